"""The implementations against float64 on this machine, and their rate beside torch.mm. In seconds."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..vocab.compiled import find_compiler
from ..vocab.fused import KERNEL_DTYPES, TRITON_IS_INSTALLED, obstacle_to_kernels
from ..vocab.tuned import Head, name_of
from .child import Answer, ask
from .measure import quartiles
from .paths import shortened

SMALL = (40, 300)
"""D and V, with a ragged last tile of every size"""
SMALL_ROWS = (20,)
LARGE = {"cpu": (1024, 32768, 128), "cuda": (4096, 131072, 4096)}
"""D, V and rows of the timed head"""
LARGE_HEAD = "the timed head"
SECONDS = 1.0
TIMED_THREADS = {"cpu": 1}
"""On one thread, processor time can be measured. On several there is only the clock, and other programs stop a thread
that the rest then wait for: a busy machine showed 8.3 times torch.mm for what takes 1.2."""
LIMIT = 120.0
Fastest = Callable[[torch.device], torch.dtype]
"""the dtype that a device computes in fastest"""
INTERPRETER = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Subject:
    """An implementation on a device. `needed`: it should run here, and it is an error if it does not."""

    name: str
    impl: str
    device: str
    needed: bool = True
    obstacle: str | None = None
    """why it cannot run here"""
    env: Mapping[str, str] = field(default_factory=dict)
    timed: bool = True


@dataclass(frozen=True)
class Checked:
    """What was found: by dtype, the largest error of a statistic or the problem; and the rate."""

    subject: Subject
    errors: Mapping[str, float] = field(default_factory=dict)
    problems: Mapping[str, str] = field(default_factory=dict)
    ratios: tuple[float, float, float] | None = None
    """time of the large head as a ratio to torch.mm: quartiles over rounds"""
    matmul: float | None = None
    """rate of torch.mm in TFLOP/s"""
    timed: str | None = None
    """the head and rows that were timed"""

    @property
    def failed(self) -> bool:
        """Whether numbers are wrong, or something that should run does not."""
        wrong = any(problem.startswith("wrong numbers") for problem in self.problems.values())
        return wrong or bool(self.problems and self.subject.needed)

    def to_json(self) -> dict[str, Any]:
        about = {"impl": self.subject.impl, "device": self.subject.device, "needed": self.subject.needed}
        about |= {"obstacle": self.subject.obstacle, "failed": self.failed}
        return about | {"errors": dict(self.errors), "problems": dict(self.problems)} | {
            "ratio_to_matmul": self.ratios and self.ratios[1], "ratio_quartiles": self.ratios and self.ratios[::2],
            "matmul_tflops": self.matmul, "timed": self.timed
        }  # fmt: skip


def subjects() -> list[Subject]:
    """Return what to check here: the CPU's implementations, and the kernels on a GPU or in Triton's interpreter."""
    found = [Subject("chunked", "chunked", "cpu")]
    missing = None if find_compiler() else "there is no C++ compiler"
    found.append(Subject("compiled", "compiled", "cpu", needed=missing is None, obstacle=missing))
    for i in range(torch.cuda.device_count()):
        obstacle = obstacle_to_kernels(torch.device("cuda", i), torch.bfloat16)
        found.append(Subject("fused", "fused", f"cuda:{i}", needed=obstacle is None, obstacle=obstacle))
        found.append(Subject("chunked", "chunked", f"cuda:{i}"))
    if not torch.cuda.device_count():
        obstacle = None if TRITON_IS_INSTALLED else "triton is not installed"
        found.append(Subject("fused (interpreter)", "fused", "cpu", False, obstacle, env=INTERPRETER, timed=False))
    return found


def check(subject: Subject, fastest: Fastest) -> Checked:
    """Check one implementation in a process of its own, in every dtype that it takes; time it in the fastest one."""
    if subject.obstacle:
        return Checked(subject)
    dtypes = [name_of(dtype) for dtype in KERNEL_DTYPES]
    timed = None
    requests = [_request(subject, Head(dtype, *SMALL), SMALL_ROWS, 0.0) for dtype in dtypes]
    if subject.timed:
        device = torch.device(subject.device)
        dim, vocab, rows = LARGE[device.type]
        head = Head(name_of(fastest(device)), dim, vocab)
        requests.append(_request(subject, head, (rows,), SECONDS, TIMED_THREADS.get(device.type)))
        timed = f"{head}, {rows} rows"
    answers = ask(requests, LIMIT, env=subject.env)
    named = dict(zip((*dtypes, LARGE_HEAD), answers, strict=False))
    problems = {name: shortened(answer["problem"]) for name, answer in named.items() if "problem" in answer}
    errors = {name: max(answer["errors"].values()) for name, answer in named.items() if "errors" in answer}
    return Checked(subject, errors, problems, *_rate(subject, answers[-1]), timed)


def _request(
    subject: Subject, head: Head, rows: Sequence[int], seconds: float, threads: int | None = None
) -> dict[str, Any]:
    choice = {"impl": subject.impl, "setting": {}}
    return {
        "head": asdict(head), "device": subject.device, "rows": list(rows), "choice": choice, "seconds": seconds,
        "threads": threads,
    }  # fmt: skip


def _rate(subject: Subject, answer: Answer) -> tuple[tuple[float, float, float] | None, float | None]:
    if "times" not in answer:
        return None, None
    dim, vocab, rows = LARGE[subject.device.partition(":")[0]]
    times = answer["times"][str(rows)]
    ratios = [ours / bare for ours, bare in zip(times["candidate"], times["matmul"], strict=True)]
    return quartiles(ratios), 2 * dim * vocab * rows / quartiles(times["matmul"])[1] / 1e12


def checked(found: Sequence[Subject], fastest: Fastest) -> Iterator[Checked]:
    """Yield the results one by one: each takes a few seconds."""
    for subject in found:
        yield check(subject, fastest)
