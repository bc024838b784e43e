"""The numbers in docs/evidence.md and bench/paper/README.md equal those in the records."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = {name: " ".join((ROOT / name).read_text().split()) for name in ("docs/evidence.md", "bench/paper/README.md")}


def on_file(name):
    return json.loads((ROOT / "bench" / "results" / f"paper-{name}.json").read_text())["results"]


def points(x):
    return f"{abs(100 * x):.1f}"


@pytest.mark.parametrize("page", PAGES)
def test_rl(page):
    table = on_file("rl")["table"]
    quiz, others = ({arm: cells[name] for arm, cells in table.items()} for name in ("quiz", "others"))
    wanted = [points(quiz["endogenous"][when]["sampled"][0]) for when in ("before", "after")]
    wanted += [points(others["endogenous"]["gain"]["sampled"][0])]
    if page == "docs/evidence.md":
        wanted += [points(quiz[arm]["after"]["sampled"][0]) for arm in ("random", "verifiable")]
        wanted += [points(quiz["endogenous"][when]["greedy"][0]) for when in ("before", "after")]
        wanted += [
            points(others["endogenous"]["gain"]["greedy"][0])
        ]  # the page that states the gain must state its cost
    assert not [w for w in wanted if w not in PAGES[page]]


@pytest.mark.parametrize("page", PAGES)
def test_ranking(page):
    methods = on_file("ranking")["methods"]
    best = max(methods[f"judge, {name}"]["all"]["value"] for name in ("verifier", "pointwise", "pairwise"))
    wanted = [points(methods[name]["all"]["value"]) for name in ("endogenous", "self-certainty")] + [points(best)]
    assert not [w for w in wanted if w not in PAGES[page]]


@pytest.mark.parametrize("page", PAGES)
def test_theory(page):
    reward, policy = on_file("reward")["exponents"]["difference"], on_file("policy")["instances"]["cliff"]["exponents"]
    wanted = [f"n^{reward['value']:.2f} [{reward['low']:.2f}, {reward['high']:.2f}]"]
    wanted += [f"H^{policy['imitation']['value']:.2f}"]
    wanted += ["H^{value:.2f} [{low:.2f}, {high:.2f}]".format(**policy["endogenous"])]
    assert not [w for w in wanted if w not in PAGES[page]]


def test_a_real_model():
    page = PAGES["bench/paper/README.md"]
    methods, steered = on_file("ranking-smollm2")["methods"], on_file("steering-smollm2")
    wanted = [points(methods[name]["all"]["value"]) for name in ("endogenous", "self-certainty", "judge, verifier")]
    wanted += [
        points(steered["followed"]["value"]),
        f"digits in {100 * steered['words']['reward']['digits']['value']:.0f}%",
    ]
    for cells in on_file("rl-smollm2")["table"].values():
        wanted += [points(cells[name]["gain"][m][0]) for name in ("quiz", "others") for m in ("sampled", "greedy")]
    assert not [w for w in wanted if w not in page]
