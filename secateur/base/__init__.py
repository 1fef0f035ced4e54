"""What everything else stands on: settings, errors, files, plug-ins, the machine, the stage.

Nothing here knows of networks, images or pruning; every other room may import from this one.
"""
