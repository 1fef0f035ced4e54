"""CondenseNet before condensation: a DenseNet whose growth rate doubles from stage to stage.

Source: G. Huang, S. Liu, L. van der Maaten, K. Weinberger, CondenseNet, CVPR 2018, in the dense
form that gconv-prune (R. Zhao, W. Luk, ICCV workshops 2019) trains before it learns the groups:
all convolutions have one group unless `groups` is set, and no groups are learnt between stages.
CondenseNet-86 for 32x32x3 images and ten classes: 1,959,626 parameters (100 classes: 2,031,716) and
248.18 MMACs.
"""

from typing import Annotated, Self

from pydantic import Field, model_validator
from torch import nn

from secateur.base.sections import Strict
from secateur.nn import blocks

Count = Annotated[int, Field(ge=1)]
Stages = Annotated[tuple[Count, ...], Field(min_length=1, max_length=8)]


class Settings(Strict):
    """Dense layers per stage, and the channels that each of them adds (growth rate)."""

    stages: Stages = (14, 14, 14)
    growth: Stages = (8, 16, 32)
    groups: Count = 1
    """Groups of all convolutions except the stem, from the start of the training."""

    @model_validator(mode="after")
    def _groups_divide_every_growth(self) -> Self:
        odd = [growth for growth in self.growth if growth % self.groups]
        if odd:
            raise ValueError(f"groups = {self.groups} does not divide growth = {odd[0]}")
        return self

    @model_validator(mode="after")
    def _growth_for_every_stage(self) -> Self:
        if len(self.stages) != len(self.growth):
            raise ValueError(
                f"growth = {list(self.growth)}: needs as many values as stages, which has "
                f"{len(self.stages)}"
            )
        return self


def build(settings: Settings, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """Stem `conv1`, `layer1` and so on with 2x2 average pooling between them, `fc`: logits.

    Height and width of images must be at least 2 ** (stages - 1) pixels.
    """
    blocks.require_side("condensenet", shape, 2 ** (len(settings.stages) - 1))
    width = 2 * settings.growth[0]
    modules: dict[str, nn.Module] = {"conv1": blocks.conv3x3(shape[0], width)}
    for number, (count, growth) in enumerate(
        zip(settings.stages, settings.growth, strict=True), start=1
    ):
        if number > 1:
            modules[f"pool{number - 1}"] = nn.AvgPool2d(2)
        added = (
            blocks.DenseBottleneck(width + k * growth, growth, settings.groups)
            for k in range(count)
        )
        modules[f"layer{number}"] = nn.Sequential(*added)
        width += count * growth
    return blocks.ConvNetZeroBias(**modules, **blocks.activated_head(width, classes))


def aliases(settings: Settings) -> dict[str, str]:
    """Names in the files of gconv-prune."""
    names = {"features.init_conv": "conv1", "features.norm_last": "bn", "classifier": "fc"}
    for stage, count in enumerate(settings.stages, start=1):
        for number in range(count):
            theirs = f"features.denseblock_{stage}.denselayer_{number + 1}"
            names[theirs] = f"layer{stage}.{number}"
    return names
