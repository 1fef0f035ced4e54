"""The state of a training between two epochs: recorded, saved, restored."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Protocol

import torch
from pydantic import ConfigDict, Field, TypeAdapter
from torch import Tensor, nn

from secateur.base.documents import validated
from secateur.base.errors import StateError, cut
from secateur.training.callbacks import Row


class StateStore(Protocol):
    """Keeps the state of a training beyond the lifetime of its process."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state that an earlier process has saved, tensors and plain values, or None."""

    def save(self, tensors: Mapping[str, Tensor], info: dict[str, Any]) -> bool:
        """Copy the state after an epoch; returns whether it is already on disk."""


class Stateful(Protocol):
    """A part of a training that has state between steps."""

    def state_dict(self) -> dict[str, Tensor]:
        """The state that a resumed training restores."""

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned; an error if it does not fit."""


class TrainingState:
    """All state that a resumed training needs: weights, optimizer, history, best epoch, parts."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        parts: Mapping[str, Stateful | None],
        keep_epoch: int | None = None,
    ) -> None:
        """`parts` maps the prefix of tensor names, such as `penalty`, to a stateful part or None.

        The weights after `keep_epoch` epochs are kept.
        """
        self.model, self.optimizer = model, optimizer
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.history: list[Row] = []
        self.best_epoch = 0
        """Counted from 1; 0 if no epoch has been compared yet."""
        self.best_weights: dict[str, Tensor] = {}
        self.keep_epoch = keep_epoch
        self.kept_weights: dict[str, Tensor] = _copy(model) if keep_epoch == 0 else {}
        """The weights after `keep_epoch` epochs."""

    def record(self, row: Row, keep_best: bool, evaluated: nn.Module | None = None) -> None:
        """Append an epoch to the history; with `keep_best`, copy its weights if it is the best.

        `evaluated` is the network that was evaluated, if it is not the one that is trained. The
        best epoch has the highest accuracy on val; among equal accuracies, the lowest loss.
        """
        self.history.append(row)
        if len(self.history) == self.keep_epoch:
            self.kept_weights = _copy(self.model)
        if not keep_best:
            return
        if self.best_epoch:
            best = self.history[self.best_epoch - 1]
            rank = (-row["val_accuracy"], row["val_loss"])
            if rank >= (-best["val_accuracy"], best["val_loss"]):
                return
        self.best_epoch = len(self.history)
        self.best_weights = _copy(evaluated or self.model)

    def load_best(self, last: nn.Module) -> None:
        """Load the weights of the best epoch into the model; if there is none, those of `last`."""
        if self.best_weights:
            self.model.load_state_dict(self.best_weights)
        elif last is not self.model:
            self.model.load_state_dict(last.state_dict())

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Named tensors and plain values that describe the whole state."""
        tensors = {f"model/{n}": t for n, t in self.model.state_dict().items()}
        tensors |= {f"best/{n}": t for n, t in self.best_weights.items()}
        tensors |= {f"kept/{n}": t for n, t in self.kept_weights.items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{n}": v for n, v in values.items() if v is not None}
        for name, part in self.parts.items():
            tensors |= {f"{name}/{n}": t for n, t in part.state_dict().items()}
        return tensors, {"history": self.history, "best": self.best_epoch}

    def load_state_dict(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises StateError if the state does not fit; everything then stays unchanged.
        """
        own, own_info = self.state_dict()
        before = {name: tensor.detach().clone() for name, tensor in own.items()}
        try:
            self._load(tensors, info)
        except Exception as error:  # whatever torch or a penalty raises on unsuitable tensors
            self._load(before, own_info)
            reason = cut(str(error) or type(error).__name__, 200)
            raise StateError(f"the saved state does not fit this training: {reason}") from error

    def _load(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Restore a state; if it does not fit, raises various errors after loading part of it."""
        progress = validated(_PROGRESS, info, "history", StateError)
        progress.check()
        kinds = {name.split("/")[0] for name in tensors}
        if unknown := kinds - {"model", "best", "kept", "optimizer", *self.parts}:
            raise ValueError(f"tensors of {sorted(unknown)[0]}")
        weights, best = with_prefix(tensors, "model/"), with_prefix(tensors, "best/")
        kept, own = with_prefix(tensors, "kept/"), self.model.state_dict()
        past = self.keep_epoch is not None and len(progress.history) >= self.keep_epoch
        for found, there in ((weights, True), (best, progress.best), (kept, past)):
            if there:
                _check_like(own, found)
        if best and not progress.best:
            raise ValueError("weights of a best epoch, but no best epoch")
        self.model.load_state_dict(weights)
        device = next(self.model.parameters()).device
        self.best_weights = {n: t.to(device) for n, t in best.items()}
        self.kept_weights = {n: t.to(device) for n, t in kept.items()} if past else {}
        self._load_optimizer(with_prefix(tensors, "optimizer/"))
        for name, part in self.parts.items():
            part.load_state_dict(with_prefix(tensors, f"{name}/"))
        self.history, self.best_epoch = list(progress.history), progress.best

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for name, tensor in tensors.items():
            index, key = name.split("/")
            like = parameters[range(len(parameters)).index(int(index))]
            if tensor.shape not in (like.shape, ()) or not tensor.is_floating_point():
                raise ValueError(f"optimizer: {cut(name)} is {tensor.dtype} {tuple(tensor.shape)}")
            if tensor.shape == like.shape:  # fused optimizers need the parameter's memory layout
                tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
            state.setdefault(int(index), {})[key] = tensor.detach()
        if len({frozenset(values) for values in state.values()} - self._optimizer_keys()):
            raise ValueError("optimizer: not the tensors of this optimizer")
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _optimizer_keys(self) -> set[frozenset[str]]:
        """Allowed sets of tensor names that the optimizer keeps for a parameter."""
        if isinstance(self.optimizer, torch.optim.SGD):
            return {frozenset({"momentum_buffer"})}
        return {frozenset({"step", "exp_avg", "exp_avg_sq"})}


@dataclass(frozen=True)
class _Progress:
    """Plain values of a state. The annotations are their schema."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    history: list[dict[str, Annotated[float, Field(allow_inf_nan=False, strict=True)]]]
    best: Annotated[int, Field(ge=0, strict=True)]

    def check(self) -> None:
        """ValueError if epochs are missing, or the best epoch is not one of them."""
        if [row.get("epoch") for row in self.history] != [*range(1, len(self.history) + 1)]:
            raise ValueError("its epochs are not numbered from 1")
        if any(row.keys() != self.history[0].keys() for row in self.history):
            raise ValueError("its epochs differ in their values")
        if self.best > len(self.history):
            raise ValueError(f"best = {self.best} of {len(self.history)} epochs")
        if self.best and not {"val_accuracy", "val_loss"} <= self.history[0].keys():
            raise ValueError("its epochs have no values on val")


_PROGRESS = TypeAdapter(_Progress)


def _copy(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the current weights and buffers."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _check_like(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """ValueError unless names, shapes and types equal those of the network."""
    if wrong := sorted(own.keys() ^ found.keys()):
        raise ValueError(f"{cut(wrong[0])} is missing or unexpected")
    for name, tensor in own.items():
        if tensor.shape != found[name].shape or tensor.dtype != found[name].dtype:
            raise ValueError(f"{name} is {found[name].dtype} {tuple(found[name].shape)}")


def with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, by the rest of their names."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
