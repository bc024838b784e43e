"""One connection of a client: how large the head of a request may be, and how long it may take."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD = 2**16
"""bytes of a request's first line and headers; uvicorn's own parser has the same limit, httptools has none"""
SECONDS = 75
"""from a connection or the last answer to the end of a request's head"""


class Connection(HttpToolsProtocol):
    """uvicorn's connection with limits. They come before the token is known, so they hold for everybody."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head: int | None = 0
        """bytes of the head that is being read; None: a body is being read"""
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request."""
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes, and refuse a head with too many."""
        if self._head is not None:
            self._head += len(data)
        super().data_received(data)
        if self._head is not None and self._head > HEAD and not self.transport.is_closing():
            self.send_400_response(f"The head of a request may have {HEAD} bytes.")

    def on_headers_complete(self) -> None:
        """Begin to answer."""
        self._head = None
        self._stop_timer()
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Note that what follows is another head."""
        self._head = 0
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for another request."""
        super().on_response_complete()
        if self.cycle.response_complete:  # otherwise another request came before this answer
            self._await_head()

    def _await_head(self) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(SECONDS, self._close)

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
