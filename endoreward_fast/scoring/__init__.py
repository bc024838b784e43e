"""From rows to scores: options, batches, results."""
