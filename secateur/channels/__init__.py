"""The channel graph: which channels of a network belong together, and how to remove them.

This room contains the knowledge about how operations treat channels, and its consequences. Deciding
which channels to remove, and changing the network, belong in `pruning`.

Data flows through the modules in this order:

- `trace`: the network as a graph of operations, `torch.fx.Graph`.
- `propagation`: runs that graph with channel ids (`ids`) in place of activations. What an operation
  does to ids is its rule; `operators` is the table of all rules, `rules/` has their code.
- `visitor`: what a propagation reports. Two visitors exist.
- `builder`: the first visitor, GroupBuilder. It creates ids, records which tensor has an entry for
  which id (`records`), and unites ids that are added (`union_find`).
- `views`: constraints that views with given sizes put on channels, once all ids have been united.
- `groups`: channels with entries in the same tensors become a ChannelGroup with its members.
- `graph`: ChannelGraph, the result, built by `build_channel_graph`; `report` prints it.
- `selection`: which channels of a selection can be removed, and which lose their purpose with them.
- `planner`: the second visitor, ShapePlanner. It propagates the ids that remain after a removal,
  checks that they still fit together, and returns a ShapePlan: the entries that each tensor keeps.
- `scales`: scales of batch normalisations by channel, for criteria that use them.

A new operation is one entry in `operators`, with a rule if none of the existing ones fits.
"""
