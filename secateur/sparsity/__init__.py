"""Which weights of a network are pruned, or are to be pruned: masks, choices and ratios.

A mask has an entry for each entry of a parameter. A choice has one for each unit (filter, input
channel or weight), without a mask yet. A ratio is the share of a layer's units that is chosen. The
room knows layers by name and shape, but neither how channels depend on each other (see `channels`)
nor how important weights are (see `pruning`).

`masks` applies, holds and counts masks. `scores` scores the units of one weight, `choices` chooses
among units, and `semi_structured` chooses two of every four weights. `ratios` parses the notations
in which users write ratios, `layer_ratios` finds the ratio of each layer, and `positions` the
position of each layer in its network.
"""
