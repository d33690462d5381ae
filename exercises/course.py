"""course.py - the exercises of implement.py, in order. It contains hints and typical mistakes: don't read ahead.

To add one, add an entry. Everything else (where the function is, what it should return, whether the tests exist) is
taken from the project, and tests/test_exercises.py checks the entry.
"""

from typing import NamedTuple


class Exercise(NamedTuple):
    """One function to write.

    place: file and function, "decoder_only.py::KVCache.append"
    task: what it has to do, in a few sentences; the docstring, which is kept, says the rest
    see: what explains it, as "README.md, <heading>", optionally followed by "; figures/<picture>"
    hints: two or three, each saying more than the one before
    properties: a sentence -> the tests that check it, as pytest names them below tests/
    mistakes: typical ones, {name: (text in the original function, what it becomes)}; the learner is told its name
    examples: lines of code to show what is wrong, as doctests without results. The docstring's own come first
    only_loop: only the body of the function's for loop is to be written, not the whole function
    """

    place: str
    task: str
    see: str
    hints: list[str]
    properties: dict[str, list[str]]
    mistakes: dict[str, tuple[str, str]]
    examples: str = ""
    only_loop: bool = False

    @property
    def file(self) -> str:
        return self.place.split("::")[0]

    @property
    def name(self) -> str:
        return self.place.split("::")[1]

    @property
    def number(self) -> int:
        return EXERCISES.index(self) + 1


EXERCISES = [
    Exercise(
        place="toy_dataset.py::make_padding_mask",
        task="""Sequences in a batch are padded to the length of the longest. Write the mask that keeps attention away
        from the padding, in a shape that broadcasts against attention scores of shape (B, H, T, S).""",
        see="README.md, The three masks; figures/masks.png",
        hints=["A comparison of ids with PAD_ID gives a boolean tensor (B, S). Which positions have to be True?",
               "Indexing with None inserts a dimension of size 1: x[:, None] turns (B, S) into (B, 1, S).",
               "The dimensions of size 1 stand for heads and queries, so they come between B and S."],
        properties={
            "It is boolean, (B, 1, 1, S), True at real tokens and False at padding":
                ["test_toy_dataset.py::test_padding_fills_ids_with_pad_and_labels_with_ignore"],
            "Padding changes no output of the encoder at a real token":
                ["test_encoder_only.py::test_padding_changes_no_real_output_and_no_pooled_output"],
            "Padding on the left or on the right changes no output of the decoder at a real token":
                ["test_decoder_only.py::test_padding_on_either_side_changes_no_real_position"],
            "Padding in the source changes no output of the encoder-decoder":
                ["test_encoder_decoder.py::test_the_content_of_source_padding_changes_nothing"],
        },
        mistakes={
            "the mask is inverted, so only padding is attended to": ("ids != PAD_ID", "ids == PAD_ID"),
            "the dimensions of size 1 for heads and queries are missing": ("[:, None, None, :]", ""),
            "the shape is (B, 1, S, 1), which masks queries instead of keys":
                ("[:, None, None, :]", "[:, None, :, None]"),
        },
        examples="""
        >>> make_padding_mask(torch.tensor([[4, 15, 16, 5], [4, 17, 5, 0]])).shape
        >>> make_padding_mask(torch.tensor([[4, 15, 16, 5], [4, 17, 5, 0]])).flatten(1).int()
        """,
    ),
    Exercise(
        place="decoder_only.py::make_causal_mask",
        task="""Write the mask that hides the future: row t may attend to the columns up to its own position. With a KV
        cache there are fewer rows than columns, T < S, and the rows are the last T positions.""",
        see="README.md, The three masks; figures/masks.png",
        hints=["tensor.tril() keeps the lower triangle and clears the rest. Its argument `diagonal` moves the border.",
               "The first of the T rows is position S - T: it may attend to S - T + 1 columns."],
        properties={
            "The rows are the last T of S positions, each attending to itself and all earlier ones":
                ["test_decoder_only.py::test_the_rows_of_a_causal_mask_are_the_last_positions"],
            "Changing a token leaves all earlier outputs of the model exactly as they were":
                ["test_decoder_only.py::test_changing_a_token_leaves_all_earlier_outputs_exactly_as_they_were"],
            "The gradient of an output with respect to a later input is exactly 0":
                ["test_decoder_only.py::test_the_gradient_with_respect_to_a_later_input_is_exactly_zero"],
            "The logits are the same with the cache and without it":
                ["test_decoder_only.py::test_cached_logits_equal_recomputed_logits_at_every_step"],
        },
        mistakes={
            "the diagonal is off by one, so each position attends to its own target, the next token":
                ("S - T)", "S - T + 1)"),
            "the diagonal is off by one, so no position attends to itself": ("S - T)", "S - T - 1)"),
            "the rows are taken to be the first T positions, not the last T": ("diagonal=S - T", ""),
            "it keeps the upper triangle, so the past is masked instead of the future": ("tril(", "triu("),
        },
        examples="""
        >>> make_causal_mask(2, 4).int()
        >>> make_causal_mask(2, 2).dtype
        """,
    ),
    Exercise(
        place="decoder_only.py::scaled_dot_product_attention",
        task="""The heart of every transformer: scores, scale, mask, softmax, dropout, weighted average of the values.
        Return the output and the weights (the weights as they are before dropout).""",
        see="README.md, Attention; figures/softmax_scaling.png",
        hints=["Four lines do it: scores, masking (if there is a mask), softmax, product. key.transpose(-2, -1) swaps "
               "the last two dimensions whatever comes before them.",
               "masked_fill(~mask, value) writes value where the mask is False. The value has to become exactly 0 "
               "after softmax, in float16 too, and a row that is masked completely must not become NaN: "
               "torch.finfo(scores.dtype).min does both.",
               "Each query's weights sum to 1 over the keys, which are the last dimension. dropout is None or a module "
               "to apply to the weights."],
        properties={
            "The weights of each query sum to 1, and masked ones are exactly 0":
                ["test_all_architectures.py::test_attention_weights_sum_to_one_and_masked_ones_are_exactly_zero"],
            "Output and gradients equal PyTorch's F.scaled_dot_product_attention, without and with a mask":
                ["test_all_architectures.py::test_attention_equals_pytorchs_forward_and_backward"],
            "A query with nothing to attend to stays finite in float32, float16 and bfloat16":
                ["test_all_architectures.py::"
                 "test_a_fully_masked_row_stays_finite_in_every_precision"],
            "Dropout acts on the weights that mix the values, not on the weights that are returned":
                ["test_all_architectures.py::"
                 "test_dropout_zeroes_attention_weights_after_softmax_but_not_the_returned_ones"],
        },
        mistakes={
            "the scores are not divided by sqrt(d_k)": (" / math.sqrt(query.size(-1)) ", " "),
            "the scores are divided by d_k, not by its square root": ("math.sqrt(query.size(-1))", "query.size(-1)"),
            "softmax runs over the queries, not over the keys": ("softmax(dim=-1)", "softmax(dim=-2)"),
            "the mask is inverted": ("~mask", "mask"),
            "the mask is applied after softmax, so the weights of a query no longer sum to 1":
                ("scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)\n"
                 "    weights = scores.softmax(dim=-1) ",
                 "pass\n    weights = scores.softmax(dim=-1) * (1 if mask is None else mask) #"),
            "dropout is applied to the weights that are returned":
                ("return mixing @ value, weights", "return mixing @ value, mixing"),
            "masked scores are -inf, which turns a row with nothing to attend to into NaN":
                ("torch.finfo(scores.dtype).min", "-math.inf"),
        },
        examples="""
        >>> nothing = torch.zeros(3, 3, dtype=torch.bool)
        >>> scaled_dot_product_attention(query, key, value, nothing)[1]
        >>> scaled_dot_product_attention(query, key, value, dropout=lambda weights: 0 * weights)
        """,
    ),
    Exercise(
        place="encoder_only.py::MultiHeadAttention.split_heads",
        task="""All heads are computed by one matrix product, side by side in C = H * d_k numbers. Make the heads a
        separate dimension, so that attention runs over all of them at once.""",
        see="README.md, Multi-head attention; figures/attention_encoder.png",
        hints=["Two steps: cut the last dimension in two, then reorder the dimensions.",
               "x.unflatten(-1, (H, d_k)) gives (B, T, H, d_k). Head 0 owns the first d_k numbers, not every H-th.",
               "Swapping dimensions needs transpose. A reshape to (B, H, T, d_k) gives the right shape but mixes "
               "positions."],
        properties={
            "Multi-head attention equals PyTorch's nn.MultiheadAttention on the same weights":
                ["test_all_architectures.py::test_multi_head_attention_equals_pytorchs_on_the_same_weights"],
            "There is one attention map (B, H, T, T) for each layer":
                ["test_encoder_only.py::test_there_is_an_attention_map_for_each_layer_and_head"],
            "Without positions, permuting the input permutes the output":
                ["test_encoder_only.py::"
                 "test_permuting_the_input_permutes_the_output_only_without_positions"],
        },
        mistakes={
            "a reshape replaces the transpose, so the heads mix positions":
                ("x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)",
                 "x.reshape(x.size(0), self.num_heads, x.size(1), -1)"),
            "the transpose is missing, so the shape is (B, T, H, d_k)": (".transpose(1, 2)", ""),
            "each head takes every H-th number, not d_k neighbors":
                ("x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)",
                 "x.unflatten(-1, (-1, self.num_heads)).permute(0, 3, 1, 2)"),
        },
        examples="""
        >>> attention = MultiHeadAttention(d_model=4, num_heads=2, dropout=0.0)
        >>> x = torch.arange(12).view(1, 3, 4)
        >>> attention.split_heads(x).shape
        >>> attention.split_heads(x)
        """,
    ),
    Exercise(
        place="decoder_only.py::PositionalEncoding.__init__",
        task="""Build the table of sines and cosines, (max_length, C), from the formula in the class's docstring. Start
        with super().__init__(), and register the table as a buffer called "table" that is not saved (persistent=False).
        Work with tensors; no loop is needed.""",
        see="README.md, Positional encoding; figures/positional_encoding.png",
        hints=["angles = positions * frequencies, with positions (max_length, 1) and frequencies (C/2): broadcasting "
               "gives (max_length, C/2).",
               "The exponents 2i / C for i = 0, 1, ... are torch.arange(0, d_model, 2) / d_model.",
               "Sines and cosines alternate: torch.stack(..., dim=-1) pairs them, flatten(start_dim=1) lines them up."],
        properties={
            "Position t holds sin and cos of t / 10000^(2i/C), side by side":
                ["test_all_architectures.py::test_positions_are_the_sines_and_cosines_of_the_paper"],
            "The table is a buffer, not a parameter, and not part of a checkpoint":
                ["test_all_architectures.py::"
                 "test_loading_restores_what_was_saved_and_the_file_is_safe_to_read[decoder_only]",
                 "test_all_architectures.py::test_the_parameter_count_matches_the_formula[decoder_only]"],
            "The output of one layer depends on the order of earlier tokens only because of the positions":
                ["test_decoder_only.py::"
                 "test_one_layer_depends_on_the_order_of_earlier_tokens_only_with_positions"],
        },
        mistakes={
            "all sines come first, then all cosines, instead of alternating":
                ("torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(start_dim=1)",
                 "torch.cat([angles.sin(), angles.cos()], dim=-1)"),
            "sine and cosine are swapped": ("[angles.sin(), angles.cos()]", "[angles.cos(), angles.sin()]"),
            "the exponent is i / C, not 2i / C": ("torch.arange(0, d_model, 2)", "torch.arange(d_model // 2)"),
            "the minus sign is missing, so the frequencies grow with i": ("(-torch.arange", "(torch.arange"),
        },
        examples="""
        >>> encoding = PositionalEncoding(d_model=6, max_length=10)
        >>> encoding.table.shape
        >>> encoding.table[0]
        >>> encoding.table[3]
        """,
    ),
    Exercise(
        place="decoder_only.py::DecoderLayer.forward",
        task="""Put the parts together: two residual branches, attention and feed-forward, each with a norm before it
        (pre-norm) and dropout after it. mask, cache and attention_maps are for the attention.""",
        see="README.md, Residuals and layer norm, pre and post; figures/gradient_flow.png",
        hints=["x = x + dropout(branch(norm(x))), twice.",
               "The first branch is self.attention, its norm self.attention_norm; the second self.feed_forward."],
        properties={
            "The layer equals PyTorch's pre-norm nn.TransformerEncoderLayer on the same weights":
                ["test_all_architectures.py::test_a_layer_equals_pytorchs_pre_norm_layer_on_the_same_weights[True]"],
            "The logits are the same with the cache and without it":
                ["test_decoder_only.py::test_cached_logits_equal_recomputed_logits_at_every_step"],
            "Dropout acts on what each branch adds to the residual stream":
                ["test_all_architectures.py::"
                 "test_dropout_is_applied_to_what_each_branch_adds_to_the_residual_stream[gpt.DecoderLayer]"],
        },
        mistakes={
            "there is no residual connection around attention": ("x = x + self.dropout(self.attention(",
                                                        "x = self.dropout(self.attention("),
            "the norm comes after the sum (post-norm)":
                ("x = x + self.dropout(self.attention(self.attention_norm(x), mask, cache, attention_maps))",
                 "x = self.attention_norm(x + self.dropout(self.attention(x, mask, cache, attention_maps)))"),
            "the feed-forward network gets x without its norm": ("self.feed_forward_norm(x)", "x"),
            "the cache is not passed on": ("mask, cache,", "mask, None,"),
            "dropout is missing around the feed-forward network":
                ("self.dropout(self.feed_forward(self.feed_forward_norm(x)))",
                 "self.feed_forward(self.feed_forward_norm(x))"),
        },
        examples="""
        >>> _ = torch.manual_seed(0)
        >>> layer = DecoderLayer(d_model=4, num_heads=2, d_ff=8, dropout=0.0)
        >>> x, cache = torch.randn(1, 3, 4), KVCache()
        >>> layer(x, make_causal_mask(3, 3), cache).round(decimals=3)
        >>> len(cache)
        >>> layer.dropout = nn.Dropout(1.0)
        >>> layer(x, None).equal(x)
        """,
    ),
    Exercise(
        place="decoder_only.py::compute_loss",
        task="""The loss of a batch, as a sum over its targets and their number. Positions whose target is IGNORE
        (padding, and whatever the task does not predict) count in neither.""",
        see="README.md, Training; figures/training_curves.png",
        hints=["predict(model, batch) gives logits (B, T, V) and targets (B, T). F.cross_entropy takes (N, V) and (N).",
               "F.cross_entropy takes logits, not probabilities, and has the arguments ignore_index and reduction."],
        properties={
            "Padding and ignored targets carry no loss and are not counted; a batch without targets gives 0":
                ["test_all_architectures.py::test_padding_and_ignored_targets_carry_no_loss[decoder_only]"],
            "Losses of unequal micro-batches add up to the loss of the whole batch":
                ["test_all_architectures.py::"
                 "test_losses_of_unequal_micro_batches_add_up_to_the_batch_loss[decoder_only]"],
            "The loss of an untrained model is near ln V":
                ["test_all_architectures.py::test_the_first_loss_is_near_that_of_uniform_guessing[decoder_only]"],
        },
        mistakes={
            "the loss is a mean, not a sum": ('reduction="sum"', 'reduction="mean"'),
            "ignored positions are counted": ("(targets != IGNORE).sum()", "torch.tensor(targets.numel())"),
            "softmax is applied before F.cross_entropy, which applies its own":
                ("logits.flatten(0, 1)", "logits.softmax(dim=-1).flatten(0, 1)"),
        },
        examples="""
        >>> _ = torch.manual_seed(0)
        >>> model = build_model(d_model=8, num_layers=1, num_heads=2, d_ff=8).cpu().eval()
        >>> one, two = (toy_dataset.decoder_only_example(number) for number in (7, 342))
        >>> compute_loss(model, toy_dataset.pad_batch([one]))
        >>> compute_loss(model, toy_dataset.pad_batch([one, two]))
        """,
    ),
    Exercise(
        place="decoder_only.py::learning_rate_at",
        task="""The schedule: linear warmup to the peak, then half a cosine down to FINAL_LEARNING_RATE_RATIO * peak.
        Steps count from 0 to num_steps - 1. The first rate must not be 0, the last one is exactly the lowest, and
        warmup takes at most a fifth of a short run.""",
        see="README.md, Training; figures/learning_rate_schedule.png",
        hints=["Limit warmup_steps first: min(warmup_steps, num_steps // 5). With 0 warmup steps, avoid a "
               "division by 0.",
               "During warmup the rate is peak * (step + 1) / warmup_steps. After it, progress runs up to 1, which it "
               "reaches at step = num_steps - 1.",
               "0.5 * (1 + cos(pi * progress)) falls from 1 to 0; the rate falls from peak to the lowest."],
        properties={
            "The rate rises from above 0 to its peak and falls to its lowest at the last step, for long and short runs":
                ["test_all_architectures.py::test_the_learning_rate_rises_to_its_peak_and_falls_to_its_minimum"],
            "A short run is not all warmup, and the decay is half a cosine":
                ["test_all_architectures.py::"
                 "test_a_short_run_is_not_all_warmup_and_the_decay_is_half_a_cosine[decoder_only]"],
        },
        mistakes={
            "the first step has the rate 0, so it is wasted": ("(step + 1) / warmup_steps", "step / warmup_steps"),
            "the last step does not reach the lowest rate": ("(step + 1 - warmup_steps)", "(step - warmup_steps)"),
            "the rate falls along a straight line, not along half a cosine":
                ("0.5 * (1 + math.cos(math.pi * progress))", "(1 - progress)"),
            "the rate falls to 0, not to the lowest rate": ("lowest + (peak - lowest)", "peak"),
            "a short run is all warmup": ("min(warmup_steps, num_steps // 5)", "warmup_steps"),
        },
        examples="""
        >>> [round(learning_rate_at(step, 20, 1.0, 4), 3) for step in (0, 1, 3, 4, 12, 19)]
        >>> [round(learning_rate_at(step, 10, 1.0, 200), 3) for step in (0, 1, 2, 9)]
        >>> [round(learning_rate_at(step, 3, 1.0, 0), 3) for step in range(3)]
        """,
    ),
    Exercise(
        place="encoder_only.py::mask_tokens",
        task="""BERT's corruption: choose each digit and word with MASK_PROBABILITY; of the chosen, 80% become <MASK>,
        10% a random digit or word, 10% stay. Draw from the given generator (on the CPU), in any order.""",
        see="README.md, Training; figures/training_curves.png",
        hints=["Two independent random numbers for each token: one decides whether it is chosen, the other which of "
               "the three happens to it. torch.rand(..., generator=generator).",
               "Special tokens have the ids below len(SPECIAL_TOKENS), so a random digit or word is "
               "torch.randint(len(SPECIAL_TOKENS), len(VOCABULARY), ids.shape, generator=generator).",
               "masked_fill and torch.where do the rest. The targets are ids.masked_fill(~chosen, IGNORE)."],
        properties={
            "Special tokens are never chosen, and targets are the originals where a token was chosen, else IGNORE":
                ["test_encoder_only.py::"
                 "test_special_tokens_are_never_chosen_and_only_chosen_tokens_are_targets"],
            "15% are chosen; of these 80% are masked, 10% replaced, 10% left alone":
                ["test_encoder_only.py::test_of_the_chosen_tokens_80_percent_are_masked_10_random_10_unchanged"],
            "A generator makes it repeatable and leaves the global random state alone":
                ["test_encoder_only.py::"
                 "test_masking_differs_each_time_unless_a_generator_fixes_it"],
        },
        mistakes={
            "special tokens are chosen too": ("(ids >= len(SPECIAL_TOKENS)) & (chance", "(chance"),
            "every chosen token becomes <MASK>": ("torch.where(replace, others, ids.masked_fill(hide, MASK_ID))",
                                                "ids.masked_fill(chosen, MASK_ID)"),
            "the loss covers all tokens, not only the chosen ones": ("ids.masked_fill(~chosen, IGNORE)", "ids"),
            "20% of the chosen are replaced, and none is left unchanged": (" & (kind < 0.9)", ""),
            "the generator is not used": ("torch.rand(2, *ids.shape, generator=generator)",
                                          "torch.rand(2, *ids.shape)"),
        },
        examples="""
        >>> _ = torch.manual_seed(0)
        >>> ids = torch.tensor([toy_dataset.masked_lm_example(777777)["ids"]]).expand(20000, -1)
        >>> corrupted, targets = mask_tokens(ids, torch.Generator().manual_seed(0))
        >>> words, chosen = ids >= len(SPECIAL_TOKENS), targets != IGNORE
        >>> chosen[~words].any().item()
        >>> f"{chosen[words].float().mean():.0%} chosen"
        >>> f"{(corrupted[chosen] == MASK_ID).float().mean():.0%} of the chosen masked"
        >>> f"{(corrupted[chosen] == ids[chosen]).float().mean():.0%} of the chosen left alone"
        >>> corrupted.equal(mask_tokens(ids, torch.Generator().manual_seed(0))[0])
        """,
    ),
    Exercise(
        place="decoder_only.py::keep_top_k",
        task="""A decoding filter: keep the logits of the k most likely tokens in each row and set all others to -inf.
        Exactly k survive, ties included; if k is larger than the vocabulary, all do.""",
        see="README.md, Inference; figures/sampling_strategies.png",
        hints=["logits.topk(k, dim=-1) returns values and indices. Comparing with the k-th value keeps too many where "
               "there are ties; the indices do not.",
               "Start with torch.full_like(logits, -math.inf), and scatter the kept logits into it."],
        properties={
            "Exactly min(k, V) tokens survive, ties included, with their logits unchanged":
                ["test_decoder_only.py::test_exactly_k_tokens_survive_top_k_ties_included"],
            "The example in its docstring is correct":
                ["test_scripts.py::test_the_examples_in_the_docstrings_are_true[decoder_only]"],
        },
        mistakes={
            "ties let in more than k tokens":
                ("torch.full_like(logits, -math.inf).scatter(-1, kept, logits.gather(-1, kept))",
                 "logits.masked_fill(logits < logits.gather(-1, kept).min(dim=-1, keepdim=True).values, -math.inf)"),
            "the others become 0 instead of -inf, so they can still be sampled": ("-math.inf", "0.0"),
            "the k least likely are kept": ("dim=-1).indices", "dim=-1, largest=False).indices"),
            "it fails when k is larger than the vocabulary": ("min(k, logits.size(-1))", "k"),
        },
        examples="""
        >>> keep_top_k(torch.tensor([[1.0, 1.0, 1.0, 0.0], [4.0, 3.0, 2.0, 1.0]]), k=2)
        >>> keep_top_k(torch.tensor([[1.0, 2.0]]), k=5)
        """,
    ),
    Exercise(
        place="decoder_only.py::keep_top_p",
        task="""Nucleus sampling: in each row keep the smallest set of most likely tokens whose total probability is
        at least p, and set all others to -inf. At least one token always survives; p = 1 keeps all.""",
        see="README.md, Inference; figures/sampling_strategies.png",
        hints=["Sort in descending order; decide in that order; scatter the result back to where each token came from.",
               "A token is kept unless the tokens before it already reach p. With c the cumulative sum of the sorted "
               "probabilities, those before token i have c[i] - probability[i].",
               "p = 1 is a special case: rounding can make the sum reach 1 one token too early."],
        properties={
            "The smallest set that reaches p survives, the token that crosses p included":
                ["test_decoder_only.py::test_top_p_keeps_the_smallest_set_that_reaches_p"],
            "It keeps as many tokens as a plain loop over the sorted probabilities":
                ["test_decoder_only.py::test_top_p_keeps_exactly_as_many_tokens_as_a_plain_loop_would"],
        },
        mistakes={
            "the token that crosses p is dropped": ("before >= p", "before + probabilities >= p"),
            "one token too many is kept": ("before >= p", "before - probabilities >= p"),
            "the result is left in sorted order":
                ("torch.empty_like(logits).scatter(-1, order, descending)", "descending"),
            "the sort is ascending": ("descending=True, stable", "descending=False, stable"),
        },
        examples="""
        >>> keep_top_p(torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log(), p=0.7).softmax(-1)
        >>> keep_top_p(torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log(), p=0.4).softmax(-1)
        """,
    ),
    Exercise(
        place="decoder_only.py::KVCache.append",
        task="""Generation computes one new position at a time. Add its keys and values to those of all earlier
        positions, store the result, and return it.""",
        see="README.md, Inference; figures/kv_cache.png",
        hints=["The first time there is nothing to add to: self.key is None.",
               "torch.cat along the positions, dimension 2 of (B, H, T, d_k); the old ones come first."],
        properties={
            "The logits are the same with the cache and without it, at every step":
                ["test_decoder_only.py::test_cached_logits_equal_recomputed_logits_at_every_step"],
            "After the first call it holds exactly the given keys and values":
                ["variations/test_positional_encodings.py::"
                 "test_rotary_attention_rotates_keys_before_caching_and_never_values"],
        },
        mistakes={
            "the new keys come before the old ones": ("[self.key, key]", "[key, self.key]"),
            "only the newest key and value are stored":
                ("        self.key, self.value = key, value\n        return key, value",
                 "        new = key[:, :, -1:], value[:, :, -1:]\n        self.key, self.value = new\n"
                 "        return key, value"),
            "nothing is stored": ("        self.key, self.value = key, value\n", ""),
            "the concatenation runs along the heads, not along the positions":
                ("[self.key, key], dim=2", "[self.key, key], dim=1"),
        },
        examples="""
        >>> cache, old, new = KVCache(), torch.arange(4.0).view(1, 1, 2, 2), torch.full((1, 1, 1, 2), 9.0)
        >>> _ = cache.append(old, -old)
        >>> cache.append(new, -new)[0]
        >>> len(cache)
        >>> cache.value
        """,
    ),
    Exercise(
        place="train_all.py::accumulate_gradients",
        task="""Gradients of several micro-batches, computed one after the other, have to add up to the gradient of the
        one large batch that does not fit in memory. Read the docstring first, then add_gradient and update around it.
        Several processes share the micro-batches by RANK and WORLD_SIZE; here there is one, 0 of 1.""",
        see="README.md, Training",
        hints=["backward() adds to .grad, so gradients are cleared once, before the first micro-batch.",
               "This process has the micro-batches range(num_micro_batches)[RANK::WORLD_SIZE]. For each: take the next "
               "batch (to the device), torch.manual_seed(seed_for(\"noise\", step, j)), then add_gradient.",
               "Sum up three numbers in a tensor: the loss, the targets, and the tokens that are not PAD_ID in the "
               "fields ids, source and target. (Not graded: with several processes model.no_sync() saves time.)"],
        properties={
            "Four micro-batches of unequal token counts give the gradient of one large batch":
                ["test_train_all.py::"
                 "test_four_micro_batches_of_unequal_token_counts_give_the_gradient_of_one_large_batch"],
            "Each micro-batch has its own dropout and masks":
                ["test_train_all.py::test_each_micro_batch_has_its_own_masks_and_dropout"],
            "The micro-batch size does not change what is learned":
                ["test_train_all.py::test_the_micro_batch_size_does_not_change_what_is_learned"],
            "Training takes the same steps as the architecture file's own train":
                ["test_train_all.py::"
                 "test_loss_and_steps_equal_those_of_the_architecture_files_own_training"],
        },
        mistakes={
            "gradients are cleared before each micro-batch, so only the last one counts":
                ("    for j in mine:\n", "    for j in mine:\n        model.zero_grad()\n"),
            "gradients are never cleared": ("    model.zero_grad()\n", ""),
            "the last micro-batch is left out": ("for j in mine:", "for j in mine[:-1] or mine:"),
            "all micro-batches have the same dropout and masks": ('("noise", step, j)', '("noise", step, 0)'),
        },
        examples="""
        >>> _ = torch.manual_seed(0)
        >>> sizes = dict(d_model=8, num_layers=1, num_heads=2, d_ff=8, dropout=0.5)
        >>> job = Job("example", decoder_only, sizes, toy_dataset.decoder_only_example, 1e-3, 1)
        >>> model = decoder_only.build_model(**sizes).cpu()
        >>> pieces = [toy_dataset.pad_batch([job.make_example(n)]) for n in (7, 777777)]
        >>> accumulate_gradients(job, model, iter(pieces), 2, 0)[1:]
        >>> model.embedding.weight.grad.norm()
        >>> _ = accumulate_gradients(job, model, iter(pieces), 2, 0)
        >>> model.embedding.weight.grad.norm()
        """,
    ),
    Exercise(
        place="encoder_decoder.py::beam_search_one",
        task="""One step of beam search, the body of the loop: extend every open hypothesis by every token, keep the
        best, collect what is finished, stop when nothing can become better. The code before the loop
        and after it is given.""",
        see="README.md, Inference; figures/beam_search_tree.png",
        hints=["A hypothesis is (log_prob, ids), ids starting with SOS_ID. model.decode(ids, memory, source_ids)[0, "
               "-1] are the logits of its next token. Never extend by PAD_ID.",
               "After sorting the candidates: among the best beam_width, those that end in EOS_ID are finished, with "
               "the score log_prob / length**length_penalty and without SOS_ID. The others, as many as beam_width, "
               "stay open. At the limit, open ones count as finished.",
               "Stop when the best finished score is at least best / limit**length_penalty, with best the log_prob of "
               "the best open one; and when beam_width finished ones all reach best / length**length_penalty."],
        properties={
            "The example in the docstring is correct":
                ["test_beam_search.py::test_the_example_in_the_docstring_is_true"],
            "Width 2 finds the most probable text where greedy decoding misses it":
                ["test_beam_search.py::"
                 "test_greedy_decoding_misses_the_most_probable_text_and_a_beam_of_2_finds_it"],
            "A hypothesis that ends outside the best beam_width candidates is dropped":
                ["test_beam_search.py::test_a_finished_candidate_outside_the_best_w_is_dropped"],
            "On untrained models, where many texts compete, it agrees with the batched beam_search":
                ["test_beam_search.py::test_both_agree_on_untrained_models_where_many_texts_compete"],
        },
        mistakes={
            "the score is not divided by the length": ("log_prob / length**length_penalty, ids[1:]",
                                                       "log_prob, ids[1:]"),
            "finished hypotheses are extended": (" if candidate[1][-1] != EOS_ID]", "]"),
            "log-probabilities are not added up": ("(log_prob + more,", "(more,"),
            "texts that end outside the best beam_width candidates count as finished":
                ("in candidates[:beam_width]", "in candidates"),
        },
        examples="""
        >>> _ = torch.manual_seed(0)
        >>> model = build_model(d_model=8, num_layers=1, num_heads=2, d_ff=8).cpu().eval()
        >>> [(round(score, 3), ids) for score, ids in beam_search_one(model, make_source(42), 2, 1.0, 3)]
        >>> found = [ids for _, ids in beam_search_one(model, make_source(7), 3000, 1.0, 2)]
        >>> sum(PAD_ID in ids for ids in found)
        >>> sum(EOS_ID in ids[:-1] for ids in found)
        >>> [ids for _, ids in beam_search_one(model, make_source(7), 1, 0.0, 3)]
        """,
        only_loop=True,
    ),
    Exercise(
        place="variations/positional_encodings.py::rotate",
        task="""Rotary position embedding (RoPE): rotate each pair of dimensions of a query or key by an angle
        proportional to its position, so that positions enter their dot product only as a distance.""",
        see="README.md, Positional encoding; figures/positional_encoding.png",
        hints=["positions (T, 1) times frequencies (d_k/2) gives angles (T, d_k/2), and from them cosines and sines.",
               "The pairs are (i, i + d_k/2): the first half of the last dimension and the second half.",
               "Rotating (a, b) by an angle gives (a cos - b sin, a sin + b cos)."],
        properties={
            "It is multiplication by a complex number of length 1":
                ["variations/test_positional_encodings.py::test_rotation_is_multiplication_by_a_complex_number"],
            "Positions enter the score of a rotated query and key only as their signed distance":
                ["variations/test_positional_encodings.py::"
                 "test_positions_enter_a_rotated_score_only_as_their_signed_distance"],
            "With all positions 0, rotary attention equals the base file's attention":
                ["variations/test_positional_encodings.py::"
                 "test_with_all_positions_0_rotary_attention_equals_the_base_attention"],
        },
        mistakes={
            "the pairs are neighbors, (2i, 2i + 1), not (i, i + d_k/2)":
                ("    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)",
                 "    first, second = x[..., ::2], x[..., 1::2]\n    return torch.stack("
                 "[first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(start_dim=-2)"),
            "a sign is wrong, so it is not a rotation": ("first * cos - second * sin", "first * cos + second * sin"),
            "the minus sign is missing, so the frequencies grow with i": ("(-torch.arange", "(torch.arange"),
            "the exponent is i / d_k, not 2i / d_k": ("device=x.device) / half)", "device=x.device) / (2 * half))"),
        },
        examples="""
        >>> rotate(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 1]))
        >>> rotate(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([1]))
        """,
    ),
    Exercise(
        place="variations/parameter_efficient_fine_tuning.py::LoRALinear.__init__",
        task="""LoRA: freeze a trained Linear layer, and add a trainable low-rank update beside it. Create what forward
        uses: inner, scale, and the two new matrices, down (A) and up (B), as Linear layers without bias. Training has
        to start from exactly the base model. Begin with super().__init__().""",
        see="README.md, Advanced topics",
        hints=["down maps from in_features to rank, up from rank to out_features. The scale is LORA_ALPHA / rank.",
               "The update is the product B A. It is zero if one of the two is, but if both are, no gradient reaches "
               "either: leave A random and set B to zero."],
        properties={
            "Before training the model equals the base model bit for bit":
                ["variations/test_parameter_efficient_fine_tuning.py::"
                 "test_before_training_it_equals_the_base_bit_for_bit[LoRA, rank 4]"],
            "It is a Linear layer with the merged weight W + (alpha / r) B A, an update of rank r":
                ["variations/test_parameter_efficient_fine_tuning.py::"
                 "test_lora_is_a_linear_layer_with_the_merged_weight"],
            "Training changes A and B and nothing else":
                ["variations/test_parameter_efficient_fine_tuning.py::"
                 "test_a_step_changes_what_is_trained_and_nothing_else[LoRA, rank 4]"],
        },
        mistakes={
            "B is random too, so training does not start from the base model":
                ("        nn.init.zeros_(self.up.weight)\n", ""),
            "A is zero too, so no gradient reaches either matrix":
                ("nn.init.zeros_(self.up.weight)", "nn.init.zeros_(self.up.weight), nn.init.zeros_(self.down.weight)"),
            "the scale is not divided by the rank": ("LORA_ALPHA / rank", "LORA_ALPHA"),
        },
        examples="""
        >>> _ = torch.manual_seed(0)
        >>> layer = LoRALinear(nn.Linear(6, 5), rank=2)
        >>> {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()}
        >>> layer.scale
        >>> layer.up.weight.any().item(), layer.down.weight.any().item()
        """,
    ),
]
