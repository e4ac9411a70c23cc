"""Chains Conv2d - ReLU (- MaxPool2d) of a model, computed by one fused layer each.

Nothing is taken out of the model: the convolution's class becomes one that computes the whole chain, and those of the
ReLU and the pool become ones that pass on what they get. So names, parameters and ``state_dict`` keys stay.

A chain lies in one ``torch.nn.Sequential``: the only place where the order of layers is certain.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from cnn_ext._arguments import fused_pool
from cnn_ext.nn.conv import Conv2d
from cnn_ext.nn.fused import ConvReLUPool2d
from cnn_ext.nn.pooling import MaxPool2d
from cnn_ext.ops.shapes import MOST_FUSED_TAPS


class FusedConv2d(ConvReLUPool2d):
    """A Conv2d that computes the chain which starts with it."""


class FusedReLU(torch.nn.ReLU):
    """A ReLU that the convolution before it has applied."""

    def forward(self, input):
        return input


class FusedMaxPool2d(torch.nn.MaxPool2d):
    """A max pooling that the convolution before it has computed."""

    def forward(self, input):
        return input


Named = tuple[str, torch.nn.Module]  # a layer and its qualified name


@dataclasses.dataclass(frozen=True)
class Chain:
    """Layers that follow each other in a Sequential."""

    conv: Named
    relu: Named
    pool: Named | None
    obstacle: str  # why it cannot be fused, or empty

    def fuse(self) -> None:
        conv = self.conv[1]
        conv.__class__ = FusedConv2d
        conv.pool_size = conv.pool_stride = 1
        self.relu[1].__class__ = FusedReLU
        if self.pool is not None:
            pool = self.pool[1]
            conv.pool_size, conv.pool_stride = pool.kernel_size, pool.stride
            pool.__class__ = FusedMaxPool2d


def unfuse(layer: torch.nn.Module) -> None:
    """Gives a layer of a fused chain the class of torch's that it was made of."""
    if type(layer) is FusedConv2d:
        del layer.pool_size, layer.pool_stride
        layer.__class__ = torch.nn.Conv2d
    elif type(layer) is FusedReLU:
        layer.__class__ = torch.nn.ReLU
    elif type(layer) is FusedMaxPool2d:
        layer.__class__ = torch.nn.MaxPool2d


FUSED = (FusedConv2d, FusedReLU, FusedMaxPool2d)


def _has_hooks(layer: torch.nn.Module, *, before: bool) -> bool:
    """Whether a hook sees what a fused layer does not show; one ``before`` the forward may be harmless."""
    seen = [layer._forward_hooks, layer._backward_hooks, layer._backward_pre_hooks]
    return any(seen) or (before and bool(layer._forward_pre_hooks))


def _runs(model: torch.nn.Module) -> Iterator[list[tuple[str, torch.nn.Module]]]:
    """The layers of each Sequential that runs them one after the other, as torch's does."""
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Sequential) and type(layer).forward is torch.nn.Sequential.forward:
            yield [(f"{name}.{key}" if name else key, child) for key, child in layer._modules.items()]


def _is_fusable_pool(layer: torch.nn.Module) -> bool:
    if type(layer) is not MaxPool2d or layer.ceil_mode or layer.return_indices or _has_hooks(layer, before=True):
        return False
    if layer.padding not in (0, (0, 0), "valid") or layer.dilation not in (1, (1, 1)):
        return False
    (pool_h, pool_w), _ = fused_pool("convert", layer.kernel_size, layer.stride)
    return pool_h * pool_w <= MOST_FUSED_TAPS


def _obstacle(conv: Named, relu: Named, uses: Counter) -> str:
    """Why a chain is to be left alone, or an empty string."""
    for (name, layer), before in ((conv, False), (relu, True)):
        if _has_hooks(layer, before=before):
            return f"{name} has hooks"
        if uses[id(layer)] > 1:
            return f"{name} is used in several places"
    return ""


def find_chains(model: torch.nn.Module, is_selected: Callable[[str, torch.nn.Module], bool]) -> Iterator[Chain]:
    """The chains of this package's layers in ``model``; every layer of a chain is selected."""
    uses = Counter(id(layer) for _, layer in model.named_modules(remove_duplicate=False))
    for run in _runs(model):
        for conv, relu, pool in zip(run, run[1:], [*run[2:], None], strict=False):
            if type(conv[1]) is not Conv2d or type(relu[1]) is not torch.nn.ReLU:
                continue
            if not is_selected(*conv) or not is_selected(*relu):
                continue
            if pool is None or not _is_fusable_pool(pool[1]) or uses[id(pool[1])] > 1 or not is_selected(*pool):
                pool = None
            yield Chain(conv, relu, pool, _obstacle(conv, relu, uses))
