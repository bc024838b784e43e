"""The command `endoreward`: a folder each for flags, input, run and evaluate, and files for demo (with facts) and show."""
