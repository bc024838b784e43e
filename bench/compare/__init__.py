"""`python -m bench.compare`: everything that runs here, by accuracy, speed and repeatability, in one table."""
