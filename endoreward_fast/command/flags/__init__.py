"""What the command line may say: options, their checks, the help."""
