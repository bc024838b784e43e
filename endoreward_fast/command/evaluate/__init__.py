"""Scores of preference files to accuracies, tables and pictures."""
