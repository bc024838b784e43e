"""The numbers in docs/evidence.md and bench/paper/README.md equal those in the records."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LEVELS, REPORTED = ("easy", "normal", "hard"), ("chat", "safety")
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


def test_rm_bench():
    methods = on_file("rm-bench-smollm2")["methods"]
    levels = {name: row["rm_bench"]["overall"] for name, row in methods.items()}
    plain, discounted, brief = "endogenous", "reward, gamma 0.93", "shorter answer"
    wanted = [points(levels[name][level]["accuracy"]) for name in (plain, brief) for level in LEVELS]
    shares = [levels[name]["average"] for name in (plain, discounted)]
    wanted += ["{} [{}, {}]".format(*(points(share[key]) for key in ("accuracy", "low", "high"))) for share in shares]
    near = [methods[name]["within_10"]["mean"] for name in (plain, discounted)]
    wanted += ["{} [{}, {}]".format(*(points(share[key]) for key in ("value", "low", "high"))) for share in near]
    wanted += ["{} [{}, {}]".format(*(points(methods[discounted]["minus_sum"][k]) for k in ("value", "low", "high")))]
    domains = {name: methods[name]["rm_bench"]["domains"] for name in (plain, discounted)}
    wanted += [points(domains[name][domain]["average"]["accuracy"]) for name in domains for domain in REPORTED]
    assert not [w for w in wanted if w not in PAGES["bench/paper/README.md"]]
    code = [row["rm_bench"]["domains"]["code"]["average"] for row in methods.values()]
    assert all(share["low"] < 0.5 < share["high"] for share in code)


def test_gsm8k():
    results = on_file("gsm8k-smollm2")
    methods, picks = results["methods"], results["picks"]
    shares = [methods["endogenous"][figure] for figure in ("accuracy", "within_10")]
    shares += [methods[name]["accuracy"] for name in ("self-certainty", "author of the solution")]
    wanted = ["{}% [{}, {}]".format(*(points(share[key]) for key in ("value", "low", "high"))) for share in shares]
    wanted += [points(methods["shorter answer"]["accuracy"]["value"])]
    wanted += [points(found["best_of_4"]["value"]) for found in (methods["endogenous"], picks["random pick"])]
    assert not [w for w in wanted if w not in PAGES["bench/paper/README.md"]]
    best = max((n for n in methods if n != "author of the solution"), key=lambda n: methods[n]["accuracy"]["value"])
    assert best == "self-certainty" and len(methods) == 30


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
