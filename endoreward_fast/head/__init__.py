"""How a model turns hidden states into final logits: its head, its family's recipe, and the check of the recipe."""
