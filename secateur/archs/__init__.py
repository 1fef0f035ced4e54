"""Architectures, one file each; the file name is the value of `arch`.

A file provides `Settings` (a `base.sections.Strict`) and
`build(settings, classes, shape) -> nn.Module`, where `shape` is (channels, height, width) of one
image. Layers are called as modules, so that torch.fx can trace them, and every module with
parameters has `reset_parameters()`. A network whose initial weights differ from those of torch's
layers has that method too: it draws weights in the current shapes of the layers, so that a pruned
network trained from scratch is initialised like the dense network.

Three further functions are optional. `published(settings) -> nn.weights.Weights`: weights that a
library publishes for the network. `aliases(settings) -> nn.matching.Names`: names of its tensors in
well-known implementations, so that their files can be loaded. `auxiliary(settings) ->
tuple[str, ...]`: prefixes of the names of further tensors in such files, such as those of auxiliary
classifiers, which are ignored.
"""
