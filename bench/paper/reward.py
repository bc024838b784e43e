r"""`python -m bench.paper.reward`: error of the endogenous reward against the true reward, by number of demonstrations.

The claim (Li et al., arXiv 2506.23235): the logits of a language model trained by next-token prediction on the text of
a soft-optimal policy contain the reward that this policy maximises. Here, everything is known. The true reward r* is
that of a random token MDP (mdp.py), and pi is its soft-optimal policy at temperature alpha. n completions are sampled
from pi, and the model maximises their likelihood (`mdp.fit`). Half a pseudo-count per token keeps the reward of unseen
tokens finite and makes unseen states uniform. endoreward_fast.token_rewards reads the rewards from the model's logits.

What is identified: the likelihood does not determine a constant c(s) per state, and the reward contains it:

    r(s, a) = alpha log pi(a|s) + V(s) - V(s')        V(s) = alpha LSE(z(s) / alpha) contains c(s)

This is potential-based shaping (Ng et al. 1999), so no number of demonstrations identifies a token's reward. They
identify
    difference  of the summed rewards of two completions of a prompt: V(s_1) cancels, and V(end) = 0
    unshaped    r(s, a) - V(s) + V(s') = alpha log pi(a|s), where V are the soft values of r

Errors: the root mean square of the difference for two completions drawn from pi, computed exactly from all A^H
completions; the largest over all pairs of completions, however unlikely; the root mean square over pi's tokens,
unshaped and raw.
Expected: n^(-1/2), the rate of maximum likelihood, once n is large enough for the rare tokens; a constant for raw.
"""

import sys

import numpy as np
import torch

from bench.paper import mdp as tabular
from bench.paper import output
from bench.paper.mdp import TokenMDP
from bench.paper.scaling import exponent, two

HORIZON, STATES, VOCAB, PROMPTS, ALPHA = 6, 6, 4, 2, 0.5
SETTINGS = {"horizon": HORIZON, "states": STATES, "vocab": VOCAB, "prompts": PROMPTS, "alpha": ALPHA, "smoothing": 0.5}
DEMONSTRATIONS = tuple(int(10 ** (k / 2)) for k in range(4, 15))  # 100 to 10 million
FITTED = 10_000  # exponents are fitted from here; below it, rare tokens have not been seen
ROWS = {
    "difference": "difference of two completions (rms)",
    "largest": "the same, largest of all pairs",
    "unshaped": "token, unshaped (rms)",
    "raw": "token, as it is (rms)",
}


def errors(mdp: TokenMDP, expert: torch.Tensor, logits: torch.Tensor, alpha: float) -> dict[str, float]:
    """Return the errors of the module docstring, the share of pairs in the right order and the size of differences."""
    policy = tabular.policy_of(expert, alpha)
    token = tabular.visits(mdp, policy)[..., None] * policy / mdp.horizon
    reward = tabular.endogenous(mdp, logits, alpha)
    unshaped = _unshaped(mdp, reward, alpha) - _unshaped(mdp, mdp.reward, alpha)
    raw = reward - mdp.reward
    out = completion_errors(mdp, expert, logits, alpha)
    return out | {name: float((token * x**2).sum().sqrt()) for name, x in {"unshaped": unshaped, "raw": raw}.items()}


def completion_errors(mdp: TokenMDP, expert: torch.Tensor, logits: torch.Tensor, alpha: float) -> dict[str, float]:
    """Return those `errors` that compare completions: all A^H, each scored by token_rewards like a text."""
    policy, completions = tabular.policy_of(expert, alpha), tabular.all_completions(mdp)
    difference, largest, order, scale = [], [], [], []
    for start in mdp.starts.tolist():
        truth = tabular.per_token(mdp, start, completions, mdp.reward).sum(-1)
        ours = tabular.completion_rewards(mdp, start, completions, logits, alpha).sum(-1)
        weight = tabular.per_token(mdp, start, completions, policy).prod(-1)
        difference.append(2 * _variance(weight, ours - truth))  # E (X - X')^2 = 2 Var X
        scale.append(2 * _variance(weight, truth))
        largest.append((ours - truth).max() - (ours - truth).min())
        order.append(_ordered(weight, truth, ours))
    rms = {"difference": difference, "scale": scale}
    out = {name: float(torch.stack(squares).mean().sqrt()) for name, squares in rms.items()}
    return out | {"largest": float(max(largest)), "order": float(torch.stack(order).mean())}


def _variance(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    mean = (weight * x).sum()
    return (weight * (x - mean) ** 2).sum()


def _ordered(weight: torch.Tensor, truth: torch.Tensor, ours: torch.Tensor, pairs: int = 20_000) -> torch.Tensor:
    """Return the share of pairs of different completions, drawn from the expert, that both rewards order alike."""
    draws = torch.multinomial(weight, 2 * pairs, replacement=True, generator=torch.Generator().manual_seed(0))
    a, b = draws.view(2, pairs)
    a, b = a[a != b], b[a != b]
    return ((truth[a] > truth[b]) == (ours[a] > ours[b])).double().mean()


def _unshaped(mdp: TokenMDP, reward: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return r(s, a) - V(s) + V(s') = Q(s, a) - V(s), where V are the soft values of r."""
    q, v = tabular.action_values(mdp, reward, alpha)
    return q - v[:-1, :, None]


def measure(seeds, demonstrations=DEMONSTRATIONS, horizon: int = HORIZON) -> dict[str, np.ndarray]:
    """Return {error: (seeds, len(demonstrations))}, with a new MDP for each seed and new demonstrations for each n."""
    runs = []
    for seed in seeds:
        rng = np.random.default_rng(seed)
        mdp = tabular.random_mdp(rng, horizon, STATES, VOCAB, PROMPTS)
        expert, _ = tabular.action_values(mdp, mdp.reward, ALPHA)
        policy = tabular.policy_of(expert, ALPHA)
        counts = [tabular.demonstrations(mdp, policy, n, rng) for n in demonstrations]
        runs.append([errors(mdp, expert, tabular.fit(count, ALPHA), ALPHA) for count in counts])
    return {name: np.array([[cell[name] for cell in run] for run in runs]) for name in runs[0][0]}


def exponents(measured: dict[str, np.ndarray], demonstrations=DEMONSTRATIONS, fitted: int = FITTED) -> dict:
    first = next(i for i, n in enumerate(demonstrations) if n >= fitted)
    rng = np.random.default_rng(0)  # for the bootstrap only
    return {name: exponent(demonstrations[first:], measured[name][:, first:], rng) for name in ROWS}


def sentence(measured: dict[str, np.ndarray], fits: dict) -> str:
    order = measured["order"].mean(0)
    return (
        f"The difference of two completions' summed rewards converges to the true one as n^{fits['difference']}.\n"
        f"The reward of one token does not converge (n^{fits['raw']}), because a constant per state is free. Without "
        f"the\nconstant it converges as n^{fits['unshaped']}. The worst pair of completions converges more slowly, as\n"
        f"n^{fits['largest']}, because its tokens are rare. Pairs drawn from the expert are in the true order in\n"
        f"{100 * order[0]:.1f}% at n = {DEMONSTRATIONS[0]} and {100 * order[-1]:.2f}% at n = {DEMONSTRATIONS[-1]}."
    )


def draw(measured: dict[str, np.ndarray], fits: dict, seeds: int, folder) -> None:
    figure, axes = output.panels(1, 2, width=5.2)
    names = (("difference", "largest"), ("unshaped", "raw"))
    colours = ((output.ENDOGENOUS, output.OTHER), (output.ENDOGENOUS, output.IMITATION))
    titles = ("completions: the difference is identified", "tokens: identified up to shaping")
    for axis, pair, pair_colours, text in zip(axes, names, colours, titles, strict=True):
        for name, colour in zip(pair, pair_colours, strict=True):
            output.band(axis, DEMONSTRATIONS, measured[name], colour, f"{ROWS[name]}: slope {two(fits[name].value)}")
        at = measured[pair[0]].mean(0)[-1] * (DEMONSTRATIONS[-1] / DEMONSTRATIONS[0]) ** 0.5
        output.guide(axis, DEMONSTRATIONS, at, -0.5, "slope -1/2")
        output.title(axis, text)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("n, demonstrations")
    axes[0].set_ylabel("error of the endogenous reward")
    axes[0].set_ylim(top=60)
    note = (
        f"{seeds} random MDPs, H = {HORIZON}, vocabulary {VOCAB}; means, bands are quartiles. Slopes from n = {FITTED}."
    )
    print(output.picture(figure, axes, note, folder / "paper-reward"))


def main(arguments: list[str]) -> None:
    torch.set_num_threads(1)  # the tables are too small for several threads
    args = output.arguments(__doc__, seeds=20).parse_args(arguments)
    measured = measure(range(args.seed, args.seed + args.seeds))
    fits = exponents(measured)
    columns = [0, 4, 8, 10]
    header = ("error", *(f"n={DEMONSTRATIONS[i]}" for i in columns), "exponent of n [95%]")
    rows = [(label, *(f"{measured[name].mean(0)[i]:.2g}" for i in columns), fits[name]) for name, label in ROWS.items()]
    print(output.table(header, rows))
    print(
        f"Size of the true differences: {measured['scale'].mean():.2f} (rms). {args.seeds} random MDPs.\n\n"
        + sentence(measured, fits)
    )
    settings = SETTINGS | {"fitted_from": FITTED, "demonstrations": DEMONSTRATIONS}
    settings |= {"seed": args.seed, "seeds": args.seeds}
    results = {"errors": measured, "exponents": fits, "sentence": sentence(measured, fits)}
    print(output.write("reward", settings, results, args.out))
    draw(measured, fits, args.seeds, args.out)


if __name__ == "__main__":
    main(sys.argv[1:])
