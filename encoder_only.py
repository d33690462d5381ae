"""encoder_only.py - a BERT-style transformer: bidirectional attention, for understanding tasks.

What it is. One stack of layers in which every position attends to all positions, left and right. The output is one
contextual vector per token. It is trained in two steps:

1. Pretraining, without labels: predict tokens that are masked, 15% of them; the text supplies the targets. To see that
   `9 0 2 1 0 <SEP> ninety <MASK> two hundred ten` lacks `thousand`, a model must learn how digits and words correspond.
2. Fine-tuning, with labels, for the task at hand: a short training run with a small new layer on top (a "head",
   unrelated to attention heads) that maps vectors to logits, the scores that softmax turns into probabilities:
   tagging    every token gets a label         3 4 2 -> hundreds, tens, ones    (as in named-entity recognition)
   counting   the sequence gets one label      3 4 2 -> its name has 4 words    (as in sentiment classification)
   matching   a pair of texts gets one label   3 4 2 <SEP> three ... -> same number (as in paraphrase detection)

    masked LM                   tagging                              counting, matching
    3 4 2 <SEP> three ...       hundreds  tens  ones                 4 words
    ^ ^ ^  ^      ^                 ^       ^     ^                    ^
    head: V logits each         head: MAX_DIGITS logits each         pooler and head, on <CLS> alone
    +--------------------------------------------------------+
    |  layer NUM_LAYERS                                      |       attention mask (# may attend, . may not):
    |  ...                                                   |
    |  layer 1:                                              |               <CLS> 3 4 2 <SEP>
    |    x = x + attention(norm(x))                          |       <CLS>     #   # # #   #
    |    x = x + feed_forward(norm(x))                       |       3         #   # # #   #
    +--------------------------------------------------------+       4         #   # # #   #
        ^       ^       ^       ^       ^                            2         #   # # #   #
      <CLS>     3       4       2     <SEP>                          <SEP>     #   # # #   #

What it is for: understanding. Tagging, classifying, comparing, searching: whenever the whole text is available
before the answer is needed. What it is not for: generation. It is trained to fill a few gaps in a complete text, not to
continue one. It can be made to (mask-predict, below), and you will see what that costs.

What you will see when you run it (about five minutes on two CPU cores): pretraining, with its distance from the best
possible predictor, which is computed exactly; masks filled in; three fine-tuning runs and their accuracy on held-out
numbers; nearest neighbors; mask-predict; and what pretraining gains, by number of labels.

    python encoder_only.py                                          train, test, show, and save checkpoints/
    python encoder_only.py 342 90210                                place values, and how many words the name has
    python encoder_only.py "90210 <SEP> ninety <MASK> two hundred ten"              fill in the mask
    python encoder_only.py "90210 <SEP> nine thousand two hundred ten"              do they name the same number?

How to read it. From the top: attention, the layer, the model, training, generation. A first reading may stop at
BUILDING A MODEL; what follows is validation, checkpoints, the best possible predictor, and demonstrations.

Papers: Devlin et al. 2019 (BERT); Vaswani et al. 2017, "Attention Is All You Need" (the parts); Ghazvininejad et al.
2019 (mask-predict).
Simplified here: positions are sinusoidal, where BERT learns a vector per position; embeddings are multiplied by
sqrt(C), as in the 2017 paper, where BERT adds segment embeddings and a LayerNorm; layers are pre-norm, BERT's are
post-norm; BERT computes masked-LM logits with one more dense layer, GELU, LayerNorm and a bias; its initial weights
have standard deviation 0.02; its pretraining includes next-sentence prediction (no help in RoBERTa, Liu et al. 2019),
without which the pooler is untrained before fine-tuning; its tokens are subwords, where these are words and digits.

Letters used for shapes, here and in the other two files:
B batch, T positions (S those attended to), C = D_MODEL, H heads, d_k = C / H per head, V vocabulary.
"""

import math
import os
import pickle
import random
import shutil
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import fmean

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.data import DataLoader, RandomSampler
from tqdm import tqdm

import toy_dataset
from toy_dataset import IGNORE, MASK_ID, MAX_DIGITS, MAX_WORDS, PAD_ID, PLACES, SEP_ID
from toy_dataset import SPECIAL_TOKENS, VOCABULARY, InputError, make_padding_mask, number_to_words, parse_number
from toy_dataset import run_script, to_ids, to_tokens

# ======================================================================================================
# CONSTANTS: change one, run again
# ======================================================================================================

# --- model ---
D_MODEL = 128         # width: the size of a token's vector. Try 32 (too narrow?), 256 (slower; better?)
NUM_LAYERS = 2        # transformer layers. Try 1 (what can it no longer do?), 4
NUM_HEADS = 4         # attention heads, each D_MODEL / NUM_HEADS wide. Try 1, 8
D_FF = 512            # inner width of the feed-forward network; 4 * D_MODEL is customary. Try 128, 1024
DROPOUT = 0.0         # fraction of activations zeroed in training, against overfitting. Try 0.1: does it help here?
MAX_LENGTH = 64       # longest sequence, digits and words together. Try 16 (too short: see the error), 1024

# --- training ---
BATCH_SIZE = 64       # sequences per step. Try 32 (more, noisier steps), 256 (fewer, smoother)
NUM_EPOCHS = 10       # pretraining: passes over the training numbers. Try 1, 3, 20
LEARNING_RATE = 2e-3  # the peak. Try 2e-4 (slow), 2e-2 (unstable), 10 (diverges: see the error)
FINAL_LEARNING_RATE_RATIO = 0.01  # final learning rate / peak. Try 1.0: no decay
WARMUP_STEPS = 200    # steps from near zero to the peak, at most a fifth of the run. Try 0 (a rough start), 20
WEIGHT_DECAY = 0.1    # shrinks the weight matrices toward zero. Try 0, 1.0
GRAD_CLIP = 1.0       # maximum gradient norm; larger gradients are scaled down to it. Try 0.1, 100
MASK_PROBABILITY = 0.15  # fraction of tokens to predict. Try 0.05 (little to learn from), 0.5 (better mask-predict?)
FINE_TUNING_STEPS = 400  # steps per fine-tuning run, however many labels there are. Try 100, 1000
FINE_TUNING_LEARNING_RATE = 1e-3  # the peak; a smaller one preserves more of the pretraining. Try 1e-4, 3e-3
NUM_LABELS = [100, 300, 1000, 3000]  # labeled examples, for the table on the effect of pretraining. Try adding 30
SEED = 0              # initial weights, order of batches, sampling. Try 1: how much is seed noise?

# --- generation ---
ITERATIONS = 4        # rounds of mask-predict; 1 fills in all masks at once. Try 1, 10
EXAMPLES = [0, 7, 42, 100, 342, 1010, 12345, 90210, 600006, 999999]  # numbers to show. Try your own
PROGRESS_EXAMPLE = 600006  # the number answered at each evaluation during training
MASKED_EXAMPLES = [  # texts to complete. Try masking a digit and its word, which nothing else determines
    "90210 <SEP> ninety <MASK> two hundred ten", "3 <MASK> 2 <SEP> three hundred forty two",
    "1010 <SEP> <MASK> <MASK> <MASK>", "<MASK> <MASK> <MASK> <SEP> seven hundred seventeen"]

CHECKPOINT = Path(__file__).parent / "checkpoints" / "encoder_only.pt"  # and, for the fine-tuned, encoder_only_TASK.pt
TASKS = {  # task -> the function that turns a number into an example
    "masked_lm": toy_dataset.masked_lm_example, "tagging": toy_dataset.tagging_example,
    "counting": toy_dataset.counting_example, "matching": toy_dataset.matching_example,
}
NUM_CLASSES = {"tagging": MAX_DIGITS, "counting": MAX_WORDS, "matching": 2}

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

    def forward(self, x, mask, attention_maps=None):
        """x (B, T, C) -> (B, T, C). mask: boolean, broadcastable to (B, H, T, T), True = may attend.

        attention_maps: a list to which this layer's weights (B, H, T, T) are appended, for pictures.
        """
        query = self.split_heads(self.query(x))                                         # (B, H, T, d_k)
        key, value = self.split_heads(self.key(x)), self.split_heads(self.value(x))     # (B, H, T, d_k)
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


class EncoderLayer(nn.Module):
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

    def forward(self, x, mask, attention_maps=None):
        """x (B, T, C) -> (B, T, C)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, attention_maps=attention_maps))
        x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        return x


class EncoderOnlyTransformer(nn.Module):
    """ids (B, T) -> logits, by task: masked_lm (B, T, V), tagging (B, T, classes), the others (B, 1, classes)."""

    def __init__(self, d_model: int, num_layers: int, num_heads: int, d_ff: int, dropout: float, max_length: int,
                 task: str):
        super().__init__()
        check_sizes(d_model, num_layers, num_heads, d_ff, dropout, max_length)
        if task not in TASKS:
            raise InputError(f"{task!r} is not a task of encoder_only.py; the tasks are: {', '.join(TASKS)}.")
        # What a checkpoint must match, under the names at the top of this file.
        self.constants = {"D_MODEL": d_model, "NUM_LAYERS": num_layers, "NUM_HEADS": num_heads, "D_FF": d_ff,
                          "MAX_LENGTH": max_length, "task": task}
        self.task = task
        self.embedding = nn.Embedding(len(VOCABULARY), d_model)
        self.positional_encoding = PositionalEncoding(d_model, max_length)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(EncoderLayer(d_model, num_heads, d_ff, dropout) for _ in range(num_layers))
        # Pre-norm layers never normalize the residual stream itself, hence the final norm.
        self.final_norm = nn.LayerNorm(d_model)
        # Fine-tuning adds only the head and its pooler; masked_lm has no head of its own (see forward).
        if task in ("counting", "matching"):
            self.pooler = nn.Linear(d_model, d_model)
        if task != "masked_lm":
            self.head = nn.Linear(d_model, NUM_CLASSES[task])
        self.apply(init_weights)

    def embed(self, ids, positions):
        """Token ids (B, T) and their positions, broadcastable to (B, T) -> (B, T, C)."""
        # Times sqrt(C) (section 3.4), so that the positional encoding, of order 1, does not dominate the embedding.
        x = self.embedding(ids) * math.sqrt(self.embedding.embedding_dim)               # (B, T, C)
        return self.dropout(x + self.positional_encoding(positions))                    # (B, T, C)

    def encode(self, ids, attention_maps=None):
        """Token ids (B, T) -> contextual vectors (B, T, C). This part is pretrained."""
        check_length(ids, self.constants["MAX_LENGTH"])
        mask = make_padding_mask(ids)                                                   # (B, 1, 1, T)
        x = self.embed(ids, torch.arange(ids.size(1), device=ids.device))               # (B, T, C)
        for layer in self.layers:
            x = layer(x, mask, attention_maps)
        return self.final_norm(x)

    def forward(self, ids, attention_maps=None):
        """The head of this model's task, on top of encode."""
        x = self.encode(ids, attention_maps)                                            # (B, T, C)
        if self.task == "tagging":
            return self.head(x)                                                         # (B, T, MAX_DIGITS)
        if self.task in ("counting", "matching"):
            # <CLS> is not a word, so its vector is free to represent the whole sequence. BERT's pooler, a layer with a
            # tanh, bounds the head's input and lets it separate classes that are not linearly separable in that vector.
            return self.head(torch.tanh(self.pooler(x[:, :1])))                         # (B, 1, classes)
        # logits = x E^T: a token's logit is the output's dot product with its embedding. Input and output share one
        # table E ("weight tying", Press & Wolf 2017): fewer parameters, and both uses train it.
        return F.linear(x, self.embedding.weight)                                       # (B, T, V)


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


def mask_tokens(ids, generator=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Corrupt some tokens as BERT does (Devlin et al. 2019, section 3.1, A.1). ids (B, T) -> (corrupted, targets).

    Each digit and word is chosen with probability MASK_PROBABILITY; special tokens never are. Of the chosen tokens,
        80% become <MASK>,
        10% become a random digit or word, so that the model cannot simply copy visible tokens,
        10% stay unchanged, to bias predictions toward the visible token. With <MASK> alone, visible tokens would never
            carry a loss, and fine-tuning has no masks.
    targets holds the original token where one was chosen and IGNORE elsewhere: the loss covers only the chosen tokens.

    Drawn anew for each batch (dynamic masking), so a text is rarely masked the same way twice. generator: to draw from,
    in place of the global one (on the CPU, so that every device masks the same tokens).
    """
    chance, kind = torch.rand(2, *ids.shape, generator=generator).to(ids.device)        # (B, T) each, in [0, 1)
    others = torch.randint(len(SPECIAL_TOKENS), len(VOCABULARY), ids.shape, generator=generator).to(ids.device)
    chosen = (ids >= len(SPECIAL_TOKENS)) & (chance < MASK_PROBABILITY)                 # (B, T), boolean
    hide = chosen & (kind < 0.8)
    replace = chosen & (kind >= 0.8) & (kind < 0.9)
    corrupted = torch.where(replace, others, ids.masked_fill(hide, MASK_ID))            # (B, T)
    return corrupted, ids.masked_fill(~chosen, IGNORE)


def create_dataloaders(batch_size=BATCH_SIZE, seed=SEED, task="masked_lm", num_train=None) -> toy_dataset.Splits:
    """Training, validation and test batches: "ids" (B, T) and, by task, "places" (B, T), "count" (B) or "match" (B)."""
    return toy_dataset.make_dataloaders(TASKS[task], batch_size, seed, num_train)


def predict(model, batch, generator=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The model's logits for a batch (B, T, classes), and its targets (B, T).

    T is 1 in counting and matching, whose one answer is given at <CLS>. In pretraining the tokens are masked here (with
    this generator), unless the batch already has "targets" (compare_architectures.py masks whole names).
    """
    ids = batch["ids"].to(next(model.parameters()).device)
    for labels in ("places", "count", "match", "targets"):
        if labels in batch:
            return model(ids), batch[labels].to(ids.device).reshape(len(ids), -1)           # (B, T)
    corrupted, targets = mask_tokens(ids, generator)
    return model(corrupted), targets


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
    """Evaluate on held-out numbers. Returns loss (nats per target), exact_match, accuracy and mistakes.

    exact_match: fraction of the sequences with every target correct (those in which no token was masked do not count).
    accuracy: fraction of the targets predicted correctly. mistakes: indices of sequences with errors, in loader order.
    """
    was_training = model.training
    model.eval()
    # The same tokens are masked in each evaluation, so that two evaluations differ only in the model.
    generator = torch.Generator().manual_seed(SEED)
    loss_sum, num_targets, num_hits, asked, right = 0.0, 0, 0, [], []
    for batch in loader:
        logits, targets = predict(model, batch, generator)
        loss_sum += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
        is_target, hit = targets != IGNORE, logits.argmax(dim=-1) == targets            # (B, T) each
        num_targets += is_target.sum().item()
        num_hits += hit.sum().item()
        right += (hit | ~is_target).all(dim=1).tolist()
        asked += is_target.any(dim=1).tolist()
    model.train(was_training)
    mistakes = [i for i, ok in enumerate(right) if not ok]
    return {"loss": loss_sum / max(1, num_targets), "exact_match": 1 - len(mistakes) / max(1, sum(asked)),
            "accuracy": num_hits / max(1, num_targets), "mistakes": mistakes}


def fine_tune(pretrained, loaders, task, num_steps=FINE_TUNING_STEPS, learning_rate=FINE_TUNING_LEARNING_RATE,
              num_evaluations=2, progress=None):
    """A new model for the task, trained for num_steps. Returns it and its history.

    pretrained: the masked LM whose encoder it starts from, or None. As in BERT, all weights are trained.
    """
    model = build_model(task=task) if pretrained is None else build_fine_tuned(pretrained, task)
    # Steps, not epochs: training takes equally long with few labels and with many. The sampler starts a new pass over
    # the data, in a new order, whenever one ends.
    labeled, batch_size = loaders.train.dataset, loaders.train.batch_size
    sampler = RandomSampler(labeled, num_samples=num_steps * batch_size, generator=loaders.train.generator)
    batches = DataLoader(labeled, batch_size, sampler=sampler, collate_fn=toy_dataset.pad_batch)
    return model, train(model, loaders._replace(train=batches), 1, learning_rate, num_evaluations, progress)


# ======================================================================================================
# GENERATION, by filling in masks
# ======================================================================================================


@torch.inference_mode()
def generate(model, prompts: list[list[int]], iterations=ITERATIONS) -> torch.Tensor:
    """Fill in the <MASK>s of each prompt (a list of ids). Returns the texts, (B, T), padded on the right.

    Mask-predict (Ghazvininejad et al. 2019): predict all masks at once, keep the most confident predictions, re-mask
    the others, and predict those again given the kept ones. After round i of N at most n * (N - i) / N of the n masks
    are left, so N rounds fill in all. With one round, masks are predicted independently given the text, so neighbors
    may contradict each other. Simplified here: a kept token stays; in the paper a later round may mask it again.
    """
    check_constant("ITERATIONS", iterations, int, lambda n: n >= 1, "a whole number, at least 1")
    if not prompts or not all(prompts):
        raise InputError("generate needs at least one prompt, each with at least one token, such as <MASK>.")
    was_training = model.training
    model.eval()
    longest = max(map(len, prompts))
    ids = torch.tensor([p + [PAD_ID] * (longest - len(p)) for p in prompts], device=next(model.parameters()).device)
    num_masks = (ids == MASK_ID).sum(dim=1, keepdim=True)                               # (B, 1), to fill in
    for i in range(1, iterations + 1):
        masked = ids == MASK_ID                                                         # (B, T), not yet kept
        logits = model(ids).float()
        logits[..., : len(SPECIAL_TOKENS)] = -math.inf                                  # answers are digits and words
        confidence, best = logits.softmax(dim=-1).max(dim=-1)                           # (B, T)
        ids = torch.where(masked, best, ids)
        # Re-mask the least confident of these predictions; argsort of argsort is the rank, 0 the least confident.
        rank = confidence.masked_fill(~masked, math.inf).argsort(dim=1).argsort(dim=1)
        ids = ids.masked_fill(masked & (rank < num_masks * (iterations - i) // iterations), MASK_ID)
    model.train(was_training)
    return ids


def parse_text(text: str) -> list[int]:
    """Typed text, such as "342 <SEP> three <MASK> forty two", to the ids of `<CLS> digits <SEP> words <SEP>`."""
    tokens = []
    for piece in text.split():  # numbers may be typed without spaces
        tokens += list(piece) if piece.isdigit() else [piece]
    if tokens.count("<SEP>") != 1 or len(tokens) > MAX_LENGTH - 2:
        raise InputError(f"{text!r} is not of the form 'digits <SEP> words' with at most MAX_LENGTH - 2 "
                         f"tokens (MAX_LENGTH = {MAX_LENGTH}).")
    return to_ids(["<CLS>", *tokens, "<SEP>"])


def fill_in(model, texts: list[str]) -> list[str]:
    """Each text with its masks filled in, the predicted tokens in brackets."""
    lines = []
    for text in texts:
        prompt = parse_text(text)
        filled = to_tokens(generate(model, [prompt])[0].tolist())
        tokens = [f"[{token}]" if i == MASK_ID else token for i, token in zip(prompt, filled)]
        lines.append(" ".join(tokens[1:-1]))  # without <CLS> and the last <SEP>, as it was typed
    return lines


@torch.inference_mode()
def answer(model, numbers: list[int]) -> list[str]:
    """The model's prediction for each number, by its task; wrong ones are marked, with the correct answer."""
    lines = []
    was_training = model.training
    model.eval()
    for number in numbers:  # one at a time: they are few
        said, truth = (answer_masked_lm if model.task == "masked_lm" else answer_fine_tuned)(model, number)
        lines.append(said if said == truth else f"{said}\n    WRONG: {truth.rpartition(' -> ')[2]}")
    model.train(was_training)
    return lines


def answer_masked_lm(model, number: int) -> tuple[str, str]:
    """A number's text with the middle word of its name masked and filled in: the model's answer and the correct one."""
    words = number_to_words(number)
    middle = len(words) // 2
    before, after = [*str(number), "<SEP>", *words[:middle]], words[middle + 1:]
    return fill_in(model, [" ".join([*before, "<MASK>", *after])])[0], " ".join([*before, f"[{words[middle]}]", *after])


def answer_fine_tuned(model, number: int) -> tuple[str, str]:
    """A number's label, or the labels of its digits: the model's and the correct ones."""
    batch = toy_dataset.pad_batch([TASKS[model.task](number)])
    logits, targets = predict(model, batch)                                             # (1, T, classes), (1, T)
    said, truth = (describe_labels(model.task, labels[targets != IGNORE].tolist())
                   for labels in (logits.argmax(dim=-1), targets))
    question = " ".join(to_tokens(batch["ids"][0].tolist())[1:-1]) if model.task == "matching" else str(number)
    return f"{question} -> {said}", f"{question} -> {truth}"


def describe_labels(task: str, labels: list[int]) -> str:
    """Classes, in words."""
    if task == "tagging":
        return ", ".join(PLACES[label] for label in labels)
    if task == "counting":
        return f"{labels[0] + 1} word" + "s" * (labels[0] > 0)
    return ["different numbers", "the same number"][labels[0]]


# ======================================================================================================
# BUILDING A MODEL, AND VALIDATING ITS SETTINGS
# ======================================================================================================


def get_device() -> torch.device:
    """An NVIDIA GPU (cuda) if there is one, otherwise an Apple GPU (mps), otherwise the CPU, which is enough."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def build_model(d_model=D_MODEL, num_layers=NUM_LAYERS, num_heads=NUM_HEADS, d_ff=D_FF, dropout=DROPOUT,
                max_length=MAX_LENGTH, task="masked_lm"):
    """A new model with random weights, on get_device() (call torch.manual_seed first for reproducibility)."""
    return EncoderOnlyTransformer(d_model, num_layers, num_heads, d_ff, dropout, max_length, task).to(get_device())


def build_fine_tuned(pretrained, task):
    """A new model for the task, made from a pretrained one: a copy of its encoder, and a head with random weights."""
    sizes = [pretrained.constants[name] for name in ("D_MODEL", "NUM_LAYERS", "NUM_HEADS", "D_FF")]
    model = build_model(*sizes, DROPOUT, pretrained.constants["MAX_LENGTH"], task)
    # strict=False: the head has no counterpart in the pretrained model. Nothing else may be missing.
    missing, unexpected = model.load_state_dict(pretrained.state_dict(), strict=False)
    assert not unexpected and all(name.startswith(("head.", "pooler.")) for name in missing)
    return model


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


def check_constants() -> None:
    """Validate all constants before training starts, not after it. Raises InputError, or OSError."""
    check_writable(CHECKPOINT)
    check_training(NUM_EPOCHS, LEARNING_RATE)
    check_constant("MASK_PROBABILITY", MASK_PROBABILITY, (int, float), lambda p: 0 < p <= 1, "above 0 and at most 1")
    check_constant("FINE_TUNING_LEARNING_RATE", FINE_TUNING_LEARNING_RATE, (int, float), lambda x: x > 0, "positive")
    for name, value in [("FINE_TUNING_STEPS", FINE_TUNING_STEPS), ("ITERATIONS", ITERATIONS)]:
        check_constant(name, value, int, lambda n: n >= 1, "a whole number, at least 1")
    check_constant("NUM_LABELS", NUM_LABELS, list, lambda counts: all(isinstance(n, int) and n >= 1 for n in counts),
                   "a list of whole numbers, at least 1 each")
    for name, value in [("EXAMPLES", EXAMPLES), ("MASKED_EXAMPLES", MASKED_EXAMPLES)]:
        check_constant(name, value, list, len, "a non-empty list")
    for number in [*EXAMPLES, PROGRESS_EXAMPLE]:
        parse_number(str(number))
    for text in MASKED_EXAMPLES:
        parse_text(str(text))


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
# THE BEST POSSIBLE PREDICTOR: computed, not trained
# ======================================================================================================


class BayesOptimalPredictor(nn.Module):
    """ids (B, T) -> logits (B, T, V), as a masked LM's, but computed: in expectation no model can do better.

    The visible tokens do not determine some masked ones, such as a digit whose word is masked too. Since all texts are
    known, Bayes' rule gives the probabilities: for a corrupted text c, and the text x of each number with equally many
    digits and words (masking changes neither; all x are equally likely, as no model can learn which are held out),

        P(x | c)  is proportional to  P(c | x)  =  product over positions j of P(c_j | x_j)

    where P(c_j | x_j) is what mask_tokens does to one token. Summed over all x with token t at position j, this gives
    P(x_j = t | c). That j was chosen is evidence too: a chosen token that is not <MASK> may well be random. So for the
    target at j itself, P(c_j | x_j) becomes P(c_j, chosen | x_j).
    """

    def __init__(self):
        super().__init__()
        same, num_others = torch.eye(len(VOCABULARY)), len(VOCABULARY) - len(SPECIAL_TOKENS)
        # P(c_j, chosen | x_j), a row for each c_j, a column for each x_j: 10% random, 10% unchanged, and 80% <MASK>.
        chosen = MASK_PROBABILITY * (0.1 / num_others + 0.1 * same)                     # (V, V)
        chosen[MASK_ID] = MASK_PROBABILITY * 0.8
        self.log_chosen = nn.Embedding.from_pretrained(chosen.log())
        self.log_seen = nn.Embedding.from_pretrained((chosen + (1 - MASK_PROBABILITY) * same).log())  # P(c_j | x_j)

    def forward(self, ids):
        logits = torch.zeros(*ids.shape, len(VOCABULARY))
        shapes = torch.stack([(ids == SEP_ID).int().argmax(dim=1) - 1, (ids != PAD_ID).sum(dim=1)], dim=1)
        for shape in shapes.unique(dim=0):  # texts with equally many digits and tokens form a batch
            rows, (num_digits, length) = (shapes == shape).all(dim=1), shape.tolist()
            c = ids[rows, :length]
            with torch.inference_mode(False):
                scores = self.log_seen(c).requires_grad_()                              # (B, T, V), log P(c_j | x_j)
                log_p = toy_dataset.log_sum_over_numbers(scores, num_digits)            # (B), log P(c) + constant
                # d log P(c) / d log P(c_j | x_j = t)  =  P(x_j = t | c):  autograd does the sums for all j and t.
                posterior, = torch.autograd.grad(log_p.sum(), scores)                   # (B, T, V)
            logits[rows, :length] = posterior.log() + self.log_chosen(c) - self.log_seen(c)
        return logits


# ======================================================================================================
# RUNNING THIS FILE
# ======================================================================================================


def parameter_formula(model) -> tuple[str, int]:
    """The expected number of parameters: as a formula, and its value."""
    V, C, F, L = len(VOCABULARY), *(model.constants[name] for name in ("D_MODEL", "D_FF", "NUM_LAYERS"))
    K = NUM_CLASSES.get(model.task, 0)
    formula, head = {"masked_lm": ("", 0), "tagging": (" + C*K + K", C * K + K)}.get(
        model.task, (" + C*C + C + C*K + K", C * C + C + C * K + K))
    formula = "V*C + L*(4*(C*C + C) + (C*F + F) + (F*C + C) + 4*C) + 2*C" + formula
    return formula, V * C + L * (4 * (C * C + C) + (C * F + F) + (F * C + C) + 4 * C) + 2 * C + head


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
    """What the best possible predictor reaches on these numbers, with the masks that evaluate draws, as text."""
    batches = [toy_dataset.pad_batch(dataset.examples[i:i + 1000]) for i in range(0, len(dataset), 1000)]
    best = evaluate(BayesOptimalPredictor(), batches)
    return (f"{best['loss']:.3f} for the best possible predictor\n"
            f"            (its masked-token accuracy: {best['accuracy']:.2%}; exact match: {best['exact_match']:.2%})")


def checkpoint_of(task: str) -> Path:
    """Where the model of a task is saved: the pretrained one at CHECKPOINT, the others beside it."""
    return CHECKPOINT if task == "masked_lm" else CHECKPOINT.with_name(f"{CHECKPOINT.stem}_{task}.pt")


def show_pretraining_gain(pretrained) -> None:
    """Test accuracy after fine-tuning from random and from pretrained weights, by number of labeled examples."""
    batch_size, rates = max(1, BATCH_SIZE // 2), (FINE_TUNING_LEARNING_RATE / 2, FINE_TUNING_LEARNING_RATE)
    matches = fmean(toy_dataset.matching_example(number)["match"] for number in toy_dataset.make_splits().test[:2000])
    print("\nTHE EFFECT OF PRETRAINING: exact match on 2,000 held-out numbers, mean of three seeds (lowest to\n"
          f"highest), after {FINE_TUNING_STEPS} steps of {batch_size} examples, with the better of two learning rates "
          f"for each\ntask and initialization (majority class in matching: {max(matches, 1 - matches):.1%})\n\n"
          f"  {'task':10}{'labels':>8}{'from scratch':>26}{'pretrained':>26}")
    bar = tqdm(desc="fine-tuning", ascii=True, ncols=95, mininterval=0.5)

    @cache  # the run that decides on the learning rate is the first of the three
    def tune(start, loaders, task, seed, rate):
        torch.manual_seed(seed)                     # the initial weights
        loaders.train.generator.manual_seed(seed)   # the order of the examples
        return fine_tune(start, loaders, task, FINE_TUNING_STEPS, rate, 0, bar)[0]

    for task, sizes in (("matching", NUM_LABELS), ("tagging", NUM_LABELS[:1]), ("counting", NUM_LABELS[::2])):
        loaders = {n: create_dataloaders(batch_size, SEED, task, n) for n in sizes}
        most, results = loaders[max(sizes)], []
        for start in (None, pretrained):
            on_validation = {rate: evaluate(tune(start, most, task, SEED, rate), most.validation)["exact_match"]
                             for rate in rates}
            best = max(rates, key=on_validation.get)  # with the most labels; used for all numbers of labels
            results.append([[evaluate(tune(start, loaders[n], task, seed, best), islice(most.test, 2))["exact_match"]
                             for seed in (SEED, SEED + 1, SEED + 2)] for n in sizes])
        for n, scratch, tuned in zip(sizes, *results):
            apart = min(tuned) > max(scratch) or min(scratch) > max(tuned)
            bar.write(f"  {task:10}{n:>8,}" + "".join(f"{f'{fmean(x):.1%} ({min(x):.1%} to {max(x):.1%})':>26}"
                                                      for x in (scratch, tuned)) + "  *" * apart)
    bar.close()
    print("  * the seeds' ranges do not overlap\n"
          "  Matching compares digits with words, and so does predicting a masked word from the digits. Tagging\n"
          "  and counting read the digits alone, which are random: none can be predicted from the others.")


@torch.inference_mode()
def show_neighbors(models: dict) -> None:
    """Search: the held-out numbers most similar to a number, by the cosine of their <CLS> vectors."""
    queries, numbers = EXAMPLES[::3], toy_dataset.make_splits().test[:2000]
    print(f"\nNEAREST NEIGHBORS among {len(numbers):,} held-out numbers, by the cosine of <CLS> vectors")
    for task in ("masked_lm", "counting"):
        ids = toy_dataset.pad_batch([TASKS[task](number) for number in queries + numbers])["ids"].to(get_device())
        vectors = F.normalize(models[task].eval().encode(ids)[:, 0], dim=-1)            # (queries + numbers, C)
        similarity = vectors[: len(queries)] @ vectors[len(queries):].T                 # (queries, numbers)
        for query, cosines, nearest in zip(queries, *(best.tolist() for best in similarity.topk(4, dim=1))):
            print(f"  {task:10}{query:>7}: "
                  + ", ".join(f"{numbers[i]} ({cosine:.3f})" for cosine, i in zip(cosines, nearest)))
    print("  Pretraining puts no loss on <CLS>, and counting trains it to count words. Encoders for search are\n"
          "  fine-tuned for similarity (Reimers & Gurevych 2019, Sentence-BERT).")


@torch.inference_mode()
def show_mask_predict(model, counter) -> None:
    """Generation with a model that was trained to fill gaps, and what that takes."""
    numbers = toy_dataset.make_splits().test[:500]
    names = [number_to_words(number) for number in numbers]
    prompts = [to_ids(["<CLS>", *str(number), "<SEP>"]) for number in numbers]
    questions = toy_dataset.pad_batch([TASKS["counting"](number) for number in numbers])
    counts = predict(counter.eval(), questions)[0].argmax(dim=-1) + 1                   # (B, 1), predicted
    true_lengths, predicted_lengths = [len(name) for name in names], counts.flatten().tolist()
    print("\nMASK-PREDICT: generation with a model trained to fill gaps. Exact match on 500 held-out names,\nby "
          f"what is masked and number of rounds\n\n  {'':36}" + "".join(f"{f'rounds: {n}':>11}" for n in (1, 4, 10)))
    rng = random.Random(SEED)  # which words are masked
    for label, share, lengths in [("one word masked", 0, true_lengths), ("half of the words masked", 0.5, true_lengths),
                                  ("all words masked, true length", 1, true_lengths),
                                  ("all words masked, predicted length", 1, predicted_lengths)]:
        texts = []  # `digits <SEP>`, and then the name with its masks
        for prompt, name, length in zip(prompts, names, lengths):
            masked = set(rng.sample(range(length), max(1, round(share * length))))
            words = ["<MASK>" if i in masked else name[i] for i in range(length)]
            texts.append(prompt + to_ids([*words, "<SEP>"]))
        results = [zip(generate(model, texts, iterations).tolist(), prompts, names) for iterations in (1, 4, 10)]
        shares = (fmean(to_tokens(ids)[len(p):-1] == name for ids, p, name in result) for result in results)
        print(f"  {label:36}" + "".join(f"{share:11.1%}" for share in shares))
    print("  Why generation is hard for it: the length must be given first, the words of a round are predicted\n"
          "  independently, and in training most of the text was visible.")


def train_and_test() -> dict:
    """Pretrain, fine-tune for each task, evaluate on the test numbers, save. Returns the models by task."""
    check_constants()
    torch.manual_seed(SEED)
    pretrained, loaders = build_model(), create_dataloaders()
    print("PRETRAINING: predict masked tokens")
    print_configuration(pretrained, loaders)
    train(pretrained, loaders)
    found = evaluate(pretrained, loaders.test)
    models = {"masked_lm": pretrained}
    numbers = loaders.test.dataset.numbers
    print(f"\nTEST on {len(numbers):,} held-out numbers: {found['accuracy']:.2%} masked-token accuracy\n"
          f"  Loss: {found['loss']:.3f}, and {describe_floor(loaders.test.dataset)}")
    for task in NUM_CLASSES:
        print(f"\nFINE-TUNING: {task}, {toy_dataset.NUM_TRAIN:,} labeled numbers")
        loaders = create_dataloaders(task=task)
        models[task], _ = fine_tune(pretrained, loaders, task)
        found = evaluate(models[task], loaders.test)
        print(f"TEST on {len(numbers):,} held-out numbers: {found['exact_match']:.2%} exact match, "
              f"{len(found['mistakes'])} wrong")
        for line in answer(models[task], [numbers[i] for i in found["mistakes"][:5]]):
            print("  " + line)
    for task, model in models.items():
        save(model, checkpoint_of(task))
    print(f"Saved to {CHECKPOINT.with_name(CHECKPOINT.stem)}*.pt")
    return models


def parse_question(text: str) -> int | str:
    """A number, or a text of digits and words. Raises InputError if it is neither."""
    if "<" in text or " " in text:
        parse_text(text)
        return text
    return parse_number(text)


def tasks_of(question: int | str) -> list[str]:
    """The tasks whose models answer a question."""
    if isinstance(question, int):
        return ["tagging", "counting"]
    return ["masked_lm"] if "<MASK>" in question else ["matching"]


def main(*questions: int | str) -> None:
    """Without questions: train, test, show. With questions: answer them, with the saved models if they are there."""
    tasks = {task for question in questions for task in tasks_of(question)}
    if tasks and all(checkpoint_of(task).exists() for task in tasks):
        models = {task: load(checkpoint_of(task), build_model(task=task)) for task in tasks}
    else:
        models = train_and_test()
    for question in questions:
        if isinstance(question, int):
            print("\n".join(answer(models[task], [question])[0] for task in tasks_of(question)))
        elif "<MASK>" in question:
            print(f"{question} -> {fill_in(models['masked_lm'], [question])[0]}")
        else:
            model = models["matching"].eval()
            label = model(torch.tensor([parse_text(question)], device=get_device())).argmax().item()
            print(f"{question} -> {describe_labels('matching', [label])}")
    if questions:
        return
    print("\nEXAMPLES: masks filled in")
    for text, filled in zip(MASKED_EXAMPLES, fill_in(models["masked_lm"], MASKED_EXAMPLES)):
        print(f"  {text}\n    -> {filled}")
    print("\nEXAMPLES: each digit's place value, and the number of words in the name")
    for tags, count in zip(*(answer(models[task], EXAMPLES) for task in ("tagging", "counting"))):
        print(f"  {tags}; {count.partition(' -> ')[2]}")
    print("\nEXAMPLES: do the digits and the name stand for the same number?\n  "
          + "\n  ".join(answer(models["matching"], EXAMPLES)))
    show_neighbors(models)
    show_mask_predict(models["masked_lm"], models["counting"])
    show_pretraining_gain(models["masked_lm"])
    print("\nNext: python encoder_only.py 342 '90210 <SEP> ninety <MASK> two hundred ten', or change a constant\n"
          "at the top; then `diff encoder_only.py decoder_only.py` shows what turns BERT into GPT.")


if __name__ == "__main__":
    run_script(main, parse_question)
