"""The flags of `endoreward serve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from ...errors import EndoRewardError
from .options import TRUNCATE, MaxLength, ModelFlags, Text, Truncated
from .panels import of_limits, of_server
from .values import at_least_one, one_of

MIB = 2**20


@dataclass(frozen=True)
class ServeFlags(ModelFlags):
    """Further flags: where the server listens, who may ask, and how much."""

    max_length: MaxLength = None
    truncate: Truncated = None
    host: Annotated[str, of_server(help="Address to listen on. Other than this machine's own, it needs a token.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, of_server(help="Port to listen on; 0 takes a free one.")] = 8000
    token_file: Annotated[
        Text,
        of_server(
            metavar="FILE", help="File with the token that requests must carry. Default: the variable ENDOREWARD_TOKEN."
        ),
    ] = None
    served_name: Annotated[Text, of_server(help="Name of the model in requests and answers. Default: --model's.")] = (
        None
    )
    window_ms: Annotated[
        float, of_server(help="Milliseconds that a batch waits for more rows after the first, at least.")
    ] = 5
    max_waiting: Annotated[int, of_limits(help="Rows that may wait. More are refused, with Retry-After.")] = 8192
    max_rows: Annotated[int, of_limits(help="Rows in one request.")] = 1024
    max_request_tokens: Annotated[int, of_limits(help="Tokens in one request.")] = MIB
    max_request_mb: Annotated[int, of_limits(help="MiB of one request's body.")] = 16
    timeout: Annotated[float, of_limits(help="Seconds from a request to its answer.")] = 600

    def check(self) -> None:
        super().check()
        if not 0 <= self.port <= 65535:
            raise EndoRewardError(f"--port must be 0 to 65535, got {self.port}")
        if not 0 <= self.window_ms <= 1000:
            raise EndoRewardError(f"--window-ms must be 0 to 1000, got {self.window_ms:g}")
        if not 0 < self.timeout <= 86400:
            raise EndoRewardError(f"--timeout must be above 0 and at most 86400, got {self.timeout:g}")
        for name in ("max_waiting", "max_rows", "max_request_tokens", "max_request_mb"):
            at_least_one(f"--{name.replace('_', '-')}", getattr(self, name))
        if self.max_length is not None:
            at_least_one("--max-length", self.max_length)
        if self.truncate is not None:
            one_of("--truncate", self.truncate, TRUNCATE)
        if self.served_name is not None and not self.served_name.strip():
            raise EndoRewardError("--served-name is empty: leave it out, or give a name")

    def scoring(self) -> dict[str, Any]:
        return super().scoring() | {"max_length": self.max_length, "truncate": self.truncate}
