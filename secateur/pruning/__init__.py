"""From an importance criterion to a smaller network that is proved to compute the same.

A pruner gets a `PruningContext` and returns a `PruningDecision` (`decision`). For that it has
importance scores (`criteria`), a target of MACs or parameters (`target`), and which layers lose the
least accuracy (`sensitivity`). `apply` masks, removes and proves. Removal (`removal`) is exact:
selected channels with all their members, then dead channels (`dead_channels`), whose constants
(`constants`) are folded into what reads them (`folding`). `proof` compares the outputs.

The room knows channels by the channel graph only (see `channels`); methods themselves are plug-ins
(see `pruners`).
"""
