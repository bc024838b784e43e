"""Read the chat template of a model's processor.

Models that also read images have a processor. In older folders the processor's files hold the chat template, and a
tokenizer does not read those.
"""

import json
from typing import Any

from ..errors import EndoRewardError, first_line
from .hub import OPTIONS, file_of

FILES = ("chat_template.json", "processor_config.json")


def with_template_of_processor(tokenizer: Any, place: str, options: dict[str, Any]) -> Any:
    """Give the tokenizer the processor's template if it has none, and return it.

    Raises EndoRewardError if a file of the processor is damaged.
    """
    if getattr(tokenizer, "chat_template", None) or options.get("gguf_file"):
        return tokenizer
    where = {key: options[key] for key in OPTIONS if key in options}
    for name in FILES:
        path = file_of(place, name, where)
        if path is None:
            continue
        try:
            template = json.loads(path.read_text("utf-8")).get("chat_template")
        except (OSError, ValueError, AttributeError) as error:
            raise EndoRewardError(f"model {place!r}: its {name} cannot be read: {first_line(error)}") from error
        if isinstance(template, str):
            tokenizer.chat_template = template
            break
    return tokenizer
