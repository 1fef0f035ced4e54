"""Pruners, one file each; the file name is the value of `pruner` in params.yaml.

A file offers `Settings` (a `base.sections.Strict`) and `prune(settings, context) ->
PruningDecision`; both types are in `pruning.decision`. The context holds the network, some training
images, the penalty's choice, and, on request, the channel graph. The decision has masks for single
weights, by parameter name, whole channels, by the name of their group and their index in it, and
names of residual branches.
A pruner trains nothing, prints nothing, and does not change the model. For a setting that does not
fit the network it raises `ArgumentError`, which names the setting without the section of
params.yaml.

Code that several pruners use is in the rooms: criteria, targets and sensitivity in `pruning`,
ratios and choices in `sparsity`, permutations and budgets of groups in `gconv`. Importing this
package makes every pruner callable: `secateur.pruners.magnitude(ratios=0.5)`.
"""

from typing import TYPE_CHECKING

from secateur.pruning.callable_pruners import ConfiguredPruner, callable_plugins

if TYPE_CHECKING:
    from collections.abc import Callable

    def __getattr__(name: str) -> Callable[..., ConfiguredPruner]: ...


callable_plugins(__name__)
