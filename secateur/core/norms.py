"""Batch normalisations with scales, and how their scales are distributed."""

import pandas as pd
import torch
from torch import nn

NORMS = (nn.BatchNorm2d, nn.BatchNorm1d)
WIDTH = 0.02
"""Of a bin."""


def scaled_norms(model: nn.Module) -> dict[str, nn.BatchNorm2d | nn.BatchNorm1d]:
    """Batch normalisations that have scales, by name and in order."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, NORMS)}
    return {name: norm for name, norm in found.items() if norm.affine}


def distribution(model: nn.Module) -> pd.DataFrame:
    """How many scales have which size: `scale`, the lower end of a bin of |gamma|, and `count`.

    All networks have the same bins, up to the largest scale; without scales there are none.
    """
    scales = [norm.weight.detach().abs().flatten().cpu() for norm in scaled_norms(model).values()]
    if not scales:
        return pd.DataFrame(columns=["scale", "count"])
    counts = torch.cat(scales).double().div(WIDTH).floor().long().bincount()
    lower = [round(place * WIDTH, 2) for place in range(len(counts))]
    return pd.DataFrame({"scale": lower, "count": counts.tolist()})
