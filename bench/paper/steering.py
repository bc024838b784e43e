r"""`python -m bench.paper.steering`: how the system prompt changes the preferences of the endogenous reward.

The claim (Li et al., arXiv 2506.23235, Table 2): the endogenous reward follows the instruction in the system prompt, so
one model gives many reward models. Their table crosses system prompts that name a domain with preference data of each
domain. Here, the instructions are "Answer in words." and "Answer in digits.", which the embedded model has learnt, and
the data are sums (the embedded model's held-out ones) with the right answer in both forms. `--model` chooses the model:
pocket, the embedded one, or a real one such as smollm2. Model, questions and completions are the same in every
row; only the system prompt changes. Both columns hold the same pairs with the preference reversed, so they add up to
100% (apart from ties).

    data "words"    preferred: the answer in words; rejected: the same answer in digits
    data "digits"   the reverse

Further measurements:
    controls      no system prompt, and an instruction that the model has never seen
    followed      the share of sums whose margin is larger under the instruction for words than under that for digits.
                  A model that prefers one form under every system prompt can still follow
    margin        score(words) - score(digits) in nats: the size of the effect
    right         whether the right answer scores above three wrong ones of the same form
    form first    whether a wrong answer in the requested form scores above the right one in the other form
    policy        the form of the model's sampled answers under that system prompt (temperature 1). A real model
                  answers in sentences: there, the form is that of the numbers in the answer
"""

import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench.paper import output
from bench.paper.policies import LONGEST, answers
from endoreward_fast import EndoRewardModel
from endoreward_fast.command.evaluate.evaluation import Accuracy, wilson
from endoreward_fast.pocket.quiz import IN_DIGITS, IN_WORDS, Problem, in_words, steered

FORMS = ("words", "digits")
UNSEEN = "Answer in Latin."
SYSTEMS = {"words": IN_WORDS, "digits": IN_DIGITS, "none": None, "unseen": UNSEEN}
LABELS = {"words": repr(IN_WORDS), "digits": repr(IN_DIGITS), "none": "no system prompt", "unseen": repr(UNSEEN)}
COLOURS = {"words": output.ENDOGENOUS, "digits": output.IMITATION, "none": output.INK, "unseen": output.OTHER}
NUMBERS = frozenset(in_words(n) for n in range(1000))
NUMBER_WORDS = frozenset(word for n in range(1000) for word in re.findall("[a-z]+", in_words(n))) - {"and"}
SENTENCE = 24  # tokens of a real model's answer


def form_of(text: str) -> str:
    """Return the form of an answer: "words", "digits" or "neither"."""
    return "digits" if text.isdecimal() else "words" if text in NUMBERS else "neither"


def form_within(text: str) -> str:
    """Return the form of the numbers in a sentence: "digits" if it has any digit, "words", or "neither"."""
    words = set(re.findall("[a-z]+", text.lower()))
    return "digits" if re.search(r"\d", text) else "words" if words & NUMBER_WORDS else "neither"


def sums(n: int, seed: int) -> list[tuple[Problem, Problem]]:
    """Return `n` different held-out sums, each with an instruction for digits and one for words."""
    found: dict[str, tuple[Problem, Problem]] = {}
    for pair in steered(20 * n, seed):
        found.setdefault(pair[0].key, pair)
    if len(found) < n:
        raise ValueError(f"n={n}: expected at most {len(found)}, the number of different sums")
    return list(found.values())[:n]


def scores(scorer: EndoRewardModel, problems: Sequence[Problem]) -> torch.Tensor:
    """Return (problems, 4) scores of each problem's completions under its system prompt, the right one first."""
    rows = [{"prompt": p.prompt("chat"), "completion": c} for p in problems for c in p.completions("chat")]
    results = scorer.score(rows)
    failed = next((result.error for result in results if result.error), None)
    if failed:
        raise ValueError(failed)
    return torch.tensor([result.score for result in results]).view(len(problems), -1)


def measure(
    scorer: EndoRewardModel, pairs: Sequence[tuple[Problem, Problem]], seed: int, sentences: bool = False
) -> dict[str, dict]:
    """Return {system prompt: results of reward and policy on the same sums under it}."""
    n = len(pairs)
    found = {}
    for name, system in SYSTEMS.items():
        digits, words = (scores(scorer, [replace(pair[side], system=system) for pair in pairs]) for side in (0, 1))
        margin = words[:, 0] - digits[:, 0]
        prefers = {"words": margin > 0, "digits": margin < 0}
        found[name] = {
            "reward": {form: _share(prefers[form]) for form in FORMS},
            "margin": margin,
            "policy": policy(scorer, [replace(pair[0], system=system) for pair in pairs], seed, sentences),
        }
        if name in FORMS:
            own, other = (words, digits) if name == "words" else (digits, words)
            found[name] |= {"right": _share((own[:, :1] > own[:, 1:]).all(1))}
            found[name] |= {"form_first": _share(own[:, 1] > other[:, 0]), "n": n}
    return found


def policy(
    scorer: EndoRewardModel, problems: Sequence[Problem], seed: int, sentences: bool = False
) -> dict[str, Accuracy]:
    """Return {form: share of sampled answers in that form}."""
    form, longest = (form_within, SENTENCE) if sentences else (form_of, LONGEST)
    said = answers(scorer.model, scorer.tokenizer, problems, seed=seed, longest=longest)
    forms = [form(row[0].text) for row in said]
    return {form: wilson(forms.count(form) / len(forms), len(forms)) for form in (*FORMS, "neither")}


def followed(found: dict[str, dict]) -> Accuracy:
    """Return the share of sums whose margin is larger under the instruction for words than under that for digits."""
    return _share(found["words"]["margin"] > found["digits"]["margin"])


def _share(won: torch.Tensor) -> Accuracy:
    return wilson(won.double().mean().item(), len(won))


def percent(share: Accuracy) -> str:
    return f"{100 * share.value:.1f} [{100 * share.low:.1f}, {100 * share.high:.1f}]"


def table(found: dict[str, dict]) -> str:
    """Format the preference table with its controls, margins and policy."""
    header = ("reward's system prompt", "data: words", "data: digits", "margin, nats", "policy: words", "digits")
    lines = []
    for name, row in found.items():
        cells = [percent(row["reward"][form]) for form in FORMS]
        cells.append(f"{row['margin'].mean():+.1f} (sd {row['margin'].std():.1f})")
        lines.append((LABELS[name], *cells, *(f"{100 * row['policy'][form].value:.1f}" for form in FORMS)))
    lines = [output.table(header, lines), ""]
    for form in FORMS:
        lines.append(f"{LABELS[form]}: right above three wrong ones in {form} {percent(found[form]['right'])}; "
                     f"wrong in {form} above right in the other form {percent(found[form]['form_first'])}")  # fmt: skip
    return "\n".join(lines)


def sentence(found: dict[str, dict]) -> str:
    """Summarise the results and their limits."""
    own = [100 * found[form]["reward"][form].value for form in FORMS]
    moved = found["words"]["margin"] - found["digits"]["margin"]
    right = [100 * found[form]["right"].value for form in FORMS]
    first = [100 * found[form]["form_first"].value for form in FORMS]
    unknown = found["unseen"]["margin"].mean() - found["none"]["margin"].mean()
    return output.paragraph(
        f"The system prompt alone reverses the preference. Of {len(moved)} held-out sums, the reward prefers words in",
        f"{own[0]:.1f}% under 'Answer in words.', and digits in {own[1]:.1f}% under 'Answer in digits.'.",
        f"The margin changes by {moved.mean():.1f} nats.",
        "Among four answers in the requested form, the right one scores highest in",
        f"{right[0]:.0f}% and {right[1]:.0f}%. Form counts for more: a wrong answer in the requested form beats the",
        f"right one in the other form in {first[0]:.0f}% and {first[1]:.0f}%. The model was trained on both.",
        f"An instruction that it does not know also changes the margin ({unknown:+.1f} nats), but not usefully:",
        "the reward follows only instructions that the policy has learnt to follow.",
    )


def sentence_of_real(found: dict[str, dict]) -> str:
    """Summarise the results of a real model."""
    own = [percent(found[form]["reward"][form]) for form in FORMS]
    moved = found["words"]["margin"] - found["digits"]["margin"]
    right = [100 * found[form]["right"].value for form in FORMS]
    first = [100 * found[form]["form_first"].value for form in FORMS]
    said = [100 * found[form]["policy"][form].value for form in FORMS]
    unknown = found["unseen"]["margin"].mean() - found["none"]["margin"].mean()
    return output.paragraph(
        f"Of {len(moved)} sums, the reward prefers words in {own[0]}% under 'Answer in words.', and digits in",
        f"{own[1]}% under 'Answer in digits.'. From one instruction to the other, the margin moves as asked in",
        f"{percent(followed(found))}% of the sums, by {moved.mean():.1f} nats on average. The margin without a system",
        f"prompt is {found['none']['margin'].mean():+.1f}, and {LABELS['unseen']} changes it by {unknown:+.1f}.",
        f"Among four answers in the requested form, the right one scores highest in {right[0]:.0f}% (words) and",
        f"{right[1]:.0f}% (digits). A wrong answer in the requested form beats the right one in the other form in",
        f"{first[0]:.0f}% and {first[1]:.0f}%. Of the model's sampled answers, {said[0]:.0f}% have their numbers in",
        f"words when asked for words, and {said[1]:.0f}% in digits when asked for digits.",
    )


def draw(
    found: dict[str, dict], note: str, path: Path, low: float = -26, high: float = 20, legend: str = "upper right"
) -> None:
    """Draw the table of shares, and the margins whose sign it counts, from `low` to `high`."""
    figure, (left, right) = output.panels(1, 2, width=5.4, height=3.4)
    shares = torch.tensor([[100 * row["reward"][form].value for form in FORMS] for row in found.values()])
    left.imshow(
        shares, cmap="RdBu_r", vmin=-60, vmax=160, aspect="auto"
    )  # the map's darkest colours would hide the text
    for y, row in enumerate(found.values()):
        for x, form in enumerate(FORMS):
            left.text(x, y, percent(row["reward"][form]), ha="center", va="center", color=output.INK, fontsize=9)
    left.set_xticks(range(2), [f"data: {form} preferred" for form in FORMS])
    left.set_yticks(range(len(found)), [LABELS[name] for name in found])
    output.title(left, "% of pairs ranked as the data say")
    edges = torch.linspace(low, high, 47).tolist()
    for name, row in found.items():
        filled = {"histtype": "stepfilled", "alpha": 0.6} if name in FORMS else {"histtype": "step", "lw": 1.4}
        right.hist(
            row["margin"].clamp(low + 0.1, high - 0.1).tolist(),
            bins=edges,
            color=COLOURS[name],
            label=LABELS[name],
            **filled,
        )
    right.axvline(0, color=output.INK, lw=1)
    right.set_ylim(0, 1.4 * right.get_ylim()[1])  # room for the legend, beside the line
    right.set_xlabel("score(words) - score(digits), nats")
    right.set_ylabel("sums")
    output.title(right, "how far the instruction moves it")
    left.tick_params(length=0, labelsize=9)
    left.spines[:].set_visible(False)
    print(output.picture(figure, [right], note, path, legend))


def main(arguments: list[str]) -> None:
    parser = output.with_model(output.arguments(__doc__, seeds=1))
    parser.add_argument("--n", type=int, help="number of different sums (pocket: 300; else 100)")
    args = parser.parse_args(arguments)
    toy = args.model == output.POCKET
    n = args.n or (300 if toy else 100)
    found = measure(output.load(args.model), sums(n, args.seed), args.seed, sentences=not toy)
    said = sentence(found) if toy else sentence_of_real(found)
    print(table(found) + f"\nmargin moves as asked: {percent(followed(found))}\n\n" + said)
    settings = {"model": args.model, "seed": args.seed, "n": n, "systems": SYSTEMS}
    print(output.write("steering", settings, found | {"followed": followed(found), "sentence": said}, args.out))
    margins = torch.cat([row["margin"] for row in found.values()])
    limits = () if toy else (margins.min().floor().item(), margins.max().ceil().item(), "upper left")
    note = f"{args.model}, {n} {'held-out ' if toy else ''}sums, seed {args.seed}; 95% intervals."
    draw(found, note, args.out / f"paper-{output.named('steering', args.model)}", *limits)


if __name__ == "__main__":
    main(sys.argv[1:])
