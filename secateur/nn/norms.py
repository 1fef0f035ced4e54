"""Batch normalisations with scales, and the distribution of their scales."""

import pandas as pd
import torch
from torch import nn

Norm = nn.BatchNorm2d | nn.BatchNorm1d | nn.SyncBatchNorm
"""Several GPUs train SyncBatchNorm in place of the other two."""
BIN_WIDTH = 0.02


def scaled_norms(model: nn.Module) -> dict[str, Norm]:
    """Batch normalisations that have scales (gamma), by module name, in order."""
    found = {n: m for n, m in model.named_modules() if isinstance(m, Norm)}
    return {name: norm for name, norm in found.items() if norm.affine}


def distribution(model: nn.Module) -> pd.DataFrame:
    """Histogram of |gamma|: `scale`, the lower edge of a bin, and `count`, the scales in it.

    The bins start at 0 in every network and end at its largest scale; without scales there are
    none.
    """
    scales = [norm.weight.detach().abs().flatten().cpu() for norm in scaled_norms(model).values()]
    if not scales:
        return pd.DataFrame(columns=["scale", "count"])
    counts = torch.cat(scales).double().div(BIN_WIDTH).floor().long().bincount()
    lower = [round(place * BIN_WIDTH, 2) for place in range(len(counts))]
    return pd.DataFrame({"scale": lower, "count": counts.tolist()})
