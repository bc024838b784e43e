"""`python -m bench.cost`: the cost of scoring, by formula and measured."""
