"""Which weights of a network are zero, or are to become zero: masks, choices and ratios.

A mask has an entry for each entry of a parameter. A choice has one for each group of weights at a
granularity (filter, channel or weight) and needs no mask yet. A ratio is the share of a layer's
groups that is chosen. The room knows layers by name and shape, and nothing of how channels depend
on each other (see `channels`) or of how important weights are (see `pruning`).

`masks` applies, holds and counts masks. `scores` scores the groups of one weight, `choices` chooses
among groups, and `semi_structured` chooses two of each four weights. `ratios` are the notations in
which a user writes ratios, `layer_ratios` finds the ratio of each layer, and `positions` the place
of each layer in its network.
"""
