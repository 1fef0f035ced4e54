"""From an importance criterion to a smaller network that is proved to compute the same.

A pruner gets a `PruningContext` and returns a `PruningDecision` (`decision`). It can use importance
scores of layers (`criteria`) and of whole channel groups (`group_scores`), targets for MACs,
parameters, bytes or latency (`target`), latencies predicted from a table of measured layers
(`latency`), and the sensitivity of the accuracy to each layer (`sensitivity`). `apply` masks,
removes and proves. Removal (`removal`) is exact: it removes selected channels with all their
members, residual branches (`branches`), then dead channels (`dead_channels`), whose constants
(`constants`) are folded into the layers that read them (`folding`). `proof` compares the outputs.

`callable_pruners` makes the plug-ins callable, with validation of their settings.

The room knows channels only through the channel graph (see `channels`); the methods are plug-ins
(see `pruners`).
"""
