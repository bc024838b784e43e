"""Every family's chat template: scored text against a separate rendering, and scores against float64 logits."""

import json
import re
from datetime import date
from functools import cache

import pytest
import torch
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from transformers import AutoModelForCausalLM, LlamaConfig

from endoreward_fast import EndoRewardModel
from endoreward_fast.errors import EndoRewardError
from endoreward_fast.text.boundary import decode
from endoreward_fast.text.encoding import encode_row

pytest.importorskip("trl", reason="trl, which has the templates, is not installed")

from tools.template_families import ASKED, BEGIN, CALL, END, PAGE, ROWS, encoded, eos_ids, sources, table, tokenizer_of

SOURCES = sources()
TODAY = date(2026, 11, 29)
# Written by hand: the mark that ends a turn of text, and the one that ends a tool call if it differs.
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>", "cohere2": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>", "diffusion_gemma": "<turn|>", "gemma4": "<turn|>", "gemma": "<end_of_turn>",
    "glm4moe": "", "gptoss": "<|return|>", "idefics3": "<end_of_utterance>", "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>", "llava_next": "</s>", "muse_glimmer": "<|eot|>", "nemotron": "<|im_end|>",
    "phi3": "<|end|>",
    "qwen": "<|im_end|>", "smolvlm": "<end_of_utterance>",
}  # fmt: skip
CALL_ENDS = {
    "gptoss": "<|call|>",
    "gemma4_v2": "<turn|>",
    "diffusion_gemma": "<|tool_response>",
    "gemma4": "<|tool_response>",
}
# Templates that do not write tool calls, and templates that write no text beside a tool call.
WITHOUT_CALLS = set(
    "cohere cohere2 deepseek_r1_distill gemma gemma3 idefics3 lfm2 llama3 llava_next phi3 phi3_5 qwen2_5_vl "
    "smolvlm".split()
)
OF_PARTS = {"idefics3", "llava_next", "smolvlm"}
# The header shared by prompt and turn, if the generation prompt opens a thinking block and the written turn does not.
OTHER_OPENINGS = {"deepseek": "<｜Assistant｜>", "qwen3_5_nothink": "<think>\n"}


def by_family(names, table):
    return next((value for name, value in table.items() if names.startswith(name)), None)


@cache
def compiled(source):
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    env.filters["tojson"] = lambda x, ensure_ascii=False, **how: json.dumps(x, ensure_ascii=ensure_ascii, **how)

    def refuse(message):
        raise ValueError(message)

    env.globals |= {"raise_exception": refuse, "strftime_now": TODAY.strftime}
    # transformers' own tag marks the part that a trainer trains on. It writes nothing.
    source = re.sub(r"(\{%-?\s*)generation\b", r"\1if true", source)
    return env.from_string(re.sub(r"(\{%-?\s*)endgeneration\b", r"\1endif", source))


def rendered(source, messages, *, tools=None, generate=False):
    """Render the template with plain Jinja, without transformers and without this package."""
    return compiled(source).render(
        messages=messages,
        tools=tools,
        documents=None,
        add_generation_prompt=generate,
        bos_token="<s>",
        eos_token="</s>",
    )


def spelt(name, messages):
    """Return the messages in the form that this template expects, written by hand."""
    found = []
    for message in messages:
        message = dict(message)
        if message.get("content") is None:
            message["content"] = ""
        if name in OF_PARTS and isinstance(message["content"], str):
            message["content"] = [{"type": "text", "text": message["content"]}]
        if name not in OF_PARTS and isinstance(message["content"], list):
            message["content"] = message["content"][0]["text"]
        if "reasoning_content" in message:
            message["thinking"] = message["reasoning_content"]
        if name == "deepseekv3" and "tool_calls" in message:
            function = message["tool_calls"][0]["function"]
            function = {**function, "arguments": json.dumps(function["arguments"])}
            message["tool_calls"] = [{**message["tool_calls"][0], "function": function}]
        if name == "gemma" and message["role"] == "system":
            continue
        found.append(message)
    if name == "gemma" and messages[0]["role"] == "system":
        found[0] = {**found[0], "content": f"{messages[0]['content']}\n\n{found[0]['content']}"}
    return found


def expected(name, kind):
    """Return (prompt, completion), or None if the template does not write the turn."""
    row, source = ROWS[kind], SOURCES[name]
    messages = spelt(name, row["messages"])
    calls = "tool_calls" in messages[-1]
    if calls and name in WITHOUT_CALLS:
        if kind != "text + call":
            return None
        messages[-1] = {key: value for key, value in messages[-1].items() if key != "tool_calls"}
        calls = False
    opening = rendered(source, messages[:-1], tools=row.get("tools"), generate=True)
    whole = rendered(source, messages, tools=row.get("tools"))
    end = (calls and by_family(name, CALL_ENDS)) or by_family(name, ENDS)
    if name.startswith("deepseek") and kind == "reasoning in content":  # it would drop the reasoning
        return opening, f"add them\n</think>\n\nIt is 5.{end}"
    if not whole.startswith(opening):
        if whole.startswith(opening.rstrip()):
            start = len(opening.rstrip())
        else:
            header = by_family(name, OTHER_OPENINGS)
            start = whole.rindex(header) + len(header)
            opening = whole[:start]
    else:
        start = len(opening)
    turn = whole[start:]
    if not end:
        return opening, turn + ("<|observation|>" if calls else "<|user|>")
    return opening, turn[: turn.rindex(end) + len(end)]


@pytest.fixture(scope="module")
def found():
    """Return {(template, kind): encoded row or error message}, and the tokenizers."""
    tokenizers = {name: tokenizer_of(source) for name, source in SOURCES.items()}
    rows = {(n, kind): e for n, tokenizer in tokenizers.items() for kind, e in encoded(n, tokenizer)}
    return tokenizers, rows


@pytest.mark.parametrize("name", SOURCES)
def test_the_scored_text_is_what_the_template_writes(found, name):
    tokenizers, rows = found
    for kind in ROWS:
        got, wanted = rows[name, kind], expected(name, kind)
        if wanted is None:
            assert isinstance(got, str) and "the chat template" in got, kind
            continue
        assert not isinstance(got, str), (kind, got)
        ids = got.input_ids
        texts = decode(tokenizers[name], ids[: got.prompt_length]), decode(tokenizers[name], ids[got.prompt_length :])
        assert texts == wanted, kind
        prompt = tokenizers[name](wanted[0], add_special_tokens=False)["input_ids"]
        assert ids[: got.prompt_length] == prompt, kind
        if kind == "text + call" and name in WITHOUT_CALLS:
            assert "template_drops" in got.flags
    assert not ROWS["plain"].get("tools") and CALL["tool_calls"]  # the row's tools do not change the shared constants


def test_a_turn_in_another_form_has_the_same_tokens(found):
    _, rows = found
    for name in SOURCES:
        for kind, same in (("parts", "plain"), ("null", "call")):
            one, other = rows[name, kind], rows[name, same]
            assert isinstance(one, str) == isinstance(other, str), (name, kind)
            if not isinstance(one, str):
                assert (one.input_ids, one.prompt_length) == (other.input_ids, other.prompt_length), (name, kind)


def turns_of(name, tokenizer, messages, **row):
    """Return (prompt, completion, flags) of a conversation, or None if the template refuses it."""
    try:
        got = encode_row(tokenizer, {"messages": messages, **row}, eos_ids=eos_ids(name, tokenizer), date="2026-11-29")
    except EndoRewardError as error:
        assert "the chat template" in str(error)
        return None
    ids, at = got.input_ids, got.prompt_length
    return decode(tokenizer, ids[:at]), decode(tokenizer, ids[at:]), got.flags


def test_a_loss_in_an_earlier_turn_is_flagged(found):
    """The loss of reasoning, of a tool call, of a tool's result, and of reasoning inside the text."""
    tokenizers, _ = found
    result = {"role": "tool", "name": "add", "tool_call_id": "1", "content": 'TOLD "5"'}
    last = {"role": "assistant", "content": "It is 5."}
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "ARGS"}}}
    earlier = {
        "reasoning": ({"role": "assistant", "content": "Four.", "reasoning_content": "SUMS"}, ASKED),
        "call": ({"role": "assistant", "content": "", "tool_calls": [call]}, result),
        "thought in text": ({"role": "assistant", "content": "<think>\nSUMS\n</think>\n\nFour."}, ASKED),
        "nothing": ({"role": "assistant", "content": "Four."}, ASKED),
    }
    lost = set()
    for name, tokenizer in tokenizers.items():
        for kind, turns in earlier.items():
            row = {"tools": ROWS["tools"]["tools"]} if kind == "call" else {}
            got = turns_of(name, tokenizer, [ASKED, *turns, last], **row)
            if got is None:
                continue
            prompt, completion, flags = got
            said = {"call": ("TOLD", "ARGS"), "nothing": ()}.get(kind, ("SUMS",))
            whole = all(word in prompt for word in said)
            assert ("context_changed" in flags) == (not whole), (name, kind, prompt)
            assert "It is 5." in completion
            lost |= {kind} if not whole else set()
    assert lost == {"reasoning", "call", "thought in text"}


def test_a_turn_of_reasoning_alone_is_scored_to_its_end(found):
    tokenizers, _ = found
    for name, tokenizer in tokenizers.items():
        thinking = {"role": "assistant", "content": "", "reasoning_content": "SUMS"}
        prompt, completion, flags = turns_of(name, tokenizer, [ASKED, thinking])
        whole = rendered(SOURCES[name], spelt(name, [ASKED, thinking]))
        end = by_family(name, ENDS)
        if "SUMS" not in whole:
            assert completion.endswith(end or "<|user|>") and "template_drops" in flags, name
            continue
        assert prompt + completion == (whole[: whole.rindex(end) + len(end)] if end else whole + "<|user|>"), name
        assert "SUMS" in completion and "marks_in_text" not in flags and "no_generation_prompt" not in flags, name


def test_reasoning_after_a_tool_result_is_scored(found):
    """Some templates have no generation prompt after a tool's result, because the turn continues."""
    tokenizers, _ = found
    name = "gemma4_v5"
    result = {"role": "tool", "name": "add", "tool_call_id": "1", "content": "5"}
    calls = {"role": "assistant", "content": "", **CALL}
    last = {"role": "assistant", "content": "It is 5.", "reasoning_content": "so"}
    _, completion, flags = turns_of(name, tokenizers[name], [ASKED, calls, result, last])
    assert completion == "<|channel>thought\nso\n<channel|>It is 5.<turn|>" and flags == ()


FAMILIES = (
    "cohere2 deepseekv3 gemma gemma3 gemma4_v5 glm4moe gptoss idefics3 lfm2_2_5_v2 llama3_2 llava_next muse_glimmer "
    "nemotron_3_nano phi3_5 qwen2_5 qwen3 qwen3_5_think smolvlm"
).split()


def test_scores_match_float64_logits(found):
    """18 families: r = z(s)[a] - LSE(z(s')), with V = 0 after the last token, from full logits in float64."""
    tokenizers, rows = found
    config = LlamaConfig(
        vocab_size=448, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16384, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    exact = AutoModelForCausalLM.from_config(config).eval().double()
    exact.load_state_dict(model.state_dict())
    for name in FAMILIES:
        scorer = EndoRewardModel(model, tokenizers[name])
        model.generation_config.eos_token_id = [*eos_ids(name, tokenizers[name]), tokenizers[name].eos_token_id]
        kinds = [kind for kind in ROWS if not isinstance(rows[name, kind], str)]
        results = scorer.score([ROWS[kind] for kind in kinds], date=TODAY.isoformat())
        for kind, result in zip(kinds, results, strict=True):
            ids = torch.tensor([rows[name, kind].input_ids])
            start = rows[name, kind].prompt_length
            with torch.no_grad():
                logits = exact(ids).logits[0]
            chosen = logits[start - 1 : -1].gather(1, ids[0, start:, None])[:, 0]
            value = logits[start:-1].logsumexp(-1)
            score = (chosen.sum() - value.sum()).item()
            assert result.num_tokens == ids.shape[1] - start, (name, kind)
            assert result.score == pytest.approx(score, rel=1e-4, abs=1e-3), (name, kind)


def test_docs_templates_has_this_table():
    page = PAGE.read_text(encoding="utf-8")
    shown = page.partition(BEGIN)[2].partition(END)[0]
    assert shown == table(), "python -m tools.template_families writes it"
