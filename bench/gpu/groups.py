"""The groups of GPU benchmarks, and how one group runs. Each group writes one file after every case."""

from dataclasses import replace
from pathlib import Path

from bench.gpu import peers_gpu
from bench.harness.cases import Case
from bench.harness.peers import BARE_MATMUL, DEVICE_COPY, THREE_MATMULS

EXPENSIVE = ("torch.compile",)  # compiles again for each shape
MODELS = ("qwen3-8b", "qwen3-1.7b", "qwen3-0.6b")  # hidden size 4096, 2048, 1024
STEP = ("llama3-8b", 4096)  # the shape of the published training steps: H=4096, V=128256, 4096 tokens
OURS = tuple(peers_gpu.IMPLS)
GROUPS = ("gpu-auto", "gpu-tuned", "gpu-peers", "gpu-logits", "gpu-overheads", "gpu-search", "gpu-sweep")


def case(subject: str, shape: str, rows: int, rounds: int = 20, without=EXPENSIVE, **more) -> Case:
    return Case(subject, shape, rows, "bf16", rounds, without, gpu=True, **more)


def cases(group: str) -> list[Case]:
    return {
        "gpu-auto": _auto, "gpu-tuned": _tuned, "gpu-peers": _peers, "gpu-logits": _logits, "gpu-overheads": _overheads,
        "gpu-search": _search, "gpu-sweep": _sweep,
    }[group]()  # fmt: skip


def _auto() -> list[Case]:
    """What auto takes beside its ceiling, without peers: the figures of targets.py."""
    return [
        *(case("linear", model, 8192, only=(BARE_MATMUL, *OURS), memory=True) for model in MODELS),
        case("linear forward+backward", *STEP, 10, only=(THREE_MATMULS, *OURS), memory=True),
        case("logits", MODELS[2], 8192, only=(DEVICE_COPY, *OURS), memory=True),
        case("linear entropy", MODELS[0], 8192, only=(BARE_MATMUL, *OURS)),
    ]


def _tuned() -> list[Case]:
    """The same forward after `endoreward tune`, whose choice auto looks up."""
    return [case("linear", model, 8192, only=(BARE_MATMUL, peers_gpu.OURS_AUTO), memory=True) for model in MODELS]


def _peers() -> list[Case]:
    return [
        case("linear", MODELS[0], 8192, 10, memory=True),
        case("linear forward+backward", *STEP, 7, memory=True),
        case("linear entropy", MODELS[0], 8192, 10, memory=True),
        *(case("linear", model, rows, 10, memory=True) for rows in (8192, 64, 512) for model in MODELS[1:]),
        *(case("linear", MODELS[0], rows, 10, memory=True) for rows in (64, 512, 32768)),
        case("linear", MODELS[2], 4096, 10, without=(), memory=True),
        case("linear forward+backward", MODELS[0], 8192, 7, memory=True),
    ]


def _logits() -> list[Case]:
    subjects = ("logits", "logits entropy", "logits backward")
    return [case(subject, MODELS[2], 8192, without=(), memory=True) for subject in subjects]


def _overheads() -> list[Case]:
    linear = [case(subject, MODELS[0], 8192, 30) for subject in ("linear masked", "linear rewards")]
    return [*linear, case("logits rewards", MODELS[2], 8192, 30)]


def _search() -> list[Case]:
    return [case("linear search", model, 8192, 10) for model in MODELS]


def _sweep() -> list[Case]:
    linear = [name for name in peers_gpu.peers("linear") if name not in (BARE_MATMUL, "eager", *OURS)]
    slow = (*EXPENSIVE, *linear)
    vocabularies = (16384, 32768, 65536, 131072, 262144)
    return [
        *(case("linear", f"D2048-V{v}", 8192, 7, slow, memory=True) for v in vocabularies),
        *(case("logits", f"D2048-V{v}", 4096, 7, memory=True) for v in vocabularies),
        *(case("logits", MODELS[2], rows, 7, memory=True) for rows in (64, 512, 2048)),
    ]


def tiny(found: Case) -> Case:
    """Shrink a case for a dry run in Triton's interpreter."""
    return replace(found, shape="D32-V300", rows=20, rounds=1, memory=False)


def run_group(group: str, seconds: float, out: Path, dry: bool) -> int:
    """Run the cases of a group in this process. Return the number that failed."""
    import torch

    from bench.harness import timing
    from bench.harness.clock import Device, Host

    clock = Host() if dry else Device()
    todo = list(dict.fromkeys(tiny(found) for found in cases(group))) if dry else cases(group)
    budget = timing.Budget(seconds, len(todo))
    record, done, failed = timing.environment(gpu=True), [], 0
    for found in todo:
        if budget.left() <= 0:
            result = {"name": found.name, "failed": "not measured: the time budget was spent"}
        else:
            try:
                result = timing.run_case(found, clock, budget.next_case())
            except Exception as error:
                failed += 1
                result = {"name": found.name, "failed": f"failed: {type(error).__name__}: {str(error)[:2000]}"}
        done.append(result)
        timing.write(group, record, done, out)
        print(timing.table(result), flush=True)
        torch._dynamo.reset()  # otherwise each new shape counts towards torch.compile's recompile limit
    return failed
