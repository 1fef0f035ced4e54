"""Device, precision and processes of a training; several processes are joined by Lightning Fabric.

There is one process and one device, unless torchrun or SLURM's srun has started several processes.
If SECATEUR_LAUNCH is set to the beginning of such a command (`torchrun --nproc-per-node 4`, or
`srun --ntasks 8 python`), a training stage starts itself that way under plain `dvc repro`. The
number of processes is not a setting, since it changes results only by rounding (and by batch-norm
statistics, which are taken over all GPUs).
"""

import contextlib
import logging
import os
import shlex
import subprocess
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from secateur.base.errors import SecateurError, SettingsError
from secateur.base.machine import device, processes

T = TypeVar("T")

TIMEOUT = timedelta(days=1)
"""How long to wait for the first process, which may wait for a concurrent run of the stage."""


class Engine:
    """The processes of one training, each with its device; usually there is only one."""

    def __init__(self, precision: str = "float32") -> None:
        """Join the processes that the environment has started. `precision`: see `resolve`."""
        self.world, local, nodes = processes()
        self.half = resolve(precision) == "bfloat16"
        self.rank, self.device = 0, device()
        self._fabric: Any = None
        if self.world > 1:
            self._fabric = _joined(self.device.type, local, nodes)
            self.rank, self.device = self._fabric.global_rank, self._fabric.device
        elif self.device.type == "cuda":
            self.device = torch.device("cuda", self.device.index or 0)  # SECATEUR_DEVICE=cuda:1
            torch.cuda.set_device(self.device)

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    def prepare(self, model: nn.Module, compiled: bool) -> nn.Module:
        """Wrap `model` for training; the wrapper shares its weights and averages gradients over all
        processes.

        On several GPUs, batch norms become SyncBatchNorm. On CPUs they do not: each process has its
        own statistics, and those of the first process are kept.
        """
        if self.world > 1 and self.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        called: nn.Module = torch.compile(model) if compiled else model  # type: ignore[assignment]
        return self._fabric.setup_module(called) if self.world > 1 else called

    def autocast(self) -> Any:
        """Context in which matrix products and convolutions have the requested precision."""
        half = torch.autocast(self.device.type, dtype=torch.bfloat16)
        return half if self.half else contextlib.nullcontext()

    def no_sync(self, model: nn.Module, on: bool) -> Any:
        """Context in which, if `on`, a backward pass does not exchange gradients."""
        if self.world == 1:
            return contextlib.nullcontext()
        return self._fabric.no_backward_sync(model, enabled=on)

    def all_reduce(self, values: Tensor) -> Tensor:
        """Sum over all processes."""
        if self.world == 1:
            return values
        summed: Tensor = self._fabric.all_reduce(values, reduce_op="sum")
        return summed

    def share_buffers(self, model: nn.Module) -> None:
        """Set the buffers of `model` to those of the first process: between two steps, those of
        batch norms differ on CPUs."""
        if self.world > 1:
            for buffer in model.buffers():
                contiguous = buffer.contiguous()  # nccl takes no others
                torch.distributed.broadcast(contiguous, 0)
                if contiguous is not buffer:
                    buffer.copy_(contiguous)

    def broadcast(self, value: T) -> T:
        """The value of the first process, returned in every process."""
        return self._fabric.broadcast(value) if self.world > 1 else value


def _joined(kind: str, local: int, nodes: int) -> Any:
    """Fabric with all processes joined; imported here, since the import takes over a second."""
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.ddp import DDPStrategy

    for name in ("lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    backend = "nccl" if kind == "cuda" else "gloo"
    strategy = DDPStrategy(process_group_backend=backend, timeout=TIMEOUT)
    fabric = Fabric(accelerator=kind, strategy=strategy, devices=local, num_nodes=nodes)
    fabric.launch()
    return fabric


def resolve(precision: str) -> str:
    """Replace `auto` by bfloat16 if the hardware multiplies it faster, else by float32.

    This is the case on GPUs with native bfloat16, and on CPUs with matrix units (AMX) or vector
    instructions for it (AVX512_BF16).
    """
    if precision != "auto":
        return precision
    if device().type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device().type == "cpu" and (
            torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        )
    return "bfloat16" if fast else "float32"


def relaunch(stage: str, arguments: Sequence[str] = ()) -> bool:
    """Run the stage in several processes if SECATEUR_LAUNCH is set; returns whether it did.

    Raises SecateurError when one of them fails; the next run resumes from the saved state.
    """
    command = os.environ.get("SECATEUR_LAUNCH", "").strip()
    if not command:
        return False
    environment = {k: v for k, v in os.environ.items() if k != "SECATEUR_LAUNCH"}
    try:
        status = subprocess.run(
            [*shlex.split(command), "-m", f"stages.{stage}", *arguments],
            env=environment,
            check=False,
        ).returncode
    except (OSError, ValueError) as error:
        raise SettingsError(f"SECATEUR_LAUNCH = {command!r}: cannot be run: {error}") from None
    if status:
        raise SecateurError(
            f"{stage}: a process of `{command}` ended with status {status} (see above); the state "
            "after the last saved epoch is kept, run the same command again to continue"
        )
    return True
