"""Data sets, one file each; the file name is the value of `dataset`.

A file offers `Settings` (a `base.settings.Strict`) and `read(settings, root) -> Images`: training
and test images as they come, before any split, with class names, normalisation and augmentation;
`root` is where files are looked for.
"""
