"""From rows of text to token ids: messages, chat templates, the boundary between prompt and completion."""
