"""A typical research script, timed; `train_speed` runs it and compares Secateur with it.

A DataLoader opens every image with PIL and transforms it individually. Tensors are NCHW float32,
the optimizer is not fused, the penalty is a Python loop over the parameters, and torch has its
default settings for threads and memory. It prints the images per second of each epoch after the
first one.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from secateur.base import plugin
from secateur.base.torchvision_import import import_torchvision


class OneByOne(Dataset[tuple[Tensor, int]]):
    """Random images, returned as torchvision data sets do: a PIL image, then transforms."""

    def __init__(self, count: int, shape: tuple[int, int, int], classes: int) -> None:
        channels, height, width = shape
        size = (count, height, width) if channels == 1 else (count, height, width, channels)
        self.images = torch.randint(0, 256, size, dtype=torch.uint8).numpy()
        self.labels = torch.randint(0, classes, (count,)).tolist()
        transforms = import_torchvision().transforms
        steps = [transforms.ToTensor()]
        if channels == 3:
            steps = [
                transforms.RandomCrop(height, padding=4),
                transforms.RandomHorizontalFlip(),
                *steps,
                transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
            ]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def main() -> None:
    """Train the task given on the command line as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", type=json.loads)
    task = parser.parse_args().task
    module = plugin.load("archs", task["arch"])
    settings = module.Settings(**task["settings"])
    model = module.build(settings, task["classes"], tuple(task["shape"])).train()
    optimizer: torch.optim.Optimizer
    if task["optimizer"] == "adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=False)
    else:
        optimizer = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=False
        )
    data = OneByOne(task["images"], tuple(task["shape"]), task["classes"])
    loader = DataLoader(data, task["batch"], shuffle=True, num_workers=task["workers"])
    for epoch in range(task["epochs"] + 1):
        start = time.perf_counter()
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            if task["decay"]:
                penalty = torch.zeros(())
                for parameter in model.parameters():
                    if parameter.requires_grad and torch.sum(torch.abs(parameter)) > 0:
                        penalty = penalty + torch.sum(torch.abs(parameter)) ** 2 / torch.sum(
                            parameter**2
                        )
                loss = loss + task["decay"] * penalty
            loss.backward()
            optimizer.step()
        if epoch:
            print(task["images"] / (time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
