"""Penalties, one file each; the file name is the value of `penalty` in params.yaml.

A file offers `Settings` (a `base.sections.Strict`) and `build(settings, model, decay) -> Penalty`:
the term that sparse-train adds to the loss, already multiplied by its strength `decay`.
`training.penalty` has the protocols. For a setting that does not fit the network, `build` raises
`ArgumentError`, which names the setting without the section of params.yaml. A `build` with a fourth
parameter `shape` gets the shape of an image, which is needed to follow channels through the
network.

`_shared` is not a penalty but holds the code that several penalties are built on: `formula` for
penalties in closed form, on single tensors or on channels and filters; `coupled` for channels that
are coupled across layers; `growing` for penalties that grow on the units chosen to be pruned;
`dynamic` for penalties that prune while the network trains; `trace` for the progress of these two.
"""
