"""Penalties, one file each; the file name is the value of `penalty`.

A file offers `Settings` (a `base.settings.Strict`) and `build(settings, model, decay) -> Penalty`:
what sparse-train adds to the loss, its strength `decay` included. `penalties._formula` has the two usual
ones: a formula over single tensors, and one over groups of weights. `penalties._growing` has those that
run a course of their own and choose what is to go; `training.penalty` says what a `Penalty` is.
"""
