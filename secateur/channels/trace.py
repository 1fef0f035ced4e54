"""Traces a network with torch.fx: its operations in the order of execution."""

from torch import fx, nn

from secateur.base.errors import PruningError
from secateur.nn.layers import ChannelSelect
from secateur.sparsity.masks import LAYERS

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d)
_LEAVES = (*LAYERS, *_BATCH_NORMS, nn.LayerNorm, nn.GroupNorm)
"""Types whose plain subclasses, without methods of their own, are leaves as well."""


class _Tracer(fx.Tracer):
    """Treats the project's own layers, and plain subclasses of known ones, as leaves."""

    def __init__(self, buffers: bool) -> None:
        super().__init__()
        self.proxy_buffer_attributes = buffers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, ChannelSelect) or super().is_leaf_module(m, module_qualified_name):
            return True
        return isinstance(m, _LEAVES) and type(m).__mro__[1] in _LEAVES and not _has_methods(m)


def _has_methods(module: nn.Module) -> bool:
    return any(callable(v) and k != "__init__" for k, v in vars(type(module)).items())


def trace(model: nn.Module) -> fx.Graph:
    """The operations of the network in eval mode.

    Buffers are nodes where that is possible, so that their uses are seen. The modes of the modules
    are restored. Raises PruningError with the reason if torch.fx cannot trace the network.
    """
    training = {m: m.training for m in model.modules()}
    try:
        try:
            return _Tracer(buffers=True).trace(model.eval())
        except Exception:  # the code depends on the value of a buffer
            return _Tracer(buffers=False).trace(model)
    except Exception as error:  # of any type: it is the network's code that fails
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PruningError(f"cannot follow {type(model).__name__}: {reason}") from None
    finally:
        for module, mode in training.items():
            module.training = mode
