"""What the endogenous reward is compared with: the model as a judge, and trained reward models."""
