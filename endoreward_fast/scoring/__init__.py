"""Rows to scores: options, batches, results."""
