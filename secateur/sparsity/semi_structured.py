"""2:4 masks: of every four consecutive inputs of an output, two are pruned.

Source: A. Mishra et al., Accelerating sparse deep neural networks, 2021. Consecutive inputs are
input channels of a convolution at the same position of its kernel, or inputs of a linear layer. The
sparse matrix units of GPUs (from compute capability 8.0 on) skip such zeros.
"""

from torch import Tensor, nn

from secateur.sparsity import masks


def suitable_layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Layers, by name, whose number of inputs (per group of a convolution) is divisible by four.

    Layers whose weights are computed from other tensors are left out: such weights have no masks.
    """
    own = masks.prunable(model, "weights")
    return {
        name: layer
        for name, layer in masks.layers(model).items()
        if f"{name}.weight".lstrip(".") in own and layer.weight.shape[1] % 4 == 0
    }


def smaller_two_of_four(scores: Tensor) -> Tensor:
    """The choice of the two lowest of every four scores along axis 1; of equal ones, the first.

    `scores` have the shape of the weight, and a multiple of four inputs.
    """
    fours = scores.movedim(1, -1).unflatten(-1, (-1, 4))
    ranks = fours.argsort(stable=True, dim=-1).argsort(-1)
    return (ranks < 2).flatten(-2).movedim(-1, 1)
