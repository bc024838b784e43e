"""Whether the Hugging Face hub can be reached, asked once: its client tries for half a minute, call after call."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable
from urllib.parse import urlsplit

from ..checkpoint import place_of

HUB = "https://huggingface.co"
PATIENCE = 5.0
"""seconds"""
PROXIES = ("https_proxy", "http_proxy", "all_proxy")


def stay_offline_without_hub(names: Iterable[str]) -> str | None:
    """Where `names` are to be looked up on a hub that is out of reach: use this machine's copies, and say so.

    The hub's client takes HF_HUB_OFFLINE from the environment when it is imported: nothing is done after that.
    """
    remote = any(not os.path.isdir(place_of(name)) for name in names)
    if not remote or "huggingface_hub" in sys.modules or "HF_HUB_OFFLINE" in os.environ or _behind_a_proxy():
        return None
    endpoint = os.environ.get("HF_ENDPOINT", HUB)
    address = urlsplit(endpoint)
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname or "", port), PATIENCE).close()
    except OSError as error:
        os.environ["HF_HUB_OFFLINE"] = "1"
        return f"{endpoint} cannot be reached ({error.strerror or error}): only models on this machine can be loaded"
    return None


def _behind_a_proxy() -> bool:
    return any(os.environ.get(name) or os.environ.get(name.upper()) for name in PROXIES)
