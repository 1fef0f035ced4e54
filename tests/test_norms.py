"""Counting the scales of norms."""

import torch
from torch import nn

from secateur.nn.norms import distribution, scaled_norms


def test_every_scale_is_counted_in_its_bin_whatever_its_sign():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([0.0, -0.019, 0.021]))
        model[2].weight.copy_(torch.tensor([0.05, -0.11]))
    rows = distribution(model).rows
    assert [row["scale"] for row in rows] == [0.0, 0.02, 0.04, 0.06, 0.08, 0.1]
    assert [row["count"] for row in rows] == [2, 1, 1, 0, 0, 1]


def test_norms_without_scales_do_not_count():
    model = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.GroupNorm(1, 3))
    assert not scaled_norms(model)
    assert distribution(model).csv() == "scale,count\n"
