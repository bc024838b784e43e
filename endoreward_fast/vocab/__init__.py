"""The pass over the vocabulary, in several implementations.

`reference` is the oracle. `chunked` (with `chunked_backward` and `chunked_tiles`), `compiled`, `fused` and `workspace`
are the fast implementations; `rows` holds the types and the row plan that they share. `checks` refuses bad arguments,
and `prepare` shapes good ones. `choice` says which of them runs. `tuned` finds what `endoreward tune` chose for a
head on this `machine`, in the user's `cache` folder. `shard_layout` describes a vocabulary that is split over ranks,
and `sharded` runs a pass on one shard. `ops` registers the passes with torch. The folder `divergence` compares two
distributions over the vocabulary.
"""
