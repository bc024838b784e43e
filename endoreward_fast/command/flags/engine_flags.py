"""The flags of a run over rows: where the rows are scored."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Annotated, Any

from ...errors import EndoRewardError
from ...remote.address import TOKEN, Address
from .options import SOURCE, Count, RowFlags, Share, Text
from .panels import of_cluster, of_output
from .values import at_least_one, one_of

ENGINES = LOCAL, RAY, HTTP = ("local", "ray", "http")
OF_SERVER = ("model", *SOURCE, "dtype", "device", "max_tokens_per_batch")
"""flags that a server has decided on"""


@dataclass(frozen=True)
class EngineFlags(RowFlags):
    """Further flags: where rows are scored and how --resume recognises them. Scores do not depend on them."""

    engine: Annotated[
        str, of_cluster(help="local: this process or torchrun's ranks. ray: a Ray cluster. http: the server at --url.")
    ] = LOCAL
    url: Annotated[
        Text,
        of_cluster(help=f"Server that `endoreward serve` started: http://HOST:PORT. Its token is read from {TOKEN}."),
    ] = None
    actors: Annotated[
        Count, of_cluster(help="Ray: number of actors, each with a model. Default: one per GPU, or per machine.")
    ] = None
    gpus_per_actor: Annotated[
        Share, of_cluster(help="Ray: GPUs per actor; 0.5 puts two on a GPU. Default: 1 if there is a GPU.")
    ] = None
    cpus_per_actor: Annotated[float, of_cluster(help="Ray: CPU cores per actor.")] = 1.0
    id: Annotated[Text, of_output(help="Column by which --resume recognises a row. Default: all columns.")] = None

    def check(self) -> None:
        one_of("--engine", self.engine, ENGINES)
        self._check_server()
        super().check()
        if self.actors is not None:
            at_least_one("--actors", self.actors)
        for flag, value in (("--gpus-per-actor", self.gpus_per_actor), ("--cpus-per-actor", self.cpus_per_actor)):
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise EndoRewardError(f"{flag} must be 0 or more, got {value}")
            if value is not None and value > 1 and value % 1:
                raise EndoRewardError(f"{flag} must be a whole number if it is above 1, got {value}")
        if self.engine != RAY and (self.actors is not None or self.gpus_per_actor is not None):
            raise EndoRewardError("--actors and --gpus-per-actor need --engine ray")

    def _check_server(self) -> None:
        if self.engine != HTTP:
            if self.url is not None:
                raise EndoRewardError("--url needs --engine http")
            return
        if self.url is None:
            raise EndoRewardError("--engine http needs --url: the address of `endoreward serve`, http://HOST:PORT")
        if Address.of(self.url).in_url:
            raise EndoRewardError(f"--url has a user or token, which other users see: set {TOKEN} to the token instead")
        unset = {name: EngineFlags.__dataclass_fields__[name].default for name in OF_SERVER}
        given = [name for name in OF_SERVER if getattr(self, name) != unset[name]]
        if given or not self.model_by_default:
            flag = (given or ["model"])[0].replace("_", "-")
            raise EndoRewardError(f"--{flag}: the server at --url has its model and batches: leave --{flag} out")

    def to_json(self) -> dict[str, Any]:
        engine = {f.name for f in fields(EngineFlags)} - {f.name for f in fields(RowFlags)}
        return {name: value for name, value in super().to_json().items() if name not in engine}
