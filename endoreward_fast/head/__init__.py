"""How a model turns hidden states into final logits: its head, the family's recipe, and the check that it is right."""
