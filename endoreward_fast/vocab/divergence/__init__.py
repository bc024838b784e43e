"""The divergence of two distributions over the vocabulary.

`reference` is the oracle, and `rows` has its formulas and the types that all share. `chunked`, with `backward` for its
gradients, and `fused` are the fast implementations. `ops` registers them with torch.
"""
