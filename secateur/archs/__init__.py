"""Architectures, one file each; the file name is the value of `arch`.

A file offers `Settings` (a `base.sections.Strict`) and
`build(settings, classes, shape) -> nn.Module`, where `shape` is (channels, height, width) of one
image. Layers are called as modules, so that torch.fx can trace them, and every module with
parameters has `reset_parameters()`. A network whose initial weights differ from those of torch's
layers has that method too: it draws weights in the present shape of the layers, so that a pruned
network trained from scratch starts like the dense one.

Three further functions are optional. `published(settings) -> nn.weights.Weights`: weights that a
library publishes for the network. `aliases(settings) -> nn.matching.Names`: names of its tensors in
well-known implementations, which files of weights then may have. `auxiliary(settings) ->
tuple[str, ...]`: beginnings of names of tensors that such files may have beside those, as of
auxiliary classifiers.
"""
