"""Pruners, one file each; the file name is the value of `pruner`.

A file offers `Settings` (a `core.settings.Strict`) and
`prune(settings, model, choices) -> dict[str, Tensor]`: a boolean mask for every parameter it
covers, by parameter name, True where the weight stays. `choices` is what the penalty has chosen
(`core.choices.Choices`), empty after one that does not choose. It trains nothing, prints nothing,
and leaves the model as it is.
"""
