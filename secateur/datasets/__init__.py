"""Data sets, one file each; the file name is the value of `dataset`.

A file provides `Settings` (a `base.sections.Strict`) and `read(settings, root) -> Images`: training
and test images before the validation split, with class names, normalisation and augmentation;
`root` is the folder of raw data. Files with a leading underscore are shared readers of folders and
file formats.
"""
