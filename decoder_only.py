"""decoder_only.py - a GPT-style transformer: causal attention, trained to predict the next token.

What it is. One stack of layers in which every position attends to itself and to the positions before it, never to those
after it. The model estimates one thing: the probability of the next token given all tokens so far. Generation repeats
this: choose a token, append it, predict again. Translation is generation too, with the source as the beginning of the
text: the prompt `<SOS> 3 4 2 <SEP>` is continued with `three hundred forty two <EOS>`.

    targets       3      4      2    <SEP>  three  ...      each position predicts the token to its right,
                  ^      ^      ^      ^      ^             all of them in parallel during training
              +-----------------------------------+
              |  layer NUM_LAYERS                 |         attention mask (# may attend, . may not):
              |  ...                              |
              |  layer 1:                         |               <SOS> 3 4 2 <SEP>
              |    x = x + attention(norm(x))     |         <SOS>   #   . . .   .
              |    x = x + feed_forward(norm(x))  |         3       #   # . .   .
              +-----------------------------------+         4       #   # # .   .
                  ^      ^      ^      ^      ^             2       #   # # #   .
    ids         <SOS>    3      4      2    <SEP>  ...      <SEP>   #   # # #   #

What it is for: generating text, and every task that can be written as a prompt and its continuation.
What it is not for: labeling a token that depends on later ones. The 3 of 3 4 2 stands for three hundred only because
two more digits follow, and at the 3 this model has not read them. The limit comes from the causal mask, not from the
model's size: compare_architectures.py computes it and measures it.

What you will see when you run it (about a minute on two CPU cores): training, with the loss falling from that of
uniform guessing to the entropy of the data; the exact-match accuracy on held-out numbers; the same prompts continued
with several decoding strategies; and the time that the KV cache saves.

    python decoder_only.py               train, test, show, and save checkpoints/decoder_only.pt
    python decoder_only.py 342 90210     name these numbers with the saved model (trains first if there is none)

How to read it. From the top: attention, the layer, the model, training, generation. A first reading may stop at
BUILDING A MODEL; what follows is validation, checkpoints and demonstrations.

Papers: Radford et al. 2018, 2019 (GPT, GPT-2); Vaswani et al. 2017, "Attention Is All You Need" (the parts).
Simplified here: positions are sinusoidal, where GPT learns a vector per position; embeddings are multiplied by sqrt(C),
as in the 2017 paper but not in GPT; weights start from Xavier initialization, where GPT-2 draws them with standard
deviation 0.02 and shrinks the projections into the residual stream by 1/sqrt(2 * NUM_LAYERS); GELU is exact, where
GPT-2 approximates it with tanh; and a token is a whole word or digit, where GPT uses subwords.

Letters used for shapes, here and in the other two files:
B batch, T positions (S those attended to), C = D_MODEL, H heads, d_k = C / H per head, V vocabulary.
"""

import math
import os
import pickle
import shutil
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import toy_dataset
from toy_dataset import EOS_ID, IGNORE, MAX_WORDS, PAD_ID, SEP_ID, SOS_ID, VOCABULARY, InputError
from toy_dataset import make_padding_mask, number_to_words, parse_number, run_script, to_ids, to_tokens
from toy_dataset import words_to_number

# ======================================================================================================
# CONSTANTS: change one, run again
# ======================================================================================================

# --- model ---
D_MODEL = 128         # width: the size of a token's vector. Try 32 (too narrow?), 256 (slower; better?)
NUM_LAYERS = 2        # transformer layers. Try 1 (what can it no longer do?), 4
NUM_HEADS = 4         # attention heads, each D_MODEL / NUM_HEADS wide. Try 1, 8
D_FF = 512            # inner width of the feed-forward network; 4 * D_MODEL is customary. Try 128, 1024
DROPOUT = 0.0         # fraction of activations zeroed in training, against overfitting. Try 0.1: does it help here?
MAX_LENGTH = 64       # longest sequence, prompt and answer together. Try 16 (too short: see the error), 1024

# --- training ---
BATCH_SIZE = 64       # sequences per step. Try 32 (more, noisier steps), 256 (fewer, smoother)
NUM_EPOCHS = 10       # passes over the training numbers. Try 1, 3, 20
LEARNING_RATE = 2e-3  # the peak. Try 2e-4 (slow), 2e-2 (unstable), 10 (diverges: see the error)
FINAL_LEARNING_RATE_RATIO = 0.01  # final learning rate / peak. Try 1.0: no decay
WARMUP_STEPS = 200    # steps from near zero to the peak, at most a fifth of the run. Try 0 (a rough start), 20
WEIGHT_DECAY = 0.1    # shrinks the weight matrices toward zero. Try 0, 1.0
GRAD_CLIP = 1.0       # maximum gradient norm; larger gradients are scaled down to it. Try 0.1, 100
LOSS_ON_PROMPT = True # loss on the digits too? Try False: it still translates, but cannot generate numbers
SEED = 0              # initial weights, order of batches, sampling. Try 1: how much is seed noise?

# --- generation ---
MAX_NEW_TOKENS = 24   # limit if <EOS> is never generated. Try 3: cut-off names
TEMPERATURE = 0.0     # 0 is greedy; 1 samples from the model's distribution. Try 0.7, 1.5
TOP_K = None          # sample from the k most likely tokens only. Try 5 (with TEMPERATURE 1)
TOP_P = None          # sample from the smallest set with this total probability. Try 0.9 (with TEMPERATURE 1)
REPETITION_PENALTY = 1.0  # above 1, generated tokens become less likely. Try 2: it breaks names that repeat words
EXAMPLES = [0, 7, 42, 100, 342, 1010, 12345, 90210, 600006, 999999]  # numbers to show. Try your own
PROGRESS_EXAMPLE = 600006  # the number answered at each evaluation during training

CHECKPOINT = Path(__file__).parent / "checkpoints" / "decoder_only.pt"

# ======================================================================================================
# THE MODEL, bottom up
# ======================================================================================================


class PositionalEncoding(nn.Module):
    """A fixed, distinct vector of sines and cosines for each position (Vaswani et al. 2017, section 3.5).

        PE(pos, 2i)   = sin(pos / 10000^(2i / C))
        PE(pos, 2i+1) = cos(pos / 10000^(2i / C))

    Without it, attention ignores order: permuting the input permutes the output, so 12 and 21 look the same.
    (A causal mask gives away some of the order, but too little to name numbers well.) Each pair (2i, 2i+1) is a hand of
    a clock; the first turns once in 6 positions, the last once in tens of thousands. A step of k positions turns each
    hand by an angle that depends only on k, so attention can learn "k to the left" once for all positions.
    """

    def __init__(self, d_model: int, max_length: int):
        super().__init__()
        positions = torch.arange(max_length).unsqueeze(1)                               # (max_length, 1)
        frequencies = 10000.0 ** (-torch.arange(0, d_model, 2) / d_model)               # (C/2)
        angles = positions * frequencies                                                # (max_length, C/2)
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(start_dim=1)  # (max_length, C): sin, cos, ...
        # A buffer moves with the model to the GPU but is not trained. It follows from a formula, so it is not saved.
        self.register_buffer("table", table, persistent=False)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """Integer positions of any shape (...) -> their encodings (..., C)."""
        return self.table[positions]


def scaled_dot_product_attention(query, key, value, mask=None, dropout=None):
    """Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V      (Vaswani et al. 2017, equation 1)

    Each position is projected to three vectors: a query (what it looks for), a key (what it is matched by) and a value
    (what it passes on). The score of a query and a key is their dot product, scaled. Softmax turns the scores of one
    query into weights that sum to 1, and the output is the weighted average of the values.

    Shapes: query (..., T, d_k), key and value (..., S, d_k), mask boolean, broadcastable to (..., T, S),
    True = may attend. Returns (output (..., T, d_k), weights (..., T, S)). Time is T * S * d_k and memory T * S per
    head: doubling the length quadruples both. F.scaled_dot_product_attention computes the same output in one fused
    kernel, which is faster on a GPU but does not return the weights; a test compares the two.

    Three tokens, two dimensions, to work through by hand. The factor sqrt(2) cancels the scaling, and ln 2 turns the
    exponentials of softmax into powers of two: the first query's scores are ln 2 * (1, 0, 1), their exponentials
    (2, 1, 2), the weights (2/5, 1/5, 2/5), and the output is 0.4 * (10, 0) + 0.2 * (0, 10) + 0.4 * (5, 5) = (6, 4).

    >>> key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    >>> query = math.sqrt(2) * math.log(2) * key
    >>> value = torch.tensor([[10.0, 0.0], [0.0, 10.0], [5.0, 5.0]])
    >>> output, weights = scaled_dot_product_attention(query, key, value)
    >>> weights
    tensor([[0.4000, 0.2000, 0.4000],
            [0.2000, 0.4000, 0.4000],
            [0.2500, 0.2500, 0.5000]])
    >>> output.round(decimals=3)
    tensor([[6., 4.],
            [4., 6.],
            [5., 5.]])

    With a causal mask the first token attends only to itself, the second to itself and the first:

    >>> causal = torch.tensor([[True, False, False], [True, True, False], [True, True, True]])
    >>> scaled_dot_product_attention(query, key, value, causal)[1]
    tensor([[1.0000, 0.0000, 0.0000],
            [0.3333, 0.6667, 0.0000],
            [0.2500, 0.2500, 0.5000]])
    """
    # scores = Q K^T / sqrt(d_k). The sum of d_k independent products of variance 1 has standard deviation
    # sqrt(d_k): without the division, softmax would put nearly all weight on one position, and gradients would vanish.
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))                  # (..., T, S)
    if mask is not None:
        # The dtype's most negative number: its exponential is exactly 0. Not -1e9, which overflows float16; not -inf,
        # which turns a row with nothing to attend to into NaN (here such a row becomes a harmless uniform average).
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)                                                    # (..., T, S), rows sum to 1
    # Dropout here cuts random connections between positions, so that no output relies on attending to one position.
    mixing = weights if dropout is None else dropout(weights)
    return mixing @ value, weights                                                      # (..., T, d_k), (..., T, S)


class KVCache:
    """The keys and values that one attention layer has already computed: (B, H, S, d_k) each.

    Under a causal mask a position never depends on later tokens, so its key and value stay the same as the text grows.
    With the cache, a new token costs its own projections and one row of attention scores; without it, every position is
    computed again for every token. The price is memory: 2 * B * S * C numbers per attention layer that has a cache.
    """

    def __init__(self):
        self.key = self.value = None

    def __len__(self):
        return 0 if self.key is None else self.key.size(2)

    def append(self, key, value):
        """Add the new positions' keys and values (B, H, T, d_k); returns those of all positions (B, H, S, d_k)."""
        if self.key is not None:
            key, value = torch.cat([self.key, key], dim=2), torch.cat([self.value, value], dim=2)
        self.key, self.value = key, value
        return key, value


class MultiHeadAttention(nn.Module):
    """H attention heads in parallel, each on its own d_k-wide projection of the input (section 3.2.2).

        MultiHead(x) = Concat(head_1, ..., head_H) W_O,   head_i = Attention(x W_Q_i, x W_K_i, x W_V_i)

    One head outputs one weighted average. Several heads can attend to different positions at once: the digit that is
    to be named, the previous word, the end of the digits. All heads together take as many multiplications as one head
    of full width would; what grows is the memory, with H attention matrices (T, S) in place of one.
    """

    def __init__(self, d_model: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(d_model, d_model)   # W_Q of all heads, side by side: one large matrix product
        self.key = nn.Linear(d_model, d_model)     # W_K
        self.value = nn.Linear(d_model, d_model)   # W_V
        self.output = nn.Linear(d_model, d_model)  # W_O mixes the outputs of the heads
        self.dropout = nn.Dropout(dropout)

    def split_heads(self, x):
        """(B, T, C) -> (B, H, T, d_k): C is cut into H pieces, and the heads become a batch dimension."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x, mask, cache=None, attention_maps=None):
        """x (B, T, C) -> (B, T, C). mask: boolean, broadcastable to (B, H, T, S), True = may attend.

        cache: a KVCache of the earlier positions; x's keys and values are appended to it.
        attention_maps: a list to which this layer's weights (B, H, T, S) are appended, for pictures.
        """
        query = self.split_heads(self.query(x))                                         # (B, H, T, d_k)
        key, value = self.split_heads(self.key(x)), self.split_heads(self.value(x))     # (B, H, T, d_k)
        if cache is not None:
            key, value = cache.append(key, value)                                       # (B, H, S, d_k)
        heads, weights = scaled_dot_product_attention(query, key, value, mask, self.dropout)
        if attention_maps is not None:
            attention_maps.append(weights.detach())
        return self.output(heads.transpose(1, 2).flatten(start_dim=2))                  # (B, T, C)


class FeedForward(nn.Module):
    """FFN(x) = GELU(x W_1 + b_1) W_2 + b_2, at each position separately (section 3.3; GELU: Hendrycks & Gimpel 2016).

    Attention moves information between positions; this network processes what each position has gathered. Without the
    GELU, W_1 and W_2 would collapse into a single linear map. With D_FF = 4 * D_MODEL it holds two thirds of a layer's
    parameters, or half where the layer also has cross-attention.
    """

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.expand = nn.Linear(d_model, d_ff)
        self.contract = nn.Linear(d_ff, d_model)

    def forward(self, x):
        return self.contract(F.gelu(self.expand(x)))                                    # (B, T, D_FF) -> (B, T, C)


class DecoderLayer(nn.Module):
    """Attention across positions, then a feed-forward network at each, both with residual connections.

    The sums form the residual stream: an identity path from the embedding to the output, along which gradients flow
    back undiminished. Normalizing inside the branch ("pre-norm", GPT-2) leaves that path free; the 2017 paper
    normalized after the sum ("post-norm"), which needs careful warmup, especially in deep stacks (Xiong et al. 2020).

    The norm is LayerNorm (Ba et al. 2016): it shifts and scales each position's vector to mean 0 and variance 1, then
    applies a learned scale and shift. (1, 2, 6) has mean 3 and variance 14/3, so it becomes (-2, -1, 3) / sqrt(14/3):

    >>> F.layer_norm(torch.tensor([1.0, 2.0, 6.0]), normalized_shape=(3,))
    tensor([-0.9258, -0.4629,  1.3887])
    """

    def __init__(self, d_model: int, num_heads: int, d_ff: int, dropout: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = MultiHeadAttention(d_model, num_heads, dropout)
        self.feed_forward_norm = nn.LayerNorm(d_model)
        self.feed_forward = FeedForward(d_model, d_ff)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask, cache=None, attention_maps=None):
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, cache, attention_maps))
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x


def make_causal_mask(T: int, S: int, device=None) -> torch.Tensor:
    """Causal mask (T, S): each of the last T of S positions may attend to itself and to all earlier ones.

    >>> make_causal_mask(3, 3).int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [1, 1, 1]], dtype=torch.int32)

    With a cache only the new positions are computed: the last rows of the full mask. A single new token is the last
    position, not the first, so it attends to all positions.

    >>> make_causal_mask(1, 3).int()
    tensor([[1, 1, 1]], dtype=torch.int32)
    """
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=S - T)


class DecoderOnlyTransformer(nn.Module):
    """ids (B, S) -> logits (B, T, V): unnormalized scores of the next token, at each of the last T positions."""

    def __init__(self, d_model: int, num_layers: int, num_heads: int, d_ff: int, dropout: float, max_length: int):
        super().__init__()
        check_sizes(d_model, num_layers, num_heads, d_ff, dropout, max_length)
        # What a checkpoint must match, under the names at the top of this file.
        self.constants = {"D_MODEL": d_model, "NUM_LAYERS": num_layers, "NUM_HEADS": num_heads, "D_FF": d_ff,
                          "MAX_LENGTH": max_length}
        self.embedding = nn.Embedding(len(VOCABULARY), d_model)
        self.positional_encoding = PositionalEncoding(d_model, max_length)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(DecoderLayer(d_model, num_heads, d_ff, dropout) for _ in range(num_layers))
        # Pre-norm layers never normalize the residual stream itself, hence the final norm.
        self.final_norm = nn.LayerNorm(d_model)
        self.apply(init_weights)

    def embed(self, ids, positions):
        """Token ids (B, T) and their positions, broadcastable to (B, T) -> (B, T, C)."""
        # Times sqrt(C) (section 3.4), so that the positional encoding, of order 1, does not dominate the embedding.
        x = self.embedding(ids) * math.sqrt(self.embedding.embedding_dim)               # (B, T, C)
        return self.dropout(x + self.positional_encoding(positions))                    # (B, T, C)

    def forward(self, ids, cache=None, attention_maps=None):
        """Next-token logits. `ids` is always the whole text so far, (B, S).

        cache: from new_cache(). Only the T positions that it does not hold yet are computed.

        Padding may be on the left (prompts) or on the right (training batches) and never changes the logits of real
        tokens. On the right the causal mask already hides it; on the left the padding mask is needed. Positions are
        counted from the first real token.
        """
        check_length(ids, self.constants["MAX_LENGTH"])
        S, start = ids.size(1), 0 if cache is None else len(cache[0])
        positions = ((ids != PAD_ID).cumsum(dim=1) - 1).clamp(min=0)                    # (B, S): 0 at the first token
        mask = make_padding_mask(ids)                                                   # (B, 1, 1, S)
        if S - start > 1:  # a single new token comes last: there is nothing later to mask
            mask = mask & make_causal_mask(S - start, S, ids.device)                    # (B, 1, T, S)
        x = self.embed(ids[:, start:], positions[:, start:])                            # (B, T, C)
        for i, layer in enumerate(self.layers):
            x = layer(x, mask, None if cache is None else cache[i], attention_maps)
        # logits = norm(x) E^T: a token's logit is the output's dot product with its embedding. Input and output share
        # one table E ("weight tying", Press & Wolf 2017): fewer parameters, and both uses train it.
        return F.linear(self.final_norm(x), self.embedding.weight)                      # (B, T, V)

    def new_cache(self) -> list[KVCache]:
        """An empty cache for one call of generate: one KVCache per layer."""
        return [KVCache() for _ in self.layers]


def init_weights(module: nn.Module) -> None:
    """Xavier initialization (Glorot & Bengio 2010), which roughly preserves the variance of activations; zero biases.

    Embeddings have standard deviation 0.5 after the factor sqrt(C). The same table is the output layer, where larger
    values would make the first predictions confident and wrong. With these the first loss is just above that of uniform
    guessing, ln V: a vector is most similar to itself, so with tied weights a new model tends to repeat its input.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5 / math.sqrt(module.embedding_dim))


# ======================================================================================================
# TRAINING
# ======================================================================================================


def create_dataloaders(batch_size=BATCH_SIZE, seed=SEED, loss_on_prompt=LOSS_ON_PROMPT) -> toy_dataset.Splits:
    """Training, validation and test batches of {"ids", "targets"}, both (B, T)."""
    make_example = partial(toy_dataset.decoder_only_example, loss_on_prompt=loss_on_prompt)
    return toy_dataset.make_dataloaders(make_example, batch_size, seed)


def predict(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's logits for a batch (B, T, V), and its targets (B, T).

    Teacher forcing: the input is the true text, not the model's own output, so one pass trains all T predictions in
    parallel. The causal mask hides each position's target, which is the next input token. The price is exposure bias
    (Ranzato et al. 2016): in training the model never continues a text that contains its own mistakes; in generation
    it may have to.
    """
    device = next(model.parameters()).device
    return model(batch["ids"].to(device)), batch["targets"].to(device)


def compute_loss(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed cross-entropy of a batch and its number of targets; loss = sum / number.

        loss = -1/N  sum over the N targets of  log p(target)            (nats);    perplexity = exp(loss)

    A perplexity of 10 is the uncertainty of a choice among 10 equally likely tokens. Sum and number are returned
    separately, so that callers that combine batches (gradient accumulation, several GPUs, a test set) can weight all
    targets equally. The mean of batch means would overweight the targets of small batches.
    """
    logits, targets = predict(model, batch)
    loss_sum = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss_sum, (targets != IGNORE).sum()


def learning_rate_at(step, num_steps, peak=LEARNING_RATE, warmup_steps=WARMUP_STEPS) -> float:
    """Linear warmup to the peak, then half a cosine down to FINAL_LEARNING_RATE_RATIO * peak at the last step.

    Warmup: Adam's first estimates of gradient sizes come from a handful of batches, and full-size steps on such
    estimates can derail training for good. Decay: large steps make fast progress, small ones settle into a minimum.
    """
    warmup_steps = min(warmup_steps, num_steps // 5)      # a short run must not be all warmup
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps           # never 0: that would waste the first step
    progress = (step + 1 - warmup_steps) / max(1, num_steps - warmup_steps)
    lowest = peak * FINAL_LEARNING_RATE_RATIO
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * progress))


def create_optimizer(model, learning_rate=LEARNING_RATE) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), with weight decay on the matrices of the Linear layers and on nothing else.

        m <- beta_1 m + (1 - beta_1) gradient           v <- beta_2 v + (1 - beta_2) gradient^2
        weight <- weight - learning_rate * (m / (sqrt(v) + epsilon) + weight_decay * weight)

    Adam follows a running mean of the gradient, divided for each weight by the root of a running mean of its square, so
    a weight moves by at most about the learning rate per step, whether its gradients are large or tiny. (Both means are
    also corrected for starting at 0.) Weight decay keeps weights small unless the loss needs them large. Norm scales,
    which belong near 1, biases and embeddings are not decayed (BERT and nanoGPT do decay embeddings).
    """
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    in_matrices = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in in_matrices]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    # A beta_2 of 0.98 (Vaswani et al. 2017, section 5.3) averages squared gradients over about 50 steps; the default
    # 0.999 averages over 1,000, too many for so short a run.
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))


def train_step(model, batch, optimizer, learning_rate) -> tuple[float, float]:
    """One step of training: a batch, its gradient, one update of all weights. Returns the loss and the gradient norm.

    Raises FloatingPointError, before the weights are changed, when the loss is not finite or far above ln V.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    loss_sum, num_targets = compute_loss(model, batch)
    loss = loss_sum / num_targets.clamp(min=1)    # a batch without targets gives 0, not 0 / 0
    optimizer.zero_grad()                         # backward adds to .grad; without this, gradients accumulate
    loss.backward()
    # Clip the norm of the whole gradient (Pascanu et al. 2013): a rare huge one is scaled down, its direction kept.
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
    # Comparisons with NaN are False. Above 10 ln V the run has diverged too, even if clipping keeps the loss finite.
    if not (loss < 10 * math.log(len(VOCABULARY)) and grad_norm.isfinite()):
        raise FloatingPointError(f"the loss is {loss.item():.4g}")
    optimizer.step()
    return loss.item(), grad_norm.item()


def train(model, loaders, num_epochs=NUM_EPOCHS, learning_rate=LEARNING_RATE, num_evaluations=10, progress=None):
    """Train the model in place, and evaluate it on the validation numbers num_evaluations times along the way.

    loaders: Splits of DataLoaders, from create_dataloaders. progress: a tqdm bar to advance; without it, train shows
    its own, and a line with an example at each evaluation (from answer, which calls generate; both come below).
    Returns the history, one dict per step: step, loss, learning_rate, grad_norm and, where there was an evaluation,
    validation_loss and exact_match. Raises FloatingPointError when training diverges.
    """
    check_training(num_epochs, learning_rate)
    optimizer = create_optimizer(model, learning_rate)
    num_steps = num_epochs * len(loaders.train)
    evaluation_steps = {num_steps * i // num_evaluations for i in range(1, num_evaluations + 1)}
    bar = progress if progress is not None else tqdm(total=num_steps, desc="training", ascii=True, ncols=95,
                                                     mininterval=0.5)
    history = []
    model.train()
    for _ in range(num_epochs):
        for batch in loaders.train:
            step = len(history) + 1
            rate = learning_rate_at(step - 1, num_steps, learning_rate)
            try:
                loss, grad_norm = train_step(model, batch, optimizer, rate)
            except FloatingPointError as error:
                raise FloatingPointError(
                    f"Training diverged: {error} at step {step}. Lower LEARNING_RATE = {learning_rate} or raise "
                    f"WARMUP_STEPS = {WARMUP_STEPS}. The last checkpoint is untouched.") from None
            history.append({"step": step, "loss": loss, "learning_rate": rate, "grad_norm": grad_norm})
            bar.update()
            if step not in evaluation_steps:
                continue
            found = evaluate(model, loaders.validation)
            history[-1] |= {"validation_loss": found["loss"], "exact_match": found["exact_match"]}
            if progress is None:
                bar.write("step {step:>5}  loss {loss:.4f}  held-out: loss {validation_loss:.4f}, exact "
                          "{exact_match:7.2%}  lr {learning_rate:.1e}  gradient {grad_norm:.2f}".format(**history[-1]))
                bar.write("            e.g. " + answer(model, [PROGRESS_EXAMPLE])[0])
    if progress is None:
        bar.close()
    return history


@torch.inference_mode()
def evaluate(model, loader) -> dict:
    """Evaluate on held-out numbers. Returns loss (nats per target), exact_match and mistakes.

    exact_match: fraction of the numbers whose every answer token is correct. One wrong word makes the name of another
    number, or no name at all, so there is no partial credit. mistakes: the indices of all others, in loader order.

    Each word is predicted given the true words before it. For greedy decoding that makes no difference: up to its first
    mistake the prefix is the same, and that mistake counts here too.
    """
    was_training = model.training
    model.eval()
    loss_sum, num_targets, right = 0.0, 0, []
    for batch in loader:
        logits, targets = predict(model, batch)
        loss_sum += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        num_targets += (targets != IGNORE).sum().item()
        in_answer = (batch["ids"].to(targets.device) == SEP_ID).cumsum(dim=1) > 0       # (B, T): not in the prompt
        hit = (logits.argmax(dim=-1) == targets) | (targets == IGNORE) | ~in_answer     # (B, T)
        right += hit.all(dim=1).tolist()
    model.train(was_training)
    return {"loss": loss_sum / max(1, num_targets), "exact_match": sum(right) / len(right),
            "mistakes": [i for i, ok in enumerate(right) if not ok]}


# ======================================================================================================
# GENERATION
# ======================================================================================================
# A decoding strategy picks the next token from the vocabulary. Each filter below maps logits (B, V) to logits (B, V);
# excluded tokens get -inf, and softmax over the rest gives the distribution to sample from.


def scale_by_temperature(logits, temperature):
    """softmax(logits / temperature): below 1 sharpens the distribution, above 1 flattens it."""
    return logits / temperature


def keep_top_k(logits, k):
    """Keep the k most likely tokens (Fan et al. 2018). If the model is confident, k is often too many; if not, too few.

    >>> keep_top_k(torch.tensor([[3.0, 1.0, 2.0, 2.0]]), k=2)
    tensor([[3., -inf, 2., -inf]])
    """
    kept = logits.topk(min(k, logits.size(-1)), dim=-1).indices  # by index, so that ties do not let in more than k
    return torch.full_like(logits, -math.inf).scatter(-1, kept, logits.gather(-1, kept))


def keep_top_p(logits, p):
    """Keep the smallest set of most likely tokens with total probability p or more (Holtzman et al. 2020, "nucleus").

    The set is small when the model is confident, large when it is not. The token that crosses p belongs to it.

    >>> keep_top_p(torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log(), p=0.7).softmax(-1)
    tensor([[0.6250, 0.3750, 0.0000, 0.0000]])
    """
    if p == 1:
        return logits  # keep all; the rule below could drop one by rounding
    descending, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = descending.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities        # total probability of all more likely tokens
    descending = descending.masked_fill(before >= p, -math.inf)  # they reach p without this one
    return torch.empty_like(logits).scatter(-1, order, descending)


def penalize_repetition(logits, written, penalty):
    """Make generated tokens less likely (Keskar et al. 2019, CTRL, section 4.1). written: (B, T) ids.

    Positive logits are divided by the penalty and negative ones multiplied, so both move down. (The paper divides all
    of them, which makes tokens with negative logits more likely; multiplying those is the fix in common use.) Meant
    for models that get stuck in loops. In a language with "two hundred two" it can only hurt: try it.
    """
    if not penalty > 0:
        raise InputError(f"repetition_penalty {penalty} must be positive: 1 disables it; try 1.2.")
    if penalty == 1:
        return logits
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, written, True)
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def choose_tokens(logits, temperature, top_k, top_p, generator):
    """One token per row: logits (B, V) -> ids (B). Temperature 0 is greedy: always the most likely token."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = scale_by_temperature(logits, temperature)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator).squeeze(1)


@torch.inference_mode()
def generate(model, prompts: list[list[int]], max_new_tokens=MAX_NEW_TOKENS, temperature=TEMPERATURE, top_k=TOP_K,
             top_p=TOP_P, repetition_penalty=REPETITION_PENALTY, use_cache=True, generator=None) -> torch.Tensor:
    """Continue each prompt (a list of ids) until <EOS> or the limit. Returns only the new ids, (B, T_new).

    Prompts may differ in length: short ones are padded on the LEFT, so that all rows end at the same column. After its
    <EOS> a row holds only <PAD>. generator: a torch.Generator to sample from, in place of the global one.
    """
    check_generation(temperature, top_k, top_p, max_new_tokens)
    if not prompts or not all(prompts):
        raise InputError("generate needs at least one prompt, and each prompt at least one token, such as <SOS>.")
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    ids = torch.tensor([[PAD_ID] * (longest - len(p)) + p for p in prompts], device=device)  # (B, longest)
    check_length(ids, model.constants["MAX_LENGTH"])
    cache = model.new_cache() if use_cache else None
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    # + 1: the last generated token is never fed back into the model, so it needs no position.
    for _ in range(min(max_new_tokens, model.constants["MAX_LENGTH"] + 1 - longest)):
        logits = model(ids, cache)[:, -1].float()          # (B, V), in float32 whatever the model computes in
        logits[:, PAD_ID] = -math.inf                      # never generate padding
        logits = penalize_repetition(logits, ids[:, longest:], repetition_penalty)
        new = choose_tokens(logits, temperature, top_k, top_p, generator)    # (B)
        new = new.masked_fill(done, PAD_ID)
        ids = torch.cat([ids, new[:, None]], dim=1)
        done |= new == EOS_ID
        if done.all():
            break
    model.train(was_training)
    return ids[:, longest:]


def make_prompt(number: int) -> list[int]:
    """The prompt for naming a number: <SOS> 3 4 2 <SEP>."""
    return to_ids(["<SOS>", *str(number), "<SEP>"])


def to_words(ids: torch.Tensor) -> str:
    """One row of generated ids as text, up to <EOS>."""
    tokens = to_tokens(ids.tolist())
    return " ".join(tokens[: tokens.index("<EOS>")] if "<EOS>" in tokens else tokens)


def answer(model, numbers: list[int]) -> list[str]:
    """The model's greedy answer for each number; wrong ones are marked, with the correct answer."""
    lines = []
    for number, ids in zip(numbers, generate(model, [make_prompt(n) for n in numbers], temperature=0.0)):
        said, truth = to_words(ids), " ".join(number_to_words(number))
        lines.append(f"{number} -> {said}" + ("" if said == truth else f"\n    WRONG: {truth}"))
    return lines


# ======================================================================================================
# BUILDING A MODEL, AND VALIDATING ITS SETTINGS
# ======================================================================================================


def get_device() -> torch.device:
    """An NVIDIA GPU (cuda) if there is one, otherwise an Apple GPU (mps), otherwise the CPU, which is enough."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def build_model(d_model=D_MODEL, num_layers=NUM_LAYERS, num_heads=NUM_HEADS, d_ff=D_FF, dropout=DROPOUT,
                max_length=MAX_LENGTH):
    """A new model with random weights, on get_device() (call torch.manual_seed first for reproducibility)."""
    return DecoderOnlyTransformer(d_model, num_layers, num_heads, d_ff, dropout, max_length).to(get_device())


def check_constant(name, value, kind, fits, wanted) -> None:
    """Raise InputError, in one sentence, for a value of the wrong type or one for which fits(value) is false.

    kind: int, or (int, float). The value is shown as Python writes it, to tell '128' from 128.
    """
    if not isinstance(value, kind) or not fits(value):
        raise InputError(f"{name} = {value!r} must be {wanted}.")


def check_sizes(d_model, num_layers, num_heads, d_ff, dropout, max_length) -> None:
    """Validate the model's sizes; errors suggest valid ones. Raises InputError."""
    for name, size in [("D_MODEL", d_model), ("NUM_LAYERS", num_layers), ("NUM_HEADS", num_heads), ("D_FF", d_ff),
                       ("MAX_LENGTH", max_length)]:
        check_constant(name, size, int, lambda n: n >= 1, "a whole number, at least 1")
    if d_model % 2:
        works = math.lcm(2, num_heads) * math.ceil(d_model / math.lcm(2, num_heads))
        raise InputError(f"D_MODEL = {d_model} must be even, since sines and cosines come in pairs: {works} works.")
    if d_model % num_heads:
        divisors = ", ".join(str(n) for n in range(1, 17) if d_model % n == 0)
        raise InputError(f"D_MODEL = {d_model} is not divisible by NUM_HEADS = {num_heads}: with this width, "
                         f"NUM_HEADS = {divisors} work; with this number of heads, D_MODEL = {32 * num_heads}.")
    check_constant("DROPOUT", dropout, (int, float), lambda p: 0 <= p < 1, "a number from 0 to below 1: 0.1 works")


def check_length(ids: torch.Tensor, max_length: int) -> None:
    """Raise InputError for a batch (B, T) with more positions than there are positional encodings."""
    if ids.size(1) > max_length:
        raise InputError(f"A sequence of {ids.size(1)} tokens is longer than MAX_LENGTH = {max_length}: "
                         f"set MAX_LENGTH to at least {ids.size(1)}, and train again.")


def check_training(num_epochs, learning_rate) -> None:
    """Validate the training constants. Raises InputError."""
    for name, value in [("NUM_EPOCHS", num_epochs), ("BATCH_SIZE", BATCH_SIZE)]:
        check_constant(name, value, int, lambda n: n >= 1, "a whole number, at least 1")
    check_constant("WARMUP_STEPS", WARMUP_STEPS, int, lambda n: n >= 0, "a whole number, at least 0")
    check_constant("SEED", SEED, int, lambda n: 0 <= n < 2**63, "a whole number, at least 0 and below 2**63")
    for name, value, works in [("LEARNING_RATE", learning_rate, 2e-3), ("GRAD_CLIP", GRAD_CLIP, 1.0)]:
        check_constant(name, value, (int, float), lambda x: x > 0, f"a number above 0: {works} works")
    check_constant("WEIGHT_DECAY", WEIGHT_DECAY, (int, float), lambda x: x >= 0, "a number, at least 0: 0.1 works")
    check_constant("FINAL_LEARNING_RATE_RATIO", FINAL_LEARNING_RATE_RATIO, (int, float), lambda x: 0 <= x <= 1,
                   "a number from 0 to 1: 0.01 works")


def check_generation(temperature, top_k, top_p, max_new_tokens) -> None:
    """Validate the generation settings. Raises InputError."""
    check_constant("TEMPERATURE", temperature, (int, float), lambda x: x >= 0,
                   "a number, 0 (greedy) or above: 0.7 works")
    if top_k is not None:
        check_constant("TOP_K", top_k, int, lambda k: k >= 1, "a whole number, at least 1, or None for all tokens")
    if top_p is not None:
        check_constant("TOP_P", top_p, (int, float), lambda p: 0 < p <= 1,
                       "a number above 0 and at most 1, or None for all tokens")
    check_constant("MAX_NEW_TOKENS", max_new_tokens, int, lambda n: n >= 1, "a whole number, at least 1")


def check_constants() -> None:
    """Validate all constants before training starts, not after it. Raises InputError, or OSError."""
    check_writable(CHECKPOINT)
    check_training(NUM_EPOCHS, LEARNING_RATE)
    check_generation(TEMPERATURE, TOP_K, TOP_P, MAX_NEW_TOKENS)
    check_constant("REPETITION_PENALTY", REPETITION_PENALTY, (int, float), lambda x: x > 0,
                   "a number above 0: 1 changes nothing, 1.2 works")
    check_constant("EXAMPLES", EXAMPLES, list, len, "a list of at least one number")
    for number in [*EXAMPLES, PROGRESS_EXAMPLE]:
        parse_number(str(number))


# ======================================================================================================
# CHECKPOINTS
# ======================================================================================================


def all_constants(model) -> dict:
    """What a checkpoint depends on: the model's sizes, the language, and the training numbers."""
    data = {name: getattr(toy_dataset, name) for name in ("MAX_DIGITS", "NUM_TRAIN", "SEED")}
    return model.constants | {f"toy_dataset.{name}": value for name, value in data.items()}


def check_writable(path: Path) -> None:
    """Create the folder of path. Raises OSError, naming the folder, if nothing can be written there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent} is not writable: change its permissions, or CHECKPOINT in this file.")


def save(model, path=CHECKPOINT) -> None:
    """Write weights and constants to path. An existing file is kept as *.old.

    Atomic: the file is written under another name and then renamed, which happens completely or not at all. Whenever
    the process is killed, path holds a complete checkpoint, the old or the new, or none if there was none.
    """
    path = Path(path)
    check_writable(path)
    if path.exists():
        shutil.copy2(path, path.with_name(path.name + ".old"))
    temporary = path.with_name(path.name + ".tmp")
    torch.save({"architecture": type(model).__name__, "constants": all_constants(model), "weights": model.state_dict()},
               temporary)
    os.replace(temporary, path)


def load(path=CHECKPOINT, model=None):
    """The model saved at path, in evaluation mode. model: what to load into (build_model() unless given).

    Raises InputError if it is not a checkpoint of this model with these constants, FileNotFoundError if it is missing.
    """
    model = build_model() if model is None else model
    remedy = "To train a new one, run this file without arguments; the old one is kept beside it, as *.old."
    try:
        # Unpickling can execute arbitrary code; weights_only allows only tensors and plain values.
        checkpoint = dict(torch.load(path, map_location="cpu", weights_only=True))
        architecture, constants, weights = (checkpoint[key] for key in ("architecture", "constants", "weights"))
    except (FileNotFoundError, PermissionError):
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, TypeError, ValueError):
        raise InputError(f"{path} is damaged, or not a checkpoint of this repository. {remedy}") from None
    if architecture != type(model).__name__:
        raise InputError(f"{path} holds a {architecture}, not a {type(model).__name__}. {remedy}")
    for name, today in all_constants(model).items():
        if constants.get(name) != today:
            raise InputError(f"{path} was saved with {name} = {constants.get(name)}, but now it is {today}. Change it "
                             f"back, or: {remedy}")
    model.load_state_dict(weights)
    return model.eval()


# ======================================================================================================
# RUNNING THIS FILE
# ======================================================================================================


def parameter_formula(model) -> tuple[str, int]:
    """The expected number of parameters: as a formula, and its value."""
    V, C, F, L = len(VOCABULARY), *(model.constants[name] for name in ("D_MODEL", "D_FF", "NUM_LAYERS"))
    formula = "V*C + L*(4*(C*C + C) + (C*F + F) + (F*C + C) + 4*C) + 2*C"
    return formula, V * C + L * (4 * (C * C + C) + (C * F + F) + (F * C + C) + 4 * C) + 2 * C


@torch.inference_mode()
def print_configuration(model, loaders) -> None:
    """What is about to be trained, and which losses to expect, before the first step."""
    print(f"{type(model).__name__} on {next(model.parameters()).device}:\n  "
          + ", ".join(f"{name} {value}" for name, value in model.constants.items()))
    count = sum(parameter.numel() for parameter in model.parameters())
    formula, expected = parameter_formula(model)
    print(f"Parameters: {count:,}, expected {expected:,}\n  = {formula}")
    sizes = [f"{len(loader.dataset):,}" for loader in loaders]
    print(f"Data: {sizes[0]} training, {sizes[1]} validation and {sizes[2]} test numbers, disjoint")
    batch = next(iter(loaders.validation))
    loss_sum, num_targets = compute_loss(model, batch)
    inputs = batch["target" if "target" in batch else "ids"]                            # (B, T)
    repeated = (predict(model, batch)[0].argmax(dim=-1).cpu() == inputs)[inputs != PAD_ID].float().mean()
    print(f"Loss: {math.log(len(VOCABULARY)):.3f} for uniform guessing (ln V)\n"
          f"      {loss_sum / num_targets:.3f} for the untrained model; {repeated:.0%} of its predictions repeat their "
          f"input,\n            since input and output share one embedding table\n"
          f"      {describe_floor(loaders.validation.dataset)}\n")


def describe_floor(dataset) -> str:
    """The loss of an ideal model on these numbers, as text.

    The name follows from the digits and costs an ideal model nothing. The digits are random: all that can be learned is
    how the training numbers were drawn. A number of n digits then has the probability
    (share of n digits in the training numbers) / (how many numbers of n digits there are), and costs -log of that.
    Held-out numbers have another mix of lengths, so this is what to expect of an ideal model, not a strict bound.
    """
    if not LOSS_ON_PROMPT:
        return "0 for an ideal model, as digits determine names"
    lengths = [len(str(number)) for number in toy_dataset.make_splits().train]
    share = {n: lengths.count(n) / len(lengths) / (9 * 10 ** (n - 1) if n > 1 else 10) for n in set(lengths)}
    nats = sum(-math.log(share[len(str(number))]) for number in dataset.numbers)
    num_targets = sum(target != IGNORE for example in dataset.examples for target in example["targets"])
    return f"{nats / num_targets:.3f} for an ideal model"


def read_text(ids: torch.Tensor) -> int | None:
    """The number, if one row of generated ids is valid (digits, <SEP>, their name, <EOS>); else None."""
    digits, _, words = to_words(ids).partition(" <SEP> ")
    try:
        number = parse_number(digits.replace(" ", ""))
        return number if EOS_ID in ids and words_to_number(words.split()) == number else None
    except InputError:
        return None


def show_strategies(model) -> None:
    """Each decoding strategy on the same prompts: 500 held-out numbers to name, and 500 unconditional samples."""
    strategies = {
        "greedy": dict(temperature=0.0),
        "temperature 0.7": dict(temperature=0.7),
        "temperature 1.0": dict(temperature=1.0),
        "temperature 1.5": dict(temperature=1.5),
        "top-k 5": dict(temperature=1.0, top_k=5),
        "top-p 0.9": dict(temperature=1.0, top_p=0.9),
        "repetition penalty 2": dict(temperature=0.0, repetition_penalty=2.0),
        "your constants": {},  # TEMPERATURE, TOP_K, TOP_P and REPETITION_PENALTY as set at the top
    }
    held_out = toy_dataset.make_splits().test[:500]
    samples = []
    print("\nDECODING STRATEGIES. exact match: 500 held-out numbers to name, prompted with <SOS> digits <SEP>.\n"
          "500 unconditional samples, prompted with <SOS> alone: distinct, the fraction of distinct texts;\n"
          f"valid, the fraction whose words name their digits.\n\n  {'':22}{'exact match':>12}{'distinct':>10}"
          f"{'valid':>8}{'tokens/s':>10}")
    for name, settings in strategies.items():
        generator = torch.Generator(next(model.parameters()).device).manual_seed(SEED)
        named = generate(model, [make_prompt(number) for number in held_out], generator=generator, **settings)
        right = sum(to_words(ids) == " ".join(number_to_words(n)) for n, ids in zip(held_out, named))
        start = time.perf_counter()
        free = generate(model, [[SOS_ID]] * 500, generator=generator, **settings)
        seconds = time.perf_counter() - start
        distinct = len(set(map(to_words, free)))
        valid = sum(read_text(ids) is not None for ids in free)
        print(f"  {name:22}{right / 500:12.1%}{distinct / 500:10.1%}{valid / 500:8.1%}"
              f"{(free != PAD_ID).sum().item() / seconds:10,.0f}")
        samples.append(f"  {name:22}{to_words(free[0])[:75]}")
    print("\nThe first unconditional sample of each:\n" + "\n".join(samples))


def show_cache(model) -> None:
    """KV cache: the same tokens in less time; the speedup grows with the length of the text."""
    prompts = [make_prompt(number) for number in toy_dataset.make_splits().test[:500]]
    seconds, texts = {}, {}
    for use_cache in (False, True):
        start = time.perf_counter()
        texts[use_cache] = generate(model, prompts, temperature=0.0, use_cache=use_cache)
        seconds[use_cache] = time.perf_counter() - start
    print(f"\nKV CACHE, 500 names of up to {MAX_WORDS} words: {seconds[False]:.2f} s without, {seconds[True]:.2f} s "
          f"with; identical tokens: {torch.equal(texts[False], texts[True])}.\n"
          "The longer the text, the more it saves: python compare_architectures.py prints the table.")


def train_and_test():
    """Train a model with the constants above, test it on the test numbers, and save it."""
    check_constants()
    torch.manual_seed(SEED)
    model, loaders = build_model(), create_dataloaders()
    print_configuration(model, loaders)
    train(model, loaders)
    found = evaluate(model, loaders.test)
    numbers = loaders.test.dataset.numbers
    print(f"\nTEST on {len(numbers):,} held-out numbers: {found['exact_match']:.2%} exact match, "
          f"{len(found['mistakes'])} wrong\n  (loss {found['loss']:.4f}; {describe_floor(loaders.test.dataset)})")
    if found["mistakes"]:
        print("  " + "\n  ".join(answer(model, [numbers[i] for i in found["mistakes"][:5]])))
    save(model)
    print(f"Saved to {CHECKPOINT}")
    return model


def main(*numbers: int) -> None:
    """Without numbers: train, test, show. With numbers: name them, with the saved model if there is one."""
    model = load() if numbers and CHECKPOINT.exists() else train_and_test()
    if numbers:
        print("\n".join(answer(model, list(numbers))))
        return
    print("\nEXAMPLES, greedy\n  " + "\n  ".join(answer(model, EXAMPLES)))
    show_strategies(model)
    show_cache(model)
    print("\nNext: python decoder_only.py 342 90210, or change a constant at the top and run it again.\n"
          "Then read encoder_decoder.py: what a second sequence adds.")


if __name__ == "__main__":
    run_script(main, parse_number)
