"""The sections of params.yaml: keys, types, ranges and defaults."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

Seed = Annotated[int, Field(ge=0, lt=2**31)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
"""A share strictly between 0 and 1."""


def _whole_above_one(value: float) -> float:
    """The value; ValueError if it is neither a share nor a whole number."""
    if value >= 1 and value != int(value):
        raise ValueError("a number of steps, or below 1 a share of the training, is needed")
    return value


StepsOrShare = Annotated[float, Field(ge=0), AfterValidator(_whole_above_one)]
"""A number of optimizer steps, or, if less than 1, a share of all steps of the training."""


def matching(pattern: str, needed: str) -> AfterValidator:
    """Validator: `pattern` must match the whole text; otherwise the error message is `needed`."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise ValueError(needed)
        return text

    return AfterValidator(check)


Name = Annotated[
    str,
    Field(max_length=64),
    matching("[a-z][a-z0-9_]*", "a name of small letters, digits and '_' is needed"),
]
SettingsByPlugin = dict[str, dict[str, Any]]
"""Name of a plug-in -> its settings, as written in params.yaml."""


def _refuse_truth(value: Any, annotation: Any) -> Any:
    """`value`; ValueError if it is, or contains, a boolean where the type has numbers."""
    is_list = isinstance(value, list)
    if isinstance(value, bool) or (is_list and any(isinstance(item, bool) for item in value)):
        types = set(types_in(annotation))
        if bool not in types and types & {int, float}:
            raise ValueError("numbers are needed" if is_list else "a number is needed")
    return value


def types_in(annotation: Any) -> list[Any]:
    """The annotation and, recursively, all its type arguments."""
    return [annotation, *(t for part in get_args(annotation) for t in types_in(part))]


class Strict(BaseModel):
    """A group of settings: frozen, no unknown keys, text converted by the field's type.

    YAML 1.1 hands `1e-05` over as text, which is why text that reads as a number is a number here.
    The reverse is not forgiven: `yes` or `true` is no number.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_values_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        return _refuse_truth(value, cls.model_fields[str(info.field_name)].annotation)


class Data(Strict):
    """How the training images are divided."""

    validation: Annotated[float, Field(ge=0, le=0.5)] = 0.1
    """Fraction of the training images held out to pick epochs on; 0 trains on all of them."""
    seed: Seed = 0
    """Which images are held out. Kept apart from `seed`, so that seeds compare on one split."""


class Averaging(Strict):
    """An average of the weights, which is evaluated and kept in their place."""

    kind: Literal["none", "ema", "swa"] = "none"
    """ema: with weights that fall off exponentially, over steps. swa: the mean over epochs."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Of ema: share of the average that stays, at every step."""
    start: StepsOrShare = 0.0
    """Steps, or below 1 a share of the training, before the average begins."""
    recalibrate: Annotated[int, Field(ge=0)] = 4096
    """Training images to measure statistics of batch normalisations on for the average; 0: those
    of the network that is trained."""


class ImageScale(Strict):
    """One part of a training, in which the images are smaller."""

    scale: Share
    """Factor for the height and width of the images."""
    until: Share
    """Share of the epochs at which this part ends."""


class Train(Strict):
    """One training: baseline, sparse_train and finetune have one each."""

    epochs: Annotated[int, Field(ge=0)]
    """0: the network is handed on as it came."""
    batch_size: Annotated[int, Field(ge=1)] = 128
    """Images of one step of the optimizer, over all parts and all processes."""
    accumulate_grad_batches: Annotated[int, Field(ge=1)] = 1
    """A batch is computed in this many parts, one after the other: less memory, and the same step
    but for batch norms, which see one part at a time."""
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    lr: Positive = 0.001
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Used by sgd."""
    nesterov: bool = True
    """Used by sgd."""
    weight_decay: NonNegative = 0.0
    weight_decay_on: Literal["all", "weights"] = "all"
    """All parameters, or those of convolutions and linear layers without their biases."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    schedule: Literal["constant", "multistep", "cosine", "one_cycle"] = "cosine"
    """The rate over the epochs; see training/optim.py."""
    schedule_by: Literal["step", "epoch"] = "step"
    """Change the rate at every step, or only at the beginning of an epoch."""
    schedule_after: NonNegative = 0.0
    """Epochs of the schedule that count as past, so that it goes on from there over `epochs` more
    (learning-rate rewinding: A. Renda et al., ICLR 2020)."""
    warmup: NonNegative = 0.0
    """Epochs over which the rate rises to lr; not with one_cycle, which has its own."""
    milestones: tuple[NonNegative, ...] = ()
    """Epochs after which multistep multiplies the rate by gamma."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Of products and convolutions while training; weights and everything else stay float32.
    auto: bfloat16 on GPUs and CPUs that multiply it faster. It pays for convolutions above all."""
    compile: bool = False
    """torch.compile: pays for long trainings on GPUs; takes minutes to start."""
    keep: Literal["best", "last"] = "best"
    """The epoch that is kept: best on the validation images, or simply the last."""
    average: Averaging = Averaging()
    progressive_resizing: tuple[ImageScale, ...] = ()
    """Parts of the training with smaller images, whose steps cost less; then the full size."""

    @model_validator(mode="after")
    def _sizes_follow_each_other(self) -> Self:
        ends = [part.until for part in self.progressive_resizing]
        if ends != sorted(set(ends)):
            raise ValueError(f"progressive_resizing: until must rise from part to part, not {ends}")
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.accumulate_grad_batches > self.batch_size:
            parts = self.accumulate_grad_batches
            raise ValueError(f"accumulate_grad_batches: {parts} parts of {self.batch_size} images")
        if not self.epochs:
            return self
        end = self.schedule_after + self.epochs
        late = [m for m in self.milestones if m >= end]
        if late:
            raise ValueError(f"milestones: {late[0]:g} is not before the last of {end:g} epochs")
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones: {list(self.milestones)} must rise")
        if self.schedule == "multistep" and not self.milestones:
            raise ValueError("milestones: multistep needs at least one")
        if self.schedule == "one_cycle" and self.warmup:
            raise ValueError(f"warmup: {self.warmup:g}; one_cycle rises by itself, so it must be 0")
        if self.warmup >= end:
            raise ValueError(f"warmup: {self.warmup:g} must be less than the {end:g} epochs")
        return self


def _inside_folder(path: str) -> str:
    """The path; ValueError unless it is relative and leads nowhere outside."""
    if not path or Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError("none, published, or the path of a file or folder in weights/")
    return path


class Baseline(Train):
    """The dense network: trained from random weights, or taken from weights that are there."""

    weights: Annotated[str, AfterValidator(_inside_folder)] = "none"
    """none: random ones. published: those that torchvision or timm publish for the architecture.
    Else a file or a folder below weights/, which dvc.yaml names as a dependency. With epochs: 0 the
    network is taken as it is, otherwise it is trained on."""
    rename: dict[str, str] = Field(default_factory=dict)
    """Name of a tensor or module in the file -> name in the network; * stands for any text."""
    head: Literal["inherit", "reset"] = "inherit"
    """reset: a new classifier, for other classes than those of the weights; it must be trained."""
    keep_epoch: Annotated[int, Field(ge=0)] | None = None
    """The weights after this epoch are kept too, as models/baseline/epoch.safetensors, for networks
    that are rewound to them; 0: those before the first."""

    @model_validator(mode="after")
    def _epoch_is_one_of_the_training(self) -> Self:
        if self.keep_epoch is not None and self.keep_epoch > self.epochs:
            raise ValueError(f"keep_epoch: {self.keep_epoch} of {self.epochs} epochs")
        return self

    @model_validator(mode="after")
    def _new_classifier_is_trained(self) -> Self:
        if self.head == "reset" and not self.epochs:
            raise ValueError("epochs: 0; with head: reset at least one, for the new classifier")
        return self


NOTHING, DENSE_PARENT = "weights/none", "models/baseline"
"""Paths of dependencies: a file that never changes, and the dense network."""


def _teacher(path: str) -> str:
    """The path; ValueError unless it names what may teach."""
    parts = Path(path).parts
    if path not in (NOTHING, DENSE_PARENT) and (
        len(parts) < 2 or parts[0] != "weights" or ".." in parts
    ):
        raise ValueError(
            f"{NOTHING} (none), {DENSE_PARENT} (the dense network), or weights/<a checkpoint>"
        )
    return path


def _code(path: str) -> str:
    """The path; ValueError unless it lies within the project."""
    if not path or Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError(f"{NOTHING}, or secateur/archs/<architecture of the teacher>.py")
    return path


class Distillation(Strict):
    """A teacher whose outputs are imitated beside the labels; see training/distillation.py."""

    teacher: Annotated[str, AfterValidator(_teacher)] = NOTHING
    """A path, which dvc.yaml names as a dependency: weights/none, a file that never changes, for no
    teacher; models/baseline for the dense network; or a checkpoint that Secateur has written."""
    code: Annotated[str, AfterValidator(_code)] = NOTHING
    """Of a teacher of another architecture, its file: secateur/archs/<name>.py. dvc.yaml names this
    path as a dependency too."""
    temperature: Positive = 4.0
    """Logits are divided by it before the softmax."""
    weight: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Of the teacher's outputs in the loss; that of the labels is 1 - weight."""
    features: tuple[str, ...] = ()
    """Layers whose outputs are compared too."""
    features_weight: NonNegative = 1.0
    """Of the mean square of their differences in the loss, summed over the layers."""

    @model_validator(mode="after")
    def _features_need_a_teacher(self) -> Self:
        if self.features and self.teacher == NOTHING:
            raise ValueError(f"features: {list(self.features)}: of no effect without a teacher")
        if self.code != NOTHING and self.teacher in (NOTHING, DENSE_PARENT):
            raise ValueError(f"code: {self.code}: of no effect without a teacher in weights/")
        return self


class ContinuedTrain(Train):
    """A training that goes on from the network of an earlier stage."""

    distillation: Distillation = Distillation()

    @model_validator(mode="after")
    def _features_are_seen(self) -> Self:
        if self.compile and self.distillation.features:
            raise ValueError("compile: true; distillation.features needs the layers one by one")
        return self


class Finetune(ContinuedTrain):
    """Training after pruning."""

    init: Literal["inherit", "scratch", "orthogonal", "rewind"] = "inherit"
    """Start from the pruned weights; from new ones in the same pruned shape, as the architecture
    draws them, or orthogonal; or from those that `rewind_to` has (J. Frankle et al., Linear mode
    connectivity and the lottery ticket hypothesis, ICML 2020)."""
    rewind_to: Literal["weights/none", "models/baseline"] = "weights/none"
    """A path, which dvc.yaml names as a dependency: models/baseline for init: rewind, whose weights
    are those of baseline.keep_epoch; else weights/none, a file that never changes."""
    budget: Literal["epochs", "compute"] = "epochs"
    """epochs: the number that is set. compute: the computation that this number of epochs takes for
    the dense network, so more for a smaller one (with init: scratch: Scratch-B of Z. Liu et al.,
    Rethinking the value of network pruning, ICLR 2019)."""
    budget_limit: Annotated[float, Field(ge=1)] = 2.0
    """Of compute: the most epochs, as a multiple of `epochs`."""

    @model_validator(mode="after")
    def _weights_to_rewind_to(self) -> Self:
        if (self.init == "rewind") and self.rewind_to == NOTHING:
            raise ValueError("init: rewind; rewind_to must then be models/baseline")
        return self


Export = Literal["none", "gconv"]


class Prune(Strict):
    """Settings of the prune stage that hold for every pruner."""

    remove_dead: bool = True
    """Remove neurons and filters whose outputs are constant or unread, where that is exact."""
    export: Export = "none"
    """gconv: masks made of groups of channels become group convolutions; see gconv/export.py."""
    recalibrate: Annotated[int, Field(ge=0)] = 0
    """Training images to measure statistics of batch normalisations on again; 0: as they are."""
    latency: Literal["none", "torch", "onnxruntime", "openvino"] = "none"
    """Runtime whose table of measured layers a pruner's target {latency: ...} is predicted from;
    `dvc repro` then measures it (stages/latency)."""


class Evaluate(Strict):
    """Measurements of the evaluate stage: latency, and accuracy over the last epochs."""

    latency_batch: Annotated[int, Field(ge=1)] = 1
    """Images per forward pass while the latency is measured."""
    latency_repeats: Annotated[int, Field(ge=3)] = 100
    """Timed passes of each model, interleaved, after a warm-up."""
    last_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs at the end of each training whose accuracy on the validation images is reported as a
    mean with its deviation, as GReg's code does of five; 0: none."""


SensitivityCriterion = Literal[
    "l1", "l2", "geometric_median", "taylor", "fisher", "wanda", "lamp", "bn_scale", "random"
]


class Sensitivity(Strict):
    """Settings of the sensitivity analysis, the pipeline in stages/sensitivity."""

    criteria: Annotated[tuple[SensitivityCriterion, ...], Field(min_length=1)] = (
        "l1",
        "bn_scale",
        "random",
    )
    """Criteria to rank a layer's outputs by; bn_scale is left out where there are no scales."""
    granularity: Literal["filter", "group"] = "filter"
    """filter: outputs of layers whose outputs can be pruned on their own; group: channels of every
    channel group that can be pruned, with all that is coupled to them."""
    ratios: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.25, 0.5, 0.75)
    """Shares of a layer's outputs that are removed in a trial."""
    images: Annotated[int, Field(ge=0)] = 0
    """Validation images to measure on; 0: all."""
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Accuracy that a layer may cost in the suggested ratios, as a fraction."""


RuntimeName = Literal["torch", "onnxruntime", "openvino"]
"""Key of `deploy.runtimes.RUNTIMES`."""


class MeasuredLatency(Strict):
    """How the pipeline in stages/latency measures layers and networks."""

    batch: Annotated[int, Field(ge=1)] = 1
    """Images per pass."""
    threads: Annotated[int, Field(ge=1)] = 1
    repeats: Annotated[int, Field(ge=3)] = 100
    """Timed passes of whole networks, taking turns, after a warm-up; the shortest counts."""


Count = Annotated[int, Field(ge=1)]


def _registered(name: str) -> str:
    """The name; ValueError if MLflow would not take it, or its alias."""
    _, _, alias = name.partition("@")
    if not re.fullmatch(r"[\w.-]+(@[a-zA-Z][\w-]*)?", name):
        raise ValueError("a name or name@alias is needed, such as digits or digits@champion")
    if alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise ValueError(
            f"MLflow keeps the alias {alias} for itself; allowed is any but latest and v1, v2, "
            "..., such as digits@champion"
        )
    return name


Registered = Annotated[str, Field(max_length=250), AfterValidator(_registered)]


class ExportedFiles(Strict):
    """Settings of the pipeline in stages/export."""

    preprocessing: Literal["outside", "inside"] = "outside"
    """outside: the files take normalised images. inside: they take pixels from 0 to 255, as
    float32, and normalise them."""
    int8: bool = True
    """Write an int8 version of the finetuned network, and measure one of the dense network too."""
    calibration_images: Annotated[int, Field(ge=1)] = 256
    """Training images on which the ranges of the activations are measured for int8."""
    runtimes: Annotated[tuple[RuntimeName, ...], Field(min_length=1)] = ("torch", "onnxruntime")
    """Where the latency is measured."""
    latency_batches: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 32)
    """Images per forward pass while the latency is measured."""
    latency_repeats: Annotated[int, Field(ge=3)] = 30
    """Timed passes of each network in each runtime, taking turns, after a warm-up."""
    register_as: Registered | None = None
    """name or name@alias of the registered model in MLflow that becomes this network; no alias is
    latest, v1, v2, ..., which MLflow keeps for itself."""


class RoundSparseTrain(ContinuedTrain):
    """Section sparse_train as a round may change it, and the penalty's strength and settings."""

    decay: NonNegative
    penalties: SettingsByPlugin
    """Of the penalty in use, by its name."""


class RoundPrune(Prune):
    """Section prune as a round may change it, and the pruner's settings."""

    pruners: SettingsByPlugin
    """Of the pruner in use, by its name."""


def _round_name(name: Any) -> Any:
    """The name; ValueError for a number, which `dvc exp run -S` cannot address."""
    named = isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9_]{,63}", name)
    if not named or name == "round1":  # which is the main chain's in reports
        raise ValueError("a name is needed, such as round2: small letters, digits and '_'")
    return name


def _model_of_a_round(path: str) -> str:
    """The path; ValueError unless it may name the model that a round leaves."""
    if not re.fullmatch(r"(rounds/[a-z][a-z0-9_]*/)?(pruned|finetuned)", path):
        raise ValueError(
            "the model that the round starts from: finetuned, or rounds/<name>/finetuned of "
            "another round; pruned in its place: the same before finetuning"
        )
    return path


RoundName = Annotated[str, BeforeValidator(_round_name)]


class Round(Strict):
    """A further round of sparse-train, prune and finetune: what differs from the first one.

    A stage of a round holds only what dvc.yaml declares for it; params.yaml has all four keys.
    """

    after: Annotated[str, AfterValidator(_model_of_a_round)] = ""
    """The model below models/ that the round starts from."""
    sparse_train: dict[str, Any] = Field(default_factory=dict)
    """Keys of RoundSparseTrain."""
    prune: dict[str, Any] = Field(default_factory=dict)
    """Keys of RoundPrune."""
    finetune: dict[str, Any] = Field(default_factory=dict)
    """Keys of Finetune."""


Version = Annotated[str, matching(r"[0-9]+(\.\w+)*", "a version such as '2.13.0' is needed")]


class Libraries(Strict):
    """Versions of the libraries that results depend on, without a suffix such as +cpu."""

    torch: Version
    torchvision: Version
