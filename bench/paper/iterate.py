r"""`python -m bench.paper.iterate`: repeated rounds of RL on the endogenous reward of the policy from the last round.

The claim (Li et al., arXiv 2506.23235): further rounds bring nothing new. Round k has a model with logits z_k, the
policy pi_k = softmax(z_k / alpha) and the endogenous reward r_k(s, a) = z_k(s, a) - V_k(s'). The next model depends on
the RL:

    same temperature  max E[sum r_k] + alpha entropy. Backward induction gives Q = z_k and hence the policy pi_k. A
                      model with this policy and other constants, z_{k+1} = alpha log pi_k + c(s), has the reward
                          r_{k+1}(s, a) = r_k(s, a) + F(s) - F(s'),    F = V_{k+1} - V_k,    F(end) = 0.
                      This is potential-based shaping (Ng et al. 1999), so the policy stays the same.
    KL penalty        max E[sum r_k] - beta KL(pi || pi_k), as in trainers, gives pi_{k+1} ~ pi_k exp(sum r_k / beta).
                      As sum r_k = alpha log pi_k + V_k(prompt), differences of summed rewards grow by the factor
                      1 + alpha / beta. Completions keep their order and the policy gets sharper. k rounds equal one
                      round with beta' = alpha / ((1 + alpha / beta)^k - 1).
    hard maximum      beta -> 0 gives the most likely completion. A second round gives the same one.
    from samples      The next model is the maximum-likelihood fit to n completions sampled from pi_k. Each round adds
                      an independent estimation error of the same size, so the error against the true reward should
                      grow about as sqrt(k). (Model collapse: Shumailov et al., Nature 2024.)

The MDPs are random, as in reward.py. The identities are checked in float64 with the package's oracle, and its float32
function is compared with the oracle. The error from samples is measured.
"""

import sys

import numpy as np
import torch

from bench.paper import mdp as tabular
from bench.paper import output
from bench.paper.mdp import TokenMDP
from bench.paper.reward import ALPHA, HORIZON, PROMPTS, SETTINGS, STATES, VOCAB, completion_errors
from bench.paper.scaling import exponent

ROUNDS, SAMPLED, N = 6, 16, 10_000
BETAS = {"KL, beta = 2 alpha": 2 * ALPHA, "KL, beta = alpha / 2": ALPHA / 2, "KL, beta = 0.01": 0.01}
SAMPLES = (1_000, 10_000, 100_000)
CHECKS = {
    "values": "soft RL's Q minus the logits it came from",
    "policy": "second policy minus the first (probability)",
    "shaping": "second reward minus (first + F(s) - F(s'))",
    "sums": "difference of two completions, second minus first",
    "unchanged": "second reward minus the first, constants and all",
    "factor": "KL: second sums / (1 + alpha/beta) minus first",
    "float32": "token_rewards (float32) minus the oracle (float64)",
}


def next_logits(mdp: TokenMDP, logits: torch.Tensor, alpha: float, beta: float | None = None) -> torch.Tensor:
    """Return the logits alpha log pi of the policy that exact RL on the endogenous reward of `logits` gives.

    beta is the weight of the KL penalty towards the policy of `logits`, which is soft RL at temperature beta for the
    reward r + beta log pi_k. None means RL at temperature alpha without a penalty.
    """
    reward = tabular.endogenous(mdp, logits, alpha, exact=True)
    if beta is None:
        q, temperature = tabular.action_values(mdp, reward, alpha)[0], alpha
    else:
        penalised = reward + beta * torch.log_softmax(logits / alpha, -1)
        q, temperature = tabular.action_values(mdp, penalised, beta)[0], beta
    return alpha * torch.log_softmax(q / temperature, -1)


def identities(mdp: TokenMDP, logits: torch.Tensor, alpha: float, rng: np.random.Generator) -> dict[str, float]:
    """Return the largest absolute violation of each of CHECKS. "unchanged" is no identity and must be far from 0."""
    constants = torch.from_numpy(rng.normal(size=(2, *logits.shape[:2], 1)))
    first = logits + constants[0]
    r1 = tabular.endogenous(mdp, first, alpha, exact=True)
    q, v1 = tabular.action_values(mdp, r1, alpha)
    second = next_logits(mdp, first, alpha) + constants[1]
    r2 = tabular.endogenous(mdp, second, alpha, exact=True)
    q2, v2 = tabular.action_values(mdp, r2, alpha)
    f = v2 - v1
    shaped = r1 + f[:-1, :, None] - torch.stack([f[h + 1][mdp.next_state[h]] for h in range(mdp.horizon)])
    beta = alpha / 2
    sharper = tabular.endogenous(mdp, next_logits(mdp, first, alpha, beta), alpha, exact=True)
    found = {
        "values": q - first,
        "policy": tabular.policy_of(q2, alpha) - tabular.policy_of(first, alpha),
        "shaping": r2 - shaped,
        "sums": _between(mdp, r2) - _between(mdp, r1),
        "unchanged": r2 - r1,
        "factor": _between(mdp, sharper) / (1 + alpha / beta) - _between(mdp, r1),
        "float32": tabular.endogenous(mdp, first, alpha) - r1,
    }
    return {name: float(value.abs().max()) for name, value in found.items()}


def _between(mdp: TokenMDP, reward: torch.Tensor) -> torch.Tensor:
    """Return (P, A^H) sums of `reward` of every completion, minus that of its prompt's first completion."""
    completions = tabular.all_completions(mdp)
    sums = [tabular.per_token(mdp, start, completions, reward).sum(-1) for start in mdp.starts.tolist()]
    return torch.stack([total - total[0] for total in sums])


def losses(mdp: TokenMDP, logits: torch.Tensor, alpha: float, rounds: int) -> dict[str, list[float]]:
    """Return the loss of expected true reward relative to the optimum after 0 (the model itself), 1, 2, ... rounds of
    exact RL."""
    optimum = tabular.action_values(mdp, mdp.reward, 0)[1][0, mdp.starts].mean().item()

    def loss(policy):
        return optimum - tabular.expected_return(mdp, policy)

    out = {}
    for name, beta in {"same temperature": None, **BETAS}.items():
        current, line = logits, [loss(tabular.policy_of(logits, alpha))]
        for _ in range(rounds):
            current = next_logits(mdp, current, alpha, beta)
            line.append(loss(tabular.policy_of(current, alpha)))
        out[name] = line
    reward = tabular.endogenous(mdp, logits, alpha, exact=True)
    best = loss(tabular.policy_of(tabular.action_values(mdp, reward, 0)[0], 0))
    return out | {"hard maximum": [out["same temperature"][0]] + [best] * rounds}


def sampled(mdp: TokenMDP, expert: torch.Tensor, alpha: float, n: int, rounds: int, rng) -> list[float]:
    """Return the rms error of reward differences in rounds 1, 2, ..., each fitted to n completions of the last."""
    policy, out = tabular.policy_of(expert, alpha), []
    for _ in range(rounds):
        logits = tabular.fit(tabular.demonstrations(mdp, policy, n, rng), alpha)
        out.append(completion_errors(mdp, expert, logits, alpha)["difference"])
        policy = tabular.policy_of(next_logits(mdp, logits, alpha), alpha)
    return out


def measure(
    seeds, horizon: int = HORIZON, rounds: int = ROUNDS, sampled_rounds: int = SAMPLED, samples=SAMPLES
) -> dict:
    """Return {"identities": worst of seeds, "losses": {RL: (seeds, rounds + 1)}, "sampled": {n: (seeds, rounds)}}."""
    checks, lines, noise = [], [], {n: [] for n in samples}
    for seed in seeds:
        rng = np.random.default_rng(seed)
        mdp = tabular.random_mdp(rng, horizon, STATES, VOCAB, PROMPTS)
        expert, _ = tabular.action_values(mdp, mdp.reward, ALPHA)
        logits = tabular.fit(tabular.demonstrations(mdp, tabular.policy_of(expert, ALPHA), N, rng), ALPHA)
        checks.append(identities(mdp, logits, ALPHA, rng))
        lines.append(losses(mdp, logits, ALPHA, rounds))
        for n in samples:
            noise[n].append(sampled(mdp, expert, ALPHA, n, sampled_rounds, rng))
    return {
        "identities": {name: max(check[name] for check in checks) for name in CHECKS},
        "losses": {name: np.array([line[name] for line in lines]) for name in lines[0]},
        "sampled": {n: np.array(errors) for n, errors in noise.items()},
    }


def growth(noise: dict[int, np.ndarray]) -> dict:
    """Return the exponent with which the error grows with the number of rounds, for each n."""
    rng = np.random.default_rng(0)  # for the bootstrap only
    return {n: exponent(np.arange(1, errors.shape[1] + 1), errors, rng) for n, errors in noise.items()}


def sentence(results: dict, fits: dict) -> str:
    worst = max(results["identities"][name] for name in ("values", "policy", "shaping", "sums"))
    noise, loss = results["sampled"][N].mean(0), {name: line.mean(0) for name, line in results["losses"].items()}
    sharp, mild = loss["KL, beta = 0.01"], loss["KL, beta = 2 alpha"]
    return (
        f"With exact RL at the same temperature, a second round gives the same policy and, up to shaping, the same\n"
        f"reward ({worst:.0e}). With a KL penalty of 0.01, one round reduces the loss from {sharp[0]:.3g} to "
        f"{sharp[1]:.2g}, and a second\nto {sharp[2]:.2g}. With a large penalty (2 alpha), more rounds help "
        f"({mild[0]:.2g}, {mild[1]:.2g}, {mild[2]:.2g}, ...): together they sharpen\nas much as one round with a "
        f"smaller penalty. With n = {N} samples, each round adds noise: the error is {noise[0]:.3f}\nin round 1, "
        f"{noise[1]:.3f} in round 2 and {noise[-1]:.3f} in round {len(noise)}. It grows as k^{fits[N]}, where "
        f"independent rounds give 1/2."
    )


def draw(results: dict, seeds: int, folder) -> None:
    figure, axes = output.panels(1, 2, width=5.2)
    left, right = axes
    colours = (output.IMITATION, "#2a9d8f", output.OTHER, output.ENDOGENOUS, output.INK)
    for colour, (name, errors) in zip(colours, results["losses"].items(), strict=True):
        style = {"ls": "--", "lw": 1.2} if name == "hard maximum" else {"marker": "o", "ms": 3.5, "lw": 1.8}
        left.plot(range(errors.shape[1]), errors.mean(0), color=colour, label=name, **style)
    output.title(left, "exact RL on the endogenous reward")
    left.set_ylabel("loss of true reward, below the optimum")
    left.set_ylim(bottom=0)
    colours = (output.OTHER, output.ENDOGENOUS, output.IMITATION)
    for colour, (n, errors) in zip(colours, results["sampled"].items(), strict=True):
        x = np.arange(1, errors.shape[1] + 1)
        output.band(right, x, errors, colour, f"n = {n}")
        output.guide(right, x, errors.mean(0)[0], 0.5, "slope 1/2" if n == SAMPLES[-1] else "_")
    right.set_xscale("log", base=2)
    right.set_yscale("log")
    right.set_ylim(0.01, 3)
    right.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    output.title(right, "each round's model fitted to n samples of the last")
    right.set_ylabel("error of the reward, two completions (rms)")
    for axis in axes:
        axis.set_xlabel("round")
    note = f"{seeds} random MDPs, H = {HORIZON}, alpha = {ALPHA}; left: {N} demonstrations. Means; bands are quartiles."
    print(output.picture(figure, axes, note, folder / "paper-iterate"))


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)  # the tables are too small for several threads
    args = output.arguments(__doc__, seeds=20).parse_args(arguments)
    results = measure(range(args.seed, args.seed + args.seeds))
    fits = growth(results["sampled"])
    rows = [(label, f"{results['identities'][name]:.1e}") for name, label in CHECKS.items()]
    print(output.table((f"largest of {args.seeds} random MDPs", "absolute"), rows))
    rows = [(name, *(f"{value:.3g}" for value in errors.mean(0)[:4])) for name, errors in results["losses"].items()]
    print("\n" + output.table(("loss of true reward after exact rounds of RL", "0", "1", "2", "3"), rows))
    shown = (1, 2, 4, SAMPLED)
    rows = [(f"n = {n}", *(f"{e.mean(0)[k - 1]:.3g}" for k in shown), fits[n]) for n, e in results["sampled"].items()]
    header = ("error of the reward, rounds from samples", *(str(k) for k in shown), "exponent [95%]")
    print("\n" + output.table(header, rows) + "\n\n" + sentence(results, fits))
    settings = SETTINGS | {"seed": args.seed, "seeds": args.seeds, "n": N}
    record = results | {"exponents": fits, "sentence": sentence(results, fits)}
    print(output.write("iterate", settings, record, args.out))
    draw(results, args.seeds, args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
