"""Rules: what each operation does to channel ids, by kind of operation.

A rule for a function or method is called with the operation's own arguments, `rule(call, x, ...)`;
a rule for a module with `rule(call, module, x)`. Activations are ChannelIds, parameters and buffers
are NamedTensors, sizes read from tensors are TracedSizes. A rule returns its result in the same
types, and reports to the visitor through `call`.
"""
