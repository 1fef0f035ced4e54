"""Published results shown beside our own: taken from the named sources, not measured.

Networks with the same name differ between papers, and so do base models and trainings. These
results are landmarks, not competitors in a comparison.
"""

from dataclasses import dataclass

TAB6 = "Wang et al., arXiv 2301.05219, table 6"
TPP = "Wang and Fu, Trainability preserving neural pruning, ICLR 2023, table 1"
SVD = "Molchanov et al., Variational dropout sparsifies deep neural networks, ICML 2017 (code)"
TP = "Fang et al., DepGraph, CVPR 2023 (code)"


@dataclass(frozen=True)
class Anchor:
    """One published operating point."""

    method: str
    accuracy: float
    """Accuracy on the test images, a fraction."""
    source: str
    compression: float | None = None
    """Dense parameters / remaining parameters, if the source gives it."""
    macs: float | None = None
    """MACs of the dense network / remaining MACs, if the source gives it."""


def of(dataset: str, arch: str, depth: int | None = None) -> list[Anchor]:
    """Published results for a network on a data set; `depth` for architectures that have one."""
    return PUBLISHED.get((dataset, arch, depth), [])


def _by_compression(source: str, *rows: tuple[str, float, float]) -> list[Anchor]:
    """Rows of method, test error in percent and compression."""
    return [Anchor(m, 1 - error / 100, source, compression=c) for m, error, c in rows]


def _by_macs(source: str, method: str, *points: tuple[float, float]) -> list[Anchor]:
    """Points of accuracy in percent and speed-up of one method."""
    return [Anchor(method, accuracy / 100, source, macs=speedup) for accuracy, speedup in points]


PUBLISHED: dict[tuple[str, str, int | None], list[Anchor]] = {
    ("mnist", "lenet300", None): _by_compression(
        SVD,
        ("Han et al. 2015", 1.59, 12),
        ("soft weight sharing", 1.94, 23),
        ("dynamic network surgery", 1.99, 56),
        ("sparse variational dropout", 1.92, 68),
    ),
    ("mnist", "lenet5", None): _by_compression(
        SVD,
        ("Han et al. 2015", 0.77, 12),
        ("dynamic network surgery", 0.91, 111),
        ("soft weight sharing", 0.97, 200),
        ("sparse variational dropout", 0.75, 280),
    ),
    ("cifar10", "resnet_cifar", 56): [
        *_by_macs(TAB6, "L1, cosine", (93.82, 1.45), (93.74, 1.99), (92.27, 3.59), (86.90, 11.41)),
        *_by_macs(TPP, "TPP", (93.81, 1.45), (93.46, 1.99), (92.35, 3.59), (89.63, 11.41)),
        *_by_macs(TPP, "scratch", (93.16, 1.45), (92.78, 1.99), (92.11, 3.59), (88.36, 11.41)),
        *_by_macs(TP, "GReg-2", (93.36, 2.55)),
        *_by_macs(TP, "DepGraph", (93.77, 2.11), (93.64, 2.57)),
    ],
}
"""By data set, architecture and depth."""
