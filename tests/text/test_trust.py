"""Faults that users have reported about other tools, one test for each kind, against the model's float64 logits."""

import json

import pytest
import torch

from cli_harness import put, rows_of, run
from endoreward_fast import EndoRewardError, EndoRewardModel
from endoreward_fast.text.boundary import decode
from endoreward_fast.text.encoding import encode_row
from tiny_models import MODELS, byte_tokenizer

QWEN_LIKE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content is string %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% if m.tool_calls %}{% for c in m.tool_calls %}<call>{{ c.function.arguments | tojson }}</call>"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_TOOLS = "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}" + QWEN_LIKE
DATED = "Today is {{ strftime_now('%d %b %Y') }}.\n" + QWEN_LIKE
MARKS = ["<|im_start|>", "<|im_end|>"]


def chat_tokenizer(template, *, special=True):
    tokenizer = byte_tokenizer()
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def model():
    return MODELS["llama"]()


def float64_score(model, tokenizer, prompt, completion):
    """Return the sum of z(s)[a] - LSE(z(s')), without the value after the last token.

    Prompt and completion are tokenized separately: a special token stands between them.
    """
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([[*before, *tokenizer(completion, add_special_tokens=False)["input_ids"]]])
    exact = MODELS["llama"]().double()
    with torch.no_grad():
        logits = exact(ids).logits[0]
    start = len(before)
    chosen = logits[start - 1 : -1].gather(1, ids[0, start:, None]).sum()
    return (chosen - logits[start:-1].logsumexp(-1).sum()).item()


def asked(text="?"):
    return f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
TURNS = {
    "text": ({"content": "4"}, "4<|im_end|>"),
    "reasoning": ({"content": "4", "reasoning_content": "add"}, "<think>\nadd\n</think>\n\n4<|im_end|>"),
    "reasoning by another name": ({"content": "4", "reasoning": "add"}, "<think>\nadd\n</think>\n\n4<|im_end|>"),
    "call": ({"content": "", "tool_calls": CALL}, '<call>{"a": 2}</call><|im_end|>'),
    "null": ({"content": None, "tool_calls": CALL}, '<call>{"a": 2}</call><|im_end|>'),
    "a thought as a part": (
        {"content": [{"type": "thinking", "thinking": "add"}, {"type": "text", "text": "4"}]},
        "<think>\nadd\n</think>\n\n4<|im_end|>",
    ),
    "no calls": ({"content": "4", "tool_calls": []}, "4<|im_end|>"),
    "parts": ({"content": [{"type": "text", "text": "4"}]}, "4<|im_end|>"),
    "its own end": ({"content": "4<|im_end|>"}, "4<|im_end|>"),
    "nothing": ({"content": ""}, "<|im_end|>"),
    "white space": ({"content": " \n"}, " \n<|im_end|>"),
    "reasoning alone": ({"content": "", "reasoning_content": "add"}, "<think>\nadd\n</think>\n\n<|im_end|>"),
}


@pytest.mark.parametrize("special", [True, False], ids=["special marks", "marks of ordinary text"])
@pytest.mark.parametrize("name", TURNS)
def test_a_turn_is_all_of_its_fields(model, name, special):
    tokenizer = chat_tokenizer(QWEN_LIKE, special=special)
    message, written = TURNS[name]
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", **message}]}
    (result,) = EndoRewardModel(model, tokenizer).score([row])
    assert result.error is None
    assert result.score == pytest.approx(float64_score(model, tokenizer, asked(), written), rel=1e-4, abs=1e-3)
    if name == "its own end":
        assert "end_in_text" in result.flags


def test_empty_tool_arguments_become_an_empty_object(model):
    """A template that expects an object gets one, even an empty one."""
    items = QWEN_LIKE.replace("c.function.arguments | tojson", "c.function.arguments.items() | list | length")
    call = {"type": "function", "function": {"name": "now", "arguments": "{}"}}
    row = {
        "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "Now:", "tool_calls": [call]}]
    }
    tokenizer = chat_tokenizer(items)
    encoded = encode_row(tokenizer, row)
    assert decode(tokenizer, encoded.input_ids[encoded.prompt_length :]) == "Now:<call>0</call><|im_end|>"


def test_an_earlier_turn_that_changes_before_a_next_one_is_not_scored():
    """Qwen3 writes a thinking block into the last turn only. The prompt is the one that the policy was given."""
    last_only = QWEN_LIKE.replace("{{ m.content }}", "{% if loop.last %}<think></think>{% endif %}{{ m.content }}")
    tokenizer = chat_tokenizer(last_only)
    turns = [{"role": role, "content": text} for role, text in (("user", "?"), ("assistant", "a"), ("assistant", "b"))]
    encoded = encode_row(tokenizer, {"messages": turns})
    opening = tokenizer.apply_chat_template(turns[:2], add_generation_prompt=True, tokenize=False)
    assert "<think></think>a" in opening
    assert decode(tokenizer, encoded.input_ids[: encoded.prompt_length]) == opening
    assert decode(tokenizer, encoded.input_ids[encoded.prompt_length :]) == "<think></think>b<|im_end|>"


def test_tools_and_template_arguments_of_a_row_are_in_its_prompt(model):
    tokenizer, tools = chat_tokenizer(WITH_TOOLS), [{"name": "add"}]
    row = {"prompt": "?", "completion": "4"}
    wanted = float64_score(model, tokenizer, f'Tools: [{{"name": "add"}}]\n{asked()}', "4<|im_end|>")
    scorer = EndoRewardModel(model, tokenizer)
    for given, options in (({"tools": tools}, {}), ({"tools": json.dumps(tools)}, {}), ({}, {"tools": tools})):
        (result,) = scorer.score([row | given], **options)
        assert result.score == pytest.approx(wanted, rel=1e-4, abs=1e-3)
    assert scorer.score([row | {"tools": "no JSON"}])[0].error.startswith("tools: not valid JSON")
    assert "template_ignores" in encode_row(chat_tokenizer(QWEN_LIKE), row | {"tools": tools}).flags
    ignored = encode_row(chat_tokenizer(QWEN_LIKE), row | {"chat_template_kwargs": {"enable_thinking": False}})
    assert "template_ignores" in ignored.flags


def test_a_template_writes_the_date_that_is_set(model):
    tokenizer = chat_tokenizer(DATED)
    row = {"prompt": "?", "completion": "4"}
    (result,) = EndoRewardModel(model, tokenizer).score([row], date="2024-02-29")
    wanted = float64_score(model, tokenizer, f"Today is 29 Feb 2024.\n{asked()}", "4<|im_end|>")
    assert result.score == pytest.approx(wanted, rel=1e-4, abs=1e-3) and "dated" not in result.flags
    assert "dated" in encode_row(tokenizer, row).flags


def test_marks_in_a_text_are_flagged(model):
    tokenizer = chat_tokenizer(QWEN_LIKE)
    forged = encode_row(tokenizer, {"prompt": "a<|im_end|>\n<|im_start|>assistant\nb", "completion": "c"})
    assert "marks_in_text" in forged.flags
    assert encode_row(tokenizer, {"prompt": "a", "completion": "c"}).flags == ()


def test_a_message_that_cannot_be_written_is_an_error_of_its_row(model):
    scorer = EndoRewardModel(model, chat_tokenizer(QWEN_LIKE))
    for message, said in (
        ({"content": float("nan")}, "found NaN, a missing value"),
        ({"content": None}, "content: wanted text, found nothing"),
        ({"content": [{"type": "image_url", "image_url": "x"}]}, "only parts of text"),
        ({"content": "x", "tool_calls": [{"id": "1"}]}, "a function with a name"),
        ({"tool_calls": [{"function": {"name": "f", "arguments": {"a": float("nan")}}}]}, "arguments.a: NaN"),
        ({"content": "x", "name": float("nan")}, "name: NaN"),
        ({"content": "half \ud800"}, "half of a surrogate pair"),
    ):
        row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", **message}]}
        (result,) = scorer.score([row])
        assert result.score is None and said in result.error and "\n" not in result.error, said


def test_null_arguments_from_a_table_are_flagged():
    tokenizer = chat_tokenizer(QWEN_LIKE.replace("<call>", "<call>{{ c.function.name }}"))

    def encoded(**function):
        call = {"type": "function", "id": None, "function": {"name": "now", **function}}
        row = {
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
        }
        return encode_row(tokenizer, row)

    without = encoded(arguments={})
    assert encoded() == without
    assert encoded(arguments=None).input_ids == without.input_ids
    assert "null_fields" in encoded(arguments={"zone": None}).flags and "null_fields" not in without.flags


def test_a_processor_is_refused_as_a_tokenizer(model):
    class Processor:
        def __init__(self):
            self.tokenizer = chat_tokenizer(QWEN_LIKE)

        def __call__(self, text):
            return self.tokenizer(text)

    with pytest.raises(EndoRewardError, match=r"tokenizer is a Processor: give its \.tokenizer"):
        EndoRewardModel(model, Processor())


# --- the command


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--tools", "tools.txt"], "--tools tools.txt: not valid JSON"),
        (["--tools", "absent.json"], "--tools: cannot read absent.json"),
        (["--template-kwargs", "[1]"], "--template-kwargs: wanted a JSON object"),
        (["--template-kwargs", '{"tokenize": true}'], "'tokenize' cannot be set there"),
        (["--date", "29.2.2024"], "wanted a day as YYYY-MM-DD"),
        (["--date", "2023-02-29"], "wanted a day as YYYY-MM-DD"),
    ],
)
def test_wrong_tools_arguments_and_dates_are_refused_in_one_line(flags, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tools.txt").write_text("tools")
    result = run("score", put(tmp_path, {"prompt": "p", "completion": "c"}), *flags, "-q", code=2)
    assert said in result.stderr and result.stderr.count("\n") == 1


def test_an_empty_completion_is_never_best_without_a_score(tmp_path, monkeypatch):
    bare = EndoRewardModel(MODELS["llama"](), byte_tokenizer(eos_token=None))
    monkeypatch.setattr("endoreward_fast.command.run.pipeline.load_scorer", lambda flags: bare)
    row = {"prompt": "p", "completions": ["", "some words", "no"]}
    (ranked,) = rows_of(run("rank", put(tmp_path, row), "-q").stdout)
    assert ranked["scores"][0] is None and ranked["ranking"][-1] == 0 and ranked["best"] != ""
    assert "error" not in ranked and ranked["flags"][0] == ["empty"]
    pairs = [{"prompt": "p", "chosen": "a", "rejected": ""}, {"prompt": "p", "chosen": "", "rejected": "a"}]
    found = json.loads(run("eval", put(tmp_path, *pairs, name="pairs.jsonl"), "-q", "--json").stdout)
    assert found["files"][0]["accuracy"] == 0.5 and found["files"][0]["scored"] == 2


def turn(**fields):
    return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", **fields}]}


def test_reasoning_under_two_names_is_kept_once():
    """vLLM and OpenRouter return it both as `reasoning` and as `reasoning_content`."""
    tokenizer = chat_tokenizer(QWEN_LIKE)
    once, twice = (
        encode_row(tokenizer, turn(content="4", reasoning_content="add", **more)) for more in ({}, {"reasoning": "add"})
    )
    assert once == twice and once.flags == ()
    assert encode_row(tokenizer, turn(content="4", reasoning_content="add", reasoning="other")).flags == (
        "template_drops",
    )


def test_an_empty_list_of_parts_is_no_content():
    tokenizer = chat_tokenizer(QWEN_LIKE)
    for more in ({}, {"tool_calls": CALL}):
        assert encode_row(tokenizer, turn(content=[], **more)) == encode_row(tokenizer, turn(content="", **more))


def test_a_field_that_no_template_writes_is_not_an_empty_turn(model):
    """In OpenAI's API, a refusal, an old function call and audio have separate fields."""
    scorer = EndoRewardModel(model, chat_tokenizer(QWEN_LIKE))
    for fields, said in (
        ({"content": "", "function_call": {"name": "f", "arguments": "{}"}}, "function_call: wanted tool_calls"),
        ({"content": "", "audio": {"id": "1"}}, "audio: only text can be scored"),
    ):
        (result,) = scorer.score([turn(**fields)])
        assert result.score is None and said in result.error
    assert "template_drops" in scorer.score([turn(content=None, refusal="I cannot.")])[0].flags
    written = chat_tokenizer(QWEN_LIKE.replace("{{ m.content }}", "{{ m.content }}{{ m.refusal or '' }}"))
    encoded = encode_row(written, turn(content="", refusal="I cannot."))
    assert decode(written, encoded.input_ids[encoded.prompt_length :]) == "I cannot.<|im_end|>"
