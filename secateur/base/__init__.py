"""The foundation of all other packages: settings, errors, files, plug-ins, machine, stage.

Nothing here deals with networks, images or pruning; every other room may import from this one.
"""
