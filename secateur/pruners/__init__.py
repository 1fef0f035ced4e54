"""Pruners, one file each; the file name is the value of `pruner`.

A file offers `Settings` (a `core.settings.Strict`) and one of
`prune(settings, model) -> dict[str, Tensor]`: a boolean mask for every parameter it covers, by
parameter name, True where the weight stays;
`prune(settings, model, network) -> Decision`: masks, whole channels, or both (`core.decision`).
`network` (`core.channels.Network`) has the groups of channels that live and die together, where
each of them stands in which tensors, which of them are locked, and `allowed`, which takes back what
cannot go. Channels are given by the name of their group and their numbers in it.

It trains nothing, prints nothing, and leaves the model as it is.
"""
