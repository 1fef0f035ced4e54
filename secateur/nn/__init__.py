"""Networks: what they are built of, how they are rebuilt smaller, stored and measured.

`blocks` and `layers` are building blocks, `norms` finds batch normalisations, `resizing` gives
layers new shapes, `checkpoint` reads and writes networks, `cost` counts parameters and MACs.
"""
