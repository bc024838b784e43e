"""The command line's flags, their checks and the help text."""
