"""`endoreward serve`: rewards over HTTP."""

from __future__ import annotations

import sys
import time

from ..errors import EndoRewardError
from .flags.serve_flags import MIB, ServeFlags
from .run.pipeline import before_loading, load_scorer


def serve(flags: ServeFlags) -> None:
    """Serve the model that `flags` name until SIGTERM or Ctrl-C."""
    try:
        from ..serving.limits import Limits, is_local, token_in
        from ..serving.metrics import Metrics
        from ..serving.run import listen, log_to_stderr, url_of
        from ..serving.run import serve as answer
        from ..serving.service import Served, Service
    except ModuleNotFoundError as error:
        needs = "pip install fastapi uvicorn httptools prometheus-client"
        raise EndoRewardError(f"serve needs {error.name}: {needs}") from None
    token = token_in(flags.token_file, needed=not is_local(flags.host))
    limits = Limits(flags.max_request_mb * MIB, flags.max_rows, flags.max_request_tokens, flags.timeout)
    listening = listen(flags.host, flags.port)
    started = time.monotonic()
    before_loading(flags)
    served = Served.of(flags.model, flags.served_name, **flags.source)
    tell(flags, f"serving {served.names[0]} on {url_of(listening)}")
    log_to_stderr()

    def load(metrics: Metrics) -> Service:
        return Service(
            load_scorer(flags), served, options=flags.scoring(), limits=limits, metrics=metrics,
            window=flags.window_ms / 1000, most_waiting=flags.max_waiting,
        )  # fmt: skip

    def on_ready() -> None:
        tell(flags, f"ready after {time.monotonic() - started:.1f} s; Ctrl-C answers what was accepted and ends")

    with listening:
        answer(load, listening, limits=limits, token=token, on_ready=on_ready)


def tell(flags: ServeFlags, text: str) -> None:
    """Write a line to standard error, unless --quiet."""
    if not flags.quiet:
        print(f"endoreward: {text}", file=sys.stderr, flush=True)
