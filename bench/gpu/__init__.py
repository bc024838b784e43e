"""`python -m bench.gpu`: tests and benchmarks on a GPU."""
