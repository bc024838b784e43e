"""Trainers and clusters. Nothing here is imported unless it is asked for by name."""
