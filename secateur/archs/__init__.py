"""Architectures, one file each; the file name is the value of `arch`.

A file offers `Settings` (a `base.settings.Strict`) and
`build(settings, classes, shape) -> nn.Module`, where `shape` is (channels, height, width) of one
image. Layers are modules that are called as modules, so that torch.fx can follow them, and every
module that holds weights has `reset_parameters()`. A network whose weights start otherwise than
torch's layers do has that method too: it draws them in whatever shape the layers have by then, so
that a pruned network trained from scratch starts like the dense one. A file whose settings can ask
for published weights offers `publish(settings, model)`, which puts them in; only the first training
calls it.
"""
