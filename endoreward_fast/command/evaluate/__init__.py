"""Turn scores into accuracies, tables and pictures."""
