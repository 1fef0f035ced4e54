"""Data sets once they are prepared: divided, hashed and stored (`dataset`), as batches (`batches`).

Images are held in memory (`dataset.InMemoryImages`) or stay in their files (`image_files`), which
worker processes decode (`image_loader`). `augment` draws and applies crops and flips. How a data
set is read from its original files is the matter of the plug-ins in `secateur/datasets`.
"""
