"""Penalties, one file each; the file name is the value of `penalty` in params.yaml.

A file offers `Settings` (a `base.sections.Strict`) and `build(settings, model, decay) -> Penalty`:
the term that sparse-train adds to the loss, its strength `decay` included. `training.penalty` has
the protocols. For a setting that does not fit the network, `build` raises `ArgumentError`, which
names the setting without the section of params.yaml. A `build` with a fourth parameter `shape` gets
that of an image, which following channels through the network needs.

`_shared` is no penalty: it holds what several of them are built on, `formula` for penalties in
closed form, on single tensors or on channels and filters; `coupled` for channels of several layers;
`growing` for penalties that grow on what they have chosen to be pruned.
"""
