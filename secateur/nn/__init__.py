"""Networks: their building blocks, and how they are resized, stored and measured.

`blocks`, `layers` and `attention` are building blocks, `norms` finds batch normalisations,
`resizing` gives layers new shapes, `checkpoint` reads and writes networks, `cost` counts parameters
and MACs. `weights` reads weights from other programs, and `matching` assigns them to a network's
tensors. `hooks` observes the inputs of layers in a forward pass, `outputs` collects the tensors
that a network returns, `modes` sets networks to eval mode, and `copies` copies them.
"""
