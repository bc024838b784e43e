"""The server at load: its speed beside scoring in-process, and many requests of which some go wrong."""
