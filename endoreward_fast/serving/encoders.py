"""Encoders that requests share: each learns how the chat template writes turns, which takes longer than a short row."""

import threading
from collections import OrderedDict
from datetime import date
from typing import Any

from ..scoring.options import ScoreOptions
from ..scoring.score import encoder_for
from ..scoring.scorer import Scorer
from ..text.encoding import Encoder
from ..text.template import Extras

OF_TEXT = ("system", "chat", "max_length", "truncate", "append_eos", "date")
KEPT = 8
USES = 1000
"""uses after which an encoder is replaced: it keeps what it has learnt of each template's turns, which has no bound"""


class Encoders:
    """The encoders of the last options. Options with tools, documents or template arguments get one of their own."""

    def __init__(self, scorer: Scorer) -> None:
        self._scorer = scorer
        self._known: OrderedDict[tuple[Any, ...], tuple[Encoder, int]] = OrderedDict()
        self._lock = threading.Lock()

    def of(self, options: ScoreOptions) -> Encoder:
        """Return an encoder for these options. It writes the date of today, unless the options name one."""
        if options.extras != Extras():
            return encoder_for(self._scorer, options)
        values = [getattr(options, name) for name in OF_TEXT]
        key = (date.today(), *((type(value), value) for value in values))  # chat=0 and chat=False differ
        with self._lock:
            known = self._known.pop(key) if key in self._known else None
            encoder, left = known or (encoder_for(self._scorer, options), USES)
            if left > 1:
                self._known[key] = encoder, left - 1
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
            return encoder
