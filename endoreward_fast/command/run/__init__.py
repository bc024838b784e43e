"""Pass rows through a model: windows, output, resuming, ranks, Ray."""
