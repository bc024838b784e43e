"""`python -m bench.cost`: what scoring costs, by formula and measured."""
