"""The command `endoreward`: flags, input, run, evaluate, and one file for each of demo and show."""
