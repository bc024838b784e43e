"""The command `endoreward`: folders for flags, input, run and evaluate; files for demo, its facts, and show."""
