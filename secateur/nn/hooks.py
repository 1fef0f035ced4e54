"""What layers get while a network computes."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn

from secateur.nn.layers import IndexedConv2d


@contextlib.contextmanager
def watched_inputs(
    layers: Mapping[str, nn.Module], take: Callable[[str, Tensor], object]
) -> Iterator[None]:
    """Call `take` with the name and the first input of each of these layers before it computes.

    The channels are in the order in which the weights read them.
    """
    hooks = [
        layer.register_forward_pre_hook(lambda m, inputs, n=name: _call(take, n, m, inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _call(
    take: Callable[[str, Tensor], object], name: str, layer: nn.Module, given: Tensor
) -> None:
    """What a hook returns would replace the input."""
    if isinstance(layer, IndexedConv2d) and layer.before is not None:
        given = given.index_select(1, layer.before)
    take(name, given)
