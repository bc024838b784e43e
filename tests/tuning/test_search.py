"""Which candidates there are, and which one is chosen."""

import json
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from endoreward_fast.kernels.config import LINEAR_SEARCH, WIDE
from endoreward_fast.kernels.hopper_vocab_stats import HOPPER_SEARCH
from endoreward_fast.tuning import candidates as listed
from endoreward_fast.tuning import child, measure, search
from endoreward_fast.tuning.candidates import Candidate, candidates
from endoreward_fast.tuning.measure import Inputs
from endoreward_fast.tuning.search import Measured, chosen, measured_in_turn, reason
from endoreward_fast.vocab import chunked_tiles
from endoreward_fast.vocab.choice import configured
from endoreward_fast.vocab.tuned import Choice, Head

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HEAD = Head("float32", 24, 333)


def measured(score, name="x", problem=None):
    return Measured(Candidate(name, Choice("chunked")), {16: (score,) * 3, 128: (score,) * 3}, problem)


# --- candidates


@pytest.fixture
def gpu(monkeypatch):
    def of(capability, hip=None):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a GPU")
        monkeypatch.setattr(torch.version, "hip", hip)

    return of


def test_the_first_candidate_on_a_cpu_is_the_rule(monkeypatch):
    for dtype in ("float32", "bfloat16", "float16"):
        found = candidates(Head(dtype, 1024, 151936), CPU)
        assert found[0] == Candidate("chunked", Choice("chunked"))
        assert len(found) == len({c.name for c in found}) <= 10
    monkeypatch.setattr(listed, "find_compiler", lambda: None)
    assert {c.choice.impl for c in candidates(HEAD, CPU)} == {"chunked"}
    monkeypatch.setattr(listed, "find_compiler", lambda: "c++")
    assert candidates(HEAD, CPU)[1].choice == Choice("compiled")


@pytest.mark.parametrize(("dtype", "units"), [("float32", True), ("bfloat16", True), ("bfloat16", False)])
def test_no_setting_of_a_cpu_takes_more_than_64_mib(monkeypatch, dtype, units):
    """Adds up the buffers of a forward. Elsewhere, partials take up to 8 MiB more, and copies of operands up to 16."""
    held = []
    make = chunked_tiles.Buffer.__init__

    def counted(self, size, device, dtype=torch.float32):
        make(self, size, device, dtype)
        held.append(self._flat.nbytes)

    monkeypatch.setattr(chunked_tiles.Buffer, "__init__", counted)
    for module in (chunked_tiles, listed):
        monkeypatch.setattr(module, "has_bf16_units", lambda: units)
    inputs = Inputs.make(Head(dtype, 2, 9000), CPU, 2100)
    most = 0
    for candidate in candidates(Head(dtype, 2, 9000), CPU):
        run = configured(candidate.choice, inputs.hidden, inputs.weight).linear_forward
        held.clear()
        measure._run(run, inputs, 2100, entropy=True)
        most = max(most, sum(held))
    copies = 16 if dtype == "bfloat16" and not units else 0
    assert 2**20 < most < (64 - 8 - copies) * 2**20


def test_hopper_gets_every_tile_of_the_search_and_several_workspaces(gpu):
    gpu((9, 0))
    found = candidates(Head("bfloat16", 4096, 151936), CUDA)
    assert [c.choice for c in found[:2]] == [Choice("fused"), Choice("chunked")]
    configs = [c.choice.arguments(CUDA)["config"] for c in found[2:] if c.choice.impl == "fused"]
    assert configs == [*(c for c in LINEAR_SEARCH if c != WIDE), *HOPPER_SEARCH], (
        "the table's own is the first candidate"
    )
    assert any(config.persistent == 2 for config in configs)
    tiles = [c.choice.setting["tile"] for c in found[2:] if c.choice.impl == "chunked"]
    assert len(tiles) >= 3 and 4 * max(tiles) < 256 * 2**20
    assert "fused 128x128x64, 4 warps, 3 stages, group 8, 2 programs a processor" in {c.name for c in found}
    assert "chunked, workspace of 64 MiB" in {c.name for c in found}


@pytest.mark.parametrize(
    ("capability", "hip", "dtype", "dim", "first"),
    [
        ((8, 0), None, "bfloat16", 4096, "fused"),
        ((9, 0), None, "bfloat16", 4097, "fused"),  # a width that the bulk copy engine cannot read
        ((9, 0), None, "float32", 4096, "chunked"),
        ((12, 0), None, "float16", 4096, "fused"),
        ((9, 4), "7.0", "float32", 4096, "fused"),
    ],
)
def test_other_gpus_get_neighbours_of_the_tables_tile(gpu, capability, hip, dtype, dim, first):
    gpu(capability, hip)
    found = candidates(Head(dtype, dim, 151936), CUDA)
    assert found[0].choice == Choice(first)
    configs = [c.choice.arguments(CUDA)["config"] for c in found if c.choice.impl == "fused" and c.choice.setting]
    assert len(configs) == 4 and {config.persistent for config in configs} == {0, 1, 2}
    assert len(found) == len({c.name for c in found})


def test_a_gpu_without_kernels_gets_chunked_alone(gpu):
    gpu((7, 5))
    assert {c.choice.impl for c in candidates(Head("float16", 64, 100), CUDA)} == {"chunked"}


# --- measuring

BY_SETTING = """
import json, os, sys, time
[request] = json.load(sys.stdin)
kind = request["choice"]["setting"]
if "hang" in kind:
    time.sleep(600)
if "die" in kind:
    os.kill(os.getpid(), 9)
if "wrong" in kind:
    print(json.dumps([{"problem": "wrong numbers: lse is off by 1.0e-02 (allowed 1.0e-05)", "errors": {"lse": 0.01}}]))
    sys.exit()
times = {str(n): {"candidate": [kind["time"]] * 3, "matmul": [100] * 3} for n in request["rows"]}
print(json.dumps([{"errors": {}, "times": times, "oracle": request["oracle"] or "made by the first"}]))
"""


def test_a_candidate_that_hangs_dies_or_is_wrong_costs_itself_alone():
    kinds = [{"hang": 1}, {"time": 120}, {"die": 1}, {"time": 90}, {"wrong": 1}]
    found = [Candidate(next(iter(kind)), Choice("chunked", kind)) for kind in kinds]

    def ask(requests, limit):
        assert search.LIMIT <= limit < search.LIMIT + 1
        # A busy machine may take seconds to start the others.
        limit = 1.0 if "hang" in requests[0]["choice"]["setting"] else 60.0
        return child.ask(requests, limit, command=(sys.executable, "-S", "-c", BY_SETTING))

    results = list(measured_in_turn(HEAD, CPU, found, 1.0, ask))
    wrong = "wrong numbers: lse is off by 1.0e-02 (allowed 1.0e-05)"
    assert [r.problem for r in results] == ["no answer within 1 s", None, "ended by SIGKILL", None, wrong]
    taken = chosen(results)
    assert taken is results[3] and taken.score == pytest.approx(0.9)
    assert reason(results, taken) == "hang, which is auto's rule, failed"
    json.dumps([r.to_json() for r in results], allow_nan=False)


def test_requests_share_the_time_and_the_first_oracle():
    asked = []

    def ask(requests, limit):
        asked.extend(requests)
        times = {str(n): {"candidate": [1.0] * 3, "matmul": [2.0] * 3} for n in search.ROWS["cpu"]}
        return [{"oracle": "of the first", "errors": {"lse": 0.0}, "times": times}]

    found = [Candidate("a", Choice("chunked")), Candidate("b", Choice("compiled"))]
    results = list(measured_in_turn(HEAD, CPU, found, 10.0, ask))
    assert [r["seconds"] for r in asked] == [5.0, 5.0] and [r["oracle"] for r in asked] == [None, "of the first"]
    assert asked[1]["choice"] == asdict(Choice("compiled")) and asked[0]["rows"] == list(search.ROWS["cpu"])
    assert [r.score for r in results] == [0.5, 0.5]


def test_a_small_gpu_is_measured_with_fewer_rows(monkeypatch):
    def of(gib):
        about = SimpleNamespace(total_memory=gib * 2**30)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: about)
        return search.rows_for(Head("bfloat16", 4096, 151936), CUDA)

    assert [of(gib) for gib in (80, 8, 0.1)] == [(64, 8192), (64, 4096), (64, 512)]
    assert search.rows_for(HEAD, CPU) == (16, 128)


# --- choosing


def test_the_fastest_is_chosen_and_near_equals_lose_to_the_first():
    rule, equal, fast, nearly = (measured(s) for s in (1.0, 0.98, 0.7, 0.71))
    assert chosen([rule, equal]) is rule
    assert chosen([rule, equal, fast]) is fast
    assert chosen([rule, nearly, fast]) is nearly
    assert chosen([fast, rule]) is fast
    assert reason([rule, fast], fast) == "30% less time than x, which is auto's rule (0.70 against 1.00)"
    quick = measured(0.69, "quick")
    assert reason([rule, fast, quick], fast) == (
        "30% less time than x, which is auto's rule (0.70 against 1.00); `quick`, the fastest, takes less than 3% less"
    )
    assert reason([rule, equal], rule) == "it is auto's rule, and no other candidate takes 3% less time"


def test_a_candidate_must_beat_the_rule_by_the_margin_itself():
    """It is not enough to be nearly as fast as another that does."""
    rule, little, enough = (measured(s) for s in (1.04, 1.03, 1.0))
    assert chosen([rule, little, enough]) is enough


def test_the_score_weighs_every_number_of_rows_alike():
    both = Measured(Candidate("x", Choice("chunked")), {16: (1.0, 0.5, 3.0), 128: (1.0, 2.0, 3.0)})
    assert both.score == pytest.approx(1.0)


def test_if_every_candidate_fails_none_is_chosen():
    assert chosen([measured(1.0, problem="no")]) is None
