"""What test_mutations.py breaks: each a mistake that was made somewhere, or is easily made here."""

HARD, MAIN, DEVICES = "tests/test_hard_cases.py", "tests/test_functional.py", "tests/test_devices.py"
PROPERTIES, IDENTITIES = "tests/test_properties.py", "tests/test_identities.py"
SCALE = "    if HAS_SCALE:\n        z *= logit_scale\n"
SOFTCAP = "    if HAS_SOFTCAP:\n        z = softcap * tanh(z * (1.0 / softcap))"
# name: (file, what stands there, what replaces it, the test that must fail)
MORE_MUTATIONS = {
    # --- offsets
    "the row's offset in 32 bits": (
        "kernels/vocab_stats.py",
        "row = (tl.program_id(0) // splits).to(tl.int64)",
        "row = tl.program_id(0) // splits",
        f"{DEVICES}::test_rows_beyond_32_bit_offsets[logits]",
    ),
    "the row's offset in 32 bits, backward": (
        "kernels/vocab_stats.py",
        "row = (tl.program_id(0) // blocks).to(tl.int64)",
        "row = tl.program_id(0) // blocks",
        f"{DEVICES}::test_gradients_of_rows_beyond_32_bit_offsets",
    ),
    "hidden's offset in 32 bits": (
        "kernels/linear_vocab_stats.py",
        "row.to(tl.int64)[:, None] * stride_hidden",
        "row[:, None] * stride_hidden",
        f"{DEVICES}::test_rows_beyond_32_bit_offsets[hidden]",
    ),
    "weight's offset in 32 bits": (
        "kernels/linear_vocab_stats.py",
        "col.to(tl.int64)[:, None] * stride_weight",
        "col[:, None] * stride_weight",
        f"{DEVICES}::test_rows_beyond_32_bit_offsets[weight]",
    ),
    # --- properties and identities, each on at least one copy
    "the last block filled up with zeros": (
        "kernels/vocab_stats.py",
        "other=NEG_INF).to(tl.float32)",
        "other=0.0).to(tl.float32)",
        f"{PROPERTIES}::test_within_the_budget[fused-logits-stats]",
    ),
    "softcap before scale": (
        "kernels/primitives.py",
        f"{SCALE}{SOFTCAP}",
        f"{SOFTCAP}\n{SCALE}",
        f"{PROPERTIES}::test_within_the_budget[fused-linear-stats]",
    ),
    "a dead state's value": (
        "rows.py",
        "(successor < 0) | dead[after]",
        "successor < 0",
        f"{PROPERTIES}::test_within_the_budget[chunked-logits-rewards]",
    ),
    "0 times the logarithm of 0": (
        "chunked.py",
        "log_p.clamp_(min=EXP_IS_ZERO)",
        "log_p",
        f"{PROPERTIES}::test_within_the_budget[chunked-logits-stats]",
    ),
    "the caller's logits as a workspace": (
        "chunked.py",
        "buffers[0].view(length(rows), length(columns)).copy_(source.load(rows, columns))",
        "source.load(rows, columns).float().contiguous()",
        f"{PROPERTIES}::test_within_the_budget[chunked-logits-stats]",
    ),
    "the scale forgotten behind a bias": (
        "chunked_tiles.py",
        "out.addmm_(self.hidden, self.weight.T, beta=scale, alpha=scale)",
        "out.addmm_(self.hidden, self.weight.T, beta=1.0, alpha=scale)",
        f"{PROPERTIES}::test_within_the_budget[chunked-linear-rewards]",
    ),
    "arithmetic in the logits' own dtype": (
        "chunked.py",
        "device) for _ in range(2)]\n    stats.target_logit",
        "device, logits.dtype) for _ in range(2)]\n    stats.target_logit",
        f"{PROPERTIES}::test_low_precision_logits_equal_the_same_numbers_in_float32[chunked]",
    ),
    "entropy left out of the chunked gradient": (
        "chunked_backward.py",
        "-grads.entropy * share",
        "0.0 * grads.entropy * share",
        f"{PROPERTIES}::test_gradients_within_the_budget[chunked-logits-stats]",
    ),
    "alpha forgotten in the gradient of the next value": (
        "rows.py",
        "-alpha * g_reward",
        "-g_reward",
        f"{PROPERTIES}::test_gradients_within_the_budget[fused-logits-rewards]",
    ),
    "softcap left out of the gradient": (
        "chunked_backward.py",
        "mul_(-1 / self._softcap**2).add_(1.0)",
        "mul_(0.0).add_(1.0)",
        f"{PROPERTIES}::test_gradients_within_the_budget[chunked-linear-stats]",
    ),
    "the oracle packs without boundaries": (
        "reference.py",
        "return starts | offsets[:-1].view_as(starts)",
        "return starts",
        f"{PROPERTIES}::test_the_oracle_is_the_definition[logits]",
    ),
    "the oracle's softcap without its factor": (
        "reference.py",
        "z = softcap * torch.tanh(z / softcap)",
        "z = torch.tanh(z / softcap)",
        f"{PROPERTIES}::test_the_oracle_is_the_definition[linear]",
    ),
    "the successor is the state itself": (
        "rows.py",
        "row + 1, -1)",
        "row, -1)",
        f"{IDENTITIES}::test_rewards_up_to_a_terminal_token_sum_to_the_logprobs_and_the_first_value[logits-fused]",
    ),
    "logprob from a rounded lse": (
        "kernels/combine.py",
        "(q - finite_or_zero(m)) / alpha - log_total)",
        "q / alpha - lse)",
        f"{IDENTITIES}::test_a_constant_on_a_states_logits_moves_its_value_and_nothing_else[logits-fused]",
    ),
    "a maximum that begins at 0": (
        "kernels/linear_vocab_stats.py",
        "m = tl.full([BLOCK_N], NEG_INF, dtype=tl.float32)",
        "m = tl.zeros([BLOCK_N], dtype=tl.float32)",
        f"{IDENTITIES}::test_a_constant_on_a_states_logits_moves_its_value_and_nothing_else[linear-fused]",
    ),
    "the first entry left out": (
        "kernels/vocab_stats.py",
        "tl.store(p_s + o, tl.sum(e, 0))",
        "tl.store(p_s + o, tl.sum(tl.where(col == 0, 0.0, e), 0))",
        f"{IDENTITIES}::test_the_order_of_the_vocabulary_does_not_matter[logits-fused]",
    ),
    "alpha forgotten in lse": (
        "kernels/combine.py",
        "lse = m / alpha + log_total",
        "lse = m + log_total",
        f"{IDENTITIES}::test_twice_the_logits_at_twice_the_temperature_is_the_same_policy[logits-fused]",
    ),
    "one split fewer in larger batches": (
        "kernels/combine.py",
        "for _ in range(1, n_splits):\n        o += n_rows\n        b_m",
        "for _ in range(1, n_splits - (n_rows > 8)):\n        o += n_rows\n        b_m",
        f"{IDENTITIES}::test_batches_put_together_are_bitwise_the_batches_apart[fused-linear]",
    ),
    "packed boundaries ignored": (
        "reference.py",
        "return starts | offsets[:-1].view_as(starts)",
        "return starts",
        f"{IDENTITIES}::test_packed_sequences_are_bitwise_the_sequences_apart[fused-logits]",
    ),
    "row numbers of before the others went": (
        "ops.py",
        "place[successor.clamp(min=0)]",
        "successor.clamp(max=len(rows) - 1)",
        f"{IDENTITIES}::test_fewer_scored_tokens_leave_the_others_as_they_were[fused-linear]",
    ),
    "alpha forgotten in the gradient of the logprob": (
        "rows.py",
        "g_reward + g_logprob / alpha",
        "g_reward + g_logprob",
        f"{IDENTITIES}::test_gradients_are_slopes[logits-fused]",
    ),
    # --- the rest of what peers got wrong
    "entropy not held to its bounds": (
        "kernels/combine.py",
        "h = tl.minimum(tl.maximum(h, 0.0), log_vocab)",
        "h = h + 0.0",
        f"{HARD}::test_entropy_of_equal_logits_is_at_most_ln_v[151669-fused]",
    ),
    "-100 taken for a token": (
        "kernels/combine.py",
        "has_target = target != NO_TARGET",
        "has_target = target == target",
        f"{MAIN}::test_no_target_leaves_the_other_statistics_right[fused]",
    ),
    "a target in the padding": (
        "kernels/combine.py",
        "(target >= vocab)",
        "(target > vocab)",
        f"{MAIN}::test_a_target_outside_the_vocabulary_where_nothing_can_raise[333-fused]",
    ),
    "dweight accumulated in bf16": (
        "chunked_backward.py",
        "return out.zero_() if out.dtype == torch.float32 else torch.zeros_like(out, dtype=torch.float32)",
        "return out.zero_()",
        f"{HARD}::test_weight_gradient_in_bf16_accumulates_in_fp32[chunked]",
    ),
    "statistics changed by their backward": (
        "chunked_backward.py",
        "share = torch.exp(-log_total)",
        "share = torch.exp(stats.log_total.neg_())",
        f"{HARD}::test_backward_twice_gives_the_same_gradient[logits-chunked]",
    ),
    "one compilation a length": (
        "ops.py",
        "targets.new_empty(targets.shape[0] if want else 0",
        "targets.new_empty(int(targets.shape[0]) if want else 0",
        "tests/test_ops.py::test_many_lengths_compile_a_bounded_number_of_times[chunked]",
    ),
}
