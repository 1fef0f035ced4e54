"""Architectures, one file each; the file name is the value of `arch`.

A file offers `Settings` (a `core.settings.Strict`) and
`build(settings, classes, shape) -> nn.Module`, where `shape` is (channels, height, width) of one
image. Layers are modules that are called as modules, so that torch.fx can follow them, and every
module that holds weights has `reset_parameters()`.
"""
