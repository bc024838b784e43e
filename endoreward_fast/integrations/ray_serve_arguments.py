"""The arguments of an application on Ray Serve: ours, those of scoring, and Ray's own."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from json import loads
from typing import Any

from ray import serve
from ray.serve.config import AutoscalingConfig

from ..errors import EndoRewardError
from ..scoring.arguments import refuse_unknown
from ..scoring.options import ScoreOptions
from ..serving.limits import TOKEN, Limits
from ..serving.service import OPTIONS

OF_RAY = tuple(
    name for name in inspect.signature(serve.deployment).parameters
    if name not in ("_func_or_class", "name", "version", "user_config")
)  # fmt: skip
"""Ray's options of a deployment"""
SCORING = (*OPTIONS, "max_tokens_per_batch")
TEXTS = ("reduction", "system", "truncate", "date")
"""options of scoring that are text, and are not read as JSON"""
MIB = 2**20


@dataclass(frozen=True)
class Settings:
    """The arguments of an application, besides those of Ray. `ray_serve.app` documents them."""

    model: str
    dtype: str = "auto"
    device: str | None = None
    revision: str | None = None
    subfolder: str | None = None
    gguf_file: str | None = None
    trust_remote_code: bool = False
    served_name: str | None = None
    window_ms: float = 5
    max_waiting: int = 8192
    max_rows: int = 1024
    max_request_tokens: int = MIB
    max_request_mb: int = 16
    timeout: float = 600
    token_file: str | None = None
    local: bool = False
    ingress_replicas: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    """of scoring, for every request"""

    @property
    def limits(self) -> Limits:
        """The limits of one request."""
        return Limits(self.max_request_mb * MIB, self.max_rows, self.max_request_tokens, self.timeout)

    @property
    def source(self) -> dict[str, Any]:
        """Arguments of from_pretrained that find the model."""
        given = {name: getattr(self, name) for name in ("revision", "subfolder", "gguf_file")}
        found = {name: value for name, value in given.items() if value is not None}
        return found | ({"trust_remote_code": True} if self.trust_remote_code else {})


def sorted_arguments(args: Mapping[str, Any]) -> tuple[Settings, dict[str, Any]]:
    """Return our arguments and Ray's. Raises EndoRewardError for those that cannot work."""
    if "token" in args:
        raise EndoRewardError(
            f"token: Ray's dashboard shows the arguments of an application: set {TOKEN}, or use token_file=FILE"
        )
    kinds = {known.name: known.type for known in fields(Settings) if known.name != "options"}
    refuse_unknown(args, [*kinds, *SCORING, *OF_RAY])
    if "model" not in args:
        raise EndoRewardError("no model: give model=NAME")
    options = {name: args[name] if name in TEXTS else _parsed(args[name]) for name in SCORING if name in args}
    ScoreOptions.of(options)  # raises for a wrong one
    ours = {name: _typed(name, args[name], kind) for name, kind in kinds.items() if name in args}
    of_ray = {name: _parsed(args[name]) for name in OF_RAY if name in args}
    scaling = of_ray.get("autoscaling_config")
    if isinstance(scaling, Mapping):
        refuse_unknown(scaling, AutoscalingConfig.model_fields)  # Ray ignores those that it does not know
    return Settings(**ours, options=options), of_ray


def _typed(name: str, value: Any, kind: Any) -> Any:
    kinds = getattr(kind, "__args__", (kind,))
    value = value if str in kinds else _parsed(value)
    if kind in (int, float):
        allowed = (int,) if kind is int else (int, float)
        fits, wanted = type(value) in allowed and value > 0, f"a {'whole ' * (kind is int)}number above 0"
    else:
        fits, wanted = type(value) in kinds, "true or false" if kind is bool else "text"
    if not fits:
        raise EndoRewardError(f"{name}: expected {wanted}, got {value!r}")
    return value


def _parsed(value: Any) -> Any:
    """Return a value that `serve run` gave as text. Text that is no JSON stays text: num_replicas=auto."""
    try:
        return loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
