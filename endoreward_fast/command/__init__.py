"""The parts of the `endoreward` command, which cli.py puts together: rows in, rows out."""
