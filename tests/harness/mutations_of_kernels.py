"""Mutations of kernels/: what test_mutations.py breaks there. name: Mutation."""

from mutations import DEVICES, HARD, IDENTITIES, MAIN, PROPERTIES, ROWS, WILD_READ, WORKSPACE, Mutation

SCALE = "    if HAS_SCALE:\n        z *= logit_scale\n"
SOFTCAP = "    if HAS_SOFTCAP:\n        z = softcap * tanh(z * (1.0 / softcap))"

PRIMITIVES = {
    "no rescaling when the maximum moves": Mutation(
        "kernels/primitives.py",
        "s = s_a * w_a + s_b * w_b",
        "s = s_a + s_b * w_b",
        f"{MAIN}::test_linear_statistics[fused-plain-ragged]",
    ),
    "-inf minus -inf": Mutation(
        "kernels/primitives.py",
        "return tl.where(m == NEG_INF, 0.0, m)",
        "return m",
        f"{HARD}::test_a_whole_tile_of_minus_infinity_and_single_ones[fused]",
    ),
    "0 times -inf": Mutation(
        "kernels/primitives.py",
        "tl.maximum(d, UNDERFLOW)",
        "d",
        f"{HARD}::test_a_whole_tile_of_minus_infinity_and_single_ones[fused]",
    ),
    "the bias added twice": Mutation(
        "kernels/primitives.py",
        "z += b_bias",
        "z += 2 * b_bias",
        f"{HARD}::test_a_bias_is_counted_once_whatever_the_vocabulary_is_split_into[fused]",
    ),
    "tanh without its polynomial": Mutation(
        "kernels/primitives.py",
        "tl.where(tl.abs(x) < 0.625, x + x * y * near, far)",
        "far",
        f"{HARD}::test_a_softcap_far_above_the_logits_costs_no_digits[1000.0-fused]",
    ),
    "softcap before scale": Mutation(
        "kernels/primitives.py",
        f"{SCALE}{SOFTCAP}",
        f"{SOFTCAP}\n{SCALE}",
        f"{PROPERTIES}::test_within_the_budget[fused-linear-stats]",
    ),
}

LINEAR = {
    "columns outside count as exp(0)": Mutation(
        "kernels/linear_vocab_stats.py",
        "if o_v + BLOCK_V > vocab:",
        "if o_v + BLOCK_V > vocab + BLOCK_V:",
        f"{HARD}::test_softcap_with_a_ragged_vocabulary[fused-1.0-129]",
    ),
    "the last of the width left out": Mutation(
        "kernels/linear_vocab_stats.py",
        "range(0, dim, BLOCK_D)",
        "range(0, dim - dim % BLOCK_D, BLOCK_D)",
        f"{HARD}::test_any_width_and_strided_weights[70-fused]",
    ),
    "the target of the next tile": Mutation(
        "kernels/linear_vocab_stats.py",
        "tl.where(col[None, :] == target[:, None], z, 0.0)",
        "tl.where(col[None, :] == target[:, None] + 1, z, 0.0)",
        f"{MAIN}::test_linear_statistics[fused-plain-ragged]",
    ),
    "a maximum that begins at 0": Mutation(
        "kernels/linear_vocab_stats.py",
        "m = tl.full([BLOCK_N], NEG_INF, dtype=tl.float32)",
        "m = tl.zeros([BLOCK_N], dtype=tl.float32)",
        f"{IDENTITIES}::test_a_constant_added_to_a_states_logits_changes_only_its_value[linear-fused]",
    ),
    "a persistent grid that goes around once": Mutation(
        "kernels/linear_vocab_stats.py",
        "* splits, tl.num_programs(0)):",
        "* splits, tl.cdiv(n_rows, BLOCK_N) * splits):",
        f"{HARD}::test_a_persistent_grid_gives_the_same_bits[3]",
    ),
    "hidden's offset in 32 bits": Mutation(
        "kernels/linear_vocab_stats.py",
        "row.to(tl.int64)[:, None] * stride_hidden",
        "row[:, None] * stride_hidden",
        f"{DEVICES}::test_rows_beyond_32_bit_offsets[hidden]",
        WILD_READ,
    ),
    "weight's offset in 32 bits": Mutation(
        "kernels/linear_vocab_stats.py",
        "col.to(tl.int64)[:, None] * stride_weight",
        "col[:, None] * stride_weight",
        f"{DEVICES}::test_rows_beyond_32_bit_offsets[weight]",
        WILD_READ,
    ),
    "a base that is not aligned taken for a bulk copy": Mutation(
        "kernels/linear_vocab_stats.py",
        "and x.data_ptr() % 16 == 0",
        "",
        f"{DEVICES}::test_tma_is_used_only_for_tensors_it_can_read",
    ),
}

LOGITS = {
    "the last block filled up with zeros": Mutation(
        "kernels/vocab_stats.py",
        "first, vocab, NEG_INF, ALIGNED, BLOCK_V)",
        "first, vocab, 0.0, ALIGNED, BLOCK_V)",
        f"{PROPERTIES}::test_within_the_budget[fused-logits-stats]",
    ),
    "strides ignored": Mutation(
        "kernels/vocab_stats.py",
        "col.to(tl.int64) * stride",
        "col.to(tl.int64)",
        f"{HARD}::test_strides_are_honoured_and_inputs_left_alone[transposed-fused]",
    ),
    "one pitch for all sequences": Mutation(
        "kernels/vocab_stats.py",
        "row // n_inner * stride_outer + row % n_inner * stride_inner",
        "row * stride_inner",
        f"{HARD}::test_strides_are_honoured_and_inputs_left_alone[slice of time-fused]",
    ),
    "the row's offset in 32 bits": Mutation(
        "kernels/vocab_stats.py",
        "row = (tl.program_id(0) // splits).to(tl.int64)",
        "row = tl.program_id(0) // splits",
        f"{DEVICES}::test_rows_beyond_32_bit_offsets[logits]",
        WILD_READ,
    ),
    "the row's offset in 32 bits, backward": Mutation(
        "kernels/vocab_stats.py",
        "row = (tl.program_id(0) // blocks).to(tl.int64)",
        "row = tl.program_id(0) // blocks",
        f"{DEVICES}::test_gradients_of_rows_beyond_32_bit_offsets",
        WILD_READ,
    ),
    "the first entry left out": Mutation(
        "kernels/vocab_stats.py",
        "tl.store(p_s + o, total(e))",
        "tl.store(p_s + o, total(tl.where(col == 0, 0.0, e)))",
        f"{IDENTITIES}::test_the_order_of_the_vocabulary_does_not_matter[logits-fused]",
    ),
    "one upstream gradient for every row": Mutation(
        "kernels/vocab_stats.py",
        "g = tl.load(g_lse + row)",
        "g = tl.load(g_lse)",
        f"{MAIN}::test_gradients[False-logits-fused]",
    ),
    "entropy left out of the gradient": Mutation(
        "kernels/vocab_stats.py",
        "dz = e * share * (constant - b_g_entropy * (d * LN2))",
        "dz = e * share * constant",
        f"{MAIN}::test_gradients[False-logits-fused]",
    ),
    "a dead row's gradient": Mutation(
        "kernels/vocab_stats.py",
        "tl.where(b_log_total == NEG_INF, 0.0, dz)",
        "dz",
        f"{HARD}::test_a_row_that_is_all_minus_infinity_has_one_defined_answer[fused]",
    ),
    "p from a rounded lse": Mutation(
        "kernels/vocab_stats.py",
        "share = tl.exp2(-b_log_total * LOG2E) / alpha",
        "share = tl.exp2((finite_or_zero(tl.load(shift + row)) / alpha"
        " - (finite_or_zero(tl.load(shift + row)) / alpha + b_log_total)) * LOG2E) / alpha",
        f"{HARD}::test_gradients_under_a_common_offset[fused-1000000.0]",
    ),
    "the vocabulary's part forgotten": Mutation(
        "kernels/vocab_stats.py",
        "== tl.load(targets + row) - first",
        "== tl.load(targets + row)",
        f"{WORKSPACE}::test_statistics_and_gradients[many tiles-dtype0-plain]",
    ),
}

COMBINE = {
    "alpha forgotten in lse": Mutation(
        "kernels/combine.py",
        "lse = m / b_alpha + log_total",
        "lse = m + log_total",
        f"{IDENTITIES}::test_twice_the_logits_at_twice_the_temperature_is_the_same_policy[logits-fused]",
    ),
    "alpha forgotten in the value": Mutation(
        "kernels/combine.py",
        "m_n + alpha_n * log_total_of(s_n)",
        "m_n + log_total_of(s_n)",
        f"{MAIN}::test_token_rewards[logits-default-fused-ragged]",
    ),
    "the value of a terminal state": Mutation(
        "kernels/combine.py",
        "value_after = tl.where(s_n == 0.0, 0.0,",
        "value_after = tl.where(s_n != s_n, 0.0,",
        f"{MAIN}::test_token_rewards[logits-default-fused-ragged]",
    ),
    "the successor's row is one too far": Mutation(
        "kernels/combine.py",
        "p_m, p_s, p_t, after, m_after",
        "p_m, p_s, p_t, after + 1, m_after",
        f"{MAIN}::test_token_rewards[logits-default-fused-ragged]",
    ),
    "logprob from a rounded lse": Mutation(
        "kernels/combine.py",
        "(z - finite_or_zero(m)) / alpha - log_total)",
        "z / alpha - (m / alpha + log_total))",
        f"{IDENTITIES}::test_a_constant_added_to_a_states_logits_changes_only_its_value[logits-fused]",
    ),
    "entropy not held to its bounds": Mutation(
        "kernels/combine.py",
        "h = tl.minimum(tl.maximum(h, 0.0), log_vocab)",
        "h = h + 0.0",
        f"{HARD}::test_entropy_of_equal_logits_is_at_most_ln_v[151669-fused]",
    ),
    "-100 taken for a token": Mutation(
        "kernels/combine.py",
        "has_target = target != NO_TARGET",
        "has_target = target == target",
        f"{MAIN}::test_other_statistics_are_right_without_a_target[fused]",
    ),
    "a target in the padding": Mutation(
        "kernels/combine.py",
        "(target >= vocab)",
        "(target > vocab)",
        f"{MAIN}::test_a_target_outside_the_vocabulary_gives_nan_where_no_check_runs[333-fused]",
    ),
    "rows off the mask hold what was there": Mutation(
        "kernels/combine.py",
        "tl.where(m_value, b_value, 0.0)",
        "b_value",
        f"{MAIN}::test_empty_inputs_and_masks[fused]",
    ),
    "a batch-dependent order of sums": Mutation(
        "kernels/combine.py",
        "mask=(split < n_splits)[:, None]",
        "mask=(split < n_splits - (pitch > 8))[:, None]",
        f"{HARD}::test_a_row_alone_is_bitwise_the_same_row_in_a_batch_and_from_run_to_run[linear]",
    ),
}

PLAN = {
    "the kernel's packed boundaries one token late": Mutation(
        "kernels/rows.py",
        "mask=m, other=-1) == x",
        "mask=m, other=-1) == x - 1",
        f"{IDENTITIES}::test_packed_sequences_equal_separate_sequences_bitwise[fused-logits]",
    ),
    "a block of the mask forgotten": Mutation(
        "kernels/rows.py",
        "count += tl.sum(keeps, 0)",
        "count = tl.sum(keeps, 0)",
        f"{ROWS}::test_the_rows_that_a_mask_keeps[0.4-5000]",
    ),
}

OF_KERNELS = PRIMITIVES | LINEAR | LOGITS | COMBINE | PLAN
