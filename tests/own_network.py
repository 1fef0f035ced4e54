"""A user's own network, for arch: module."""

from torch import nn


class Net(nn.Module):
    """Averages the channels of an image, so it accepts any number of them."""

    def __init__(self, num_classes, width=8):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.out = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.out(self.relu(self.norm(self.conv(x.mean(1, keepdim=True)))).mean((2, 3)))
