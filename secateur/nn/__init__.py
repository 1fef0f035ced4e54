"""Networks: their building blocks, and how they are resized, stored and measured.

`blocks`, `layers` and `attention` are building blocks, `norms` finds batch normalisations,
`resizing` gives layers new shapes, `checkpoint` reads and writes networks, `cost` counts parameters
and MACs. Weights that others have saved are read by `weights` and assigned to a network's tensors
by `matching`. `hooks` hands out the inputs of layers while a network computes, `outputs` the
tensors that a network returns.
"""
