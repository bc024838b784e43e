"""`EndoRewardModel` and what it takes to load one: names, adapters, dtypes, devices, limits of length, layouts."""
