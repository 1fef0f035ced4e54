"""Parametrizations, one file each; the file name is the value of `parametrization` in params.yaml.

A file offers `Settings` (a `base.sections.Strict`) and `build(settings, model) -> Parametrization`:
while sparse-train runs, the weights of the model are computed from other parameters, which are
trained in their place, or drawn at random. `training.parametrization` has the protocol. At the end
they are collapsed to plain weights, zero where the parametrization prunes, so that later stages are
not aware of it. For a setting that does not fit the network, `build` raises `ArgumentError`, which
names the setting without the section of params.yaml.
"""
