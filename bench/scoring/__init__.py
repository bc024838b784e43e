"""Scoring rows end to end: ours beside what a person would pick instead."""
