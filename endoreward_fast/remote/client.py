"""`RemoteModel`: a model behind a URL, which scores rows in place of a loaded one.

    scorer = RemoteModel("http://rewards:8000")
    scorer.score([{"prompt": "What is 2 + 3?", "completion": "5"}])

`endoreward serve` starts the server. transport.py sends the requests, and rows.py turns rows into JSON.
"""

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from typing_extensions import Unpack

from ..errors import EndoRewardError
from ..scoring.arguments import ScoreKwargs, list_of_rows
from ..scoring.options import ScoreOptions
from ..scoring.ranking import ranked
from ..scoring.results import OnTokens, Ranked, RowScore, Scores, in_order
from ..text.rows import Row
from .address import Address
from .in_flight import in_flight
from .rows import Sent, as_json, to_send
from .transport import Refused, Transport
from .vocabulary import RemoteVocabulary
from .wire import MODEL, REWARDS, SERVERS_OWN, VOCABULARY, of_json

ROWS, BYTES = 64, 65536
"""Most rows and about most bytes of a request, whatever the server allows: about what fills a batch of 8192 tokens, so
that several requests are in flight and results come early"""
ENVELOPE = 64
"""bytes of a request beside its rows and options, at most"""
TOO_LARGE, NO_SCORES, NOT_FOUND = 413, 422, 404
KNOWN = ("model", "weights", "vocab_size", "eos_ids", "limits")


class RemoteModel:
    """A model that a server scores with. Scoring has the interface of EndoRewardModel, and may run in many threads.

    url          address of the server: "http://HOST:PORT". It may hold the token: "http://any:TOKEN@HOST:PORT"
    token        the server's token. Default: the one in `url`, else the environment variable ENDOREWARD_TOKEN
    timeout      seconds that one request may take in all, waits and repetitions included
    retries      how often a request is sent again after a lost connection, 502 or 504, with growing waits. While the
                 server answers 429 or 503 (busy, or loading its model), a request waits until `timeout`
    concurrency  requests in flight at a time, each on one of as many open connections. It holds for all threads
                 together, and for each process on its own

    A RemoteModel can be pickled, token included, and used in a forked process. Neither asks the server. The connection
    is direct: the variables HTTP_PROXY and HTTPS_PROXY are not read.

    The token goes to this server alone: redirects are not followed. Over http it can be read on the way, so outside of
    a trusted network, use https.

    Raises EndoRewardError, in one line that does not show the token, if no server answers there.
    """

    tokenizer = None
    """text is tokenized by the server"""

    def __init__(
        self, url: str, token: str | None = None, *, timeout: float = 600.0, retries: int = 6, concurrency: int = 8
    ) -> None:
        for name, value, least in (("timeout", timeout, 0), ("retries", retries, -1), ("concurrency", concurrency, 0)):
            whole = name != "timeout"
            if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not value > least:
                raise EndoRewardError(f"{name}={value!r}: expected a number above {least}{' and whole' * whole}")
        address = Address.of(url, token)
        self.url, self.concurrency = address.url, concurrency
        self._transport = Transport(address, timeout=timeout, retries=retries, connections=self.concurrency)
        self._vocabulary: list[RemoteVocabulary | None] = []
        self.about = self._transport.get(MODEL)
        """the server's description of its model: /v1/model"""
        missing = [name for name in KNOWN if name not in self.about]
        if missing:
            raise EndoRewardError(f"{self.url}{MODEL} does not say its {missing[0]!r}: is `endoreward serve` there?")

    def __repr__(self) -> str:
        return f"RemoteModel({self.url!r})"

    @property
    def vocab_size(self) -> int:
        """The number of tokens that the model's output head has."""
        return int(self.about["vocab_size"])

    @property
    def max_positions(self) -> int | None:
        """The most tokens in a row; None: no limit."""
        return self.about.get("max_positions")

    @property
    def eos_ids(self) -> frozenset[int]:
        """Token ids that end an episode."""
        return frozenset(self.about["eos_ids"])

    def vocabulary(self) -> RemoteVocabulary | None:
        """Return the vocabulary of the server's tokenizer, or None if the model has no tokenizer. Asks once."""
        if not self._vocabulary:  # without a lock: a second thread may ask too, and gets the same
            self._vocabulary.append(self._asked_vocabulary())
        return self._vocabulary[0]

    def _asked_vocabulary(self) -> RemoteVocabulary | None:
        try:
            found = self._transport.get(VOCABULARY)
        except Refused as refused:
            if refused.status == NOT_FOUND:
                return None
            raise
        return RemoteVocabulary(found["name"], found["tokens"], found.get("special", ()))

    def score(
        self, rows: Iterable[Row], *, on_tokens: OnTokens = None, **options: Unpack[ScoreKwargs]
    ) -> list[RowScore]:
        """Return the scores of rows, in their order: rows and options as in EndoRewardModel.score.

        A row that cannot be scored gets an `error`; the others are still scored. An option that is not given is the
        server's: `endoreward serve --gamma 0.9` scores with 0.9 unless `gamma` is given. `max_tokens_per_batch` and
        `reference` are the server's business and are refused.

        Raises EndoRewardError for an option that is wrong, and for a server that refuses or does not answer.
        """
        return in_order(self.iter_scores(rows, on_tokens=on_tokens, **options))

    def iter_scores(self, rows: Iterable[Row], *, on_tokens: OnTokens = None, **options: Unpack[ScoreKwargs]) -> Scores:
        """Yield (position in rows, score) as requests finish, in any order. Options as in `score`.

        `on_tokens` is called with the number of tokens of each finished request.
        """
        self._refuse(options)
        return self._scores(list_of_rows(rows), options, on_tokens)

    def encode(self, rows: Iterable[Row], **options: Unpack[ScoreKwargs]) -> list[Row]:
        """Return the rows, because the server encodes them. Raises EndoRewardError for an option that is wrong."""
        self._refuse(options)
        return list_of_rows(rows)

    def rank(
        self, prompt: Any, completions: Iterable[Any], *, on_tokens: OnTokens = None, **options: Unpack[ScoreKwargs]
    ) -> list[Ranked]:
        """Return the completions of one prompt, best first, as EndoRewardModel.rank does."""
        return ranked(lambda rows: self.score(rows, on_tokens=on_tokens, **options), prompt, completions)

    def _refuse(self, options: ScoreKwargs) -> None:
        ScoreOptions.of(options)
        for name in SERVERS_OWN:
            if options.get(name) is not None:
                raise EndoRewardError(f"{name} is the server's own option at {self.url}: leave it out")

    def _scores(self, rows: Sequence[Row], options: ScoreKwargs, on_tokens: OnTokens) -> Iterator[tuple[int, RowScore]]:
        # None is sent too: without it, the server's own default would take its place.
        given = {name: value for name, value in options.items() if name not in (*SERVERS_OWN, "chat")}
        head = as_json(given, "an option")
        chat = as_json(options["chat"], "chat") if "chat" in options else b""
        limits = self.about["limits"]
        largest: float = limits.get("request_bytes") or math.inf
        ready: list[Sent] = []
        for place, row in enumerate(rows):
            sent = to_send(place, row, chat)
            if isinstance(sent, Sent) and (size := len(_body(head, [sent]))) > largest:
                said = f"{size} bytes, and {self.url} takes requests of at most {largest}: shorten the row"
                sent = RowScore(None, 0, None, error=said)
            if isinstance(sent, RowScore):
                yield place, sent
            else:
                ready.append(sent)
        room = max(0, min(BYTES, largest - len(head) - ENVELOPE))
        requests = list(_requests(ready, min(ROWS, limits.get("rows") or ROWS), room))
        for places, found, tokens in in_flight(partial(self._scored, head), requests, self.concurrency):
            if on_tokens is not None:
                on_tokens(tokens)
            yield from zip(places, found, strict=True)

    def _scored(
        self, head: bytes, request: list[Sent], stop: threading.Event
    ) -> tuple[list[int], list[RowScore], int]:  # fmt: skip
        """Return (places, scores, tokens) of one request. One that is too large for the server is sent in halves."""
        places = [sent.place for sent in request]
        try:
            answer = self._transport.post(REWARDS, _body(head, request), stop)
        except Refused as refused:
            if refused.status == TOO_LARGE and len(request) > 1:
                half = len(request) // 2
                parts = [self._scored(head, part, stop) for part in (request[:half], request[half:])]
                return places, [score for _, found, _ in parts for score in found], sum(part[2] for part in parts)
            if refused.status == TOO_LARGE:
                return places, [RowScore(None, 0, None, error=str(refused))], 0
            if not (refused.status == NO_SCORES and isinstance(refused.answer.get("rows"), list)):
                raise
            answer = refused.answer
        return places, self._read(answer, len(request)), _tokens_of(answer)

    def _read(self, answer: dict[str, Any], count: int) -> list[RowScore]:
        if answer.get("weights", self.about["weights"]) != self.about["weights"]:
            raise EndoRewardError(f"{self.url} has another model than before: score all rows again with one of them")
        rows = answer.get("rows")
        if not isinstance(rows, list) or len(rows) != count:
            found = len(rows) if isinstance(rows, list) else "no"
            raise EndoRewardError(f"{self.url} answers {found} rows for {count}: is `endoreward serve` there?")
        try:
            return [_without_place(of_json(row), place) for place, row in enumerate(rows)]
        except (KeyError, TypeError, AttributeError) as error:
            raise EndoRewardError(
                f"{self.url} answers rows of another kind ({error!r}): install its version"
            ) from error


def _requests(rows: Sequence[Sent], most_rows: int, most_bytes: float) -> Iterator[list[Sent]]:
    """Yield rows of one request each. A row above `most_bytes` goes alone."""
    request: list[Sent] = []
    size = 0
    for row in rows:
        full = len(request) >= most_rows or size + len(row.body) > most_bytes
        if request and (full or row.chat != request[0].chat):
            yield request
            request, size = [], 0
        request.append(row)
        size += len(row.body) + 1
    if request:
        yield request


def _body(head: bytes, request: list[Sent]) -> bytes:
    """Return the options and the rows as one JSON object. `head` is the options as an object."""
    chat = request[0].chat
    options = b",".join(part for part in (head[1:-1], chat and b'"chat":' + chat) if part)
    return b'{"rows":[%s]%s%s}' % (b",".join(row.body for row in request), b"," if options else b"", options)


def _without_place(found: RowScore, place: int) -> RowScore:
    """Return the result without the row's place in its request, which is no place among the caller's rows."""
    return replace(found, error=found.error.removeprefix(f"rows[{place}]: ")) if found.error else found


def _tokens_of(answer: dict[str, Any]) -> int:
    usage = answer.get("usage")
    return int(usage.get("tokens", 0)) if isinstance(usage, dict) else 0
