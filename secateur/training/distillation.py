"""Distillation: the trained network imitates a teacher's outputs, in addition to the labels."""

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.base.errors import ArgumentError, CheckpointError, cut, shorten
from secateur.base.sections import NOTHING, Distillation
from secateur.data.batches import Batches, sequential_batches
from secateur.data.dataset import DatasetInfo
from secateur.nn import checkpoint
from secateur.nn.layers import Removed
from secateur.nn.modes import in_eval_mode
from secateur.training.engine import Engine

MOST_LOGITS = 2**26
"""Limit of teacher outputs that are kept in memory: 256 MiB."""


def softened_divergence(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 times the KL divergence of the softened outputs of each image: (n, classes) -> (n,).

    The divergence is the sum over classes of p (log p - log q), where p is the teacher's softmax of
    logits / T and q the network's; T^2 keeps the gradients as large as those of the labels. Source:
    G. Hinton, O. Vinyals, J. Dean, Distilling the knowledge in a neural network, 2015.
    """
    ours = F.log_softmax(logits / temperature, 1)
    theirs = F.log_softmax(teacher / temperature, 1)
    return temperature**2 * F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1)


def check_layers(names: tuple[str, ...], model: nn.Module, whose: str = "the network") -> None:
    """Raise ArgumentError naming the first of these layers that the network does not have."""
    modules = dict(model.named_modules())
    known = {name for name, module in modules.items() if name and not isinstance(module, Removed)}
    for name in names:
        if name in modules and name not in known:
            why = f"{whose} has {shorten(name)} no more: it was removed with its residual branch"
            raise ArgumentError("distillation.features", why, list(names))
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=3) or sorted(known)[:8]
            raise ArgumentError(
                "distillation.features",
                f"{whose} has no layer {shorten(name)}; it has {', '.join(close)}",
                list(names),
            )


def load_teacher(
    path: Path, code: str, arch: str, own_code: dict[str, Any] | None
) -> tuple[Path, checkpoint.Checkpoint]:
    """The file of a teacher, and its checkpoint; the network to be trained has architecture `arch`.

    `path` and `code` are the settings `teacher` and `code`; `own_code` has the settings of `arch`
    if that is a function of the user. Raises CheckpointError if `code` is not the file of the
    teacher's architecture; it may be left out if that is `arch` too.
    """
    file = path / "model.safetensors" if path.is_dir() else path
    found = checkpoint.load(file)
    header = found.header
    theirs = cut(header.arch)
    if header.arch == checkpoint.OWN_CODE:
        if arch != checkpoint.OWN_CODE:
            raise CheckpointError(
                f"{file}: cannot teach a '{arch}': its network comes from a function of yours, and "
                "can only teach networks of that function"
            )
        found = checkpoint.load(file, arch, own_code)
    needed = f"secateur/archs/{theirs}.py"
    if code != needed and not (code == NOTHING and header.arch == arch):
        raise CheckpointError(
            f"{file}: its architecture is '{theirs}', that of the network '{arch}': the setting "
            f"distillation.code must be {needed}, on which the stage then depends; it is {code}"
        )
    return file, found


def check_data(file: Path, header: checkpoint.Header, info: DatasetInfo, *keys: str) -> None:
    """Raise CheckpointError naming the first of these keys in which teacher and data differ."""
    for key in keys:
        theirs, ours = list(getattr(header, key)), list(getattr(info, key))
        if theirs != ours:
            raise CheckpointError(
                f"{file}: cannot teach: its {key} = {shorten(theirs)}, those of the data "
                f"{shorten(ours)}"
            )


class Distiller:
    """The loss by which a network imitates a teacher during one training.

    If the images are the same in every epoch, the teacher's outputs are computed only once.

    With `features`, outputs of layers of the same name are compared too, by the mean squared
    difference (A. Romero et al., FitNets, ICLR 2015). Where the teacher's layer is wider, as after
    pruning, the network's output first passes through a linear map of its channels (a 1x1
    convolution), which is trained with the network and discarded afterwards.
    """

    def __init__(
        self,
        settings: Distillation,
        teacher: nn.Module,
        model: nn.Module,
        shape: tuple[int, ...],
        seed: int,
    ) -> None:
        """`shape` is that of an image; `seed` determines the initial weights of the maps.

        Raises ArgumentError for a layer that a network lacks or never runs, that returns more than
        one tensor, or whose outputs differ in more than their width.
        """
        self.settings, self.model = settings, model
        self.teacher = in_eval_mode(teacher).requires_grad_(False)
        check_layers(settings.features, model)
        check_layers(settings.features, teacher, "the teacher")
        self._ours: dict[str, Tensor] = {}
        self._theirs: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._logits: Tensor | None = None
        """The teacher's logits of all training images, (images, classes); None if not stored."""
        self._order = torch.empty(0, dtype=torch.int64)
        """Positions of the remaining images of this epoch."""
        self.maps = self._make_maps(shape, seed) if settings.features else {}

    def _make_maps(self, shape: tuple[int, ...], seed: int) -> dict[str, nn.Module]:
        """Layer -> map of its outputs to the teacher's width, if the widths differ."""
        device, training = next(self.model.parameters()).device, self.model.training
        image = torch.zeros(1, *shape, device=device)
        self.listen()
        with torch.no_grad():
            in_eval_mode(self.model)(image)
            self.teacher.to(device)(image)
        self.close()
        self.model.train(training)
        maps: dict[str, nn.Module] = {}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            for name in self.settings.features:
                ours = _taken(name, self._ours, "the network")
                made = _map(name, ours, _taken(name, self._theirs, "the teacher"))
                if made is not None:
                    maps[name] = made
        return maps

    def on(self, device: torch.device) -> list[nn.Parameter]:
        """Move teacher and maps to a device; returns the maps' parameters, to be trained too."""
        self.teacher.to(device)
        return [p for module in self.maps.values() for p in module.to(device).parameters()]

    def start_epoch(self, batches: Batches, epoch: int, resized: bool, engine: Engine) -> None:
        """Prepare for an epoch, whose images come in the order of `batches`.

        The first call computes the teacher's logits of all training images, unless images differ
        between epochs, in content or size (`resized`), or features are compared.
        """
        count = len(batches.split) * len(batches.info.classes)
        changing = resized or not batches.info.augment.nothing
        if changing or self.settings.features or count > MOST_LOGITS:
            return
        if self._logits is None:
            images = sequential_batches(batches.split, batches.info, device=engine.device)
            self._logits = torch.cat([self._teach(part, engine) for part, _ in images])
        self._order = batches.order(epoch).to(engine.device)

    def _teach(self, images: Tensor, engine: Engine) -> Tensor:
        """The teacher's logits of images."""
        with torch.no_grad(), engine.autocast():
            return self.teacher(images).float()

    def _wanted(self, images: Tensor, engine: Engine) -> Tensor:
        """The teacher's logits of the next images of the epoch."""
        if self._logits is None:
            return self._teach(images, engine)
        now, self._order = self._order.split([len(images), len(self._order) - len(images)])
        return self._logits.index_select(0, now)

    def __call__(self, images: Tensor, logits: Tensor, engine: Engine) -> Tensor:
        """The loss, summed over images (n, channels, height, width) for which the network has just
        computed `logits` (n, classes).

        It is `weight` times the loss of the outputs plus `features_weight` times the loss of the
        features. Gradients flow to the network and the maps, not to the teacher.
        """
        settings, wanted = self.settings, self._wanted(images, engine)
        loss = settings.weight * softened_divergence(logits, wanted, settings.temperature).sum()
        for name in settings.features:
            ours, theirs = self._ours.pop(name).float(), self._theirs.pop(name).float()
            if name in self.maps:
                ours = self.maps[name](ours)
            squares = (ours - theirs).square().flatten(1).mean(1).sum()
            loss = loss + settings.features_weight * squares
        return loss

    def average_gradients(self, engine: Engine) -> None:
        """Average the gradients of the maps over all processes."""
        if engine.world > 1:
            for parameter in self.on(engine.device):
                own = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                parameter.grad = engine.all_reduce(own) / engine.world

    def listen(self) -> None:
        """Store the outputs of the compared layers in every forward pass of the two networks."""
        self._hooks = [
            network.get_submodule(name).register_forward_hook(_keep(found, name))
            for network, found in ((self.model, self._ours), (self.teacher, self._theirs))
            for name in self.settings.features
        ]

    def close(self) -> None:
        """Stop listening."""
        for hook in self._hooks:
            hook.remove()

    def state_dict(self) -> dict[str, Tensor]:
        """The weights of the maps; the teacher's never change."""
        return {
            f"{name}/{key}": tensor
            for name, module in self.maps.items()
            for key, tensor in module.state_dict().items()
        }

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned; ValueError if it does not fit."""
        if state.keys() != self.state_dict().keys():
            raise ValueError("distillation: not the maps of this training")
        for name, module in self.maps.items():
            own = {k: state[f"{name}/{k}"] for k in module.state_dict()}
            module.load_state_dict(own)


def _keep(found: dict[str, Any], name: str) -> Callable[..., None]:
    """A hook that stores the output of a layer.

    The output is copied, since later operations may be in-place, such as ReLU(inplace=True).
    """

    def store(_module: nn.Module, _inputs: Any, output: Any) -> None:
        found[name] = output.clone() if isinstance(output, Tensor) else output

    return store


def _taken(name: str, found: dict[str, Any], whose: str) -> Tensor:
    """Take a layer's output from `found`; ArgumentError if it is missing or not a tensor."""
    if name not in found:
        raise ArgumentError("distillation.features", f"{whose} never runs this layer", name)
    output = found.pop(name)
    if not isinstance(output, Tensor):
        kind = type(output).__name__
        raise ArgumentError(
            "distillation.features", f"the layer of {whose} gives a {kind}, not one tensor", name
        )
    return output


def _map(name: str, ours: Tensor, theirs: Tensor) -> nn.Module | None:
    """A linear map from the channels of one output to those of another; None if shapes are equal.

    Channels are the second axis; in sequences (n, length, channels), the last axis.
    """
    if ours.shape == theirs.shape:
        return None
    axis = 2 if ours.dim() == 3 else 1
    rest = [[*t.shape[:axis], *t.shape[axis + 1 :]] for t in (ours, theirs)]
    if ours.dim() != theirs.dim() or rest[0] != rest[1] or ours.dim() not in (2, 3, 4):
        raise ArgumentError(
            "distillation.features",
            f"{name} gives {_sizes(ours)}, in the teacher {_sizes(theirs)}: only the number of "
            "channels may differ",
            name,
        )
    before, after = ours.shape[axis], theirs.shape[axis]
    if ours.dim() == 4:
        return nn.Conv2d(before, after, 1, bias=False)
    return nn.Linear(before, after, bias=False)


def _sizes(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape[1:]))
