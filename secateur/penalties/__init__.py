"""Penalties, one file each; the file name is the value of `penalty`.

A file offers `Settings` (a `core.settings.Strict`) and `build(settings, model) -> Penalty`: what
sparse-train multiplies by `decay` and adds to the loss. `core.penalty` says what a `Penalty` is
and has the two usual ones: a formula over single tensors, and one over groups of weights.
"""
