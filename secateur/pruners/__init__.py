"""Pruners, one file each; the file name is the value of `pruner`.

A file offers `Settings` (a `base.settings.Strict`) and `prune(settings, subject) -> Decision`; both
types are in `pruning.decision`. The subject is the network with some images, what the penalty has
chosen, and on request the groups of channels that live and die together (`channels.graph`). The
decision is made of masks for single parameters, True where an entry stays, and of whole channels,
by the name of their group and their numbers in it.

A pruner trains nothing, prints nothing, and leaves the model as it is.
"""

from typing import TYPE_CHECKING

from secateur.base.callable_plugin import ConfiguredPruner, callable_plugins

if TYPE_CHECKING:
    from collections.abc import Callable

    def __getattr__(name: str) -> Callable[..., ConfiguredPruner]: ...


callable_plugins(__name__)
