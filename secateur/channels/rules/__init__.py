"""Rules: what each operation does to channel ids, by kind of operation.

A rule for a function or method is called with the operation's own arguments, `rule(call, x, ...)`;
a rule for a module with `rule(call, module, x)`. Activations are ChannelIds, parameters and buffers
are NamedTensors, sizes read from tensors are TracedSizes. A rule returns the result in the same
terms, and reports through `call` what the visitor has to know.
"""
