"""From an importance criterion to a smaller network that is proved to compute the same.

A pruner gets a `PruningContext` and returns a `PruningDecision` (`decision`). For that it has
importance scores of layers (`criteria`) and of whole channel groups (`group_scores`), a target of
MACs, parameters, bytes or time (`target`), the time as a table of measured layers predicts it
(`latency`), and which layers lose the least accuracy (`sensitivity`). `apply` masks, removes and
proves. Removal (`removal`) is exact: selected channels with all their members, then dead channels
(`dead_channels`), whose constants (`constants`) are folded into what reads them (`folding`).
`proof` compares the outputs.

`callable_pruners` makes the plug-ins functions that validate their settings.

The room knows channels by the channel graph only (see `channels`); methods themselves are plug-ins
(see `pruners`).
"""
