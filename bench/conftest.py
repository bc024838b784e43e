"""`python -m pytest bench/bench_linear.py bench/bench_logits.py`: run the CPU benchmarks.

pytest-benchmark's table shows our times. The ratios to every peer, measured in the same rounds, are printed at the end
and written to bench/results/<name>.json.
"""

import pytest

from bench.harness import timing
from bench.harness.peers import OURS

RESULTS = pytest.StashKey[dict]()


@pytest.fixture
def run_and_keep(request, benchmark):
    """Return run(file name, case), which times the case and adds its result to the file."""
    kept = request.config.stash.setdefault(RESULTS, {"environment": timing.environment(), "files": {}})

    def run(file_name: str, case: timing.Case) -> dict:
        result = _run(benchmark, case)
        cases = kept["files"].setdefault(file_name, [])
        cases.append(result)
        benchmark.extra_info["ratios"] = {name: peer["ratio"] for name, peer in result["peers"].items()}
        timing.write(file_name, kept["environment"], cases)
        return result

    return run


def _run(benchmark, case: timing.Case) -> dict:
    """Time a case. pytest-benchmark times ours; before each of its rounds, every peer is timed once."""
    if case.isa:  # run_case starts a separate process, which pytest-benchmark times as a whole
        return benchmark.pedantic(timing.run_case, args=(case,), rounds=1)
    calls, skipped = timing.prepare(case)
    ours = calls.pop(OURS)
    times = {name: [] for name in [*calls, OURS]}

    def peers_first():
        for name, seconds in timing.interleave(calls, 1).items():
            times[name] += seconds

    benchmark.pedantic(lambda: times[OURS].append(timing.HOST.seconds(ours)), setup=peers_first, rounds=case.rounds)
    extra = timing.HOST.weigh(case, times) if case.memory else {}
    return timing.summarise(case, times, skipped, extra)


def pytest_terminal_summary(terminalreporter, config) -> None:
    for name, cases in config.stash.get(RESULTS, {"files": {}})["files"].items():
        terminalreporter.section(f"bench/results/{name}.json")
        for case in cases:
            terminalreporter.write_line(timing.table(case))
