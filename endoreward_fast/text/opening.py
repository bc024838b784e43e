r"""Where the last assistant turn begins in the text of a whole conversation, as a chat template writes it.

The header is what a template writes between a user's text and the assistant's:

    generation prompt        header                        template
    <|im_start|>assistant\n  all of it                     ChatML
    <|Assistant|><think>\n   <|Assistant|>                 DeepSeek: turns that are complete have no <think>
    none                     [/INST]                       Llama 2: it writes nothing after the user's turn

A conversation is split after its last header. The thinking block that a generation prompt opens belongs to the prompt
as far as the conversation has it.
"""

from typing import NamedTuple

from ..errors import EndoRewardError
from .template import Extras, Marked, Template
from .turn import common_prefix, open_thought, without_partial_mark


class Opening(NamedTuple):
    """What opens an assistant turn: `header`, and `thought`, which the generation prompt writes after it."""

    header: str
    thought: str

    @classmethod
    def of(cls, template: Template) -> "Opening":
        """Return what opens a template's turns. Raises EndoRewardError if it writes nothing before them."""
        between, prompt = _between(template), _generation_prompt(template)
        if not prompt.strip():
            if not between.strip():
                raise EndoRewardError("the model's chat template writes nothing before a turn: POST to /v1/rewards")
            return cls(between.strip(), "")
        thought = open_thought(prompt)
        header = whole = prompt.removesuffix(thought)
        while header not in between:
            header = header[:-1]
        header = header if header == whole else without_partial_mark(header)
        if not header.strip():
            raise EndoRewardError("the model's chat template opens no turn as it writes turns: POST to /v1/rewards")
        return cls(header, thought)

    def split(self, text: str, *, first: bool = False) -> tuple[str, str] | None:
        """Return a conversation's (prompt, what follows it), or None if it has no header.

        The prompt ends with the last header, or with the first one if `first`.

        White space at the end of the thinking block belongs to the prompt even if the conversation lacks it.
        """
        at = (text.find if first else text.rfind)(self.header)
        if at < 0:
            return None
        begun, rest = text[: at + len(self.header)], text[at + len(self.header) :]
        common = common_prefix([self.thought, rest])
        missing = self.thought[len(common) :]
        if missing.isspace():
            return begun + self.thought, rest[len(common) :].lstrip()
        common = without_partial_mark(common) if missing else common
        return begun + common, rest[len(common) :]


def _between(template: Template) -> str:
    """Return what the template writes between a user's text and the assistant's."""
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    marked = Marked(template.fit(turns, Extras()))
    (_, asked), (said, _) = marked.marks[0], marked.marks[-1]
    return template.write(marked.messages, Extras()).partition(said)[0].rpartition(asked)[2]


def _generation_prompt(template: Template) -> str:
    """Return what the template writes to open a turn. Without it, some templates write an end of text instead."""
    asked = template.fit([{"role": "user", "content": "x"}], Extras())
    opened, bare = template.write(asked, Extras(), generate=True), template.write(asked, Extras())
    common = common_prefix([opened, bare])
    return opened[len(common if common == bare else without_partial_mark(common)) :]
