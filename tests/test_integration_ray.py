"""ScoreRows under a real Ray on this machine: actors, batches, rows that cannot be scored."""

import warnings

import pytest

from endoreward_fast import EndoRewardError, EndoRewardModel

ray = pytest.importorskip("ray", reason="Ray Data is not installed")
pyarrow = pytest.importorskip("pyarrow")
from endoreward_fast.integrations.ray import ScoreRows  # noqa: E402

ROWS = [{"id": i, "prompt": f"What is {i} + 3?", "completion": str(i + 3), "messages": None} for i in range(20)]
ROWS[7] |= {"prompt": None, "completion": None, "messages": [{"role": "user", "content": "?"}]}  # nothing to score
ROWS[9] |= {
    "prompt": None, "completion": None,
    "messages": [{"role": "user", "content": "What is 9 + 3?"}, {"role": "assistant", "content": "12"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def expected(**options):
    return EndoRewardModel.from_pretrained("pocket").score(
        [{k: v for k, v in row.items() if v is not None} for row in ROWS], **options
    )


@pytest.mark.parametrize(("actors", "options"), [(1, {}), (2, {"reduction": "mean"})])
def test_scores_do_not_depend_on_how_the_rows_are_spread(cluster, actors, options):
    found = ray.data.from_items(ROWS).map_batches(
        ScoreRows, fn_constructor_kwargs={"model": "pocket"} | options, batch_format="pyarrow", batch_size=6,
        concurrency=actors,
    ).take_all()  # fmt: skip
    by_id = {row["id"]: row for row in found}
    assert len(by_id) == len(found) == len(ROWS)
    for row, wanted in zip(ROWS, expected(**options), strict=True):
        ours = by_id[row["id"]]
        assert (ours["prompt"], ours["tokens"], ours["error"]) == (row["prompt"], wanted.num_tokens, wanted.error)
        assert ours["score"] == (None if wanted.score is None else pytest.approx(wanted.score, abs=1e-4))
    assert by_id[7]["score"] is None and "wanted the assistant's, found 'user'" in by_id[7]["error"]


def test_bad_input_is_one_clear_line():
    with pytest.raises(EndoRewardError, match="alpha"):
        ScoreRows("pocket", alpha=-1)
    with pytest.raises(EndoRewardError, match=r"nowhere.*no such folder"):
        ScoreRows("./nowhere")
    score = ScoreRows("pocket")
    with pytest.raises(EndoRewardError, match=r"a batch is a dict: map_batches\(ScoreRows, batch_format='pyarrow'\)"):
        score({"prompt": ["a"]})
    with pytest.raises(EndoRewardError, match="has a column 'error', which ScoreRows adds"):
        score(pyarrow.table({"prompt": ["a"], "completion": ["b"], "error": ["c"]}))
    with pytest.raises(TypeError, match="unknown"):
        ScoreRows("pocket", unknown=1)
