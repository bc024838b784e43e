"""`python -m bench.gpu`: run the tests and benchmarks on a GPU."""
