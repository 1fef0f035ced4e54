"""Classification of pictures with a checkpoint of the pipeline or an exported file."""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from secateur.base import files, settings
from secateur.base.errors import CheckpointError, DataError, SecateurError, shorten
from secateur.data.batches import Normalise
from secateur.data.dataset import channels_first
from secateur.data.image_files import IMAGE_SUFFIXES, ImageView, decode_file
from secateur.deploy import metadata
from secateur.deploy.runtimes import Runner, open_model
from secateur.nn import checkpoint
from secateur.nn.checkpoint import Checkpoint

BATCH = 64
"""Pictures in one pass through the network."""
MODELS = ("model.safetensors", "model.onnx", "model.pt2")
"""Files to look for in a folder, in this order."""


@dataclass(frozen=True)
class Prediction:
    """Prediction of a network for one picture."""

    file: str
    label: str
    """Name of the class with the highest probability."""
    probability: float
    top: list[tuple[str, float]]
    """The classes with the highest probabilities, the highest first."""


@dataclass(frozen=True)
class Classifier:
    """An opened network, with everything needed to prepare pictures for it."""

    run: Runner
    classes: Sequence[str]
    view: ImageView
    """How pictures of other sizes are brought to the network's size."""
    preprocess: Callable[[torch.Tensor], torch.Tensor]
    """uint8 (N, channels, height, width) -> float32 input of the network."""

    def predict(self, paths: Sequence[Path], top: int = 1) -> Iterator[Prediction]:
        """Predictions in the order of the files, `top` classes for each.

        Raises DataError naming the first file that is not a readable picture.
        """
        for start in range(0, len(paths), BATCH):
            part = paths[start : start + BATCH]
            pixels = torch.from_numpy(np.stack([decode_file(path, self.view) for path in part]))
            images = self.preprocess(channels_first(pixels)).contiguous().numpy()
            for path, likely in zip(part, softmax(self.run(images)), strict=True):
                order = np.argsort(-likely, kind="stable")[:top]
                best = [(self.classes[k], float(likely[k])) for k in order]
                yield Prediction(str(path), *best[0], best)


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Probabilities by row, (N, classes), in float64."""
    shifted = logits.astype(np.float64) - logits.max(1, keepdims=True)
    likely: NDArray[np.float64] = np.exp(shifted)
    return likely / likely.sum(1, keepdims=True)


def open_classifier(path: Path, resize: int | None = None) -> Classifier:
    """Open a .safetensors, .onnx or .pt2 file, or the first of them in a folder.

    `resize`: pixels of the shorter side before the centre is cut out; the default is the value in
    the file, else the size that the network takes. Raises SecateurError, naming the file, if it
    cannot be opened or has no class names.
    """
    path = _find(path)
    if path.suffix == ".safetensors":
        found = checkpoint.load(path)
        if not found.header.arch:
            raise CheckpointError(
                f"{path}: not of an architecture of Secateur, so only secateur.load(path, into) "
                "reads it"
            )
        if found.header.arch == checkpoint.OWN_CODE:
            found = _of_own_code(path, found.header)
        about = metadata.from_header(found.header, found.sha256, "outside")
        run = _runner(found.model())
    else:
        about, run = metadata.read(path), open_model(path)
    channels, height, width = about.shape
    side = resize or about.resize or max(height, width)
    if side < max(height, width):
        raise SecateurError(f"--resize {side}: {path} takes pictures of {height}x{width} pixels")
    inside = about.preprocessing == "inside"
    normalise = Normalise(about.mean, about.std, torch.device("cpu"))
    return Classifier(
        run,
        about.classes,
        ImageView(channels, height, width, side),
        (lambda pixels: pixels.to(torch.float32)) if inside else normalise,
    )


def _find(path: Path) -> Path:
    if not files.is_folder(path, CheckpointError):
        if path.suffix not in {Path(name).suffix for name in MODELS} and path.exists():
            raise CheckpointError(f"{path}: must be a .safetensors, .onnx or .pt2 file")
        return path
    for name in MODELS:
        if (path / name).exists():
            return path / name
    raise CheckpointError(f"{path}: holds none of {', '.join(MODELS)}")


def _of_own_code(path: Path, header: checkpoint.Header) -> Checkpoint:
    """The checkpoint, if params.yaml in this folder names the user function that makes its network.

    Otherwise CheckpointError: a function is not called just because a file names it.
    """
    here = Path(settings.FILE).is_file()
    written = (settings.read().archs.get(checkpoint.OWN_CODE) or {}) if here else {}
    if written == header.arch_settings:
        return checkpoint.load(path, checkpoint.OWN_CODE, written)
    key = f"archs.{checkpoint.OWN_CODE}"
    found = f"has {shorten(written)} here" if here else "is not in this folder"
    raise CheckpointError(
        f"{path}: its network comes from a function of yours, which is called only where "
        f"{settings.FILE} has {key} = {shorten(header.arch_settings, 300)}; it {found}; an "
        "exported file needs no function: `make export`, then models/export"
    )


def _runner(model: torch.nn.Module) -> Runner:
    @torch.inference_mode()
    def run(images: NDArray[Any]) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = model(torch.from_numpy(images)).numpy()
        return logits

    return run


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """The files among `paths`, and the pictures in and below the folders among them, sorted.

    Hidden files and folders are left out, as in data set image_folder. Raises DataError for a path
    that does not exist, and for a folder without pictures.
    """
    found: list[Path] = []
    for path in paths:
        if not files.is_folder(path, DataError):
            files.file_size(path, DataError)
            found.append(path)
            continue
        below = sorted(p for p in path.rglob("*") if _is_picture(p, path))
        if not below:
            raise DataError(f"{path}: no pictures in it ({' '.join(sorted(IMAGE_SUFFIXES))})")
        found += below
    return found


def _is_picture(path: Path, folder: Path) -> bool:
    """Whether a path below a folder is taken for a picture, by its name; folders never are."""
    return (
        path.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not files.is_folder(path, DataError)
    )


def command(options: argparse.Namespace) -> None:
    """`secateur predict`: a line for each picture, or one JSON list."""
    pictures = find_pictures([Path(path) for path in options.image])
    classifier = open_classifier(Path(options.model), options.resize)
    predictions = classifier.predict(pictures, options.top)
    if options.json:
        print(json.dumps([asdict(prediction) for prediction in predictions], indent=2))
        return
    width = max(len(_printable(str(path))) for path in pictures)
    for prediction in predictions:
        best = "  ".join(f"{label} {likely:.2%}" for label, likely in prediction.top)
        print(_printable(f"{_printable(prediction.file):{width}}  {best}"), flush=True)


def _printable(text: str) -> str:
    """The text with backslash escapes for characters that stdout cannot encode, as in odd names."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)
