"""What one request may cost, and who may ask."""

import hmac
import ipaddress
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from ..errors import EndoRewardError

TOKEN = "ENDOREWARD_TOKEN"
"""the environment variable with the token, for the server and its clients"""
SHORTEST = 16
"""characters of a token"""


@dataclass(frozen=True)
class Limits:
    """The most that one request may have. A request that has more gets status 413, or 504 for the time."""

    request_bytes: int = 16 * 2**20
    rows: int = 1024
    """completions to score"""
    tokens: int = 2**20
    """of all its rows"""
    seconds: float = 600
    """from the end of its body to its answer; reading the body may take as long again, at 50 KB a second or more"""

    @property
    def values(self) -> int:
        """The most values of JSON in a body: each token has two, its id and whether it counts."""
        return 2 * self.tokens + 2**16

    @property
    def bytes_held(self) -> int:
        """The most bytes that the bodies of all requests may have, from the first byte to the answer.

        The queue is limited in rows, which may be long: as token ids, they take about seven times as many bytes.
        """
        return 32 * self.request_bytes


def is_local(host: str) -> bool:
    """Return whether only this machine can reach a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def token_in(file: str | None, *, needed: bool, flag: str = "--token-file") -> bytes | None:
    """Return the token: of the file, else of the environment variable ENDOREWARD_TOKEN, else None.

    `flag` is the name by which the user gave the file.

    Raises EndoRewardError: a file that cannot be read or that others can read, a token that is short or has a space,
    and no token where one is `needed`.
    """
    if file is not None:
        return _checked(_contents(Path(file).expanduser(), flag), f"{flag} {file}")
    if TOKEN in os.environ:
        return _checked(os.environ[TOKEN], TOKEN)
    if needed:
        raise EndoRewardError(
            f"other machines can reach this host, so a token is required: name a file with {flag}, or set {TOKEN}"
        )
    return None


def _contents(path: Path, flag: str) -> str:
    try:
        with path.open(encoding="utf-8") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise EndoRewardError(f"{flag} {path}: it is not a file")
            if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
                raise EndoRewardError(f"{flag} {path}: other users can read it: run `chmod 600 {path}`")
            return file.read(2**16)
    except UnicodeDecodeError:
        raise EndoRewardError(f"{flag} {path}: it is not text") from None
    except OSError as error:
        raise EndoRewardError(f"{flag} {path}: {error.strerror}") from None


def _checked(text: str, where: str) -> bytes:
    token = text.strip()
    if len(token) < SHORTEST or not token.isascii() or not token.isprintable() or " " in token:
        raise EndoRewardError(f"{where}: a token has at least {SHORTEST} printable ASCII characters and no space")
    return token.encode()


def same(given: bytes, token: bytes) -> bool:
    """Return whether the tokens are equal, in a time that does not depend on how much of them is."""
    return hmac.compare_digest(given, token)
