"""Mutations of the other implementations, of what surrounds them and of the oracle. name: Mutation."""

from mutations import EXTRAS, HARD, IDENTITIES, MAIN, OPS, PROPERTIES, ROWS, Mutation

CHUNKED = {
    "0 times the logarithm of 0": Mutation(
        "vocab/chunked.py",
        "y.clamp_(min=EXP_IS_ZERO)",
        "y",
        f"{PROPERTIES}::test_within_the_budget[chunked-logits-stats]",
    ),
    "a row added up lane by lane": Mutation(
        "vocab/chunked.py",
        "total = weight.sum(-1)",
        "total = torch.log_softmax(y, -1).amax(-1).neg().exp()",
        f"{HARD}::test_one_token_that_stands_out_among_equal_ones[chunked]",
    ),
    "the caller's logits as a workspace": Mutation(
        "vocab/chunked.py",
        "y = torch.sub(z, peak.unsqueeze(-1), out=work.y.view(*shape))",
        "y = work.y.view(*shape).copy_(z.sub_(peak.unsqueeze(-1)))",
        f"{HARD}::test_strides_are_honoured_and_inputs_left_alone[unaligned-chunked]",
    ),
    "arithmetic in the logits' own dtype": Mutation(
        "vocab/chunked.py",
        "z = work.y.view(length(rows), length(columns)).copy_(z)",
        "pass",
        f"{PROPERTIES}::test_low_precision_logits_equal_the_same_numbers_in_float32[chunked]",
    ),
    "no pieces of no rows": Mutation(
        "vocab/chunked_tiles.py",
        "pieces = max(1, -(-total // most))",
        "pieces = -(-total // most)",
        f"{MAIN}::test_empty_inputs_and_masks[chunked]",
        "ZeroDivisionError",
    ),
    "the scale forgotten behind a bias": Mutation(
        "vocab/chunked_tiles.py",
        "z.addmm_(self.hidden, weight, beta=scale, alpha=scale)",
        "z.addmm_(self.hidden, weight, beta=1.0, alpha=scale)",
        f"{PROPERTIES}::test_within_the_budget[chunked-linear-rewards]",
    ),
    "entropy left out of the chunked gradient": Mutation(
        "vocab/chunked_backward.py",
        "-grads.entropy * share",
        "0.0 * grads.entropy * share",
        f"{PROPERTIES}::test_gradients_within_the_budget[chunked-logits-stats]",
    ),
    "softcap left out of the gradient": Mutation(
        "vocab/chunked_backward.py",
        "mul_(-1 / self._softcap**2).add_(1.0)",
        "mul_(0.0).add_(1.0)",
        f"{PROPERTIES}::test_gradients_within_the_budget[chunked-linear-stats]",
    ),
    "dweight rounded to bf16 after each tile": Mutation(
        "vocab/chunked_backward.py",
        "into.addmm_(left.float(), right.float())",
        "into.addmm_(left.float(), right.float()).copy_(into.bfloat16())",
        f"{HARD}::test_weight_gradient_in_bf16_accumulates_in_fp32[chunked]",
    ),
    "statistics changed by their backward": Mutation(
        "vocab/chunked_backward.py",
        "share = torch.exp(-log_total)",
        "share = torch.exp(stats.log_total.data.neg_())",
        f"{HARD}::test_backward_twice_gives_the_same_gradient[logits-chunked]",
    ),
}

COMPILED = {
    "compiled: no rescaling when the maximum moves": Mutation(
        "vocab/compiled.cpp", "total *= shrink;", "", f"{HARD}::test_odd_vocabularies[compiled-peaked-50257]"
    ),
    "compiled: the last vector filled up with zeros": Mutation(
        "vocab/compiled.cpp",
        "length, buffer, -INFINITY);",
        "length, buffer, 0);",
        f"{HARD}::test_odd_vocabularies[compiled-all negative-50257]",
    ),
    "compiled: a lane of 128 numbers in one strip": Mutation(
        "vocab/compiled.cpp",
        "STRIP = 256",
        "STRIP = 2048",
        f"{HARD}::test_one_token_that_stands_out_among_equal_ones[compiled]",
    ),
    "compiled: -inf minus -inf": Mutation(
        "vocab/compiled.cpp",
        "state.peak == -INFINITY ? 0.0f : static_cast<float>(state.peak)",
        "static_cast<float>(state.peak)",
        f"{HARD}::test_a_whole_tile_of_minus_infinity_and_single_ones[compiled]",
    ),
    "compiled: strides ignored": Mutation(
        "vocab/compiled.cpp",
        "buffer[i] = load(z[i * stride]);",
        "buffer[i] = load(z[i]);",
        f"{HARD}::test_strides_are_honoured_and_inputs_left_alone[transposed-compiled]",
    ),
}

REWARDS = {
    "a dead state's value": Mutation(
        "vocab/rows.py",
        "(successor < 0) | dead[after]",
        "successor < 0",
        f"{PROPERTIES}::test_within_the_budget[chunked-logits-rewards]",
    ),
    "the successor is the state itself": Mutation(
        "vocab/plan.py",
        "row + 1, -1)",
        "row, -1)",
        f"{IDENTITIES}::test_rewards_up_to_a_terminal_token_sum_to_the_logprobs_and_the_first_value[logits-chunked]",
    ),
    "alpha forgotten in the gradient of the next value": Mutation(
        "vocab/rows.py",
        "-at(alpha, after) * g_reward",
        "-g_reward",
        f"{PROPERTIES}::test_gradients_within_the_budget[fused-logits-rewards]",
    ),
    "alpha forgotten in the gradient of the logprob": Mutation(
        "vocab/rows.py",
        "g_reward + g_logprob / alpha",
        "g_reward + g_logprob",
        f"{IDENTITIES}::test_gradients_match_finite_differences[logits-fused]",
    ),
    "the mean of no tokens": Mutation(
        "returns.py", "mask.sum(-1).clamp(min=1)", "mask.sum(-1)", f"{MAIN}::test_sequence_score"
    ),
}

OPERATORS = {
    "an expanded upstream gradient read as dense": Mutation(
        "vocab/fused.py",
        "None if x is None else x.contiguous() for x in rows",
        "x for x in rows",
        f"{HARD}::test_strides_are_honoured_and_inputs_left_alone[padded rows-fused]",
    ),
    "one row cut into other pieces than many": Mutation(
        "vocab/fused.py",
        "config=_logits_config(vocab),",
        "config=_logits_config(vocab if logits.shape[1] > 1 else 4096),",
        f"{HARD}::test_a_row_alone_is_bitwise_the_same_row_in_a_batch_and_from_run_to_run[logits]",
    ),
    "the first kept row in place of the next": Mutation(
        "kernels/combine.py",
        "after = tl.load(place + after, mask=m_after, other=0).to(tl.int64)",
        # Not `after` itself: behind the kept rows nothing is defined, so that test would fail in some runs only.
        "after = after * 0",
        f"{IDENTITIES}::test_masking_tokens_out_does_not_change_the_others[fused-linear]",
    ),
    "one compilation a length": Mutation(
        "vocab/ops.py",
        "targets.new_empty(targets.shape[0] if want else 0",
        "targets.new_empty(int(targets.shape[0]) if want else 0",
        f"{OPS}::test_many_lengths_compile_a_bounded_number_of_times[chunked]",
        "FailOnRecompileLimitHit",
    ),
    "a mask read back in a CUDA graph": Mutation(
        "vocab/workspace.py",
        "return EveryRow(mask) if mask is not None and _capturing(mask.device) else KeptRows(mask)",
        "return KeptRows(mask)",
        f"{ROWS}::test_a_captured_gradient_reads_nothing_back_and_is_the_same",
    ),
    "rows off the mask in a CUDA graph's gradient": Mutation(
        "vocab/workspace.py",
        "torch.where(mask, stats.log_total, -torch.inf)",
        "stats.log_total + 0.0",
        f"{ROWS}::test_a_captured_gradient_reads_nothing_back_and_is_the_same",
    ),
}

ORACLE = {
    "the oracle packs without boundaries": Mutation(
        "vocab/rows.py",
        "return starts | offsets[:-1].view_as(starts)",
        "return starts",
        f"{PROPERTIES}::test_the_oracle_is_the_definition[logits]",
    ),
    "packed boundaries one token early": Mutation(
        "vocab/rows.py",
        "offsets[cu_seqlens.long()] = True",
        "offsets[cu_seqlens.long() - 1] = True",
        f"{ROWS}::test_the_kernels_plan_is_the_one_of_torch[7]",
    ),
    "the oracle's softcap without its factor": Mutation(
        "vocab/reference.py",
        "z = softcap * torch.tanh(z / softcap)",
        "z = torch.tanh(z / softcap)",
        f"{PROPERTIES}::test_the_oracle_is_the_definition[linear]",
    ),
}

TEMPERATURES_AND_NAMES = {
    "the next state valued at this token's temperature": Mutation(
        "kernels/combine.py",
        "m_n + alpha_n * log_total_of(s_n)",
        "m_n + b_alpha * log_total_of(s_n)",
        f"{EXTRAS}::test_the_alpha_of_a_token_is_that_of_the_state_before_it[fused]",
    ),
    "a temperature taken at the token before": Mutation(
        "vocab/reference.py",
        "torch.where(chosen, shift_left(alpha), alpha)",
        "alpha",
        f"{EXTRAS}::test_the_alpha_of_a_token_is_that_of_the_state_before_it[chunked]",
    ),
    "temperatures of before the others went": Mutation(
        "kernels/linear_vocab_stats.py",
        "scale_of(c, o_row, m_row, ALPHAS)",
        "scale_of(c, row, m_row, ALPHAS)",
        f"{EXTRAS}::test_rewards_under_many_temperatures_sum_to_logprobs_and_the_first_value[fused]",
    ),
    "the gradient of the next value at this token's temperature": Mutation(
        "vocab/rows.py",
        "-at(alpha, after) * g_reward",
        "-alpha * g_reward",
        f"{EXTRAS}::test_the_gradient_of_the_next_value_has_its_own_temperature[chunked]",
    ),
    "the first row's temperature for all": Mutation(
        "vocab/chunked.py",
        "self._alpha[rows, None, None]",
        "self._alpha[:1, None, None]",
        f"{EXTRAS}::test_the_gradient_of_the_next_value_has_its_own_temperature[chunked]",
    ),
    "a named logprob from a rounded lse": Mutation(
        "vocab/rows.py",
        "(logits - shift) / per_row(alpha) - log_total",
        "logits / per_row(alpha) - stats.lse.unsqueeze(1)",
        f"{EXTRAS}::test_named_logprobs_are_those_of_the_softmax[1000000.0-chunked]",
    ),
    "a named token without its share of lse": Mutation(
        "vocab/rows.py",
        "lse=grads.lse - g.sum(1)",
        "lse=grads.lse",
        f"{EXTRAS}::test_the_gradient_of_a_token_named_twice[chunked]",
    ),
    "a token named twice gets one gradient": Mutation(
        "kernels/vocab_stats.py",
        "dz += tl.where(neighbours(o_v, BLOCK_V) == token, tl.load(g_named + row * NAMES + k), 0.0)",
        "dz = tl.where(neighbours(o_v, BLOCK_V) == token, tl.load(g_named + row * NAMES + k), dz)",
        f"{EXTRAS}::test_the_gradient_of_a_token_named_twice[fused]",
    ),
    "a name outside the vocabulary holds what was there": Mutation(
        "kernels/combine.py",
        "lost | (token < 0) | (token >= vocab)",
        "lost",
        f"{EXTRAS}::test_names_outside_the_vocabulary",
    ),
}

AROUND_KERNELS = TEMPERATURES_AND_NAMES | CHUNKED | COMPILED | REWARDS | OPERATORS | ORACLE
