"""Scoring on a cluster, by Ray Data (written against Ray 2.60).

    ds = ray.data.read_json("rows.jsonl")
    ds = ds.map_batches(
        ScoreRows, fn_constructor_kwargs={"model": "Qwen/Qwen2.5-0.5B-Instruct", "reduction": "mean"},
        batch_format="pyarrow", batch_size=256,
        compute=ray.data.ActorPoolStrategy(size=4), num_gpus=0.5,      # Ray's own: two actors share a GPU
    )
    ds.write_parquet("scored")

Ray decides where actors run and what is retried; a row's score does not depend on that. `endoreward score --engine ray`
is `on_ray`: Ray Data once more, over windows of rows that the command has read, so that it takes every format that the
command takes and writes in the order of the input.
"""

import contextlib
import logging
import os
import pickle
import socket
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from ..command.flags.options import EngineFlags
from ..command.run.jobs import Engine, Finished, InOrder, Job, Windows, Write, note_idle, warnings_to
from ..command.run.output import Monitor
from ..command.run.pipeline import Item
from ..errors import EndoRewardError
from ..model.model import EndoRewardModel
from ..scoring.arguments import ScoreKwargs
from ..scoring.score import ScoreOptions

if TYPE_CHECKING:
    import pyarrow

ADDED = ("score", "tokens", "error")
PATIENCE = 10.0
"""seconds to wait for a cluster to answer"""
RETRIES = 3
"""of a window whose actor died under it: Ray's own number has no end, and rows may be what kills it"""


class ScoreRows:
    """One model, loaded once an actor; each call scores one batch of rows.

    model            a name or folder ("pocket" is built in)
    dtype, device    as in EndoRewardModel.from_pretrained; by default the checkpoint's, and the GPU that Ray gives
    source           where in the model its weights are, and more of EndoRewardModel.from_pretrained: {"revision": "v2"}
    options          as in EndoRewardModel.score: alpha, reduction, gamma, floor, system, chat, max_length, ...

    Rows are those of EndoRewardModel.score, a column for each key: `prompt` and `completion`, text or messages, or
    `messages`, or `prompt_ids` and `completion_ids`. A null is a key that the row does not have.
    Adds `score` (float64, null where there is none), `tokens` (int64, scored ones) and `error` (why not, or null).

    Raises EndoRewardError: a model that cannot be loaded, an option that cannot work, a column that is there already.
    """

    def __init__(
        self, model: str, *, dtype: str = "auto", device: str | None = None, source: dict[str, Any] | None = None,
        **options: Unpack[ScoreKwargs],
    ) -> None:  # fmt: skip
        ScoreOptions.of(options)  # what cannot work is said before the model is loaded
        self.options = options
        self.scorer = EndoRewardModel.from_pretrained(model, dtype=dtype, device=device, **(source or {}))

    def __call__(self, batch: "pyarrow.Table") -> "pyarrow.Table":
        import pyarrow

        if not isinstance(batch, pyarrow.Table):
            raise EndoRewardError(
                f"a batch is a {type(batch).__name__}: map_batches(ScoreRows, batch_format='pyarrow')"
            )
        taken = sorted(set(ADDED) & set(batch.column_names))
        if taken:
            raise EndoRewardError(f"the data set has a column {taken[0]!r}, which ScoreRows adds: rename it first")
        rows = [{key: value for key, value in row.items() if value is not None} for row in batch.to_pylist()]
        results = self.scorer.score(rows, **self.options)
        columns = (
            pyarrow.array([r.score for r in results], pyarrow.float64()),
            pyarrow.array([r.num_tokens for r in results], pyarrow.int64()),
            pyarrow.array([r.error for r in results], pyarrow.string()),
        )
        for name, column in zip(ADDED, columns, strict=True):
            batch = batch.append_column(name, column)
        return batch


class ScoreWindow:
    """The actor of `on_ray`: {"number": of a window, "items": pickled} -> {"finished": their lines}."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.refusal: str | None = None
        self.notes: list[str] = []
        try:
            with warnings_to(self.notes.append):
                self.scorer = job.load()
        except EndoRewardError as error:  # told with the first window: Ray would start this actor again and again
            self.refusal = str(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["number"])
        if self.refusal:
            return {"finished": Finished(number, stopped=self.refusal).to_json()}
        finished = self.job.finish(number, pickle.loads(row["items"]), self.scorer)
        finished.notes[:0] = self.notes
        return {"finished": finished.to_json()}


def on_ray(job: Job, flags: EngineFlags) -> Engine:
    """Windows of rows over the actors of a Ray cluster: RAY_ADDRESS, or the one of this machine, or one started here.

    Ray holds the windows in its object store, which spills to disk. Raises EndoRewardError: actors that the cluster has
    no room for.
    """
    import ray

    ours = not ray.is_initialized()
    if ours:
        _look_for(os.environ.get("RAY_ADDRESS", ""))
        try:
            ray.init(logging_level="error", log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:  # RAY_ADDRESS names none, or is no address
            raise EndoRewardError(f"--engine ray: {error} (RAY_ADDRESS)") from error
    size = actors(flags, [node["Resources"] for node in ray.nodes() if node["Alive"]])

    def run(windows: Iterator[list[Item]], write: Write, monitor: Monitor) -> None:
        read, output = Windows(windows), InOrder(write, monitor)
        packed = [{"number": number, "items": pickle.dumps(items)} for number, items in enumerate(read)]
        note_idle(monitor, read.count, size["actors"], "actors")
        try:
            # Ray prints of actors that died, between rows on their way out.
            with contextlib.redirect_stdout(sys.stderr):
                for finished in _finished(packed, job, **size):
                    output.add(Finished.from_json(finished))
        finally:
            output.keep()
            if ours:
                ray.shutdown()
        read.raise_error()

    return run


def _look_for(address: str) -> None:
    """EndoRewardError where no machine answers at `address`: Ray tries for minutes, and says so to itself."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return  # none is named, or "auto", or none at all, which Ray says
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise EndoRewardError(f"--engine ray: nothing answers at {address} (RAY_ADDRESS): {reason}") from None


def _finished(packed: list[dict[str, Any]], job: Job, actors: int, num_gpus: float, num_cpus: float) -> Iterator[str]:
    """What ScoreWindow makes of each window, as they come."""
    import ray.data

    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)  # the command has a bar and words of its own; Ray's log files keep theirs
    data = ray.data.from_items(packed, override_num_blocks=len(packed))
    data.context.enable_progress_bars = False
    pool = ray.data.ActorPoolStrategy(size=min(actors, len(packed)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")  # and Ray below 2.64 is asked for
        scored = data.map(
            ScoreWindow, fn_constructor_args=(job,), compute=pool, num_gpus=num_gpus, num_cpus=num_cpus,
            max_task_retries=RETRIES,
        )  # fmt: skip
    try:
        for row in scored.iter_rows():
            yield row["finished"]
    except ray.exceptions.RayActorError as error:
        reason = str(error).strip().partition("\n")[0]
        raise EndoRewardError(f"an actor died {RETRIES + 1} times over the same rows: {reason}") from error


def actors(flags: EngineFlags, nodes: list[dict[str, float]]) -> dict[str, Any]:
    """How many actors of which size: by default one a GPU, or one a machine where there is none.

    `nodes`: what each machine that is up has, as Ray names it (CPU, GPU). Raises EndoRewardError for more than there is
    room for: Ray would wait for machines to come.
    """
    gpus = any(node.get("GPU") for node in nodes)
    each = flags.gpus_per_actor if flags.gpus_per_actor is not None else float(gpus)
    on_gpus = [_on_gpus(node.get("GPU", 0.0), each) for node in nodes]
    on_cores = [_times(node.get("CPU", 0.0), flags.cpus_per_actor) for node in nodes]
    count = flags.actors or max(1, sum(on_gpus) if each else sum(fit > 0 for fit in on_cores))
    room = sum(map(min, on_gpus, on_cores))
    if count > room:
        raise EndoRewardError(
            f"--actors {count} with --gpus-per-actor {each:g} and --cpus-per-actor {flags.cpus_per_actor:g}: "
            f"the cluster has room for {room}"
        )
    return {"actors": count, "num_gpus": each, "num_cpus": flags.cpus_per_actor}


def _on_gpus(gpus: float, each: float) -> int:
    """An actor with less than a GPU does not stand on two of them."""
    return int(gpus) * _times(1, each) if 0 < each < 1 else _times(gpus, each)


def _times(there: float, each: float) -> int:
    """How often `each` fits; 1 / 0.1 is 10, and 1 // 0.1 is 9."""
    return int(there / each + 1e-6) if each else sys.maxsize
