"""Prepared data sets: split, hashed and stored by `dataset`, read in `batches`.

Images are held in memory (`dataset.InMemoryImages`) or stay in their files (`image_files`), which
worker processes decode (`image_loader`). `augment` draws and applies crops and flips, `warp`
rotations and elastic distortions, `cutout` hidden squares; `progressive_resizing` makes the images
of the first epochs smaller. The plug-ins in `secateur/datasets` read data sets from their original
files.
"""
