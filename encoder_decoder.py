"""encoder_decoder.py - a T5-style transformer: reads one sequence, writes another.

What it is. Two stacks. The encoder reads the source in both directions and leaves one vector per position, the memory.
The decoder writes the target from left to right, as a GPT does, and in every layer looks across at the memory: this
cross-attention is the only road between the two. It is the transformer of the 2017 paper, made for translation.

                                              targets    three hundred forty  two   <EOS>
                                                           ^      ^      ^     ^      ^
    +-----------------------------------+     +-----------------------------------------------+
    |  encoder, NUM_LAYERS times        |     |  decoder, NUM_LAYERS times                    |
    |                                   |     |    x = x + self_attention(norm(x))    causal  |
    |    x = x + attention(norm(x))     | mem-|                                               |
    |    x = x + feed_forward(norm(x))  | ory |    x = x + cross_attention(norm(x), memory)   |
    |                                   |---->|    x = x + feed_forward(norm(x))              |
    +-----------------------------------+     +-----------------------------------------------+
         ^     ^     ^     ^                               ^      ^      ^     ^      ^
         3     4     2   <EOS>   source       target     <SOS>  three hundred forty  two

What may look at what (# yes, . no):  the encoder at everything, the decoder at its own past and at the whole source.

            3 4 2 <EOS>                   <SOS> three hundred                  3 4 2 <EOS>
    3       # # #   #           <SOS>       #     .      .         <SOS>       # # #   #
    4       # # #   #           three       #     #      .         three       # # #   #
    2       # # #   #           hundred     #     #      #         hundred     # # #   #
    <EOS>   # # #   #
          encoder                        decoder, self                      decoder, cross

What it is for: turning one sequence into another, translation, summary, speech to text; whenever there is a whole input
to be understood before, and while, the output is written. What it is not for: text without a source. It would carry
an encoder for nothing. compare_architectures.py lets it try.

What you will see when you run it (about a minute on two CPU cores): training, the share of held-out numbers that it
names without a mistake, greedy decoding, sampling and beam search on the same sources, the hypotheses of one beam, and
which digit the model looks at for which word.

    python encoder_decoder.py               train, test, show, and save checkpoints/encoder_decoder.pt
    python encoder_decoder.py 342 90210     name these numbers with the saved model (trains first if there is none)

Papers: Vaswani et al. 2017, "Attention Is All You Need"; Raffel et al. 2020 (T5); Wu et al. 2016 (beam search in use).
Simplified here: sinusoidal positions, where T5 learns relative ones; LayerNorm, where T5 has RMSNorm; no pretraining.

Letters used for shapes, here and in the other two files:
B batch, T positions (S those attended to), C = D_MODEL, H heads, d_k = C / H per head, V vocabulary.
"""

import math
import os
import pickle
import shutil
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import toy_dataset
from toy_dataset import EOS_ID, IGNORE, PAD_ID, SOS_ID, VOCABULARY, InputError
from toy_dataset import align, make_padding_mask, number_to_words, parse_number, run_script, to_ids, to_tokens

# ======================================================================================================
# CONSTANTS: change one, run again
# ======================================================================================================

# --- model ---
D_MODEL = 128         # width: how many numbers describe a token. Try 32 (too narrow?), 256 (slower; better?)
NUM_LAYERS = 2        # in the encoder, and as many in the decoder. Try 1, 4
NUM_HEADS = 4         # attention patterns side by side, each D_MODEL / NUM_HEADS wide. Try 1, 8
D_FF = 512            # inner width of the feed-forward network; 4 * D_MODEL is customary. Try 128, 1024
DROPOUT = 0.0         # share of values zeroed in training, against memorizing. Try 0.1: too few steps here to need it?
MAX_LENGTH = 64       # longest source, and longest target. Try 8 (too short: see what it says), 1024

# --- training ---
BATCH_SIZE = 64       # sequences per step. Try 32 (more, noisier steps), 256 (fewer, smoother)
NUM_EPOCHS = 8        # passes over the training numbers. Try 1, 3, 20
LEARNING_RATE = 1e-3  # the peak. Try 1e-4 (slow), 2e-2 (unstable), 10 (stopped with a sentence)
FINAL_LEARNING_RATE_RATIO = 0.01  # last learning rate / peak. Try 1.0: no decay
WARMUP_STEPS = 200    # steps from near zero to the peak. Try 0 (a rough start), 500
WEIGHT_DECAY = 0.1    # pull of the weight matrices towards zero. Try 0, 1.0
GRAD_CLIP = 1.0       # longest gradient allowed; longer ones are shortened to it. Try 0.1, 100
SEED = 0              # initial weights, order of batches, sampling. Try 1: how much of the result is luck?

# --- generation ---
MAX_NEW_TOKENS = 24   # stop here, should <EOS> never come. Try 3: cut-off names
TEMPERATURE = 0.0     # 0 always takes the likeliest token; 1 samples as the model believes. Try 0.7, 1.5
TOP_K = None          # sample among the k likeliest only. Try 5 (with TEMPERATURE 1)
TOP_P = None          # sample among the fewest that together have this probability. Try 0.9 (with TEMPERATURE 1)
BEAM_WIDTH = 5        # texts kept in play by beam search. Try 1 (greedy), 10
LENGTH_PENALTY = 1.0  # score = log_prob / length**this: 0 favours short texts, above 1 long ones. Try 0, 2
EXAMPLES = [0, 7, 42, 100, 342, 1010, 12345, 90210, 600006, 999999]  # numbers to show. Try your own
PROGRESS_EXAMPLE = 600006  # the number answered at each evaluation during training
DETAILED_EXAMPLE = 90210  # the number whose beam search and cross-attention are shown

CHECKPOINT = Path(__file__).parent / "checkpoints" / "encoder_decoder.pt"

# ======================================================================================================
# THE MODEL, bottom up
# ======================================================================================================


class PositionalEncoding(nn.Module):
    """Tells a position from another: a fixed vector of sines and cosines for each (Vaswani et al. 2017, section 3.5).

        PE(pos, 2i)   = sin(pos / 10000^(2i / C))
        PE(pos, 2i+1) = cos(pos / 10000^(2i / C))

    Attention by itself is blind to order: it sees a bag of tokens, in which 12 and 21 are the same. Each pair
    (2i, 2i+1) is a clock hand, the first turning once in 6 positions, the last once in tens of thousands. Moving k
    positions on turns each hand by an angle that depends on k alone, wherever one starts: so "k to the left" looks
    alike everywhere, and attention can learn it once for all positions.
    """

    def __init__(self, d_model: int, max_length: int):
        super().__init__()
        positions = torch.arange(max_length).unsqueeze(1)                               # (max_length, 1)
        frequencies = 10000.0 ** (-torch.arange(0, d_model, 2) / d_model)               # (C/2)
        angles = positions * frequencies                                                # (max_length, C/2)
        table = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(start_dim=1)  # (max_length, C): sin, cos, ...
        # A buffer moves with the model to the GPU but is not trained; being a formula, it need not be saved either.
        self.register_buffer("table", table, persistent=False)

    def forward(self, positions: torch.Tensor) -> torch.Tensor:
        """Integer positions of any shape (...) -> their encodings (..., C)."""
        return self.table[positions]


def scaled_dot_product_attention(query, key, value, mask=None, dropout=None):
    """Attention(Q, K, V) = softmax(Q K^T / sqrt(d_k)) V      (Vaswani et al. 2017, equation 1)

    Every position asks a question, its query. Every position also offers a key, by which it can be found, and a value,
    which it hands over; all three are learned projections of the position's vector. How well a key fits a query is
    their dot product. Softmax turns the fits into shares that sum to 1, and the answer is the values, mixed in these.

    Shapes: query (..., T, d_k), key and value (..., S, d_k), mask boolean, broadcastable to (..., T, S),
    True = may attend. Returns (output (..., T, d_k), weights (..., T, S)).

    Three tokens, two dimensions, to follow on paper. The factor sqrt(2) undoes the scale, and ln 2 turns the
    exponentials of softmax into powers of two: the first query's scores are ln 2 * (1, 0, 1), their exponentials
    (2, 1, 2), their shares (2/5, 1/5, 2/5), so its output is 0.4 * (10, 0) + 0.2 * (0, 10) + 0.4 * (5, 5) = (6, 4).

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

    With a causal mask the first token sees only itself, the second itself and the first:

    >>> causal = torch.tensor([[True, False, False], [True, True, False], [True, True, True]])
    >>> scaled_dot_product_attention(query, key, value, causal)[1]
    tensor([[1.0000, 0.0000, 0.0000],
            [0.3333, 0.6667, 0.0000],
            [0.2500, 0.2500, 0.5000]])
    """
    # scores = Q K^T / sqrt(d_k). A dot product of d_k terms of random sign and size 1 is about sqrt(d_k) large;
    # undivided, it would saturate softmax: nearly all weight on one position, and hardly any gradient passes.
    scores = query @ key.transpose(-2, -1) / math.sqrt(query.size(-1))                  # (..., T, S)
    if mask is not None:
        # The dtype's most negative number: its exponential is exactly 0. Not -1e9, which does not fit into float16;
        # not -inf, which makes a row with nothing to attend to NaN (here such a row is a harmless average).
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1)                                                    # (..., T, S), rows sum to 1
    mixing = weights if dropout is None else dropout(weights)
    return mixing @ value, weights                                                      # (..., T, d_k), (..., T, S)


class KVCache:
    """The keys and values that one attention layer has already computed: (B, H, S, d_k) each.

    A causal position never changes its mind: what it saw when it was written is all that it will ever see, so its key
    and value stay the same however long the text becomes. Keeping them means that a new token costs one position of
    work instead of all of them. The price is memory: 2 * NUM_LAYERS * B * S * C numbers.
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
    """H attentions side by side, each on its own d_k-wide projection of the input (section 3.2.2).

        MultiHead(x) = Concat(head_1, ..., head_H) W_O,   head_i = Attention(x W_Q_i, x W_K_i, x W_V_i)

    One softmax can concentrate on one thing. Several heads can look at several at once: the digit that is to be named,
    the word beside it, the end of the digits. All heads together cost what one full-width attention would.
    """

    def __init__(self, d_model: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(d_model, d_model)   # W_Q of all heads, side by side in one matrix: one large product
        self.key = nn.Linear(d_model, d_model)     # W_K
        self.value = nn.Linear(d_model, d_model)   # W_V
        self.output = nn.Linear(d_model, d_model)  # W_O mixes what the heads have found
        self.dropout = nn.Dropout(dropout)

    def split_heads(self, x):
        """(B, T, C) -> (B, H, T, d_k): C is cut into H pieces, and the heads become a batch dimension."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x, mask, memory=None, cache=None, attention_maps=None):
        """x (B, T, C) -> (B, T, C). mask: boolean, broadcastable to (B, H, T, S), True = may attend.

        memory: the encoder's output, (B, S, C), or None. Without it x attends to itself: self-attention. With it this
        is cross-attention: the questions come from the text being written, the answers from the text being read.
        cache: a KVCache. In self-attention it grows by x's keys and values. In cross-attention it is filled once and
        then only read, for the source does not change while the target is written.
        attention_maps: a list that receives this layer's weights (B, H, T, S), for pictures.
        """
        query = self.split_heads(self.query(x))                                         # (B, H, T, d_k)
        if memory is not None and cache is not None and len(cache) > 0:
            key, value = cache.key, cache.value                                         # (B, H, S, d_k)
        else:
            attended = x if memory is None else memory                                  # (B, S, C)
            key, value = self.split_heads(self.key(attended)), self.split_heads(self.value(attended))
            if cache is not None:
                key, value = cache.append(key, value)                                   # (B, H, S, d_k)
        heads, weights = scaled_dot_product_attention(query, key, value, mask, self.dropout)
        if attention_maps is not None:
            attention_maps.append(weights.detach())
        return self.output(heads.transpose(1, 2).flatten(start_dim=2))                  # (B, T, C)


class FeedForward(nn.Module):
    """FFN(x) = GELU(x W_1 + b_1) W_2 + b_2, at each position by itself (section 3.3; GELU: Hendrycks & Gimpel 2016).

    Attention moves information between positions; this is where each position works on what it has gathered. It holds
    two thirds of a layer's parameters, if D_FF = 4 * D_MODEL.
    """

    def __init__(self, d_model: int, d_ff: int):
        super().__init__()
        self.expand = nn.Linear(d_model, d_ff)
        self.contract = nn.Linear(d_ff, d_model)

    def forward(self, x):
        return self.contract(F.gelu(self.expand(x)))                                    # (B, T, D_FF) -> (B, T, C)


class EncoderLayer(nn.Module):
    """One round of communication (attention), one of thought (feed-forward), each added to what was there.

    The sums are the residual stream: a straight road from the embedding to the output, on which gradients travel back
    undamped. Normalizing inside the branch ("pre-norm", GPT-2) leaves that road clear; the 2017 paper normalized after
    the sum ("post-norm"), which trains badly when the stack is deep (Xiong et al. 2020). The norm is LayerNorm (Ba et
    al. 2016): each position's vector is brought to mean 0 and variance 1, then scaled and shifted by learned numbers.
    """

    def __init__(self, d_model: int, num_heads: int, d_ff: int, dropout: float):
        super().__init__()
        self.attention_norm = nn.LayerNorm(d_model)
        self.attention = MultiHeadAttention(d_model, num_heads, dropout)
        self.feed_forward_norm = nn.LayerNorm(d_model)
        self.feed_forward = FeedForward(d_model, d_ff)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask, attention_maps=None):
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, attention_maps=attention_maps))
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x


class DecoderLayer(nn.Module):
    """An encoder layer with one step more: look at what was written, look across at the source, think.

    The first attention is causal, the second is not: the target is still being written, the source is all there.
    """

    def __init__(self, d_model: int, num_heads: int, d_ff: int, dropout: float):
        super().__init__()
        self.self_attention_norm = nn.LayerNorm(d_model)
        self.self_attention = MultiHeadAttention(d_model, num_heads, dropout)
        self.cross_attention_norm = nn.LayerNorm(d_model)
        self.cross_attention = MultiHeadAttention(d_model, num_heads, dropout)
        self.feed_forward_norm = nn.LayerNorm(d_model)
        self.feed_forward = FeedForward(d_model, d_ff)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, mask, memory, memory_mask, cache=(None, None), self_maps=None, cross_maps=None):
        """x (B, T, C), memory (B, S, C) -> (B, T, C). cache: a KVCache for each of the two attentions."""
        x = x + self.dropout(self.self_attention(self.self_attention_norm(x), mask, None, cache[0], self_maps))
        x = x + self.dropout(
            self.cross_attention(self.cross_attention_norm(x), memory_mask, memory, cache[1], cross_maps))
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x


def make_causal_mask(T: int, S: int, device=None) -> torch.Tensor:
    """No looking ahead: the last T of S positions may each attend to themselves and to what stands before. (T, S).

    >>> make_causal_mask(3, 3).int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [1, 1, 1]], dtype=torch.int32)

    With a cache only the newest positions are computed, and their rows of the mask are the last ones. A single new
    token is the last position, not the first: it sees everything.

    >>> make_causal_mask(1, 3).int()
    tensor([[1, 1, 1]], dtype=torch.int32)
    """
    return torch.ones(T, S, dtype=torch.bool, device=device).tril(diagonal=S - T)


class EncoderDecoderTransformer(nn.Module):
    """source (B, S), target (B, T) -> logits (B, T, V): how likely each token is to come next in the target."""

    def __init__(self, d_model: int, num_layers: int, num_heads: int, d_ff: int, dropout: float, max_length: int):
        super().__init__()
        check_sizes(d_model, num_layers, num_heads, d_ff, dropout, max_length)
        # What a checkpoint must agree on to fit this model, under the names that stand at the top of the file.
        self.constants = {"D_MODEL": d_model, "NUM_LAYERS": num_layers, "NUM_HEADS": num_heads, "D_FF": d_ff,
                          "MAX_LENGTH": max_length}
        self.embedding = nn.Embedding(len(VOCABULARY), d_model)  # one table for source, target and output
        self.positional_encoding = PositionalEncoding(d_model, max_length)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList(EncoderLayer(d_model, num_heads, d_ff, dropout) for _ in range(num_layers))
        self.decoder = nn.ModuleList(DecoderLayer(d_model, num_heads, d_ff, dropout) for _ in range(num_layers))
        # Pre-norm layers add to the stream without ever normalizing it, so it needs a norm before it is read off.
        self.encoder_norm = nn.LayerNorm(d_model)
        self.decoder_norm = nn.LayerNorm(d_model)
        self.apply(init_weights)

    def embed(self, ids, positions):
        """Token ids (B, T) and their positions, broadcastable to (B, T) -> (B, T, C): what it is, and where."""
        # Times sqrt(C) (section 3.4), so that the token is heard beside its position, whose sines are of order 1.
        x = self.embedding(ids) * math.sqrt(self.embedding.embedding_dim)               # (B, T, C)
        return self.dropout(x + self.positional_encoding(positions))                    # (B, T, C)

    def encode(self, source, attention_maps=None):
        """Read: source ids (B, S) -> memory (B, S, C). Done once for a source, however long the target becomes."""
        check_length(source, self.constants["MAX_LENGTH"])
        mask = make_padding_mask(source)                                                # (B, 1, 1, S)
        x = self.embed(source, torch.arange(source.size(1), device=source.device))      # (B, S, C)
        for layer in self.encoder:
            x = layer(x, mask, attention_maps)
        return self.encoder_norm(x)

    def decode(self, target, memory, source, cache=None, self_maps=None, cross_maps=None):
        """Write: logits for what follows each position of the target. `target` is always all that is written so far.

        source: its ids, to tell real tokens of the memory from padding.
        cache: from new_cache(). It knows how many positions it has seen; only the T that are new are computed.
        """
        check_length(target, self.constants["MAX_LENGTH"])
        start = 0 if cache is None else len(cache[0][0])
        length = target.size(1)
        mask = make_padding_mask(target) & make_causal_mask(length - start, length, target.device)  # (B, 1, T, S)
        memory_mask = make_padding_mask(source)                                         # (B, 1, 1, S)
        x = self.embed(target[:, start:], torch.arange(start, length, device=target.device))  # (B, T, C)
        for i, layer in enumerate(self.decoder):
            x = layer(x, mask, memory, memory_mask, (None, None) if cache is None else cache[i], self_maps, cross_maps)
        # logits = norm(x) E^T: a token's logit is how well the output fits its embedding. Input and output share the
        # one table E ("weight tying", Press & Wolf 2017): fewer parameters, and each end learns from the other.
        return F.linear(self.decoder_norm(x), self.embedding.weight)                    # (B, T, V)

    def forward(self, source, target):
        """Read and write in one go, as in training, when the whole target is known."""
        return self.decode(target, self.encode(source), source)

    def new_cache(self) -> list[tuple[KVCache, KVCache]]:
        """An empty cache for one call of generate: for each layer one for self- and one for cross-attention."""
        return [(KVCache(), KVCache()) for _ in self.decoder]


def init_weights(module: nn.Module) -> None:
    """Random weights that let signals through at their own size: Xavier (Glorot & Bengio 2010), biases of zero.

    Embeddings start so small that the factor sqrt(C) makes them 0.5 large. They are also the output layer, where larger
    ones would make the first guesses confident and wrong; so the first loss is near ln V, blind guessing.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.5 / math.sqrt(module.embedding_dim))


# ======================================================================================================
# TRAINING
# ======================================================================================================


def create_dataloaders(batch_size=BATCH_SIZE, seed=SEED) -> toy_dataset.Splits:
    """Training, validation and test batches of {"source" (B, S), "target" (B, T), "targets" (B, T)}."""
    return toy_dataset.make_dataloaders(toy_dataset.encoder_decoder_example, batch_size, seed)


def predict(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's logits for a batch (B, T, V), and the targets that they are meant to hit (B, T).

    Teacher forcing: the decoder is shown the true target, not its own, and every position predicts its next token at
    once. The causal mask keeps each from reading its answer off its right neighbour. One pass trains T predictions.
    """
    device = next(model.parameters()).device
    return model(batch["source"].to(device), batch["target"].to(device)), batch["targets"].to(device)


def compute_loss(model, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The summed cross-entropy of a batch, and the number of targets that it is the sum of; loss = sum / number.

        loss = -1/N  sum over the N targets of  log p(target)            (nats)

    Kept apart, so that whoever adds up several batches (gradient accumulation, several GPUs, a whole test set) can
    weigh each target alike. The mean of the batches' means would count a target more where there are few.
    """
    logits, targets = predict(model, batch)
    loss_sum = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE, reduction="sum")
    return loss_sum, (targets != IGNORE).sum()


def learning_rate_at(step, num_steps, peak=LEARNING_RATE, warmup_steps=WARMUP_STEPS) -> float:
    """Linear warmup to the peak, then half a cosine down to FINAL_LEARNING_RATE_RATIO * peak at the last step.

    Warmup: Adam's first estimates of each gradient's size come from a handful of batches; full-size steps on such
    estimates can throw the weights where they never recover. Decay: large steps find the valley, small ones its floor.
    """
    warmup_steps = min(warmup_steps, num_steps // 5)      # a short run must not be all warmup
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps           # never 0: the first step would be wasted
    progress = (step + 1 - warmup_steps) / max(1, num_steps - warmup_steps)
    lowest = peak * FINAL_LEARNING_RATE_RATIO
    return lowest + (peak - lowest) * 0.5 * (1 + math.cos(math.pi * progress))


def create_optimizer(model, learning_rate=LEARNING_RATE) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), with weight decay on the matrices of the Linear layers and on nothing else.

    Decay says "no weight without need". A norm's scale belongs near 1, not 0; a bias is one number against a matrix of
    them; and a rare word's embedding would shrink at every step at which the word does not even occur.
    """
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    in_matrices = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in in_matrices]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    # A beta_2 of 0.98 (Vaswani et al. 2017, section 5.3) forgets old gradient sizes sooner than the usual 0.999, which
    # averages over a thousand steps: too slow for so short a training.
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))


def train_step(model, batch, optimizer, learning_rate) -> tuple[float, float]:
    """The heart of training: one batch, one update of all weights. Returns the loss and the gradient's norm.

        gradient <- d loss / d weights,   shortened to GRAD_CLIP if it is longer
        weights  <- weights - learning_rate * AdamW(gradient)

    Raises FloatingPointError, before the weights are touched, when the loss is not finite or far above ln V.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    loss_sum, num_targets = compute_loss(model, batch)
    loss = loss_sum / num_targets.clamp(min=1)    # a batch without targets gives 0, not 0 / 0
    optimizer.zero_grad()                         # backward adds to .grad: without this, gradients accumulate
    loss.backward()
    # Clip the norm of the whole gradient (Pascanu et al. 2013): a rare huge one keeps only its direction.
    grad_norm = nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
    # Comparisons with NaN are False. Above 10 ln V the run has diverged too, even if clipping keeps the loss finite.
    if not (loss < 10 * math.log(len(VOCABULARY)) and grad_norm.isfinite()):
        raise FloatingPointError(f"the loss is {loss.item():.4g}")
    optimizer.step()
    return loss.item(), grad_norm.item()


def train(model, loaders, num_epochs=NUM_EPOCHS, learning_rate=LEARNING_RATE, num_evaluations=10, progress=None):
    """Train the model in place, and look at the validation numbers num_evaluations times on the way.

    loaders: Splits of DataLoaders, from create_dataloaders. progress: a tqdm bar to move on; without it this shows its
    own, and a line at each evaluation. Returns the history, one dict per step: step, loss, learning_rate, grad_norm
    and, where there was an evaluation, validation_loss and exact_match. Raises FloatingPointError when the loss is no
    longer finite, or has left all reason.
    """
    check_training(num_epochs, learning_rate)
    optimizer = create_optimizer(model, learning_rate)
    num_steps = num_epochs * len(loaders.train)
    evaluation_steps = {num_steps * i // num_evaluations for i in range(1, num_evaluations + 1)}
    bar = progress
    if progress is None:
        bar = tqdm(total=num_steps, desc="training", ascii=True, ncols=95, mininterval=0.5)
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
                    f"WARMUP_STEPS = {WARMUP_STEPS}. The last checkpoint saved is untouched.") from None
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


@torch.no_grad()
def evaluate(model, loader) -> dict:
    """Test on numbers that were not trained on. Returns loss (nats per target), exact_match and mistakes.

    exact_match: share of the numbers whose whole answer is right, each word of it. A name with one wrong word is the
    name of another number, so nothing less counts. mistakes: the indices of the others, in the loader's order.

    It asks for each word given the true words before it. That is no easier than writing the answer alone: as long as
    greedy decoding makes no mistake it has the same words before it, and its first mistake is a mistake here too.
    """
    was_training = model.training
    model.eval()
    loss_sum, num_targets, right = 0.0, 0, []
    for batch in loader:
        logits, targets = predict(model, batch)
        loss_sum += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        num_targets += (targets != IGNORE).sum().item()
        hit = (logits.argmax(dim=-1) == targets) | (targets == IGNORE)                  # (B, T)
        right += hit.all(dim=1).tolist()
    model.train(was_training)
    return {"loss": loss_sum / max(1, num_targets), "exact_match": sum(right) / len(right),
            "mistakes": [i for i, ok in enumerate(right) if not ok]}


# ======================================================================================================
# GENERATION
# ======================================================================================================
# A strategy decides which of V likely tokens is written. Each is a function logits (B, V) -> logits (B, V), in which
# what it rules out has become -inf; softmax over what is left gives the probabilities to draw from.


def scale_by_temperature(logits, temperature):
    """softmax(logits / temperature): below 1 sharper (the likely gets likelier), above 1 flatter, 1 as learned."""
    return logits / temperature


def keep_top_k(logits, k):
    """Keep the k likeliest tokens (Fan et al. 2018). A fixed number: too many where one token is clear, too few where
    a hundred would do.

    >>> keep_top_k(torch.tensor([[3.0, 1.0, 2.0, 2.0]]), k=2)
    tensor([[3., -inf, 2., -inf]])
    """
    kept = logits.topk(min(k, logits.size(-1)), dim=-1).indices  # by index, so that ties don't let in more than k
    return torch.full_like(logits, -math.inf).scatter(-1, kept, logits.gather(-1, kept))


def keep_top_p(logits, p):
    """Keep the fewest likeliest tokens that together have probability p or more (Holtzman et al. 2020, "nucleus").

    Few where the model is sure, many where it is not. The token that crosses p is kept: it takes it to get there.

    >>> keep_top_p(torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log(), p=0.7).softmax(-1)
    tensor([[0.6250, 0.3750, 0.0000, 0.0000]])
    """
    if p == 1:
        return logits  # everything; by the rule below rounding might cost a token
    descending, order = logits.sort(dim=-1, descending=True, stable=True)
    probabilities = descending.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities        # the mass of all likelier tokens, this one not counted
    descending = descending.masked_fill(before >= p, -math.inf)  # they had reached p without it
    return torch.empty_like(logits).scatter(-1, order, descending)


def choose_tokens(logits, temperature, top_k, top_p, generator):
    """One token for each row: logits (B, V) -> ids (B). Temperature 0 is greedy: always the likeliest."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = scale_by_temperature(logits, temperature)
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    return torch.multinomial(logits.softmax(dim=-1), num_samples=1, generator=generator).squeeze(1)


def pad_sources(sources: list[list[int]], device) -> torch.Tensor:
    """Lists of ids -> (B, S), padded at the right. Raises InputError if there is nothing to read."""
    if not sources or not all(sources):
        raise InputError("There must be at least one source, and in each at least one token, such as <EOS>.")
    longest = max(map(len, sources))
    return torch.tensor([source + [PAD_ID] * (longest - len(source)) for source in sources], device=device)


@torch.no_grad()
def generate(model, sources: list[list[int]], max_new_tokens=MAX_NEW_TOKENS, temperature=TEMPERATURE, top_k=TOP_K,
             top_p=TOP_P, use_cache=True, generator=None) -> torch.Tensor:
    """Write a target for each source (a list of ids), until <EOS> or the limit. Returns ids (B, T_new), without <SOS>.

    Sources may differ in length. After its <EOS> a row holds only <PAD>. generator: a torch.Generator to draw from, in
    place of the global one.
    """
    check_generation(temperature, top_k, top_p, max_new_tokens)
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    source = pad_sources(sources, device)                                    # (B, S)
    memory = model.encode(source)                                            # (B, S, C), read once
    ids = torch.full((len(sources), 1), SOS_ID, device=device)               # (B, 1), the target so far
    cache = model.new_cache() if use_cache else None
    done = torch.zeros(len(sources), dtype=torch.bool, device=device)
    for _ in range(min(max_new_tokens, model.constants["MAX_LENGTH"])):
        logits = model.decode(ids, memory, source, cache)[:, -1].float()     # (B, V), for what follows the last token
        logits[:, PAD_ID] = -math.inf                                        # padding is not a word
        new = choose_tokens(logits, temperature, top_k, top_p, generator)    # (B)
        new = new.masked_fill(done, PAD_ID)
        ids = torch.cat([ids, new[:, None]], dim=1)
        done |= new == EOS_ID
        if done.all():
            break
    model.train(was_training)
    return ids[:, 1:]


@torch.no_grad()
def beam_search(model, sources: list[list[int]], beam_width=BEAM_WIDTH, length_penalty=LENGTH_PENALTY,
                max_new_tokens=MAX_NEW_TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """Search for the likeliest whole text, where greedy takes the likeliest next token and never looks back.

        score = log_prob / length**length_penalty          log_prob = sum of log p(token), length counts <EOS>

    W = beam_width open texts are kept for each source, the likeliest of those of their length. A text that writes <EOS>
    while among the best W is finished: it moves out of the beam into a pool of the W best finished ones, where no
    token is ever added to it and only a finished text with a better score can push it out. All sources are searched
    at once: B * W texts are one batch for the model.

    A source is done when no open text can still beat its best finished one, or when W finished ones are better than
    every open one is now. If neither happens before the limit, open texts compete as they stand. Width 1 is greedy.

    Returns ids (B, W, T), best first, <PAD> after <EOS>, and scores (B, W), -inf where fewer than W texts were found.
    """
    if beam_width < 1:
        raise InputError(f"beam width {beam_width} must be at least 1: 5 works.")
    if length_penalty < 0:
        raise InputError(f"length penalty {length_penalty} must not be negative: 1 works.")
    check_generation(0, None, None, max_new_tokens)
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    B, W, V = len(sources), beam_width, len(VOCABULARY)
    source = pad_sources(sources, device)                                               # (B, S)
    memory = model.encode(source).repeat_interleave(W, dim=0)                           # (B*W, S, C)
    source = source.repeat_interleave(W, dim=0)                                         # (B*W, S)
    cache = model.new_cache()
    first_row = W * torch.arange(B, device=device)[:, None]                             # (B, 1): where its W rows begin
    limit = min(max_new_tokens, model.constants["MAX_LENGTH"])

    open_ids = torch.full((B, W, 1), SOS_ID, device=device)
    open_log_probs = torch.full((B, W), -math.inf, device=device)
    open_log_probs[:, 0] = 0.0  # all W begin with the same <SOS>: only one may count, or all would stay the same
    pool_ids = torch.full((B, W, 1), SOS_ID, device=device)
    pool_scores = torch.full((B, W), -math.inf, device=device)
    done = torch.zeros(B, 1, dtype=torch.bool, device=device)
    for length in range(1, limit + 1):
        logits = model.decode(open_ids.flatten(0, 1), memory, source, cache)[:, -1].float()  # (B*W, V)
        log_probs = logits.log_softmax(dim=-1).view(B, W, V)
        log_probs[..., PAD_ID] = -math.inf                                              # padding is not a word
        # Each open text has V continuations. The best 2W of all W*V: at most W of these end in <EOS> (one for each
        # text), so at least W are left to go on with.
        candidates = (open_log_probs[..., None] + log_probs).flatten(1)                 # (B, W*V)
        log_prob, index = candidates.topk(2 * W)                                        # (B, 2W), best first
        parent, token = index // V, index % V                                           # which text, continued by what
        ids = torch.cat([open_ids.gather(1, parent[..., None].expand(-1, -1, length)), token[..., None]], dim=2)
        ended = token == EOS_ID                                                         # (B, 2W)

        # Finished texts compete for the pool: old against new, the best W stay. Only the best W candidates may enter.
        enters = ended if length < limit else torch.ones_like(ended)                    # at the limit, all enter as is
        enters = enters & (torch.arange(2 * W, device=device) < W) & ~done
        scores = (log_prob / length**length_penalty).masked_fill(~enters, -math.inf)
        pool_scores, best = torch.cat([pool_scores, scores], dim=1).topk(W)             # (B, W)
        pool_ids = torch.cat([F.pad(pool_ids, (0, 1), value=PAD_ID), ids], dim=1)       # (B, 3W, length + 1)
        pool_ids = pool_ids.gather(1, best[..., None].expand(-1, -1, length + 1))

        # The best W unfinished ones go on, and the cache with them: its rows must follow the texts they belong to.
        open_log_probs, best = log_prob.masked_fill(ended, -math.inf).topk(W)           # (B, W)
        open_ids = ids.gather(1, best[..., None].expand(-1, -1, length + 1))
        rows = (first_row + parent.gather(1, best)).flatten()                           # (B*W)
        for self_cache, _ in cache:  # not the cross-attention's: all W texts of a source read the same source
            self_cache.key, self_cache.value = self_cache.key[rows], self_cache.value[rows]

        # log_prob can only fall from here on, and no text gets longer than the limit: no open text can score better
        # than `reachable`. And none is worth waiting for once W finished ones are better than it is now.
        reachable, now = (open_log_probs[:, :1] / n**length_penalty for n in (limit, length))  # (B, 1)
        done |= (pool_scores[:, :1] >= reachable) | (pool_scores[:, -1:] >= now)
        if done.all():
            break
    model.train(was_training)
    return pool_ids[..., 1:].masked_fill(pool_scores[..., None] == -math.inf, PAD_ID), pool_scores


def make_source(number: int) -> list[int]:
    """What the encoder reads: 3 4 2 <EOS>."""
    return to_ids([*str(number), "<EOS>"])


def to_words(ids: torch.Tensor) -> str:
    """One row of generate's answer as text, up to <EOS>."""
    tokens = to_tokens(ids.tolist())
    return " ".join(tokens[: tokens.index("<EOS>")] if "<EOS>" in tokens else tokens)


def answer(model, numbers: list[int]) -> list[str]:
    """What the model says to each number, greedily; wrong answers are marked, with what would have been right."""
    lines = []
    for number, ids in zip(numbers, generate(model, [make_source(n) for n in numbers], temperature=0.0)):
        said, truth = to_words(ids), " ".join(number_to_words(number))
        lines.append(f"{number} -> {said}" + ("" if said == truth else f"\n    WRONG: {truth}"))
    return lines


# ======================================================================================================
# BUILDING A MODEL, AND REFUSING WHAT CANNOT WORK
# ======================================================================================================


def get_device() -> torch.device:
    """The fastest device here: an NVIDIA GPU (cuda), an Apple one (mps), or else the CPU, which is enough."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def build_model(d_model=D_MODEL, num_layers=NUM_LAYERS, num_heads=NUM_HEADS, d_ff=D_FF, dropout=DROPOUT,
                max_length=MAX_LENGTH):
    """A new model with random weights (torch.manual_seed before it makes them repeatable), on the fastest device."""
    return EncoderDecoderTransformer(d_model, num_layers, num_heads, d_ff, dropout, max_length).to(get_device())


def check_sizes(d_model, num_layers, num_heads, d_ff, dropout, max_length) -> None:
    """Refuse sizes of which no model can be made, and say which would do. Raises InputError."""
    for name, size in [("D_MODEL", d_model), ("NUM_LAYERS", num_layers), ("NUM_HEADS", num_heads), ("D_FF", d_ff),
                       ("MAX_LENGTH", max_length)]:
        if not isinstance(size, int) or size < 1:
            raise InputError(f"{name} = {size} must be a whole number, at least 1.")
    if d_model % 2:
        raise InputError(f"D_MODEL = {d_model} must be even, for sines and cosines come in pairs: {d_model + 1} works.")
    if d_model % num_heads:
        divisors = ", ".join(str(n) for n in range(1, 17) if d_model % n == 0)
        raise InputError(f"D_MODEL = {d_model} cannot be shared equally among NUM_HEADS = {num_heads}: with this width "
                         f"NUM_HEADS = {divisors} work, with these heads D_MODEL = {32 * num_heads} works.")
    if not 0 <= dropout < 1:
        raise InputError(f"DROPOUT = {dropout} must be at least 0 and below 1: 0.1 works.")


def check_length(ids: torch.Tensor, max_length: int) -> None:
    """Refuse a batch (B, T) with more positions than there are encodings for. Raises InputError."""
    if ids.size(1) > max_length:
        raise InputError(f"A sequence of {ids.size(1)} tokens is longer than MAX_LENGTH = {max_length}: "
                         f"set MAX_LENGTH to at least {ids.size(1)}, and train again.")


def check_training(num_epochs, learning_rate) -> None:
    """Refuse training constants that cannot train. Raises InputError."""
    for name, value, works in [("NUM_EPOCHS", num_epochs, 10), ("LEARNING_RATE", learning_rate, 2e-3),
                               ("GRAD_CLIP", GRAD_CLIP, 1.0)]:
        if not value > 0:
            raise InputError(f"{name} = {value} must be above 0: {works} works.")
    for name, value, works in [("WARMUP_STEPS", WARMUP_STEPS, 200), ("WEIGHT_DECAY", WEIGHT_DECAY, 0.1)]:
        if not value >= 0:
            raise InputError(f"{name} = {value} must not be negative: {works} works.")


def check_generation(temperature, top_k, top_p, max_new_tokens) -> None:
    """Refuse settings that mean nothing. Raises InputError."""
    if not temperature >= 0:
        raise InputError(f"temperature {temperature} must be 0 (greedy) or above: 0.7 works.")
    if top_k is not None and not top_k >= 1:
        raise InputError(f"top_k {top_k} must be at least 1, or None for all tokens.")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p {top_p} must be above 0 and at most 1, or None for all tokens.")
    if not max_new_tokens >= 1:
        raise InputError(f"max_new_tokens {max_new_tokens} must be at least 1.")


# ======================================================================================================
# CHECKPOINTS
# ======================================================================================================


def all_constants(model) -> dict:
    """What a checkpoint was made with: the model's sizes, and the language and the numbers that it learned."""
    data = {name: getattr(toy_dataset, name) for name in ("MAX_DIGITS", "NUM_TRAIN", "SEED")}
    return model.constants | {f"toy_dataset.{name}": value for name, value in data.items()}


def check_writable(path: Path) -> None:
    """Raises OSError, naming the folder, if nothing can be written where path is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path.parent} is not writable: change its permissions, or CHECKPOINT in this file.")


def save(model, path=CHECKPOINT) -> None:
    """Write weights and constants to path. What stood there before is kept beside it, as *.old.

    Atomic: the file is written under another name and then renamed, which happens at once or not at all. Whatever is
    killed at whatever moment, under the checkpoint's name there is a whole checkpoint: the old one or the new.
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

    Raises InputError when the file is no checkpoint, or not one of this model and these constants; FileNotFoundError
    when there is none.
    """
    model = build_model() if model is None else model
    remedy = "To train a new one, run this file without arguments; the old one is kept beside it, as *.old."
    try:
        # A pickle may hold any code, and run it when it is read. weights_only reads tensors, numbers and texts alone.
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
            raise InputError(f"{path} was made with {name} = {constants.get(name)}, and now it is {today}. Change it "
                             f"back. Or: {remedy}")
    model.load_state_dict(weights)
    return model.eval()


# ======================================================================================================
# RUNNING THIS FILE
# ======================================================================================================


def parameter_formula(model) -> tuple[str, int]:
    """How many parameters there should be, by arithmetic: the formula, and its value."""
    V, C, F, L = len(VOCABULARY), *(model.constants[name] for name in ("D_MODEL", "D_FF", "NUM_LAYERS"))
    formula = "V*C + L*(3*4*(C*C + C) + 2*((C*F + F) + (F*C + C)) + 10*C) + 4*C"
    return formula, V * C + L * (3 * 4 * (C * C + C) + 2 * ((C * F + F) + (F * C + C)) + 10 * C) + 4 * C


def print_configuration(model, loaders) -> None:
    """What is about to be trained, and what its loss can be expected to be, before the first step."""
    print(f"{type(model).__name__} on {next(model.parameters()).device}:\n  "
          + ", ".join(f"{name} {value}" for name, value in model.constants.items()))
    count = sum(parameter.numel() for parameter in model.parameters())
    formula, expected = parameter_formula(model)
    print(f"Parameters: {count:,}, and by arithmetic {expected:,}\n  = {formula}")
    sizes = [f"{len(loader.dataset):,}" for loader in loaders]
    print(f"Numbers: {sizes[0]} to learn from, {sizes[1]} for validation, {sizes[2]} for the test; all different")
    with torch.no_grad():
        loss_sum, num_targets = compute_loss(model, next(iter(loaders.validation)))
    print(f"Loss: {math.log(len(VOCABULARY)):.3f} is blind guessing (ln V), {loss_sum / num_targets:.3f} this model, "
          f"untrained;\n  {describe_floor(loaders.validation.dataset)}\n")


def describe_floor(dataset) -> str:
    """The least loss that is possible on these numbers, as text."""
    return "0 the least possible, as names follow from digits"


def show_strategies(model) -> None:
    """The same held-out sources under each strategy."""
    held_out = toy_dataset.make_splits().test[:500]
    sources = [make_source(number) for number in held_out]
    strategies = {
        "greedy": lambda **kw: generate(model, sources, temperature=0.0),
        "temperature 1.0": lambda **kw: generate(model, sources, temperature=1.0, **kw),
        "temperature 1.5": lambda **kw: generate(model, sources, temperature=1.5, **kw),
        "top-p 0.9": lambda **kw: generate(model, sources, temperature=1.0, top_p=0.9, **kw),
        f"beam width {BEAM_WIDTH}": lambda **kw: beam_search(model, sources)[0][:, 0],
        "your constants": lambda **kw: generate(model, sources, **kw),  # TEMPERATURE, TOP_K and TOP_P as at the top
    }
    print(f"\nSTRATEGIES, on the same {len(sources)} held-out numbers\n\n  {'':22}{'named right':>12}{'names/s':>10}")
    for name, strategy in strategies.items():
        generator = torch.Generator(next(model.parameters()).device).manual_seed(SEED)
        start = time.perf_counter()
        texts = strategy(generator=generator)
        seconds = time.perf_counter() - start
        right = sum(to_words(ids) == " ".join(number_to_words(number)) for number, ids in zip(held_out, texts))
        print(f"  {name:22}{right / len(sources):12.1%}{len(sources) / seconds:10,.0f}")


def show_beam(model, number: int) -> None:
    """What beam search found for one number: all its hypotheses, with their scores."""
    texts, scores = beam_search(model, [make_source(number)])
    print(f"\nBEAM SEARCH for {number}, width {BEAM_WIDTH}: score = log_prob / length**{LENGTH_PENALTY}")
    for ids, score in zip(texts[0], scores[0].tolist()):
        if score > -math.inf:
            print(f"  {score:9.4f}  {to_words(ids)}")


@torch.no_grad()
def cross_attention(model, number: int) -> torch.Tensor:
    """Where the model looks while it writes a number's name: the mean over layers and heads, (words + 1, digits + 1).

    Row t is the position that predicts word t, the last one <EOS>; the last column is the source's <EOS>.
    """
    device = next(model.parameters()).device
    example = toy_dataset.pad_batch([toy_dataset.encoder_decoder_example(number)])
    source, target, maps = example["source"].to(device), example["target"].to(device), []
    model.decode(target, model.encode(source), source, cross_maps=maps)
    return torch.cat(maps).mean(dim=(0, 1))  # each map is (1, H, T, S)


def show_alignment(model, number: int) -> None:
    """The cross-attention, drawn: darker is more. A word's true digits, those that decide it, stand in brackets."""
    weights = cross_attention(model, number)
    words = [*number_to_words(number), "<EOS>"]
    print(f"\nCROSS-ATTENTION for {number}: which digits it looks at (mean of layers and heads)\n"
          "for each word; [ ] marks those that it is made of. Attention shows where information can flow,\nno more.\n")
    print("  " + " " * 10 + "".join(f"{token:^7}" for token in [*str(number), "<EOS>"]))
    on_digits = 0.0
    for word, row, digits in zip(words, weights.tolist(), [*align(number), set()]):
        cells = (f"{'[' if i in digits else ' '}{'#' * round(5 * weight):5}{']' if i in digits else ' '}"
                 for i, weight in enumerate(row))
        print(f"  {word:>10}" + "".join(cells))
        on_digits += sum(row[i] for i in digits)
    print(f"  Share of attention on the bracketed digits: {on_digits / (len(words) - 1):.0%}; by chance it would be "
          f"{sum(map(len, align(number))) / (len(words) - 1) / weights.size(1):.0%}.")


def train_and_test():
    """Train a model as the constants say, test it once on the test numbers, and save it."""
    check_writable(CHECKPOINT)  # before a minute of training, not after it
    torch.manual_seed(SEED)
    model, loaders = build_model(), create_dataloaders()
    print_configuration(model, loaders)
    train(model, loaders)
    found = evaluate(model, loaders.test)
    numbers = loaders.test.dataset.numbers
    print(f"\nTEST on {len(numbers):,} numbers never seen: {found['exact_match']:.2%} named without a mistake, "
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
    show_beam(model, DETAILED_EXAMPLE)
    show_alignment(model, DETAILED_EXAMPLE)
    print("\nNext: python encoder_decoder.py 342 90210, or change a constant at the top and run it again.")


if __name__ == "__main__":
    run_script(main, parse_number)
