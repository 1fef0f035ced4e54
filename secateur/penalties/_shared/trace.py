"""The trace of penalties that choose what is pruned: progress at some steps, for growth.csv."""

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_POINTS = 500
"""Largest number of points of a trace, not counting its end."""


class Trace:
    """Values at some steps of a training, all of one shape; they belong to the penalty's state."""

    def __init__(self, shape: Sequence[int]) -> None:
        """`shape` is that of a point."""
        self.shape = torch.Size(shape)
        self.points: list[tuple[int, Tensor]] = []
        """Step, and its values, float32 on the CPU."""

    def add(self, step: int, point: Tensor) -> None:
        """Add a point; steps ascend."""
        self.points.append((step, point))

    def state_dict(self) -> dict[str, Tensor]:
        """The points as two tensors."""
        points = [point for _, point in self.points]
        return {
            "trace.steps": torch.tensor([step for step, _ in self.points], dtype=torch.int64),
            "trace.points": torch.stack(points) if points else torch.zeros(0, *self.shape),
        }

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` returned; ValueError if its points have another shape."""
        steps, points = state["trace.steps"], state["trace.points"]
        if points.shape != (len(steps), *self.shape):
            raise ValueError(f"penalty: trace of {tuple(points.shape)} does not fit")
        pairs = zip(steps.tolist(), points, strict=True)
        self.points = [(step, point.clone()) for step, point in pairs]


def interval(number: int) -> int:
    """Every how many of `number` steps or updates a trace has a point, to have at most MAX_POINTS;
    at least 1."""
    return max(1, -(-number // MAX_POINTS))
