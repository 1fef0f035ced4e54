"""How many channels of a network can be removed: Secateur compared with Torch-Pruning.

For each network, the number of groups that can be removed independently, and the number of channels
in them. An attention head is one channel. Rows are the outputs of the first layer of each group,
where a head counts all rows of its queries, keys and values; this is what Torch-Pruning counts.
Torch-Pruning is not a dependency of the project; without it, its columns are empty.

    pip install --no-deps --target DIRECTORY torch-pruning==1.6.1
    PYTHONPATH=DIRECTORY python -m benchmarks.channel_counts
"""

import argparse
import importlib
import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn

from secateur.base.torchvision_import import import_torchvision
from secateur.channels.graph import build_channel_graph
from secateur.channels.groups import ChannelGroup

NETWORKS = [
    *("alexnet", "squeezenet1_1", "vgg11_bn", "googlenet", "inception_v3", "densenet121"),
    *("resnet18", "resnet34", "resnet50", "wide_resnet50_2", "resnext50_32x4d"),
    *("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "mnasnet0_5"),
    *("shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "regnet_x_400mf", "regnet_y_400mf"),
    *("efficientnet_b0", "efficientnet_v2_s", "convnext_tiny", "vit_b_16", "swin_t", "deit_tiny"),
]
"""Networks of torchvision; deit_tiny is from timm."""
LAYERS = (nn.Conv2d, nn.Linear, nn.MultiheadAttention)

Counts = tuple[int, int, int]
"""Numbers of groups, channels and rows."""


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The network in eval mode, and one image for it."""
    torchvision = import_torchvision()  # before timm, which imports it too
    if name == "deit_tiny":
        model = importlib.import_module("timm").create_model("deit_tiny_patch16_224")
    else:
        options = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
        model = torchvision.models.get_model(name, weights=None, **options)
    side = 299 if name == "inception_v3" else 224
    return model.eval(), torch.zeros(1, 3, side, side)


def ours(model: nn.Module, image: Tensor) -> Counts:
    """Counts for the channel graph."""
    free = [g for g in build_channel_graph(model, image).groups if g.locked is None]
    return len(free), sum(g.size for g in free), sum(g.size * _rows(g) for g in free)


def _rows(group: ChannelGroup) -> int:
    """Outputs per channel in the first layer of a group; for a head, all of its rows."""
    return next((m.index.shape[1] for m in group.members if m.kind == "out"), 1)


def theirs(model: nn.Module, image: Tensor) -> Counts | None:
    """Counts for Torch-Pruning's groups, without the classifier; None if it is not installed."""
    try:
        library: Any = importlib.import_module("torch_pruning")
    except ImportError:
        return None
    graph = library.DependencyGraph().build_dependency(model, example_inputs=image)
    last = [module for module in model.modules() if isinstance(module, LAYERS)][-1]
    sizes = []
    for group in graph.get_all_groups(ignored_layers=[last], root_module_types=list(LAYERS)):
        outputs = [d.target.module for d, _ in group if graph.is_out_channel_pruning_fn(d.handler)]
        if any(module is last for module in outputs):
            continue
        root = group[0][0].target.module
        sizes.append(graph.get_out_channels(root))
    return len(sizes), sum(sizes), sum(sizes)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=NETWORKS, help="names of networks")
    parser.add_argument("--limit", type=float, default=120, help="seconds for Torch-Pruning")
    options = parser.parse_args()
    print("| network | groups | theirs | channels | rows | theirs |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in options.only:
        print(f"| {name} | {_row(*build(name), options.limit)} |", flush=True)


def _row(model: nn.Module, image: Tensor, limit: float) -> str:
    groups, channels, rows = ours(model, image)
    other = apart(model, image, limit)
    if isinstance(other, str):
        return f"{groups} | fails | {channels:,} | {rows:,} | {other}"
    if other is None:
        return f"{groups} | | {channels:,} | {rows:,} | "
    return f"{groups} | {other[0]} | {channels:,} | {rows:,} | {other[1]:,}"


def apart(model: nn.Module, image: Tensor, limit: float) -> Counts | str | None:
    """The result of `theirs` in a separate process, since some networks make it run forever or
    crash; if it fails, the reason in words."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(model, image, sender), daemon=True)
    process.start()
    sender.close()
    try:
        found: Counts | str | None = (
            receiver.recv() if receiver.poll(limit) else f"no end within {limit:g} s"
        )
    except EOFError:
        process.join()
        found = f"ended with status {process.exitcode}"
    process.kill()
    process.join()
    return found


def _send(model: nn.Module, image: Tensor, channel: Connection) -> None:
    try:
        channel.send(theirs(model, image))
    except Exception as error:  # of any type, since the library is not ours
        channel.send(" ".join(str(error).split())[:60] or type(error).__name__)


if __name__ == "__main__":
    main()
