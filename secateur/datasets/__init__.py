"""Data sets, one file each; the file name is the value of `dataset`.

A file offers `Settings` (a `core.settings.Strict`), `CLASSES` (their names, in label order) and
`read(settings, root) -> Images`: the training and test images as they come, before any split;
`root` is where files are looked for.
"""
