"""Score on a cluster with Ray Data (written against Ray 2.60).

    ds = ray.data.read_json("rows.jsonl")
    ds = ds.map_batches(
        ScoreRows, fn_constructor_kwargs={"model": "Qwen/Qwen2.5-0.5B-Instruct", "reduction": "mean"},
        batch_format="pyarrow", batch_size=256,
        compute=ray.data.ActorPoolStrategy(size=4), num_gpus=0.5,      # Ray's options: two actors share a GPU
    )
    ds.write_parquet("scored")

Ray decides where actors run and what is retried. A row's score does not depend on it. `endoreward score --engine ray`
does the same for files.
"""

from typing import TYPE_CHECKING, Any

from typing_extensions import Unpack

from ..errors import EndoRewardError
from ..model.model import EndoRewardModel
from ..remote.address import is_url
from ..scoring.arguments import ScoreKwargs
from ..scoring.options import ScoreOptions
from .generated import RewardScorer, scorer_of

if TYPE_CHECKING:
    import pyarrow

ADDED = ("score", "tokens", "error")


class ScoreRows:
    """Score batches of rows. Each actor loads the model once.

    model            a name or folder ("pocket" is built in), or the URL of a server ("http://HOST:PORT"), which loads
                     the model once for all actors and decides on the three arguments below
    dtype, device    as in EndoRewardModel.from_pretrained. Default: the checkpoint's dtype, the GPU that Ray assigns
    source           other arguments of EndoRewardModel.from_pretrained: {"revision": "v2"}
    options          as in EndoRewardModel.score: alpha, reduction, gamma, floor, system, chat, max_length, ...

    Rows are those of EndoRewardModel.score, with one column for each key: `prompt` and `completion` as text or
    messages, or `messages`, or `prompt_ids` and `completion_ids`. A null means that the row lacks the key.
    Adds `score` (float64, null if there is none), `tokens` (int64, number of scored tokens) and `error` (the reason for
    a missing score, or null).

    Raises EndoRewardError: a model that cannot be loaded, an invalid option, a column that exists already.
    """

    def __init__(
        self, model: str, *, dtype: str = "auto", device: str | None = None, source: dict[str, Any] | None = None,
        **options: Unpack[ScoreKwargs],
    ) -> None:  # fmt: skip
        ScoreOptions.of(options)  # raises for invalid options before the model is loaded
        self.options = options
        self.scorer: RewardScorer
        if is_url(model):
            for name, value in (("dtype", None if dtype == "auto" else dtype), ("device", device), ("source", source)):
                if value is not None:
                    raise EndoRewardError(f"{name}={value!r}: the server has loaded its model: leave it out")
            self.scorer = scorer_of(model, max_tokens_per_batch=options.get("max_tokens_per_batch"))
        else:
            self.scorer = EndoRewardModel.from_pretrained(model, dtype=dtype, device=device, **(source or {}))

    def __call__(self, batch: "pyarrow.Table") -> "pyarrow.Table":
        import pyarrow

        if not isinstance(batch, pyarrow.Table):
            raise EndoRewardError(
                f"a batch is a {type(batch).__name__}, expected a pyarrow.Table: "
                "use map_batches(ScoreRows, batch_format='pyarrow')"
            )
        taken = sorted(set(ADDED) & set(batch.column_names))
        if taken:
            raise EndoRewardError(f"the data set has a column {taken[0]!r}, which ScoreRows adds: rename it first")
        rows = [{key: value for key, value in row.items() if value is not None} for row in batch.to_pylist()]
        results = self.scorer.score(rows, **self.options)
        columns = (
            pyarrow.array([r.score for r in results], pyarrow.float64()),
            pyarrow.array([r.num_tokens for r in results], pyarrow.int64()),
            pyarrow.array([r.error for r in results], pyarrow.string()),
        )
        for name, column in zip(ADDED, columns, strict=True):
            batch = batch.append_column(name, column)
        return batch
