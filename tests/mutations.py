"""What test_mutations.py breaks: each a mistake that was made somewhere, or is easily made here."""

HARD, MAIN, DEVICES = "tests/test_hard_cases.py", "tests/test_functional.py", "tests/test_devices.py"
PROPERTIES, IDENTITIES = "tests/test_properties.py", "tests/test_identities.py"
# name: (file, what stands there, what replaces it, the test that must fail)
MUTATIONS = {
    "columns outside count as exp(0)": (
        "kernels/linear_vocab_stats.py",
        "if o_v + BLOCK_V > vocab:",
        "if o_v + BLOCK_V > vocab + BLOCK_V:",
        f"{HARD}::test_softcap_with_a_ragged_vocabulary[fused-1.0-129]",
    ),
    "no rescaling when the maximum moves": (
        "kernels/primitives.py",
        "s = s_a * w_a + s_b * w_b",
        "s = s_a + s_b * w_b",
        f"{MAIN}::test_linear_statistics[fused-plain-ragged]",
    ),
    "-inf minus -inf": (
        "kernels/primitives.py",
        "return tl.where(m == NEG_INF, 0.0, m)",
        "return m",
        f"{HARD}::test_a_whole_tile_of_minus_infinity_and_single_ones[fused]",
    ),
    "the target of the next tile": (
        "kernels/linear_vocab_stats.py",
        "tl.where(col[None, :] == target[:, None], z, 0.0)",
        "tl.where(col[None, :] == target[:, None] + 1, z, 0.0)",
        f"{MAIN}::test_linear_statistics[fused-plain-ragged]",
    ),
    "alpha forgotten in the value": (
        "kernels/combine.py",
        "m_n + alpha * log_total_of(s_n)",
        "m_n + log_total_of(s_n)",
        f"{MAIN}::test_token_rewards[logits-default-fused-ragged]",
    ),
    "the value of a terminal state": (
        "kernels/combine.py",
        "value_after = tl.where(s_n == 0.0, 0.0,",
        "value_after = tl.where(s_n != s_n, 0.0,",
        f"{MAIN}::test_token_rewards[logits-default-fused-ragged]",
    ),
    "one upstream gradient for every row": (
        "kernels/vocab_stats.py",
        "g = tl.load(g_lse + row)",
        "g = tl.load(g_lse)",
        f"{MAIN}::test_gradients[False-logits-fused]",
    ),
    "the bias added twice": (
        "kernels/primitives.py",
        "z += b_bias",
        "z += 2 * b_bias",
        f"{HARD}::test_a_bias_is_counted_once_whatever_the_vocabulary_is_split_into[fused]",
    ),
    "tanh without its polynomial": (
        "kernels/primitives.py",
        "tl.where(tl.abs(x) < 0.625, x + x * y * near, far)",
        "far",
        f"{HARD}::test_a_softcap_far_above_the_logits_costs_no_digits[1000.0-fused]",
    ),
    "strides ignored": (
        "kernels/vocab_stats.py",
        "col.to(tl.int64) * stride_vocab",
        "col.to(tl.int64)",
        f"{HARD}::test_strides_are_honoured_and_inputs_left_alone[transposed-fused]",
    ),
    "entropy left out of the gradient": (
        "kernels/vocab_stats.py",
        "dz = e * share * (constant - b_g_entropy * (d * LN2))",
        "dz = e * share * constant",
        f"{MAIN}::test_gradients[False-logits-fused]",
    ),
    "the successor's row is one too far": (
        "kernels/combine.py",
        "p_m, p_s, p_t, after, m_row",
        "p_m, p_s, p_t, after + 1, m_row",
        f"{MAIN}::test_token_rewards[logits-default-fused-ragged]",
    ),
    "the vocabulary's part forgotten": (
        "kernels/vocab_stats.py",
        "tl.load(targets + row) - first, tl.load(g_target + row)",
        "tl.load(targets + row), tl.load(g_target + row)",
        "tests/test_workspace.py::test_statistics_and_gradients[many tiles-dtype0-plain]",
    ),
    "a batch-dependent order of sums": (
        "kernels/combine.py",
        "for _ in range(1, n_splits):\n        o += n_rows\n        b_m",
        "for _ in range(1, n_splits - (n_rows > 8)):\n        o += n_rows\n        b_m",
        f"{HARD}::test_a_row_alone_is_bitwise_the_same_row_in_a_batch_and_from_run_to_run[linear]",
    ),
    "compiled: no rescaling when the maximum moves": (
        "compiled.cpp",
        "total *= shrink;",
        "",
        f"{HARD}::test_odd_vocabularies[compiled-peaked-50257]",
    ),
    "compiled: the last vector filled up with zeros": (
        "compiled.cpp",
        "length, buffer, -INFINITY);",
        "length, buffer, 0);",
        f"{HARD}::test_odd_vocabularies[compiled-all negative-50257]",
    ),
}
