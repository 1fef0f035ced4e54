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

from secateur.base.optional import RuntimeName

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


def in_steps(value: float, steps: int) -> int:
    """Number of steps that a `StepsOrShare` stands for in a training of `steps`, rounded down.

    Without the rounding error of the product: 0.29 of 100 is 29, and 1/3 of 15 is 5.
    """
    return int(round(value * steps, 6)) if value < 1 else int(value)


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

    YAML 1.1 parses `1e-05` as text, so text that is a valid number is accepted for a number.
    Booleans, such as `yes` or `true`, are not.
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
    """Selects the images held out; separate from `seed`, so that all seeds share one split."""


class Averaging(Strict):
    """An average of the weights over the training, which is evaluated and kept in their place."""

    kind: Literal["none", "ema", "swa"] = "none"
    """ema: exponential moving average over steps. swa: plain mean over epochs."""
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """For ema: factor of the previous average at every step."""
    start: StepsOrShare = 0.0
    """Steps, or if less than 1 a share of the training, before averaging begins."""
    recalibrate: Annotated[int, Field(ge=0)] = 4096
    """Training images on which batch-norm statistics are measured for the averaged weights; 0:
    the statistics of the network that is trained."""


class ImageScale(Strict):
    """One part of a training, in which the images are smaller."""

    scale: Share
    """Factor by which height and width of the images are multiplied."""
    until: Share
    """Share of the epochs at which this part ends."""


NOTHING, DENSE_PARENT = "weights/none", "models/baseline"
"""Paths of dependencies: a file that never changes, and the dense network."""


def _teacher(path: str) -> str:
    """The path; ValueError unless it names a possible teacher."""
    parts = Path(path).parts
    if path not in (NOTHING, DENSE_PARENT) and (
        len(parts) < 2 or parts[0] != "weights" or ".." in parts
    ):
        raise ValueError(
            f"{NOTHING} (none), weights/<a checkpoint>, or, for sparse_train and finetune, "
            f"{DENSE_PARENT} (the dense network)"
        )
    return path


def _code(path: str) -> str:
    """The path; ValueError unless it is within the project."""
    if not path or Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError(f"{NOTHING}, or secateur/archs/<architecture of the teacher>.py")
    return path


class Distillation(Strict):
    """A teacher whose outputs the network imitates, in addition to the labels; see
    training/distillation.py."""

    teacher: Annotated[str, AfterValidator(_teacher)] = NOTHING
    """A path, which dvc.yaml names as a dependency: weights/none, a file that never changes, for no
    teacher; models/baseline for the dense network; or a checkpoint that Secateur has written."""
    code: Annotated[str, AfterValidator(_code)] = NOTHING
    """For a teacher of another architecture: the file secateur/archs/<name>.py of that
    architecture, which dvc.yaml names as a dependency too."""
    temperature: Positive = 4.0
    """Logits are divided by it before the softmax."""
    weight: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Weight of the teacher's outputs in the loss; the labels have the weight 1 - weight."""
    features: tuple[str, ...] = ()
    """Layers whose outputs are compared too."""
    features_weight: NonNegative = 1.0
    """Weight in the loss of the mean squared differences, summed over these layers."""

    @model_validator(mode="after")
    def _features_need_a_teacher(self) -> Self:
        if self.features and self.teacher == NOTHING:
            raise ValueError(f"features: {list(self.features)}: of no effect without a teacher")
        if self.code != NOTHING and self.teacher in (NOTHING, DENSE_PARENT):
            raise ValueError(f"code: {self.code}: of no effect without a teacher in weights/")
        return self


class Train(Strict):
    """One training: baseline, sparse_train and finetune have one each."""

    epochs: Annotated[int, Field(ge=0)]
    """0: the network is passed on unchanged."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    """Images per optimizer step, over all parts and all processes."""
    accumulate_grad_batches: Annotated[int, Field(ge=1)] = 1
    """A batch is computed in this many parts, one after the other: less memory, and the same step,
    except that batch norms see one part at a time."""
    optimizer: Literal["sgd", "adam", "adamw"] = "adam"
    lr: Positive = 0.001
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Used by sgd."""
    nesterov: bool = True
    """Used by sgd."""
    weight_decay: NonNegative = 0.0
    weight_decay_on: Literal["all", "weights"] = "all"
    """all: all parameters. weights: only weights of convolutions, linear layers and attention, not
    their biases."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    schedule: Literal["constant", "multistep", "cosine", "one_cycle"] = "cosine"
    """The learning rate over the epochs; see training/optim.py."""
    schedule_by: Literal["step", "epoch"] = "step"
    """Change the learning rate at every step, or only at the beginning of an epoch."""
    schedule_after: NonNegative = 0.0
    """Epochs of the schedule that are skipped: it starts from there and lasts for `epochs` more
    (learning-rate rewinding: A. Renda et al., ICLR 2020)."""
    warmup: NonNegative = 0.0
    """Epochs over which the learning rate rises to lr; not with one_cycle, which has a warm-up."""
    milestones: tuple[NonNegative, ...] = ()
    """Epochs after which multistep multiplies the learning rate by gamma."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1
    precision: Literal["auto", "float32", "bfloat16"] = "float32"
    """Precision of matrix products and convolutions in training; weights and everything else stay
    float32. auto: bfloat16 on GPUs and CPUs where it is faster; it helps convolutions most."""
    compile: bool = False
    """Use torch.compile: takes minutes to start, worthwhile for long trainings on GPUs."""
    keep: Literal["best", "last"] = "best"
    """Which epoch is kept: the best on the validation images, or the last."""
    average: Averaging = Averaging()
    progressive_resizing: tuple[ImageScale, ...] = ()
    """First parts of the training, with smaller images, which cost less; then the full size."""
    distillation: Distillation = Distillation()

    @model_validator(mode="after")
    def _features_are_seen(self) -> Self:
        if self.compile and self.distillation.features:
            raise ValueError("compile: true; distillation.features needs the layers one by one")
        return self

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
    """The path; ValueError unless it is relative and stays inside its folder."""
    if not path or Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError("none, published, or the path of a file or folder in weights/")
    return path


class Baseline(Train):
    """The dense network: trained from random weights, or started from existing weights."""

    weights: Annotated[str, AfterValidator(_inside_folder)] = "none"
    """none: random weights. published: the weights that torchvision or timm publish for the
    architecture. Otherwise a file or folder in weights/, which dvc.yaml names as a dependency. With
    epochs: 0 the network is used as it is, otherwise it is trained further."""
    rename: dict[str, str] = Field(default_factory=dict)
    """Name of a tensor or module in the file -> name in the network; * matches any text."""
    head: Literal["inherit", "reset"] = "inherit"
    """reset: a new classifier, if the weights belong to other classes; it must be trained."""
    keep_epoch: Annotated[int, Field(ge=0)] | None = None
    """The weights after this epoch are kept too, as models/baseline/epoch.safetensors, for networks
    that are rewound to them; 0: the weights before the first epoch."""

    @model_validator(mode="after")
    def _epoch_is_one_of_the_training(self) -> Self:
        if self.keep_epoch is not None and self.keep_epoch > self.epochs:
            raise ValueError(f"keep_epoch: {self.keep_epoch} of {self.epochs} epochs")
        return self

    @model_validator(mode="after")
    def _teacher_exists_before(self) -> Self:
        if self.distillation.teacher == DENSE_PARENT:
            raise ValueError(
                f"distillation.teacher: {DENSE_PARENT}: the network that this stage makes; "
                f"{NOTHING} (none), or weights/<a checkpoint>"
            )
        return self

    @model_validator(mode="after")
    def _new_classifier_is_trained(self) -> Self:
        if self.head == "reset" and not self.epochs:
            raise ValueError("epochs: 0; with head: reset at least one, for the new classifier")
        return self


class SparseTrain(Train):
    """Training with a penalty."""

    keep: Literal["best", "last"] = "last"
    """Which epoch is kept: the last, or the best on the validation images, which would be an early
    one, hardly sparse."""


class Finetune(Train):
    """Training after pruning."""

    init: Literal["inherit", "scratch", "orthogonal", "rewind"] = "inherit"
    """inherit: start from the pruned weights. scratch: from new weights in the pruned shapes, drawn
    as the architecture draws them. orthogonal: from new orthogonal weights. rewind: from the
    weights of `rewind_to` (J. Frankle et al., Linear mode connectivity and the lottery ticket
    hypothesis, ICML 2020)."""
    rewind_to: Literal["weights/none", "models/baseline"] = "weights/none"
    """A path, which dvc.yaml names as a dependency. For init: rewind it is models/baseline, with
    the weights kept by baseline.keep_epoch; otherwise weights/none, a file that never changes."""
    budget: Literal["epochs", "compute"] = "epochs"
    """epochs: train for `epochs`. compute: train for the computation that `epochs` take with the
    dense network, which is more epochs for a smaller network (with init: scratch, this is Scratch-B
    of Z. Liu et al., Rethinking the value of network pruning, ICLR 2019)."""
    budget_limit: Annotated[float, Field(ge=1)] = 2.0
    """For compute: the largest number of epochs, as a multiple of `epochs`."""

    @model_validator(mode="after")
    def _weights_to_rewind_to(self) -> Self:
        if (self.init == "rewind") and self.rewind_to == NOTHING:
            raise ValueError("init: rewind; rewind_to must then be models/baseline")
        return self


class Prune(Strict):
    """Settings of the prune stage that apply to every pruner."""

    branches: tuple[str, ...] = ()
    """Residual branches, such as layer1.2, that are removed whole before the pruner chooses; see
    pruning/branches.py. Further rounds pass over those that are gone."""
    remove_dead: bool = True
    """Remove neurons and filters whose outputs are constant or not used, where that is exact."""
    group_convolutions: bool = False
    """Convert masks made of groups of channels to group convolutions; see gconv/conversion.py."""
    recalibrate: Annotated[int, Field(ge=0)] = 0
    """Training images on which batch-norm statistics are measured again; 0: they are kept."""
    latency: Literal["none", RuntimeName] = "none"
    """Runtime whose table of measured layers predicts a pruner's target {latency: ...}; `dvc repro`
    measures that table first (stages/latency)."""


class Evaluate(Strict):
    """Measurements of the evaluate stage: latency, and accuracy over the last epochs."""

    latency_batch: Annotated[int, Field(ge=1)] = 1
    """Images per forward pass while the latency is measured."""
    latency_repeats: Annotated[int, Field(ge=3)] = 200
    """Timed passes of each model, interleaved, after a warm-up."""
    last_epochs: Annotated[int, Field(ge=0)] = 0
    """Number of last epochs of each training over which mean and standard deviation of the
    validation accuracy are reported, as GReg's code does for five; 0: none."""


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
    """Criteria that rank a layer's outputs; bn_scale is skipped where there are no scales."""
    granularity: Literal["filter", "group"] = "filter"
    """filter: outputs of layers whose outputs can be pruned independently. group: channels of every
    channel group that can be pruned, with everything that is coupled to them."""
    ratios: Annotated[tuple[Share, ...], Field(min_length=1)] = (
        0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9,
    )  # fmt: skip
    """Shares of a layer's outputs that are removed in a trial."""
    images: Annotated[int, Field(ge=0)] = 0
    """Validation images to measure on; 0: all."""
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.01
    """Loss of accuracy that a layer may cause at its suggested ratio, as a fraction."""


class MeasuredLatency(Strict):
    """How the pipeline in stages/latency measures layers and networks."""

    batch: Annotated[int, Field(ge=1)] = 1
    """Images per pass."""
    threads: Annotated[int, Field(ge=1)] = 1
    repeats: Annotated[int, Field(ge=3)] = 100
    """Timed passes of whole networks, interleaved, after a warm-up; the shortest counts."""


Count = Annotated[int, Field(ge=1)]


def _registered(name: str) -> str:
    """The name; ValueError if MLflow does not allow the name or its alias."""
    _, _, alias = name.partition("@")
    if not re.fullmatch(r"[\w.-]+(@[a-zA-Z][\w-]*)?", name):
        raise ValueError("a name or name@alias is needed, such as digits or digits@champion")
    if alias.lower() == "latest" or re.fullmatch(r"[vV]\d+", alias):
        raise ValueError(
            f"the alias {alias} is reserved by MLflow; allowed is any but latest and v1, v2, ..., "
            "such as digits@champion"
        )
    return name


Registered = Annotated[str, Field(max_length=250), AfterValidator(_registered)]


class ExportedFiles(Strict):
    """Settings of the pipeline in stages/export."""

    preprocessing: Literal["outside", "inside"] = "outside"
    """outside: the files take normalised images. inside: they take pixels from 0 to 255, as
    float32, and normalise them."""
    int8: bool = True
    """Write an int8 version of the finetuned network; one of the dense network is measured too."""
    calibration_images: Annotated[int, Field(ge=1)] = 256
    """Training images on which the ranges of the activations are measured for int8."""
    runtimes: Annotated[tuple[RuntimeName, ...], Field(min_length=1)] = (
        "torch",
        "onnxruntime",
        "openvino",
    )
    """Runtimes in which the latency is measured."""
    latency_batches: Annotated[tuple[Count, ...], Field(min_length=1)] = (1, 32)
    """Images per forward pass while the latency is measured."""
    latency_repeats: Annotated[int, Field(ge=3)] = 30
    """Timed passes of each network in each runtime, interleaved, after a warm-up."""
    register_as: Registered | None = None
    """name or name@alias under which the network is registered in MLflow; the aliases latest, v1,
    v2, ... are reserved by MLflow."""


class RoundSparseTrain(SparseTrain):
    """The keys of sparse_train that a round may change, and the penalty's strength and settings."""

    decay: NonNegative
    penalties: SettingsByPlugin
    """Settings of the penalty in use, by its name."""


class RoundPrune(Prune):
    """The keys of prune that a round may change, and the pruner's settings."""

    pruners: SettingsByPlugin
    """Settings of the pruner in use, by its name."""


def _round_name(name: Any) -> Any:
    """The name; ValueError for a number, which `dvc exp run -S` cannot address."""
    named = isinstance(name, str) and re.fullmatch(r"[a-z][a-z0-9_]{,63}", name)
    if not named or name == "round1":  # reports use this name for the main chain
        raise ValueError("a name is needed, such as round2: small letters, digits and '_'")
    return name


def _model_of_a_round(path: str) -> str:
    """The path; ValueError unless it names a model that a round can start from."""
    if not re.fullmatch(r"(rounds/[a-z][a-z0-9_]*/)?(pruned|finetuned)", path):
        raise ValueError(
            "the model that the round starts from: finetuned, or rounds/<name>/finetuned of "
            "another round; with pruned instead of finetuned, the model before finetuning"
        )
    return path


RoundName = Annotated[str, BeforeValidator(_round_name)]


class Round(Strict):
    """A further round of sparse-train, prune and finetune: settings that differ from the first one.

    A stage of a round gets only the keys that dvc.yaml declares for it; params.yaml has all four.
    """

    after: Annotated[str, AfterValidator(_model_of_a_round)] = ""
    """The model in models/ that the round starts from."""
    sparse_train: dict[str, Any] = Field(default_factory=dict)
    """Keys as in RoundSparseTrain."""
    prune: dict[str, Any] = Field(default_factory=dict)
    """Keys as in RoundPrune."""
    finetune: dict[str, Any] = Field(default_factory=dict)
    """Keys as in Finetune."""


Version = Annotated[str, matching(r"[0-9]+(\.\w+)*", "a version such as '2.13.0' is needed")]


class Libraries(Strict):
    """Versions of the libraries that results depend on, without a suffix such as +cpu."""

    torch: Version
    torchvision: Version
