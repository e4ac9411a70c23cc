"""Chains Conv2d (- BatchNorm2d) - ReLU (- MaxPool2d) and Conv2d - BatchNorm2d in a Sequential, computed by one operator
each.

The layers stay what they are: called alone, in a slice of the Sequential or with a hook, each computes its own part.
It is the Sequential whose class is replaced by one with another forward, which looks at every call for the layers that
follow a convolution; so what is put in, taken out or given a hook after the conversion is computed as it then stands.

A batch normalisation in evaluation mode is a factor and a summand for each channel, which are multiplied into the
weight and the bias at every call: nothing is kept, and the gradients of all parameters are as before. In training mode
it needs the convolution's output, so the layers run one after the other.
"""

import dataclasses
from collections.abc import Callable, Iterator

import torch

from cnn_ext import functional
from cnn_ext._arguments import fused_pool
from cnn_ext.nn.conv import Conv2d
from cnn_ext.nn.derived import Derived, derived_class
from cnn_ext.nn.pooling import MaxPool2d
from cnn_ext.ops.shapes import MOST_FUSED_TAPS

Named = tuple[str, torch.nn.Module]  # a layer and its qualified name


class Fused(Derived):
    """Mixed into the class of a Sequential that computes the chains in it."""

    def forward(self, input):
        layers = list(self)
        while layers:
            conv, *others = layers
            followers = _fused_followers(conv, others)
            input = _compute(conv, followers, input) if followers else conv(input)
            layers = others[len(followers) :]
        return input


_fused: dict[type, type] = {}


def fused(original: type[torch.nn.Sequential]) -> type[torch.nn.Sequential]:
    """The class ``original`` with its chains fused."""
    if original not in _fused:
        _fused[original] = derived_class(fused, original, Fused, original)
    return _fused[original]


def _has_hooks(layer: torch.nn.Module) -> bool:
    """Whether a hook of its own wants to see a layer's call."""
    hooks = layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks
    return any(hooks)


def _is_fusable_pool(layer: MaxPool2d) -> bool:
    if layer.ceil_mode or layer.return_indices:
        return False
    if layer.padding not in (0, (0, 0), "valid") or layer.dilation not in (1, (1, 1)):
        return False
    (pool_h, pool_w), _ = fused_pool("convert", layer.kernel_size, layer.stride)
    return pool_h * pool_w <= MOST_FUSED_TAPS


def _is_fusable(layer: torch.nn.Module) -> bool:
    """Whether a layer behind a convolution can be computed with it."""
    if isinstance(layer, torch.nn.BatchNorm2d):
        return layer.running_mean is not None
    return not isinstance(layer, MaxPool2d) or _is_fusable_pool(layer)


def _fused_followers(conv: torch.nn.Module, others: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """The layers behind a convolution that are computed with it."""
    if not isinstance(conv, Conv2d) or not conv.followers or _has_hooks(conv):
        return []
    followers = []
    for layer, kind in zip(others, conv.followers, strict=False):
        if type(layer) is not kind or _has_hooks(layer) or not _is_fusable(layer):
            break
        followers.append(layer)
    return followers


def _compute(conv: Conv2d, followers: list[torch.nn.Module], input: torch.Tensor) -> torch.Tensor:
    """What a convolution and the layers behind it give."""
    first, *others = followers
    norm = first if isinstance(first, torch.nn.BatchNorm2d) else None
    if norm is not None and norm.training:
        for layer in (conv, *followers):
            input = layer(input)
        return input
    weight, bias, packing = conv.weight, conv.bias, conv.packing_for(input)
    if norm is not None:
        weight, bias = _folded(weight, bias, norm) if packing is None else _kept_folded(packing, weight, bias, norm)
        followers = others
    geometry = conv.stride, conv.padding, conv.dilation, conv.groups
    keywords = {"padding_mode": conv.padding_mode, "packing": packing}
    if not followers:
        return functional.conv2d(input, weight, bias, *geometry, **keywords)
    pool = [(layer.kernel_size, layer.stride) for layer in followers[1:]] or [(1, 1)]
    return functional.conv2d_relu_max_pool2d(input, weight, bias, *geometry, *pool[0], **keywords)


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


@dataclasses.dataclass(frozen=True)
class Chain:
    """A convolution of a Sequential and the layers behind it that can be computed with it."""

    container: torch.nn.Sequential
    conv: Named
    followers: list[Named]

    def fuse(self) -> None:
        self.conv[1].followers = tuple(type(layer) for _, layer in self.followers)
        if not isinstance(self.container, Fused):
            self.container.__class__ = fused(type(self.container))

    def fused_followers(self) -> list[Named]:
        """The layers that are computed with the convolution, in evaluation mode at the latest."""
        if not isinstance(self.container, Fused):
            return []
        return self.followers[: len(_fused_followers(self.conv[1], [layer for _, layer in self.followers]))]

    def note(self) -> str:
        """With what the convolution is fused, or why with nothing."""
        followers = self.fused_followers()
        if not followers:
            hooked = [name for name, layer in (self.conv, *self.followers[:1]) if _has_hooks(layer)]
            return f"not fused: {hooked[0]} has hooks" if hooked else ""
        mode = " in evaluation mode" if isinstance(followers[0][1], torch.nn.BatchNorm2d) else ""
        names = ", ".join(name for name, _ in followers)
        padding_mode = self.conv[1].padding_mode
        if padding_mode != "zeros" and type(followers[-1][1]) is not torch.nn.BatchNorm2d:
            return f"padding_mode={padding_mode!r}: computed{mode} with {names}, one after the other"
        return f"fused{mode} with {names}"


def find_chains(model: torch.nn.Module, is_selected: Callable[[str, torch.nn.Module], bool]) -> Iterator[Chain]:
    """The chains of this package's layers in the Sequentials of ``model``; every layer of a chain is selected."""
    for name, container in model.named_modules():
        if isinstance(container, torch.nn.Sequential) and type(container).forward in _IN_ORDER:
            layers = [(f"{name}.{key}" if name else key, layer) for key, layer in container._modules.items()]
            for i, conv in enumerate(layers):
                followers = _followers(layers[i + 1 : i + 4], is_selected)
                if type(conv[1]) is Conv2d and is_selected(*conv) and followers:
                    yield Chain(container, conv, followers)


_IN_ORDER = (torch.nn.Sequential.forward, Fused.forward)  # which run one layer after the other


def _followers(layers: list[Named], is_selected: Callable[[str, torch.nn.Module], bool]) -> list[Named]:
    """The batch normalisation, the ReLU and behind that the pool, of the layers behind a convolution."""
    followers: list[Named] = []
    for kind in (torch.nn.BatchNorm2d, torch.nn.ReLU, MaxPool2d):
        following = layers[len(followers) :]
        if following and type(following[0][1]) is kind and _is_fusable(following[0][1]) and is_selected(*following[0]):
            followers.append(following[0])
        elif kind is torch.nn.ReLU:
            break
    return followers


def unfuse(layer: torch.nn.Module) -> None:
    """Takes away from a layer what ``Chain.fuse`` gave it."""
    layer.__dict__.pop("followers", None)
