"""Mutations of the divergence of two distributions. name: Mutation."""

from mutations import WILD_READ, Mutation

DIVERGENCE = "tests/vocab/test_divergence.py"

OF_DIVERGENCE = {
    "the forward KL taken for the reverse one": Mutation(
        "divergence.py",
        'if kind == "reverse-kl":',
        'if kind == "forward-kl":',
        f"{DIVERGENCE}::test_the_oracle_is_the_definition",
    ),
    "beta given to the student": Mutation(
        "divergence.py",
        'float(beta) if kind == "jsd"',
        '1 - float(beta) if kind == "jsd"',
        f"{DIVERGENCE}::test_the_oracle_is_the_definition",
    ),
    "the oracle's KL of q from p": Mutation(
        "vocab/divergence/reference.py",
        "p * (log_p - log_q)",
        "q * (log_q - log_p)",
        f"{DIVERGENCE}::test_the_oracle_is_the_definition",
    ),
    "divergence: the last tile filled up with what lies there": Mutation(
        "kernels/divergence.py",
        "q, None, row, o_v, vocab,",
        "q, None, row, o_v, vocab + BLOCK_V,",
        f"{DIVERGENCE}::test_values_and_gradients[200-forward-kl-fused]",
        WILD_READ,
    ),
    "divergence: the two log-sum-exps lost": Mutation(
        "kernels/divergence.py",
        "* LN2 + (log_total_q - log_total_p)\n",
        "* LN2\n",
        f"{DIVERGENCE}::test_values_and_gradients[200-forward-kl-fused]",
    ),
    "divergence: an excluded word counts as 0": Mutation(
        "kernels/divergence.py",
        "tl.where(outside, INF, e_p",
        "tl.where(outside, 0.0, e_p",
        f"{DIVERGENCE}::test_excluded_words[fused]",
    ),
    "divergence: the mean left out of the gradient": Mutation(
        "kernels/divergence_backward.py",
        "(b_q - b_p - b_mean)",
        "(b_q - b_p)",
        f"{DIVERGENCE}::test_values_and_gradients[200-reverse-kl-fused]",
    ),
    "divergence, chunked: the two log-sum-exps lost": Mutation(
        "vocab/divergence/chunked.py",
        "(dead[0], 1.0) + (out.log_total_q - out.log_total_p)",
        "(dead[0], 1.0)",
        f"{DIVERGENCE}::test_values_and_gradients[200-forward-kl-chunked]",
    ),
    "divergence, chunked: 0 times the logarithm of 0": Mutation(
        "vocab/divergence/chunked.py",
        "y.clamp_(min=EXP_IS_ZERO)  # 0",
        "y  # 0",
        f"{DIVERGENCE}::test_excluded_words[chunked]",
    ),
    "divergence, chunked: beta and 1 - beta swapped in the mixture": Mutation(
        "vocab/divergence/chunked.py",
        ".mul_(2 * beta - 1).add_(1 - beta)",
        ".mul_(1 - 2 * beta).add_(beta)",
        f"{DIVERGENCE}::test_values_and_gradients[200-jsd-chunked]",
    ),
    "divergence: softcap left out of the gradient": Mutation(
        "vocab/divergence/backward.py",
        "slope.mul_(-1 / self._head.softcap**2).add_(1.0)",
        "slope.mul_(0.0).add_(1.0)",
        f"{DIVERGENCE}::test_hidden_states[forward-kl-37]",
    ),
}
