"""The engine of a run: what its flags name, whether it can start, and what tells its model from others."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import EndoRewardError
from ...model.checkpoint import weights_of
from ..flags.engine_flags import HTTP, LOCAL, RAY, EngineFlags
from . import pipeline
from .jobs import Engine, Job, here, nothing_left
from .ranks import Rank, lead

if TYPE_CHECKING:
    from ...remote.client import RemoteModel

NEEDS = {RAY: ("ray", "Ray Data: pip install 'ray[data]<2.64'"), HTTP: ("urllib3", "urllib3: pip install 'urllib3>=2'")}
"""{engine: its module, and what to install}"""


def refuse_without_means(engine: str, rank: Rank) -> None:
    """Raise EndoRewardError if the engine cannot start in this process, or if its package is not installed."""
    if engine == LOCAL:
        return
    if not rank.alone:
        whose = "starts its own processes" if engine == RAY else "asks one server"
        raise EndoRewardError(f"--engine {engine} {whose}: start it without a launcher")
    module, what = NEEDS[engine]
    if importlib.util.find_spec(module) is None:
        raise EndoRewardError(f"--engine {engine} needs {what}")


def model_of(flags: EngineFlags, server: Callable[[], RemoteModel]) -> dict[str, Any]:
    """Return what tells the model of a run from others, for its settings."""
    if flags.engine != HTTP:
        return {"weights": weights_of(flags.model, **flags.source)}
    about = server().about
    return {"model": about["model"], "weights": about["weights"], "served_dtype": about.get("dtype")}


def engine_of(
    job: Job, rank: Rank, settings: Callable[[], dict[str, Any]], server: Callable[[], RemoteModel], *, idle: bool,
    waits: bool,
) -> Engine:  # fmt: skip
    """Return the engine that scores the rows. `idle`: no rows are left. `waits`: reading may wait, as from a pipe."""
    flags = job.flags
    if not rank.alone:
        return lead(job, rank, settings()["weights"], idle=idle)
    if idle:
        return nothing_left
    if flags.engine == HTTP:
        settings()  # now, because the first write needs them, and the server may have gone away by then
        return here(job, ahead=not waits, scorer=server())
    pipeline.before_loading(flags)
    if flags.engine != RAY:
        return here(job, ahead=not waits)
    from .on_ray import on_ray

    return on_ray(job, flags)
