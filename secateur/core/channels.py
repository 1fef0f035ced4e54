"""Which channels live and die together: here the links of a chain of layers.

A link joins a layer to the one that reads its output. Taking one output of the first away takes
`positions` inputs of the second away with it: one, or as many as a feature map has pixels where
it is flattened on the way.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from secateur.core.errors import PruningError
from secateur.core.masks import LAYERS

ELEMENTWISE = (nn.ReLU, nn.Dropout, nn.Identity)
POOLING = (nn.MaxPool2d, nn.AvgPool2d)


@dataclass(frozen=True)
class Link:
    """Outputs of one layer as the next layer reads them."""

    producer: str
    consumer: str
    through: tuple[nn.Module, ...]
    """What stands between them and acts on every channel by itself."""
    positions: int
    """Inputs of the consumer for each output of the producer."""
    side: tuple[int, ...]
    """Height and width of the producer's output; empty for a linear layer."""


def links(model: nn.Module, example: Tensor) -> list[Link]:
    """All links of a chain, in order; `example` is a batch of inputs of any size.

    Raises PruningError naming the first operation that it cannot follow.
    """
    modules = dict(model.named_modules())
    found: list[Link] = []
    producer: str | None = None
    through: list[nn.Module] = []
    seen: set[str] = set()
    sides = _sides(model, example)
    for node in _trace(model).graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        module = modules[str(node.target)] if node.op == "call_module" else None
        known = isinstance(module, (*LAYERS, *ELEMENTWISE, *POOLING, nn.Flatten))
        if not known or module is None or len(node.users) != 1:
            raise PruningError(
                f"cannot follow channels through '{node.name}' ({node.op} {node.target}): only "
                "chains of convolutions, linear layers, ReLU, pooling, dropout and flatten"
            )
        if isinstance(module, LAYERS):
            name = str(node.target)
            if name in seen:
                raise PruningError(f"layer {name} is used twice: shared weights are not followed")
            seen.add(name)
            if isinstance(module, nn.Conv2d) and module.groups != 1:
                raise PruningError(f"layer {name}: grouped convolutions are not followed yet")
            if producer is not None:
                outputs = modules[producer].weight.shape[0]
                positions = module.weight.shape[1] // outputs
                found.append(Link(producer, name, tuple(through), positions, sides[producer]))
            producer, through = name, []
        elif not isinstance(module, nn.Flatten):
            through.append(module)
    return found


def _trace(model: nn.Module) -> fx.GraphModule:
    try:
        return fx.symbolic_trace(model)
    except Exception as error:  # what the tracer raises depends on what it stumbles over
        reason = " ".join(str(error).split())
        raise PruningError(f"cannot follow {type(model).__name__}: {reason}") from None


@torch.no_grad()
def _sides(model: nn.Module, example: Tensor) -> dict[str, tuple[int, ...]]:
    """Height and width of every layer's output, seen in one pass."""
    seen: dict[str, tuple[int, ...]] = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, n=name: seen.update({n: out.shape[2:]}))
        for name, module in model.named_modules()
        if isinstance(module, LAYERS)
    ]
    try:
        model(example)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: tuple(side) for name, side in seen.items()}
