"""Exported files: equal to the network for every architecture, equal in bytes, free of pickles."""

import pytest
import torch
from test_channels_zoo import SMALL, graph

from secateur.data.dataset import DatasetInfo, InMemoryImages
from secateur.deploy import export, parity
from secateur.deploy.metadata import Metadata
from secateur.deploy.runtimes import open_model


def about(shape, **changes):
    fields = {
        "classes": ["a", "b", "c", "d"], "shape": list(shape), "mean": [0.4], "std": [0.2],
        "preprocessing": "outside", "sha256": "0" * 64, "arch": "any", "split": "s",
    }  # fmt: skip
    return Metadata(**(fields | changes))


def images(shape, count=9, seed=0):
    """A split of random pixels, and what is known about it."""
    chance = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (count, *shape[1:], shape[0]), generator=chance, dtype=torch.uint8)
    labels = torch.randint(4, (count,), generator=chance)
    split = InMemoryImages.from_pixels(pixels, labels)
    info = DatasetInfo("x", ["a", "b", "c", "d"], list(shape), [0.4], [0.2], "s", {"test": count})
    return split, info


@pytest.mark.parametrize(("arch", "chosen", "shape"), SMALL, ids=str)
def test_both_files_of_every_network_compute_what_it_computes(arch, chosen, shape, tmp_path):
    model = graph(arch, chosen, shape).float()
    paths = export.write(model, shape, about(shape), tmp_path)
    opened = {path.name: open_model(path) for path in paths.values()}
    split, info = images(shape)
    found = parity.verify(model, opened, split, info)
    assert set(found) == {"model.onnx", "model.pt2"}
    assert all(0 <= result.difference <= 1e-5 for result in found.values())
