"""The embedded model of 3 million weights, and the problems and sentences that it was trained on."""
