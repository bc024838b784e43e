"""The command `endoreward`: a folder each for flags, input, run and evaluate, and a file each for demo and show."""
