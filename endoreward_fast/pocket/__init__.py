"""The embedded model with 3 million weights, and generators of the problems and sentences that it was trained on."""
