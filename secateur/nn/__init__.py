"""Networks: their building blocks, and how they are resized, stored and measured.

`blocks` and `layers` are building blocks, `norms` finds batch normalisations, `resizing` gives
layers new shapes, `checkpoint` reads and writes networks, `cost` counts parameters and MACs.
"""
