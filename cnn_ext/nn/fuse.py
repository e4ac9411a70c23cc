"""Chains Conv2d (- BatchNorm2d) - ReLU (- MaxPool2d) and Conv2d - BatchNorm2d, computed by one fused layer each.

Nothing is taken out of the model: the convolution's class becomes one that computes the whole chain, and those of the
others become ones that pass on what they get. So names, parameters and ``state_dict`` keys stay.

A batch normalisation in evaluation mode is a factor and a summand for each channel, which are multiplied into the
weight and the bias at every call: nothing is kept, and the gradients of all parameters are as before. In training mode
it needs the convolution's output, so the layers run one after the other.

A chain lies in one ``torch.nn.Sequential``: the only place where the order of layers is certain.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator

import torch

from cnn_ext import functional
from cnn_ext._arguments import fused_pool
from cnn_ext.nn.conv import Conv2d
from cnn_ext.nn.fused import ConvReLUPool2d
from cnn_ext.nn.pooling import MaxPool2d
from cnn_ext.ops.shapes import MOST_FUSED_TAPS


class FusedConv2d(ConvReLUPool2d):
    """A Conv2d that computes the chain which starts with it."""

    norms: tuple[torch.nn.BatchNorm2d, ...] = ()  # at most one; in a tuple it is not registered here a second time
    has_relu = True

    def _compute(self, input, weight, bias, *geometry, packing=None, padding_mode):
        keywords = {"padding_mode": padding_mode, "packing": packing}
        for norm in self.norms:
            if norm.training or norm.running_mean is None:
                output = functional.conv2d(input, weight, bias, *geometry, **keywords)
                return self._compute_behind(torch.nn.BatchNorm2d.forward(norm, output))
            weight, bias = _folded(weight, bias, norm) if packing is None else _kept_folded(packing, weight, bias, norm)
        if self.has_relu:
            return super()._compute(input, weight, bias, *geometry, **keywords)
        return functional.conv2d(input, weight, bias, *geometry, **keywords)

    def _compute_behind(self, normalised):
        """What the chain does with the output of its normalisation, which nobody else sees."""
        output = torch.relu_(normalised) if self.has_relu else normalised
        if (self.pool_size, self.pool_stride) == (1, 1):
            return output
        return functional.max_pool2d(output, self.pool_size, self.pool_stride)


def _folded(weight, bias, norm: torch.nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight and bias of the convolution whose output is the normalised one; half types are rounded once."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    scale, shift = torch.rsqrt(norm.running_var.to(dtype) + norm.eps), -norm.running_mean.to(dtype)
    if bias is not None:
        shift = shift + bias
    if norm.affine:
        scale = scale * norm.weight
    shift = shift * scale
    if norm.affine:
        shift = shift + norm.bias
    return (weight * scale.view(-1, 1, 1, 1)).to(weight.dtype), shift.to(weight.dtype)


def _kept_folded(packing, weight, bias, norm: torch.nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """The same without gradients, as it was the last time if nothing has changed since."""

    @torch.inference_mode(False)
    @torch.no_grad()
    def fold():
        return _folded(weight, bias, norm)

    tensors = (weight, bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return packing.folded.of(fold, tensors, (norm.eps,))


class FusedBatchNorm2d(torch.nn.BatchNorm2d):
    """A batch normalisation that the convolution before it has applied."""

    def forward(self, input):
        return input


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
    norm: Named | None
    relu: Named | None
    pool: Named | None
    obstacle: str  # why it cannot be fused, or empty

    def fuse(self) -> None:
        conv = self.conv[1]
        conv.__class__ = FusedConv2d
        conv.pool_size = conv.pool_stride = 1
        conv.has_relu = self.relu is not None
        if self.norm is not None:
            conv.norms = (self.norm[1],)
            self.norm[1].__class__ = FusedBatchNorm2d
        if self.relu is not None:
            self.relu[1].__class__ = FusedReLU
        if self.pool is not None:
            pool = self.pool[1]
            conv.pool_size, conv.pool_stride = pool.kernel_size, pool.stride
            pool.__class__ = FusedMaxPool2d


def unfuse(layer: torch.nn.Module) -> None:
    """Gives a layer of a fused chain the class of torch's that it was made of."""
    if type(layer) is FusedConv2d:
        for name in ("pool_size", "pool_stride", "has_relu", "norms"):
            layer.__dict__.pop(name, None)
        layer.__class__ = torch.nn.Conv2d
    elif type(layer) is FusedBatchNorm2d:
        layer.__class__ = torch.nn.BatchNorm2d
    elif type(layer) is FusedReLU:
        layer.__class__ = torch.nn.ReLU
    elif type(layer) is FusedMaxPool2d:
        layer.__class__ = torch.nn.MaxPool2d


FUSED = (FusedConv2d, FusedBatchNorm2d, FusedReLU, FusedMaxPool2d)


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


def _obstacle(conv: Named, followers: list[Named], uses: Counter) -> str:
    """Why a chain is to be left alone, or an empty string."""
    for name, layer in (conv, *followers):
        if _has_hooks(layer, before=layer is not conv[1]):
            return f"{name} has hooks"
        if uses[id(layer)] > 1:
            return f"{name} is used in several places"
    return ""


def find_chains(model: torch.nn.Module, is_selected: Callable[[str, torch.nn.Module], bool]) -> Iterator[Chain]:
    """The chains of this package's layers in ``model``; every layer of a chain is selected."""
    uses = Counter(id(layer) for _, layer in model.named_modules(remove_duplicate=False))
    for run in _runs(model):
        for i, conv in enumerate(run):
            norm, relu, pool = _followers(run[i + 1 : i + 4])
            followers = [layer for layer in (norm, relu) if layer is not None]
            if type(conv[1]) is not Conv2d or not followers:
                continue
            if not all(is_selected(*layer) for layer in (conv, *followers)):
                continue
            if None in (relu, pool) or not _is_fusable_pool(pool[1]) or uses[id(pool[1])] > 1 or not is_selected(*pool):
                pool = None
            yield Chain(conv, norm, relu, pool, _obstacle(conv, followers, uses))


def _followers(layers: list[Named]) -> tuple[Named | None, Named | None, Named | None]:
    """The batch normalisation, the ReLU and what comes behind it, of the layers behind a convolution."""
    norm = layers.pop(0) if layers and type(layers[0][1]) is torch.nn.BatchNorm2d else None
    relu = layers.pop(0) if layers and type(layers[0][1]) is torch.nn.ReLU else None
    return norm, relu, layers[0] if layers else None
