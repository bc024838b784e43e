"""The address of a server, and the token that it asks for. This module imports neither torch nor urllib3."""

import os
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from ..errors import EndoRewardError

TOKEN = "ENDOREWARD_TOKEN"
"""environment variable: the server's token"""
WANTED = "expected http://HOST:PORT or https://HOST"


def is_url(name: Any) -> bool:
    """Return whether a model's name is the address of a server."""
    return isinstance(name, str) and name.lower().startswith(("http://", "https://"))


@dataclass(frozen=True)
class Address:
    """Where a server is, without secrets, and its token."""

    url: str
    """scheme, host, port and path prefix, without a slash at the end"""
    token: str | None = field(default=None, repr=False)
    in_url: bool = field(default=False, repr=False)
    """whether the URL itself held a user or a token"""

    @classmethod
    def of(cls, url: str, token: str | None = None) -> "Address":
        """Read a URL. The token is `token`, else the password (or user) in the URL, else that of ENDOREWARD_TOKEN.

        Raises EndoRewardError for a URL that cannot be the address of a server, or a token that no header can hold.
        No message shows the token.
        """
        if not is_url(url):
            raise EndoRewardError(f"url is {_shown(url)}: {WANTED}")
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:  # a port that is no number, or brackets that do not match
            host, port = None, None
        # A backslash, a space or an @ in the path: the URL was cut in another place than its author meant.
        odd = not host or "\\" in url or any(c in f"{host}{parts.path}" for c in "@ ")
        if odd or not url.isprintable() or not url.isascii():
            raise EndoRewardError(f"the url of the server cannot be read: {WANTED}")
        if parts.query or parts.fragment:
            raise EndoRewardError(f"the url of the server has a query or fragment: {WANTED}")
        where = f"[{host}]" if ":" in str(host) else str(host)
        clean = f"{parts.scheme.lower()}://{where}{'' if port is None else f':{port}'}{parts.path.rstrip('/')}"
        in_url = unquote(parts.password or parts.username or "")
        return cls(clean, _checked(token or in_url or os.environ.get(TOKEN, "").strip()), "@" in parts.netloc)


def _checked(token: str) -> str | None:
    if not token:
        return None
    if not (token.isascii() and token.isprintable() and " " not in token):
        raise EndoRewardError(f"the token has spaces or characters beyond ASCII: check {TOKEN}, or the argument token")
    return token


def _shown(url: Any) -> str:
    """Return what was given in place of a URL, unless it may hold a secret."""
    if not isinstance(url, str):
        return f"a {type(url).__name__}"
    return "another text with an @" if "@" in url else repr(url[:80])
