"""Batch normalisations with scales, and how their scales are distributed."""

import pandas as pd
import torch
from torch import nn

Norm = nn.BatchNorm2d | nn.BatchNorm1d | nn.SyncBatchNorm
"""The last is what the first two become where several GPUs train."""
WIDTH = 0.02
"""Of a bin."""


def scaled_norms(model: nn.Module) -> dict[str, Norm]:
    """Batch normalisations that have scales, by name and in order."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, Norm)}
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
