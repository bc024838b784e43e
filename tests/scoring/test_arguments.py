"""The methods that take rows accept what they should, and refuse the rest in one line that says what was expected."""

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from endoreward_fast import EndoRewardError, EndoRewardModel, RewardModel, ScoreOptions
from endoreward_fast.rivals.judges import Pairwise, Verifier
from endoreward_fast.scoring.arguments import LoadKwargs, ScoreKwargs
from tiny_models import MODELS, SIZES, TOKENIZER

ROW = {"prompt": "2 + 3 =", "completion": "5"}


@pytest.fixture(scope="module")
def scorers():
    model = EndoRewardModel(MODELS["llama"](), TOKENIZER)
    torch.manual_seed(0)
    classifier = LlamaForSequenceClassification(LlamaConfig(**SIZES, num_labels=1)).eval()
    return {
        "model": model,
        "reward": RewardModel(classifier, TOKENIZER),
        "verifier": Verifier(model),
        "pairs": Pairwise(model),
    }


def named(x):
    """Return a test id that is the same in every process, unlike an iterator's address or a set's order."""
    return type(x).__name__


EVERY = pytest.mark.parametrize("name", ["model", "reward", "verifier", "pairs"])


def one_line(error):
    return "\n" not in str(error.value)


@EVERY
@pytest.mark.parametrize(
    "rows",
    ["hello", "", b"hello", ["a", "b"], ("a",), {"a", "b"}, ROW, OrderedDict(ROW), {}, [[ROW, ROW]], [None], None, 3,
     torch.zeros(2, 3), np.zeros(3), Path("rows.jsonl"), iter("hello"), [1, 2], ROW.items()],
    ids=named,
)  # fmt: skip
def test_anything_but_a_list_of_rows_is_refused(scorers, name, rows):
    for ask in (scorers[name].score, scorers[name].iter_scores):
        if isinstance(rows, type(iter("a"))):
            rows = iter("hello")
        with pytest.raises(EndoRewardError, match=r"^rows .*expected a list of rows such as") as error:
            ask(rows)
        assert one_line(error)


@EVERY
def test_the_error_for_a_table_names_the_call_that_converts_it(scorers, name):
    pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    columns = {"prompt": ["2 + 3 ="] * 2, "completion": ["5", "6"]}
    for table, call in (
        (pandas.DataFrame(columns), r'rows.to_dict("records")'), (pandas.DataFrame(), r'rows.to_dict("records")'),
        (pyarrow.table(columns), "rows.to_pylist()"), (pyarrow.RecordBatch.from_pydict(columns), "rows.to_pylist()"),
    ):  # fmt: skip
        with pytest.raises(EndoRewardError) as error:
            scorers[name].score(table)
        assert call in str(error.value) and type(table).__name__ in str(error.value)
    wanted = scorers[name].score([ROW, ROW | {"completion": "6"}])
    assert scorers[name].score(pandas.DataFrame(columns).to_dict("records")) == wanted
    assert scorers[name].score(pyarrow.table(columns).to_pylist()) == wanted
    assert scorers[name].score(pandas.Series(pyarrow.table(columns).to_pylist())) == wanted


@EVERY
def test_every_iterable_of_rows_is_accepted_also_an_empty_one(scorers, name):
    rows = [ROW, ROW | {"completion": "6"}]
    wanted = scorers[name].score(rows)
    for given in (tuple(rows), (row for row in rows), map(dict, rows), dict(enumerate(rows)).values(), np.array(rows)):
        assert scorers[name].score(given) == wanted
    assert [scorers[name].score(given) for given in ([], (), iter(()))] == [[], [], []]


@EVERY
def test_a_bad_row_does_not_stop_the_others(scorers, name):
    first, *bad, last = scorers[name].score([ROW, "a", None, 3, ["b"], b"c", {}, ROW])
    assert all(result.score is None and result.error and "\n" not in result.error for result in bad)
    assert first.score == last.score is not None


@EVERY
def test_an_unknown_option_is_named_with_the_nearest(scorers, name):
    for option, near in (
        ("max_token_per_batch", "max_tokens_per_batch"),
        ("reducton", "reduction"),
        ("Alpha", "alpha"),
    ):
        for ask in (scorers[name].score, scorers[name].iter_scores):
            with pytest.raises(EndoRewardError, match=rf"^no option '{option}': did you mean '{near}'\?$"):
                ask([ROW], **{option: 2})
    with pytest.raises(EndoRewardError, match=r"^no option 'zzz': expected one of alpha, reduction, "):
        scorers[name].score([ROW], zzz=2)


def test_options_are_known_by_name():
    assert ScoreOptions.of({"alpha": 2.0}) == ScoreOptions(alpha=2.0)
    assert list(ScoreKwargs.__annotations__) == list(ScoreOptions.__dataclass_fields__)
    with pytest.raises(EndoRewardError, match="did you mean 'revision'"):
        EndoRewardModel.from_pretrained("pocket", revison="main")
    with pytest.raises(EndoRewardError, match="did you mean 'device_map'"):
        RewardModel.from_pretrained("no/such", devicemap="auto")
    assert "subfolder" in LoadKwargs.__annotations__


@pytest.mark.parametrize("completions", ["Paris", "", b"Paris", {"a": "Paris"}, None, 3], ids=named)
def test_rank_requires_a_list_of_completions(scorers, completions):
    with pytest.raises(EndoRewardError, match=r"^completions is .*expected a list of completions such as") as error:
        scorers["model"].rank("Capital?", completions)
    assert one_line(error)


@pytest.mark.parametrize("empty", [[], (), iter(())], ids=named)
def test_rank_refuses_an_empty_list(scorers, empty):
    with pytest.raises(EndoRewardError, match=r"^completions is empty: expected a list of completions"):
        scorers["model"].rank("Capital?", empty)


def test_rank_accepts_any_iterable_and_passes_its_options_on(scorers):
    counted = []
    wanted = scorers["model"].rank("2 + 3 =", ["5", "66"], on_tokens=counted.append, reduction="mean")
    assert sum(counted) and wanted == scorers["model"].rank("2 + 3 =", (c for c in ("5", "66")), reduction="mean")
    with pytest.raises(EndoRewardError, match="no option 'reductoin'"):
        scorers["model"].rank("2 + 3 =", ["5"], reductoin="mean")


@pytest.mark.parametrize("owner", [EndoRewardModel, RewardModel])
@pytest.mark.parametrize(
    "given, said",
    [
        (("pocket", None), r"takes a loaded model, not its name: use \w+\.from_pretrained\('pocket'\)"),
        ((Path("a/folder"), TOKENIZER), r"takes a loaded model, not its name: use \w+\.from_pretrained\('a/folder'\)"),
        ((TOKENIZER, None), r"model is a \w+: expected a loaded model"),
        ((None, TOKENIZER), r"model is a NoneType: expected a loaded model"),
        ((LlamaForSequenceClassification, None), r"model is a class LlamaForSequenceClassification: expected a loaded"),
        ((LlamaConfig(), None), r"model is a LlamaConfig: expected a loaded model"),
        (("scorer", None), r"model is a \w+: already is one|expected a loaded model"),
        (("inner", "gpt2"), r"not its name: load it with transformers\.AutoTokenizer\.from_pretrained"),
        (("inner", Path("gpt2")), r"takes a loaded tokenizer, not its name"),
        (("inner", 3), r"tokenizer is a int: expected a tokenizer"),
        (("inner", TOKENIZER.backend_tokenizer), r"tokenizer is a Tokenizer: expected a tokenizer"),
    ],
    ids=named,
)
def test_anything_but_a_loaded_model_is_refused(scorers, owner, given, said):
    scorer = scorers["model" if owner is EndoRewardModel else "reward"]
    stands_for = {"scorer": scorer, "inner": scorer.model}
    with pytest.raises(EndoRewardError, match=said) as error:
        owner(*(stands_for.get(x, x) if isinstance(x, str) else x for x in given))
    assert one_line(error)


@pytest.mark.parametrize("given", ["pocket", None, 3, Path("pocket")], ids=named)
def test_a_judge_requires_a_scorer(given):
    with pytest.raises(EndoRewardError, match=r"^scorer is a \w+: expected an EndoRewardModel"):
        Verifier(given)


@pytest.mark.parametrize("name", ["model", "reward"])
def test_device_and_dtype(scorers, name):
    scorer = scorers[name]
    assert scorer.device == torch.device("cpu") and scorer.dtype == torch.float32
    assert scorer.to(torch.bfloat16) is scorer and scorer.dtype == torch.bfloat16
    assert scorer.to("cpu", torch.float32) is scorer and scorer.dtype == torch.float32
    assert scorer.to(device="cpu", dtype=torch.float32).dtype == torch.float32


@pytest.mark.parametrize(
    "options",
    [{"alpha": "1"}, {"alpha": None}, {"alpha": float("nan")}, {"gamma": None}, {"gamma": "0.9"}, {"floor": "0"},
     {"system": ["Be brief."]}, {"chat": "yes"}, {"max_length": "5"}, {"max_length": 5.5}, {"max_length": 0},
     {"max_tokens_per_batch": 1e4}, {"max_tokens_per_batch": "8192"}, {"per_token": "yes"}, {"texts": None},
     {"append_eos": 2}, {"entropy": []}, {"signals": 3}, {"reference": "pocket"}, {"truncate": True}],
    ids=str,
)  # fmt: skip
def test_an_option_of_the_wrong_type_is_refused_before_any_row(scorers, options):
    (name,) = options
    for ask in (scorers["model"].score, scorers["reward"].score, lambda rows, **o: ScoreOptions(**o)):
        with pytest.raises(EndoRewardError, match=rf"^{name}=.*: expected ") as error:
            ask([ROW], **options)
        assert one_line(error)


def test_numpy_numbers_are_accepted_as_options():
    ScoreOptions(alpha=np.float32(0.5), gamma=np.float64(0.9), max_length=np.int64(5), per_token=np.True_)


@pytest.mark.parametrize("completions", [{"a", "b"}, frozenset("ab"), {"a": 1}.keys()], ids=named)
def test_rank_refuses_completions_without_an_order(scorers, completions):
    with pytest.raises(EndoRewardError, match=r"^completions is a \w+, which has no order: expected a list"):
        scorers["model"].rank("Capital?", completions)


@pytest.mark.parametrize("owner", [EndoRewardModel, RewardModel])
def test_anything_but_the_name_of_a_model_is_refused(scorers, owner):
    loaded = scorers["model"].model
    for odd in (None, 3, b"pocket", loaded, LlamaConfig(), ["pocket"]):
        with pytest.raises(EndoRewardError, match=r"^name_or_path is a \w+: expected a folder, a Hub name") as error:
            owner.from_pretrained(odd)
        assert one_line(error) and (odd is not loaded or f"{owner.__name__}(model, tokenizer)" in str(error.value))
    options = {"dtype": 3, "subfolder": 3, "revision": 3, "gguf_file": True}
    for option, odd in (options | ({"device": 1.5} if owner is EndoRewardModel else {})).items():
        with pytest.raises(EndoRewardError, match=rf"{option} is a \w+: expected ") as error:
            owner.from_pretrained("pocket", **{option: odd})
        assert one_line(error)
