"""The GPU benchmarks, with injected clocks and budgets. Kernels run on a GPU if there is one, else interpreted."""

import importlib.util
import json
import time
from types import SimpleNamespace

import pytest
import torch

from bench.gpu import groups, peers_gpu, run, sanitize
from bench.harness import cases, packages, peers, shapes, timing
from bench.harness.cases import Case
from bench.harness.clock import Device, Host

DRY = not torch.cuda.is_available()


def clock_here():
    return Host() if DRY else Device()


needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is in the bench extra"
)


class Ticks:
    """A clock on which each call takes one second."""

    def __init__(self):
        self.time = 0.0

    def __call__(self) -> float:
        return self.time

    def seconds(self, call) -> float:
        call()
        self.time += 1.0
        return 1.0


class FakeCuda:
    """Record the calls that Device makes to torch.cuda, in order."""

    def __init__(self):
        self.log = []

    def get_device_properties(self, device):
        return SimpleNamespace(L2_cache_size=1 << 20)

    def synchronize(self):
        self.log.append("synchronize")

    def _sleep(self, cycles):
        self.log.append("sleep")

    def Event(self, enable_timing):
        event = SimpleNamespace(elapsed_time=lambda end: 2.5)
        event.record = lambda: self.log.append("event")
        return event


def _case(subject, shape="D32-V300", rows=20, **options) -> Case:
    return Case(subject, shape, rows, "bf16", options.pop("rounds", 1), gpu=True, **options)


# ------------------------------------------------------------------------------------------------ clock and budget


def test_caches_are_flushed_and_the_device_idles_before_each_sample(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(Device, "LEAST_FLUSH", 1)
    clock = Device("cpu")
    assert clock._flush.numel() == 4 << 20  # four times the cache
    clock._flush.fill_(1)
    assert clock.seconds(lambda: cuda.log.append("call")) == 0.0025
    assert not clock._flush.any()
    assert cuda.log == ["synchronize", "sleep", "event", "call", "event", "synchronize"]


def test_a_case_that_spent_its_share_stops_after_a_whole_round():
    ticks = Ticks()
    budget = timing.Budget(20.0, cases=2, now=ticks)
    calls = {name: (lambda: None) for name in "ab"}
    times = timing.interleave(calls, 100, ticks, budget.next_case())
    assert [len(t) for t in times.values()] == [5, 5]  # half of 20 s, 2 s a round
    result = timing.summarise(_case("linear", rounds=100), times, {}, {})
    assert result["stopped"] == "time budget: 5 of 100 rounds" and result["stopped"] in timing.table(result)
    timing.interleave(calls, 2, ticks, budget.next_case())  # the last case may use all of the rest and leaves some
    assert budget.left() == 6.0


def test_at_least_three_rounds_are_run_whatever_the_budget():
    ticks = Ticks()
    budget = timing.Budget(0.0, cases=1, now=ticks)
    assert len(timing.interleave({"a": int}, 10, ticks, budget.next_case())["a"]) == timing.LEAST_ROUNDS


def test_a_group_out_of_time_reports_the_cases_it_did_not_measure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(groups, "cases", lambda group: [_case("linear")])
    assert groups.run_group("gpu-linear", 0.0, tmp_path, dry=DRY) == 0
    record = json.loads((tmp_path / "gpu-linear.json").read_text())
    assert record["cases"][0]["failed"] == "not measured: the time budget was spent"
    assert "not measured" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------ arithmetic


def test_work_by_formula():
    shape = shapes.find("D32-V300")
    matmul = 2 * 20 * 32 * 300
    assert _case("linear").flops() == matmul == shapes.linear_flops(20, shape)
    assert _case("linear forward+backward").flops() == 3 * matmul
    assert _case("linear forward+backward").bytes() == 2 * _case("linear").bytes() == 2 * 2 * 32 * 320
    assert _case("logits backward").bytes() == 2 * _case("logits").bytes() == 2 * 2 * 20 * 300
    assert _case("logits").flops() is None
    assert _case("linear masked").flops() is None and _case("linear masked").bytes() is None


def test_share_of_the_ceiling():
    """A copy moves twice the bytes of a forward, so half the copy's time is 100% of the bandwidth."""
    times = {peers.DEVICE_COPY: [2.0, 2.0], "ours": [1.25, 1.25]}
    forward = timing.summarise(_case("logits"), times, {}, {})["peers"]
    assert forward["ours"]["of_ceiling"] == pytest.approx(0.8)
    assert forward[peers.DEVICE_COPY]["of_ceiling"] == 1.0
    assert forward["ours"]["gb_per_s"] / forward[peers.DEVICE_COPY]["gb_per_s"] == pytest.approx(0.8)
    backward = timing.summarise(_case("logits backward"), times, {}, {})["peers"]
    assert backward["ours"]["of_ceiling"] == pytest.approx(1.6)
    linear = timing.summarise(_case("linear"), {peers.BARE_MATMUL: [1.0], "ours": [1.25]}, {}, {})["peers"]
    assert linear["ours"]["of_ceiling"] == pytest.approx(0.8)
    assert linear["ours"]["tflops"] == pytest.approx(_case("linear").flops() / 1.25e12)
    other = timing.summarise(_case("linear masked"), {"every row": [1.0], "a fifth": [0.2]}, {}, {})["peers"]
    assert other["a fifth"]["of_ceiling"] is None and other["a fifth"]["ratio"] == 0.2


# ------------------------------------------------------------------------------------------------ peers and gate


@pytest.mark.parametrize("subject", peers_gpu.SUBJECTS)
def test_every_peer_passes_the_gate_or_is_skipped_with_the_reason(subject):
    result = timing.run_case(_case(subject, memory=not DRY, without=("torch.compile",)), clock_here())
    listed = peers_gpu.peers(subject)
    assert result["peers"].keys() | result["skipped"].keys() == listed.keys()
    assert result["baseline"] == next(iter(listed))
    assert any(name.startswith(peers.OURS) for name in result["peers"])
    for package in packages.CALLS.keys() & listed.keys() - result["peers"].keys():
        assert result["skipped"][package]


@pytest.mark.parametrize("subject", [s for s in peers_gpu.SUBJECTS if s not in ("linear masked",)])
def test_the_gate_rejects_wrong_numbers_of_every_subject(subject, device):
    shape = shapes.find("D32-V300")
    inputs = peers.make_inputs(subject, shape, 20, torch.float32, device=device)
    gate, peer = timing.Gate(inputs), list(peers_gpu.peers(subject).values())[-1]
    got = peer.prepare(inputs)()
    gate.check("ours", peer.gives, got)
    parts = [got] if isinstance(got, torch.Tensor) else list(got)
    for i, part in enumerate(parts):
        for wrong in (part * 1.01, part.roll(1, 0), part * torch.nan):
            changed = wrong if isinstance(got, torch.Tensor) else [*parts[:i], wrong, *parts[i + 1 :]]
            with pytest.raises(AssertionError, match="broken is off by"):
                gate.check("broken", peer.gives, changed)


def test_the_gate_rejects_a_gradient_that_is_wrong_outside_the_target(device):
    shape = shapes.find("D32-V300")
    inputs = peers.make_inputs("logits backward", shape, 20, torch.bfloat16, device=device)
    gate = timing.Gate(inputs)
    right = list(peers_gpu.peers("logits backward").values())[-1].prepare(inputs)()
    gate.check("ours", "logits gradient", right)
    only_targets = torch.zeros_like(right).scatter(1, inputs.targets[:, None], right.gather(1, inputs.targets[:, None]))
    with pytest.raises(AssertionError):
        gate.check("filtered", "logits gradient", only_targets)


def _with_peer(monkeypatch, name, peer):
    listed = peers_gpu.peers("linear")
    monkeypatch.setattr(peers_gpu, "peers", lambda subject: {**listed, name: peer})


def test_a_peer_that_fails_is_skipped_but_a_failure_of_ours_raises(monkeypatch):
    def broken(inputs):
        raise RuntimeError("no kernel image\nand more")

    _with_peer(monkeypatch, "theirs", peers.Peer(broken))
    case = _case("linear", without=("torch.compile", peers_gpu.OURS_FUSED))
    calls, skipped = timing.prepare(case)
    assert skipped["theirs"] == "failed: RuntimeError: no kernel image" and peers.BARE_MATMUL in calls
    _with_peer(monkeypatch, "wrong", peers.Peer(lambda i: (torch.zeros(20), torch.zeros(20))))
    assert "is off by" in timing.prepare(case)[1]["wrong"]
    monkeypatch.setattr(timing, "PEER_SECONDS", 0.2)
    _with_peer(monkeypatch, "slow", peers.Peer(lambda i: time.sleep(30)))
    assert timing.prepare(case)[1]["slow"] == "failed: TimeoutError: no result after 0.2 s"
    monkeypatch.setattr(timing, "PEER_SECONDS", 90)
    _with_peer(monkeypatch, peers_gpu.OURS_CHUNKED, peers.Peer(broken))
    with pytest.raises(RuntimeError, match="no kernel image"):
        timing.prepare(case)


def test_peers_that_do_not_fit_are_skipped_with_the_reason():
    clock = Host()
    clock.free_bytes = lambda: 100
    calls, skipped = timing.prepare(_case("linear", without=("torch.compile", peers_gpu.OURS_FUSED)), clock)
    assert "GiB are free" in skipped["eager"] and "GiB are free" in skipped[peers.BARE_MATMUL]
    assert list(calls)[-1] == peers_gpu.OURS_CHUNKED
    need = {name: peer.bytes_per_logit for name, peer in peers_gpu.peers("linear").items()}
    assert need["eager"] > 2 and need[peers_gpu.OURS_FUSED] == need[peers_gpu.OURS_CHUNKED] == 0


def test_only_the_named_peers_are_in_a_record():
    only = (peers.BARE_MATMUL, peers_gpu.OURS_CHUNKED)
    result = timing.run_case(_case("linear", only=only), clock_here())
    assert tuple(result["peers"]) == only and not result["skipped"]


def test_a_missing_package_is_reported_with_the_reason():
    _, missing = packages.find(("no_such_package_here:function",))
    assert missing == "no_such_package_here: ModuleNotFoundError: No module named 'no_such_package_here'"


def test_four_fifths_of_the_rows_are_off_the_mask():
    mask = peers.completion_mask(8192)
    assert mask.float().mean().item() == pytest.approx(0.2, abs=1e-3)
    assert not mask[0] and mask[2047] and not mask[2048]


# ------------------------------------------------------------------------------------------------ commands


@pytest.mark.parametrize("main", [run.main, sanitize.main])
def test_without_a_gpu_the_command_prints_one_line_and_exits_with_2(main, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and "GPU" in said.err


def test_sanitizer_commands_select_tests_that_exist():
    for command in sanitize.commands().values():
        assert command[0] == "compute-sanitizer" and "--error-exitcode" in command
    assert all((run.ROOT / file).exists() for file in sanitize.FILES)


def test_a_dry_run_writes_the_record(tmp_path, monkeypatch):
    overheads = [groups.tiny(case) for case in groups.cases("gpu-overheads")]
    monkeypatch.setattr(groups, "cases", lambda group: overheads[-1:])
    assert groups.run_group("gpu-overheads", 60.0, tmp_path, dry=DRY) == 0
    record = json.loads((tmp_path / "gpu-overheads.json").read_text())
    assert "packages" in record["environment"] and record["cases"][0]["peers"]


# ------------------------------------------------------------------------------------------------ pictures


def invented(folder) -> None:
    """Write a record of every case of `make gpu` with invented times, proportional to the work."""
    environment = timing.environment() | {"gpu": "an invented device"}
    for group in groups.GROUPS:
        results = []
        for case in groups.cases(group):
            names = [name for name in peers_gpu.peers(case.subject) if name not in case.without]
            work = (case.flops() or 1e10) / 1e14 + (case.bytes() or 1e9) / 1e12
            times = {name: [work * (1 + 0.3 * i) * (1 + 0.1 * r) for r in range(3)] for i, name in enumerate(names)}
            extra = {name: case.rows / 64 * (0 if i == len(names) - 1 else i) for i, name in enumerate(names)}
            results.append(timing.summarise(case, times, {}, extra if case.memory else {}))
        timing.write(group, environment, results, folder)


@needs_matplotlib
def test_pictures_are_drawn_from_the_record_alone(tmp_path):
    from bench.harness import charts

    invented(tmp_path)
    made = charts.draw(tmp_path)
    assert [path.name for path in made] == [
        "time-against-N.png", "time-against-V.png", "memory-against-N.png", "roofline.png"
    ]  # fmt: skip
    assert all(path.stat().st_size > 10_000 for path in made)
    environment, results = charts.load(sorted(tmp_path.glob("gpu-*.json")))
    assert len(charts.families(results, "rows")) >= 4 and len(charts.families(results, "vocab")) >= 2
    no_copy = [case for case in results if peers.DEVICE_COPY not in case["peers"]]
    assert charts.roofline(environment, no_copy, tmp_path / "none.png") is None


@needs_matplotlib
def test_the_cpu_sweep_draws_its_pictures(tmp_path):
    from bench import sweep

    few = [
        *(Case("logits", f"D32-V{v}", 8, rounds=1, without=sweep.WITHOUT) for v in (300, 600)),
        *(Case("linear", "D32-V300", rows, rounds=1, without=sweep.WITHOUT) for rows in (4, 8)),
    ]
    made = sweep.run(few, 60.0, tmp_path)
    assert [path.name for path in made] == ["cpu-time-against-N.png", "cpu-time-against-V.png"]


def test_a_shape_is_found_by_its_sizes():
    assert shapes.find("D1024-V32768") == shapes.Shape("D1024-V32768", 1024, 32768)
    with pytest.raises(KeyError, match="no shape 'qwen9'"):
        shapes.find("qwen9")
    assert cases.DTYPES["bf16"] == torch.bfloat16
