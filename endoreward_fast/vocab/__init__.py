"""The pass over the vocabulary, one file for each way to make it.

`reference` is the oracle. `chunked`, `compiled`, `fused` and `workspace` are the fast ways. They share `rows` (which
rows are computed). `checks` refuses bad arguments, `shards` describes a vocabulary that is split over ranks, `sharded`
runs a pass on a shard, and `ops` registers the passes with torch.
"""
