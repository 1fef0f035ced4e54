"""What layers get while a network computes."""

import contextlib
from collections.abc import Callable, Iterator, Mapping

from torch import Tensor, nn


@contextlib.contextmanager
def watched_inputs(
    layers: Mapping[str, nn.Module], take: Callable[[str, Tensor], object]
) -> Iterator[None]:
    """Call `take` with the name and the first input of each of these layers before it computes."""
    hooks = [
        layer.register_forward_pre_hook(lambda _m, inputs, n=name: _call(take, n, inputs[0]))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _call(take: Callable[[str, Tensor], object], name: str, given: Tensor) -> None:
    """What a hook returns would replace the input."""
    take(name, given)
