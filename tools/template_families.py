"""Encode rows of each kind with the chat template of every family that TRL ships, and tabulate the results.

python -m tools.template_families      rewrites the table in docs/templates.md
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from endoreward_fast.errors import EndoRewardError
from endoreward_fast.text.encoding import Encoded, encode_row

PAGE = Path(__file__).parent.parent / "docs" / "templates.md"
BEGIN, END = "<!-- table -->\n", "<!-- end of table -->\n"
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "integer"}, "b": {"type": "string"}},
                "required": ["a", "b"],
            },
        },
    }
]
CALL = {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "3"}}}]}
ASKED = {"role": "user", "content": "What is 2 + 3?"}


def _row(*before: dict[str, Any], tools: bool = False, **answer: Any) -> dict[str, Any]:
    row = {"messages": [*before, {"role": "assistant", **answer}]}
    return row | {"tools": TOOLS} if tools else row


def _part(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


ROWS: dict[str, dict[str, Any]] = {
    "plain": _row(ASKED, content="It is 5."),
    "reasoning": _row(ASKED, content="It is 5.", reasoning_content="add them"),
    "reasoning in content": _row(ASKED, content="<think>\nadd them\n</think>\n\nIt is 5."),
    "call": _row(ASKED, tools=True, content="", **CALL),
    "text + call": _row(ASKED, tools=True, content="Let me see.", **CALL),
    "parts": _row(ASKED | {"content": _part(ASKED["content"])}, content=_part("It is 5.")),
    "null": _row(ASKED, tools=True, content=None, **CALL),
    "system": _row({"role": "system", "content": "Be brief."}, ASKED, content="It is 5."),
    "tools": _row(ASKED, tools=True, content="It is 5."),
}
"""one row of each kind; "null" means the same as "call", and "parts" the same as "plain" does"""
FLAGS = {
    "template_drops": "drops",
    "template_ignores": "ignores tools",
    "template_rewrites": "as written",
    "white_space": "white space differs",
    "opening_differs": "other opening",
    "system_in_user": "in the user's turn",
}
SPECIAL = re.compile(r"<[|｜][^<>{}'\"\s]{1,40}[|｜]>|</?s>|<(?:start|end)_of_\w+>|<\|?turn\|?>|<bos>")
ENDS_BESIDES = {"glm4moe": ("<|user|>", "<|observation|>")}
"""stop tokens from a family's generation_config that its template does not show"""


def sources() -> dict[str, str]:
    """Return {name: template} for TRL's copies of the models' templates."""
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    found = {path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.jinja"))}
    return {name: source for name, source in found.items() if not name.endswith("_training")}


def tokenizer_of(source: str) -> PreTrainedTokenizerFast:
    """Return a byte tokenizer with the template's markers as special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(SPECIAL.findall(source)) - {"<s>", "</s>"})})
    tokenizer.chat_template = source
    return tokenizer


def eos_ids(name: str, tokenizer: Any) -> list[int]:
    """Return the model's stop tokens besides the tokenizer's."""
    return tokenizer.convert_tokens_to_ids(list(ENDS_BESIDES.get(name, ())))


def encoded(name: str, tokenizer: Any) -> Iterator[tuple[str, Encoded | str]]:
    """Yield (kind, encoded row or error message) for each row under one template."""
    for kind, row in ROWS.items():
        try:
            yield kind, encode_row(tokenizer, row, eos_ids=eos_ids(name, tokenizer), date="2026-11-29")
        except EndoRewardError as error:
            yield kind, str(error)


def cell(found: Encoded | str) -> str:
    """Return the table's entry for a row."""
    if isinstance(found, str):
        return "refused"
    return ", ".join(FLAGS.get(flag, flag) for flag in found.flags) or "✓"


def table() -> str:
    """Return the table of docs/templates.md."""
    lines = [f"| template | {' | '.join(ROWS)} |", "|---" * (len(ROWS) + 1) + "|"]
    for name, source in sources().items():
        cells = [cell(found) for _, found in encoded(name, tokenizer_of(source))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def page_with(table: str) -> str:
    """Return docs/templates.md with the table replaced."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return before + BEGIN + table + END + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page_with(table()), encoding="utf-8")
