"""`EndoRewardModel`, and how it is loaded: names, adapters, dtypes, devices, length limits, batch layouts."""
