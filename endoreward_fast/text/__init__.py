"""Rows to token ids: messages, the chat template, the boundary between prompt and completion."""
