"""Small networks whose tensor names are those of the original projects.

Written anew from descriptions of their layers, with the same names, order and arithmetic.
"""

import torch
import torch.nn.functional as F
from torch import nn


def conv(inputs, outputs, kernel=3, stride=1, groups=1, bias=False):
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=bias)


class MaskConv2d(nn.Conv2d):
    """gconv-prune: a mask (filters, channels) next to the weight."""

    def __init__(self, inputs, outputs, kernel=3, stride=1):
        super().__init__(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.mask = nn.Parameter(torch.ones(outputs, inputs), requires_grad=False)

    def forward(self, x):
        weight = self.weight * self.mask[:, :, None, None]
        return F.conv2d(x, weight, None, self.stride, self.padding)


class GroupConv2d(nn.Module):
    """gconv-prune: a convolution between two index selections of channels."""

    def __init__(self, inputs, outputs, kernel=3, stride=1):
        super().__init__()
        self.conv2d = conv(inputs, outputs, kernel, stride)
        self.ind_in = nn.Parameter(torch.arange(inputs), requires_grad=False)
        self.ind_out = nn.Parameter(torch.arange(outputs), requires_grad=False)

    def forward(self, x):
        return self.conv2d(x[:, self.ind_in])[:, self.ind_out]


class Basic(nn.Module):
    """Two convolutions; `shortcut` is the name of the projection on the shortcut."""

    def __init__(self, inputs, outputs, stride, shortcut, pad=False):
        super().__init__()
        self.conv1, self.bn1 = conv(inputs, outputs, stride=stride), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = conv(outputs, outputs), nn.BatchNorm2d(outputs)
        self.shortcut_name, self.pad = shortcut, outputs // 4 if pad else 0
        if stride != 1 and not pad:
            layers = conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs)
            self.add_module(shortcut, nn.Sequential(*layers))

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if y.shape != x.shape and self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        elif y.shape != x.shape:
            x = self.get_submodule(self.shortcut_name)(x)
        return F.relu(x + y)


class ResNet(nn.Module):
    """bearpaw: widths 16 to 64, `downsample`, `fc`. classifier-pruner: 64 to 512, `shortcut`,
    `linear`. GReg: 16 to 64, padded shortcuts, `linear`."""

    def __init__(self, widths, count, shortcut, classifier, pad=False, classes=10):
        super().__init__()
        self.conv1, self.bn1 = conv(3, widths[0]), nn.BatchNorm2d(widths[0])
        inputs = widths[0]
        for stage, width in enumerate(widths, start=1):
            blocks = []
            for number in range(count):
                stride = 2 if number == 0 and stage > 1 else 1
                blocks.append(Basic(inputs, width, stride, shortcut, pad))
                inputs = width
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.stages, self.classifier_name = len(widths), classifier
        self.add_module(classifier, nn.Linear(inputs, classes))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in range(1, self.stages + 1):
            x = self.get_submodule(f"layer{stage}")(x)
        return self.get_submodule(self.classifier_name)(x.mean((2, 3)))


class PreBottleneck(nn.Module):
    """BN-ReLU-convolution three times; `downsample` is the projection of the raw input."""

    def __init__(self, inputs, inner, stride, make):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), make(inputs, inner, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(inner), make(inner, inner, 3, stride)
        self.bn3, self.conv3 = nn.BatchNorm2d(inner), make(inner, 4 * inner, 1)
        self.downsample = None
        if inputs != 4 * inner or stride != 1:
            self.downsample = nn.Sequential(make(inputs, 4 * inner, 1, stride))

    def forward(self, x):
        y = self.conv1(F.relu(self.bn1(x)))
        y = self.conv2(F.relu(self.bn2(y)))
        y = self.conv3(F.relu(self.bn3(y)))
        return y + (x if self.downsample is None else self.downsample(x))


class PreResNet(nn.Module):
    """bearpaw and, with `make=MaskConv2d`, gconv-prune; depth 11."""

    def __init__(self, make=conv, classes=10):
        super().__init__()
        self.conv1 = conv(3, 16)
        self.layer1 = nn.Sequential(PreBottleneck(16, 16, 1, make))
        self.layer2 = nn.Sequential(PreBottleneck(64, 32, 2, make))
        self.layer3 = nn.Sequential(PreBottleneck(128, 64, 2, make))
        self.bn, self.fc = nn.BatchNorm2d(256), nn.Linear(256, classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))


class WideBlock(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv(inputs, outputs, stride=stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv(outputs, outputs)
        self.convShortcut = None if inputs == outputs else conv(inputs, outputs, 1, stride)

    def forward(self, x):
        first = F.relu(self.bn1(x))
        y = self.conv2(F.relu(self.bn2(self.conv1(first))))
        return y + (x if self.convShortcut is None else self.convShortcut(first))


class WideStage(nn.Module):
    def __init__(self, count, inputs, outputs, stride):
        super().__init__()
        rest = [WideBlock(outputs, outputs, 1) for _ in range(count - 1)]
        self.layer = nn.Sequential(WideBlock(inputs, outputs, stride), *rest)

    def forward(self, x):
        return self.layer(x)


class WideResNet(nn.Module):
    """bearpaw; depth 16, twice as wide."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv1 = conv(3, 16)
        self.block1 = WideStage(2, 16, 32, 1)
        self.block2 = WideStage(2, 32, 64, 2)
        self.block3 = WideStage(2, 64, 128, 2)
        self.bn1, self.fc = nn.BatchNorm2d(128), nn.Linear(128, classes)

    def forward(self, x):
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.relu(self.bn1(x)).mean((2, 3)))


class NextBottleneck(nn.Module):
    def __init__(self, inputs, inner, outputs, stride, groups):
        super().__init__()
        self.conv_reduce, self.bn_reduce = conv(inputs, inner, 1), nn.BatchNorm2d(inner)
        self.conv_conv, self.bn = conv(inner, inner, 3, stride, groups), nn.BatchNorm2d(inner)
        self.conv_expand, self.bn_expand = conv(inner, outputs, 1), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut.add_module("shortcut_conv", conv(inputs, outputs, 1, stride))
            self.shortcut.add_module("shortcut_bn", nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = F.relu(self.bn_reduce(self.conv_reduce(x)))
        y = F.relu(self.bn(self.conv_conv(y)))
        return F.relu(self.bn_expand(self.conv_expand(y)) + self.shortcut(x))


class ResNeXt(nn.Module):
    """bearpaw; depth 20, two groups of four channels in the first stage, outputs 128 to 512."""

    def __init__(self, classes=10):
        super().__init__()
        self.conv_1_3x3, self.bn_1 = conv(3, 64), nn.BatchNorm2d(64)
        inputs = 64
        for stage, outputs in ((1, 128), (2, 256), (3, 512)):
            layers = nn.Sequential()
            for number in range(2):
                stride = 2 if stage > 1 and number == 0 else 1
                block = NextBottleneck(inputs, outputs // 16, outputs, stride, 2)
                layers.add_module(f"stage_{stage}_bottleneck_{number}", block)
                inputs = outputs
            self.add_module(f"stage_{stage}", layers)
        self.classifier = nn.Linear(512, classes)

    def forward(self, x):
        x = F.relu(self.bn_1(self.conv_1_3x3(x)))
        x = self.stage_3(self.stage_2(self.stage_1(x)))
        return self.classifier(x.mean((2, 3)))


class DenseBottleneck(nn.Module):
    def __init__(self, inputs, growth, make):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), make(inputs, 4 * growth, 1)
        self.bn2, self.conv2 = nn.BatchNorm2d(4 * growth), make(4 * growth, growth, 3)

    def forward(self, x):
        y = self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))
        return torch.cat((x, y), 1)


class DenseBasic(nn.Module):
    def __init__(self, inputs, growth, make):
        super().__init__()
        self.bn, self.conv = nn.BatchNorm2d(inputs), make(inputs, growth, 3)

    def forward(self, x):
        return torch.cat((x, self.conv(F.relu(self.bn(x)))), 1)


class Transition(nn.Module):
    def __init__(self, inputs, outputs, make):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), make(inputs, outputs, 1)

    def forward(self, x):
        return F.avg_pool2d(self.conv1(F.relu(self.bn1(x))), 2)


class DenseNet(nn.Module):
    """bearpaw (bottlenecks, compression 0.5) and gconv-prune (basic blocks, masks)."""

    def __init__(self, block, count, growth, stem, compression, make=conv, classes=10):
        super().__init__()
        self.conv1, width = conv(3, stem), stem
        for stage in (1, 2, 3):
            layers = [block(width + k * growth, growth, make) for k in range(count)]
            self.add_module(f"dense{stage}", nn.Sequential(*layers))
            width += count * growth
            if stage < 3:
                kept = int(width * compression)
                self.add_module(f"trans{stage}", Transition(width, kept, make))
                width = kept
        self.bn, self.fc = nn.BatchNorm2d(width), nn.Linear(width, classes)

    def forward(self, x):
        x = self.trans1(self.dense1(self.conv1(x)))
        x = self.dense3(self.trans2(self.dense2(x)))
        return self.fc(F.relu(self.bn(x)).mean((2, 3)))


class CondenseNet(nn.Module):
    """gconv-prune; its convolutions may have an index before and after them."""

    def __init__(self, stages, growth, make, classes=10):
        super().__init__()
        width = 2 * growth[0]
        self.features = nn.Sequential()
        self.features.add_module("init_conv", conv(3, width))
        for stage, (count, rate) in enumerate(zip(stages, growth, strict=True), start=1):
            block = nn.Sequential()
            for number in range(count):
                layer = DenseBottleneck(width, rate, make)
                block.add_module(f"denselayer_{number + 1}", layer)
                width += rate
            self.features.add_module(f"denseblock_{stage}", block)
            if stage < len(stages):
                self.features.add_module(f"transition_{stage}", nn.AvgPool2d(2))
        self.features.add_module("norm_last", nn.BatchNorm2d(width))
        self.classifier = nn.Linear(width, classes)

    def forward(self, x):
        return self.classifier(F.relu(self.features(x)).mean((2, 3)))


class VGG(nn.Module):
    """bearpaw and classifier-pruner: biases, five pooling layers. GReg: no biases, four layers."""

    def __init__(self, counts, bias, poolings, norm=True, classes=10):
        super().__init__()
        layers, inputs = [], 3
        for stage, (width, count) in enumerate(zip((64, 128, 256, 512, 512), counts, strict=True)):
            for _ in range(count):
                layers.append(conv(inputs, width, bias=bias))
                layers += [nn.BatchNorm2d(width)] if norm else []
                layers.append(nn.ReLU())
                inputs = width
            layers += [nn.MaxPool2d(2)] if stage < poolings else []
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(512, classes)

    def forward(self, x):
        return self.classifier(self.features(x).mean((2, 3)))


class AlexNet(nn.Module):
    """bearpaw."""

    def __init__(self, classes=10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 11, 4, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
            nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
            nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        )  # fmt: skip
        self.classifier = nn.Linear(256, classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


class LeNet300(nn.Module):
    """DeepHoyer, mnist/MLP."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(784, 300), nn.Linear(300, 100), nn.Linear(100, 10)

    def forward(self, x):
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


class LeNet5(nn.Module):
    """DeepHoyer, mnist/CNN."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(x.flatten(1))))
