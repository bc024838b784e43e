"""Damaged flags and columns for the chat template: each gives a one-line error, never a score of another text."""

import json

import pytest

from cli_harness import put, rows_of, run
from endoreward_fast import EndoRewardModel
from endoreward_fast.command.run import pipeline
from tiny_models import MODELS, byte_tokenizer

TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% if mood %}{{ mood }}{% endif %}{% for m in messages %}"
    "{% if 'BOOM' in m.content %}{{ raise_exception('no booms') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
PAIR = {"prompt": "p", "completion": "abc"}
DEEP = "[" * 100_000
TURNS = [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]


@pytest.fixture(scope="module")
def chat():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return EndoRewardModel(MODELS["llama"](), tokenizer)


@pytest.fixture
def scorer(chat, monkeypatch):
    monkeypatch.setattr(pipeline, "load_scorer", lambda flags: chat)
    return chat


def refused(*args):
    said = run(*args, code=2)
    assert said.stdout == "" and said.stderr.count("\n") == 1 and said.stderr.startswith("endoreward: "), said.stderr
    return said.stderr


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (DEEP, "not valid JSON ("),
        ('[{"name": "a", "name": "b"}]', "the key 'name' occurs twice in one object: keep one"),
        ('[{"name": NaN}]', "tools[0].name: NaN and infinity are not valid JSON"),
        ('[{"name": 1e999}]', "tools[0].name: NaN and infinity are not valid JSON"),
        ('[{"name": "\\ud800"}]', "tools[0].name: character 1 is half of a surrogate pair"),
        ('[{"\\ud800": 1}]', "a key: character 1 is half of a surrogate pair"),
        ('[{"a": ' + "[" * 300 + "1" + "]" * 300 + "}]", "nested more than 100 levels deep"),
        ("null", "found null"),
        (" ", "not valid JSON"),
        ("name: a", "not valid JSON"),
        (b"\xff", "it is not UTF-8"),
    ],
)
def test_invalid_tools_are_refused(text, error, scorer, tmp_path):
    path = tmp_path / "tools.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    said = refused("score", put(tmp_path, PAIR), "--tools", path)
    assert error in said and f"--tools {path}" in said.replace("--tools: cannot read", "--tools"), said


def test_unreadable_tools_are_refused_and_a_byte_order_mark_is_accepted(scorer, tmp_path):
    source, path = put(tmp_path, PAIR), tmp_path / "tools.json"
    assert "--tools: cannot read ~nobody-here/x: " in refused("score", source, "--tools", "~nobody-here/x")
    assert "Is a directory" in refused("score", source, "--tools", tmp_path)
    found = []
    for mark in ("", "\ufeff"):
        path.write_text(f'{mark}[{{"name": "f"}}]', encoding="utf-8")
        found += rows_of(run("score", source, "--tools", path, "-q").stdout)
    assert found[0] == found[1] != rows_of(run("score", source, "-q").stdout)[0]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (DEEP, "not valid JSON ("),
        ('{"mood": 1, "mood": 2}', "the key 'mood' occurs twice"),
        ('{"mood": NaN}', "mood: NaN and infinity are not valid JSON"),
        ('{"mood": "\\ud800"}', "mood: character 1 is half of a surrogate pair"),
        ("null", "found null"),
        ('{"return_dict": true}', "'return_dict' cannot be set there"),
        ('{"continue_final_message": true}', "'continue_final_message' cannot be set there"),
        ('{"self": 1}', "'self' cannot be set there"),
        ('{"max_length": 2}', "'max_length' cannot be set there"),
        ('{"strftime_now": "x"}', "'strftime_now' cannot be set there"),
    ],
)
def test_invalid_template_variables_are_refused(text, error, scorer, tmp_path):
    said = refused("score", put(tmp_path, PAIR), "--template-kwargs", text)
    assert "--template-kwargs: " in said and error in said


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"tools": DEEP}, "tools: not valid JSON"),
        ({"tools": '[{"a": 1, "a": 2}]'}, "tools: not valid JSON (the key 'a' occurs twice"),
        ({"tools": [{"a": float("nan")}]}, "tools[0].a: NaN and infinity are not valid JSON"),
        ({"tools": float("nan")}, "tools: wanted a list of JSON objects"),
        ({"tools": [{"a": "\ud800"}]}, "tools[0].a: character 1 is half of a surrogate pair"),
        ({"documents": [{"title": "\ud800"}]}, "documents[0].title: character 1 is half"),
        ({"chat_template_kwargs": {"mood": "\ud800"}}, "chat_template_kwargs.mood: character 1 is half"),
        ({"chat_template_kwargs": '{"mood": Infinity}'}, "chat_template_kwargs.mood: NaN and infinity"),
        ({"chat_template_kwargs": {"mood": 5, "return_dict": True}}, "'return_dict' cannot be set there"),
        ({"messages": [{"role": "\ud800", "content": "x"}, TURNS[1]]}, "messages[0].role: character 1 is half"),
        ({"messages": [TURNS[0], {"role": "assistant", "content": "BOOM"}]}, "refuses the conversation: no booms"),
        ({"messages": [{**TURNS[0], "x": {"y": ["\ud800"]}}, TURNS[1]]}, "messages[0].x.y[0]: character 1 is half"),
    ],
)
def test_a_row_with_invalid_template_input_fails_alone(columns, error, scorer, tmp_path):
    good = {"messages": TURNS}
    bad = json.dumps(good | columns)
    result = run("score", put(tmp_path, good, bad, good), code=2)
    first, found, last = rows_of(result.stdout)
    assert found["score"] is None and error in found["error"] and first == last and first["score"] is not None
    pair = {"prompt": TURNS[:1], "chosen": "a", "rejected": "b"} | {k: v for k, v in columns.items() if k != "messages"}
    if "messages" not in columns:
        result = run("eval", put(tmp_path, pair, {**pair, **dict.fromkeys(columns)}), "-q", "--judge", "all", code=2)
        assert error in result.stderr


def test_a_system_prompt_that_is_not_text_is_refused(scorer, tmp_path):
    assert "--system: character 1 is half of a surrogate pair" in refused(
        "score", put(tmp_path, PAIR), "--system", "\udcff"
    )
    from endoreward_fast import EndoRewardError

    with pytest.raises(EndoRewardError, match="system: character 2"):
        scorer.score([PAIR], system="a\ud800")


def test_tools_that_plain_text_cannot_use_are_flagged(scorer, tmp_path):
    path = tmp_path / "tools.json"
    path.write_text('[{"name": "f"}]')
    source = put(tmp_path, PAIR)
    for flags in (("--tools", path), ("--template-kwargs", '{"mood": "m"}')):
        [row] = rows_of(run("score", source, "--no-chat", *flags).stdout)
        assert row["flags"] == ["template_ignores"]
    assert "flags" not in rows_of(run("score", source, "--no-chat").stdout)[0]
