"""Prepared data sets: divided, hashed and stored (`dataset`), handed out in `batches`.

Images are held in memory (`dataset.InMemoryImages`) or stay in their files (`image_files`), which
worker processes decode (`image_loader`). `augment` draws and applies crops and flips, `warp`
rotations and elastic distortions, `cutout` hidden squares; `progressive_resizing` makes the images
of the first epochs smaller. How a data set is read from its original files is defined by the
plug-ins in `secateur/datasets`.
"""
