"""`--engine ray`: the command reads windows of rows, and Ray Data distributes them over the actors of a Ray cluster.

Because the command reads and writes, Ray runs take the same formats and keep the order of the input. Written against
Ray 2.60.
"""

import contextlib
import logging
import os
import pickle
import socket
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from ...data.items import Item
from ...errors import EndoRewardError
from ..flags.engine_flags import EngineFlags
from .jobs import Engine, Finished, InOrder, Job, Windows, Write, note_idle, warnings_to
from .monitor import Monitor

PATIENCE = 10.0
"""seconds to wait for a cluster to answer"""
RETRIES = 3
"""retries of a window whose actor died; Ray's default is unlimited, but the rows themselves may kill every actor"""


class ScoreWindow:
    """The actor of `on_ray`: {"number": window number, "items": pickled items} -> {"finished": JSON of Finished}."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.refusal: str | None = None
        self.notes: list[str] = []
        try:
            with warnings_to(self.notes.append):
                self.scorer = job.load()
        except EndoRewardError as error:  # returned with the first window: if raised, Ray restarts the actor forever
            self.refusal = str(error)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = int(row["number"])
        if self.refusal:
            return {"finished": Finished(number, stopped=self.refusal).to_json()}
        finished = self.job.finish(number, pickle.loads(row["items"]), self.scorer)
        finished.notes[:0] = self.notes
        return {"finished": finished.to_json()}


def on_ray(job: Job, flags: EngineFlags) -> Engine:
    """Return the Engine that scores on a Ray cluster: RAY_ADDRESS, a cluster on this machine, or a new one here.

    Ray holds the windows in its object store, which spills to disk. Raises EndoRewardError if the cluster cannot be
    reached or has no room for the actors.
    """
    import ray

    ours = not ray.is_initialized()
    if ours:
        _look_for(os.environ.get("RAY_ADDRESS", ""))
        try:
            ray.init(logging_level="error", log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:  # RAY_ADDRESS has no cluster, or is no address
            raise EndoRewardError(f"--engine ray: {str(error).rstrip('.')}: check RAY_ADDRESS") from error
    size = actors(flags, [node["Resources"] for node in ray.nodes() if node["Alive"]])

    def run(windows: Iterator[list[Item]], write: Write, monitor: Monitor) -> None:
        read, output = Windows(windows), InOrder(write, monitor)
        packed = [{"number": number, "items": pickle.dumps(items)} for number, items in enumerate(read)]
        note_idle(monitor, read.count, size["actors"], "actors")
        try:
            # Ray prints about dead actors on standard output, which may hold results.
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
    """Raise EndoRewardError if no machine answers at `address`. Ray would retry for minutes without a message."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdecimal()):
        return  # empty, "auto", or not an address, which Ray reports
    try:
        socket.create_connection((host.strip("[]"), int(port)), PATIENCE).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise EndoRewardError(f"--engine ray: nothing answers at {address} ({reason}): check RAY_ADDRESS") from None


def _finished(packed: list[dict[str, Any]], job: Job, actors: int, num_gpus: float, num_cpus: float) -> Iterator[str]:
    """Yield the results of ScoreWindow in the order in which they finish."""
    import ray.data

    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.ERROR)  # the command shows its own progress; Ray's log files stay complete
    data = ray.data.from_items(packed, override_num_blocks=len(packed))
    data.context.enable_progress_bars = False
    pool = ray.data.ActorPoolStrategy(size=min(actors, len(packed)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`ray_remote_args` is deprecated")  # the extra requires Ray below 2.64
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
    """Return the number of actors and their size. Default: one per GPU, or per machine if there is no GPU.

    `nodes` holds each live machine's resources under Ray's names (CPU, GPU). Raises EndoRewardError if the actors
    do not fit, because Ray would wait for machines to join.
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
            f"the cluster has room for {room}: lower one of them"
        )
    return {"actors": count, "num_gpus": each, "num_cpus": flags.cpus_per_actor}


def _on_gpus(gpus: float, each: float) -> int:
    """Return how many actors fit on `gpus`. An actor with a fraction of a GPU cannot span two."""
    return int(gpus) * _times(1, each) if 0 < each < 1 else _times(gpus, each)


def _times(there: float, each: float) -> int:
    """Return how often `each` fits into `there`. Not by //: 1 // 0.1 is 9."""
    return int(there / each + 1e-6) if each else sys.maxsize
