"""The compiled CPU backend. It builds compiled.cpp with the machine's C++ compiler and has the functions of `chunked`.

Only impl="compiled" imports this module, so nothing is compiled unless a caller asks for it. The build takes two or
three seconds once per machine and serves every shape and dtype. The library stays in the user's cache folder; its name
is a hash of the source, the compiler, its flags and the processor's features.

C++ has two advantages over torch.compile. A row's bits depend neither on the batch, nor on the number of threads, nor
on the first shape seen. A new length compiles nothing.

From hidden states, `chunked` computes the tiles of logits and the gradients; this module reduces the tiles.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from .cache import cache_folder
from .chunked import linear_backward
from .chunked_backward import upstream_factors
from .chunked_tiles import Buffer, Limits, LinearTile, length, linear_tiles, spans
from .rows import KeptRows, RowGrads, RowRewards, RowStats, with_rewards

__all__ = ["linear_backward", "linear_forward", "logits_backward", "logits_forward"]

SOURCE = Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC", "-Wno-psabi")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def logits_forward(
    logits: Tensor, targets: Tensor, *, mask: Tensor | None, alpha: float | Tensor, entropy: bool, logit_mean: bool,
    successor: Tensor | None = None, named: None = None,
) -> tuple[RowStats, RowRewards | None]:  # fmt: skip
    """Return statistics, and rewards if `successor` is given, of logits (B, T, V), any strides; 0 off the mask (N,)."""
    alpha = one_alpha(alpha, named)
    pass_ = _Pass(logits.shape[0] * logits.shape[1], mask, alpha, entropy, logit_mean)
    pass_.take(logits, targets.contiguous(), 0, slice(None))
    stats = pass_.finish(logits.shape[-1])
    return with_rewards(stats, targets, mask, logits.shape[-1], successor, alpha)


def logits_backward(
    logits: Tensor, targets: Tensor, stats: RowStats, grads: RowGrads, *, mask: Tensor | None, alpha: float | Tensor,
    named: None = None,
) -> Tensor:  # fmt: skip
    """Return dlogits (B, T, V), contiguous, in the logits' dtype; 0 off the mask (N,)."""
    alpha = one_alpha(alpha, named)
    vocab = logits.shape[-1]
    factors = upstream_factors(targets, stats, grads, vocab, alpha)
    per_row = (factors.shift, factors.constant, factors.slope, factors.each_column, factors.at_target)
    per_row = [None if t is None else t.float().contiguous() for t in per_row]
    mask, targets = _dense(mask), targets.contiguous()
    dlogits = torch.empty_like(logits, memory_format=torch.contiguous_format)
    library().er_gradient(
        *_layout(logits), len(targets), vocab, _at(mask), _at(targets), alpha, *map(_at, per_row),
        torch.get_num_threads(), _at(dlogits),
    )  # fmt: skip
    return dlogits


@torch.no_grad()
def linear_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, mask: Tensor | None = None, bias: Tensor | None,
    logit_scale: float, softcap: float | None, alpha: float | Tensor, entropy: bool, logit_mean: bool,
    successor: Tensor | None = None, named: None = None, limits: Limits | None = None,
) -> tuple[RowStats, RowRewards | None]:  # fmt: skip
    """Do the same as `chunked.linear_forward`, with one call of the library to reduce each tile."""
    alpha = one_alpha(alpha, named)
    kept, all_targets = KeptRows(mask), targets
    hidden, targets = kept.take(hidden), kept.take(targets).contiguous()
    tiles = linear_tiles(hidden, weight, limits=limits)
    tile = LinearTile(hidden, weight, bias, logit_scale, softcap, tiles, limits)
    buffer = Buffer(tiles.rows * tiles.vocab, hidden.device)
    pass_ = _Pass(len(hidden), None, alpha, entropy, logit_mean)
    for columns in spans(0, weight.shape[0], tiles.vocab):
        tile.load_weight(columns)
        for rows in spans(0, len(hidden), tiles.rows):
            tile.load_hidden(rows)
            z = tile.native_logits()
            if z is None:
                z = tile.logits(buffer.view(length(rows), length(columns)))
            pass_.take(z.unsqueeze(0), targets, columns.start, rows)
    stats = RowStats(*map(kept.spread, pass_.finish(weight.shape[0])))
    return with_rewards(stats, all_targets, mask, weight.shape[0], successor, alpha)


def one_alpha(alpha: float | Tensor, named: Tensor | None) -> float:
    """Return alpha. Raises ValueError for temperatures of rows and named tokens, which the library does not know."""
    if isinstance(alpha, Tensor) or named is not None:
        raise ValueError("impl='compiled' takes one alpha for all rows, and no named tokens: use impl='chunked'")
    return alpha


class _Pass:
    """The running state of N rows, and their final statistics."""

    def __init__(self, num_rows: int, mask: Tensor | None, alpha: float, entropy: bool, logit_mean: bool):
        self._mask, self._alpha, self._want = _dense(mask), alpha, (entropy, logit_mean)
        self._state = torch.empty(num_rows, 4, dtype=torch.float64)
        wanted = (True, True, entropy, logit_mean, True, True)
        self._stats = RowStats(*(torch.zeros(num_rows, dtype=torch.float32) if want else None for want in wanted))
        library().er_start(num_rows, _at(self._state))

    def take(self, z: Tensor, targets: Tensor, first: int, rows: slice) -> None:
        """Add z (B, T, columns), the logits of the given rows from column `first` on. targets are those of all rows."""
        state, picked, targets = self._state[rows], self._stats.target_logit[rows], targets[rows]
        library().er_update(
            *_layout(z), len(targets), z.shape[-1], first, _at(self._mask), _at(targets), self._alpha, *self._want,
            torch.get_num_threads(), _at(state), _at(picked),
        )  # fmt: skip

    def finish(self, vocab: int) -> RowStats:
        lse, _, *others = self._stats
        outputs = map(_at, (lse, *others))
        library().er_finish(_at(self._state), len(lse), vocab, _at(self._mask), self._alpha, *outputs)
        return self._stats


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _at(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _layout(z: Tensor) -> tuple[int, ...]:
    """Return the address, dtype code, rows per outer index and strides of z (B, T, V)."""
    return z.data_ptr(), DTYPES[z.dtype], max(1, z.shape[1]), *z.stride()


# ------------------------------------------------------------------------------------------------------- building


@functools.cache
def library() -> ctypes.CDLL:
    """Return compiled.cpp as a library, from the cache folder or newly built. Raises ValueError without a compiler."""
    compiler = find_compiler()
    if compiler is None:
        raise ValueError(
            "impl='compiled' needs a C++ compiler, and none of $CXX, c++, g++ and clang++ was found: install one, or "
            "use impl='auto'"
        )
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    parts = (SOURCE.read_text(), compiler, version, *FLAGS, _cpu_features())
    name = f"compiled-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:24]}.so"
    folder = cache_folder()
    if not (folder / name).exists():
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            build(compiler, folder / name)
        except OSError:  # the cache folder is not writable: build for this process only
            folder = Path(tempfile.mkdtemp(prefix="endoreward_fast-"))
            build(compiler, folder / name)
    return _typed(ctypes.CDLL(str(folder / name)))


def find_compiler() -> str | None:
    asked = os.environ.get("CXX")
    return next(filter(None, map(shutil.which, [asked] if asked else ["c++", "g++", "clang++"])), None)


def build(compiler: str, path: Path) -> None:
    """Compile to `path` atomically, because several processes may build at the same time."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        command = [compiler, *FLAGS, str(SOURCE), "-o", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(
                f"impl='compiled' needs a C++ compiler with OpenMP (GCC or Clang); {' '.join(command)} said:\n"
                f"{done.stderr[-2000:]}"
            )
        os.replace(made, path)


def _cpu_features() -> str:
    """Return what -march=native depends on, because different machines may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())


def _typed(loaded: ctypes.CDLL) -> ctypes.CDLL:
    at, long, real, flag = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double, ctypes.c_int
    layout = (at, flag, long, long, long, long)
    signatures = {
        "er_start": (long, at),
        "er_update": (*layout, long, long, long, at, at, real, flag, flag, flag, at, at),
        "er_finish": (at, long, long, at, real, at, at, at, at, at),
        "er_gradient": (*layout, long, long, at, at, real, at, at, at, at, at, flag, at),
    }
    for name, arguments in signatures.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded
