"""Shared parts of the benchmarks: cases, shapes, peers, correctness gate, clock, memory, charts."""
