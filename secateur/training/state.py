"""The state of a training between two epochs: recorded, saved, restored."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.training.callbacks import Row
from secateur.training.penalty import Penalty


class StateStore(Protocol):
    """Keeps the state of a training beyond the life of its process."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state that an earlier process has saved, if any: tensors and plain values."""

    def save(self, tensors: Mapping[str, Tensor], info: dict[str, Any]) -> bool:
        """Copy the state after an epoch; returns whether it is on disk already."""


class TrainingState:
    """All that a resumed training needs: weights, optimizer, penalty, history, best epoch."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, penalty: Penalty | None
    ) -> None:
        self.model, self.optimizer, self.penalty = model, optimizer, penalty
        self.history: list[Row] = []
        self.best_epoch = 0
        """Counted from 1; 0 as long as no epoch has been compared."""
        self.best_weights: dict[str, Tensor] = {}

    def record(self, row: Row, keep_best: bool) -> None:
        """Append an epoch to the history; with `keep_best`, copy its weights if it is the best.

        The best epoch has the highest accuracy on val, and the lowest loss among equal ones.
        """
        self.history.append(row)
        if not keep_best:
            return
        if self.best_epoch:
            best = self.history[self.best_epoch - 1]
            rank = (-row["val_accuracy"], row["val_loss"])
            if rank >= (-best["val_accuracy"], best["val_loss"]):
                return
        self.best_epoch = len(self.history)
        self.best_weights = {n: t.detach().clone() for n, t in self.model.state_dict().items()}

    def load_best(self) -> None:
        """Load the weights of the best epoch into the model, if epochs were compared."""
        if self.best_weights:
            self.model.load_state_dict(self.best_weights)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Named tensors and plain values that describe the whole state."""
        tensors = {f"model/{n}": t for n, t in self.model.state_dict().items()}
        tensors |= {f"best/{n}": t for n, t in self.best_weights.items()}
        for index, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{n}": v for n, v in values.items() if v is not None}
        if self.penalty is not None:
            tensors |= {f"penalty/{n}": t for n, t in self.penalty.state_dict().items()}
        return tensors, {"history": self.history, "best": self.best_epoch}

    def load_state_dict(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.model.load_state_dict(_with_prefix(tensors, "model/"))
        device = next(self.model.parameters()).device
        self.best_weights = {n: t.to(device) for n, t in _with_prefix(tensors, "best/").items()}
        self._load_optimizer(_with_prefix(tensors, "optimizer/"))
        if self.penalty is not None:
            self.penalty.load_state_dict(_with_prefix(tensors, "penalty/"))
        self.history, self.best_epoch = list(info["history"]), int(info["best"])

    def _load_optimizer(self, tensors: dict[str, Tensor]) -> None:
        state: dict[int, dict[str, Tensor]] = {}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for name, tensor in tensors.items():
            index, key = name.split("/")
            like = parameters[int(index)]
            if tensor.shape == like.shape:  # fused optimizers need the parameter's memory layout
                tensor = torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
            state.setdefault(int(index), {})[key] = tensor.detach()
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name starts with `prefix`, by the rest of their names."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
