"""Batches of images that stay in their files, decoded by worker processes."""

import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from secateur.base import machine
from secateur.base.errors import DataError
from secateur.data.augment import FileAugment, SamplePlan
from secateur.data.image_files import ImageFileList


class ImageFileLoader:
    """Decodes the images of a list in worker processes that live until `close`.

    The number of workers (`machine.workers`) only affects the speed.
    """

    def __init__(
        self,
        files: ImageFileList,
        augment: FileAugment | None,
        seed: int,
        device: torch.device,
        world: int,
    ) -> None:
        """`augment` is None for evaluation; `world` processes share the machine's processors."""
        workers = machine.workers(world)
        self.device = device
        self.sampler = _PlanSampler()
        self.loader: DataLoader[Tensor | str] | None = DataLoader(
            _BatchDecoder(files, augment, seed),
            sampler=self.sampler,
            batch_size=None,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=device.type == "cuda",
            worker_init_fn=_set_signal_handlers if workers else None,
            generator=torch.Generator(),  # not the global generator, which the training uses
        )

    def batches(self, plan: SamplePlan, parts: list[slice]) -> Iterator[Tensor]:
        """One batch per part of the plan: uint8 (batch, height, width, channels)."""
        if self.loader is None:
            raise RuntimeError("the loader of images is closed")
        self.sampler.plans = [plan.part(part) for part in parts]
        for batch in self.loader:
            if isinstance(batch, str):
                raise DataError(batch)
            yield batch.to(self.device, non_blocking=True)

    def close(self) -> None:
        """Stop the worker processes."""
        self.loader = None


class _PlanSampler(Sampler[SamplePlan]):
    """Yields the plans of the current epoch's batches instead of indices."""

    def __init__(self) -> None:
        self.plans: list[SamplePlan] = []

    def __iter__(self) -> Iterator[SamplePlan]:
        return iter(self.plans)


class _BatchDecoder(TorchDataset[Tensor | str]):
    """Runs in a worker: decodes the images of one batch; returns the message of an error."""

    def __init__(self, files: ImageFileList, augment: FileAugment | None, seed: int) -> None:
        self.files, self.augment, self.seed = files, augment, seed

    def __getitem__(self, plan: SamplePlan) -> Tensor | str:
        channels, height, width = self.files.shape
        batch = np.zeros((len(plan.image), height, width, channels), dtype=np.uint8)
        pad, crop = 0, None
        if self.augment is not None:
            pad, area = self.augment.pad, self.augment.area
            crop = (area, self.seed, plan.epoch) if area < 1 else None
        padded = np.zeros((height + 2 * pad, width + 2 * pad, channels), dtype=np.uint8)
        inside = padded[pad : pad + height, pad : pad + width]
        columns = (tensor.tolist() for tensor in (plan.image, plan.top, plan.left, plan.flip))
        for target, index, top, left, flip in zip(batch, *columns, strict=True):
            try:
                inside[:] = self.files.decode(index, crop)
            except DataError as error:  # raised here, it would carry the worker's traceback
                return str(error)
            cropped = padded[top : top + height, left : left + width]
            target[:] = cropped[:, ::-1] if flip else cropped
        return torch.from_numpy(batch)


def _set_signal_handlers(_worker: int) -> None:
    """Leave Ctrl-C to the main process, and exit at once on SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
