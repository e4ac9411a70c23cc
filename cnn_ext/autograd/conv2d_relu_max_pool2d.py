"""The convolution fused with its ReLU and max pooling, with gradients of every order.

Forward keeps the input, the weight and the mask (with pooling the offsets, one byte each; without it the output),
never the tensor in between. The mask is constant wherever there is a derivative, and with it everything is linear:
with E the scattering of a pooled gradient to the places that the mask names, and P = E transposed (the convolution's
values at these places),
    backward_input I(E g, w):   to g  P F(v, w),   to w  W(E g, v)      (v: the gradient that arrives)
    backward_weight W(E g, x):  to g  P F(x, v),   to x  I(E g, v)
The second ones are the fused gradients again, with v in place of an operand; P F is the unfused convolution, picked.
"""

import torch
from torch.autograd import Function

from cnn_ext import ops
from cnn_ext.autograd.conv2d import conv2d, conv2d_tangent, plus_bias
from cnn_ext.autograd.function import (
    asked_gradients,
    bilinear_tangent,
    differentiable,
    in_layout,
    needs_backward,
    save,
    weight_form,
)
from cnn_ext.autograd.pooling import max_pool2d_gather
from cnn_ext.ops.conv2d_relu_max_pool2d import has_pooling
from cnn_ext.ops.shapes import MOST_FUSED_TAPS

_NO_GRADIENT = MOST_FUSED_TAPS  # the first number that is no tap


class _Forward(Function):
    """output, offsets = max pooling of relu(conv2d(input, weight) + bias), and the places of the maxima"""

    @staticmethod
    def forward(input, weight, bias, geometry, pool, with_offsets):
        return _compute(input, weight, bias, geometry, pool, with_offsets)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, weight, _, ctx.geometry, ctx.pool, _ = inputs
        values, offsets = output
        ctx.mark_non_differentiable(offsets)
        input_needs, weight_needs, *_ = ctx.needs_input_grad
        mask = offsets if has_pooling(ctx.pool) else values
        save(ctx, (input, weight, mask), (input if weight_needs else None, weight if input_needs else None, mask))
        ctx.input_size, ctx.weight_form = input.shape, weight_form(weight) if weight_needs else None
        ctx.channels_last = not values.is_contiguous()

    @staticmethod
    def backward(ctx, grad_output, _):
        grad_input = grad_weight = grad_bias = None
        input, weight, mask = ctx.saved_tensors
        mask = mask.detach()  # an output, without pooling; its sign has no derivative
        input_needs, weight_needs, bias_needs, *_ = asked_gradients(ctx)
        grad_output = in_layout(grad_output, ctx.channels_last)
        if input_needs:
            grad_input = _backward_input(grad_output, mask, weight, ctx.input_size, ctx.geometry, ctx.pool)
        if weight_needs:
            grad_weight = _backward_weight(grad_output, mask, input, ctx.geometry, ctx.pool, ctx.weight_form)
        if bias_needs:
            grad_bias = _backward_bias(grad_output, mask, ctx.pool)
        return grad_input, grad_weight, grad_bias, None, None, None

    @staticmethod
    def jvp(ctx, input_tangent, weight_tangent, bias_tangent, *_):
        input, weight, mask = ctx.saved_tensors
        tangent = conv2d_tangent(input, weight, input_tangent, weight_tangent, ctx.geometry)
        picked = None if tangent is None else _pick(tangent, mask, ctx.pool)
        return plus_bias(picked, bias_tangent, mask.shape).masked_fill(_is_stopped(mask, ctx.pool), 0.0), None


class _BackwardInput(Function):
    """grad_input = I(E grad_output, weight)"""

    @staticmethod
    def forward(grad_output, mask, weight, input_size, geometry, pool):
        return ops.conv2d_relu_max_pool2d_backward_input(
            grad_output, mask, weight, input_size, *geometry[:4], *pool, *geometry[4:]
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, mask, weight, ctx.input_size, ctx.geometry, ctx.pool = inputs
        grad_output_needs, _, weight_needs, *_ = ctx.needs_input_grad
        save(
            ctx,
            (grad_output, mask, weight),
            (grad_output if weight_needs else None, mask, weight if grad_output_needs else None),
        )
        ctx.weight_form = weight_form(weight) if weight_needs else None
        ctx.channels_last = not output.is_contiguous()

    @staticmethod
    def backward(ctx, grad):
        grad_output, mask, weight = ctx.saved_tensors
        grad_output_needs, _, weight_needs, *_ = asked_gradients(ctx)
        grad = in_layout(grad, ctx.channels_last)
        grad_grad_output = grad_weight = None
        if grad_output_needs:
            grad_grad_output = _pick(conv2d(grad, weight, None, ctx.geometry), mask, ctx.pool)
        if weight_needs:
            grad_weight = _backward_weight(grad_output, mask, grad, ctx.geometry, ctx.pool, ctx.weight_form)
        return grad_grad_output, None, grad_weight, None, None, None

    @staticmethod
    def jvp(ctx, grad_output_tangent, _, weight_tangent, *__):
        grad_output, mask, weight = ctx.saved_tensors

        def compute(grad_output, weight):
            return _backward_input(grad_output, mask, weight, ctx.input_size, ctx.geometry, ctx.pool)

        return bilinear_tangent(compute, (grad_output, weight), (grad_output_tangent, weight_tangent))


class _BackwardWeight(Function):
    """grad_weight = W(E grad_output, input), of the weight's form: its size, and whether it is channels_last"""

    @staticmethod
    def forward(grad_output, mask, input, geometry, pool, weight_form):
        size, channels_last = weight_form
        return ops.conv2d_relu_max_pool2d_backward_weight(
            grad_output, mask, input, size, *geometry[:4], *pool, channels_last, *geometry[4:]
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        grad_output, mask, input, ctx.geometry, ctx.pool, ctx.weight_form = inputs
        grad_output_needs, _, input_needs, *_ = ctx.needs_input_grad
        save(
            ctx,
            (grad_output, mask, input),
            (grad_output if input_needs else None, mask, input if grad_output_needs else None),
        )
        ctx.input_size = input.shape

    @staticmethod
    def backward(ctx, grad):
        grad_output, mask, input = ctx.saved_tensors
        grad_output_needs, _, input_needs, *_ = asked_gradients(ctx)
        grad_grad_output = grad_input = None
        if grad_output_needs:
            grad_grad_output = _pick(conv2d(input, grad, None, ctx.geometry), mask, ctx.pool)
        if input_needs:
            grad_input = _backward_input(grad_output, mask, grad, ctx.input_size, ctx.geometry, ctx.pool)
        return grad_grad_output, None, grad_input, None, None, None

    @staticmethod
    def jvp(ctx, grad_output_tangent, _, input_tangent, *__):
        grad_output, mask, input = ctx.saved_tensors

        def compute(grad_output, input):
            return _backward_weight(grad_output, mask, input, ctx.geometry, ctx.pool, ctx.weight_form)

        return bilinear_tangent(compute, (grad_output, input), (grad_output_tangent, input_tangent))


class _BackwardBias(Function):
    """grad_bias = sum of the gradients that pass, over images and positions"""

    @staticmethod
    def forward(grad_output, mask, pool):
        return ops.conv2d_relu_max_pool2d_backward_bias(grad_output, mask, *pool)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, mask, ctx.pool = inputs
        save(ctx, (mask,), (mask,))

    @staticmethod
    def backward(ctx, grad):
        (mask,) = ctx.saved_tensors
        return grad.view(1, -1, 1, 1).expand(mask.shape).masked_fill(_is_stopped(mask, ctx.pool), 0.0), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        (mask,) = ctx.saved_tensors
        return _backward_bias(tangent, mask, ctx.pool)


def _compute(input, weight, bias, geometry, pool, with_offsets, **hints):
    return ops.conv2d_relu_max_pool2d_forward(
        input, weight, bias, *geometry[:4], *pool, with_offsets, *geometry[4:], **hints
    )


_forward = differentiable(_Forward, _compute)
_backward_input = differentiable(_BackwardInput)
_backward_weight = differentiable(_BackwardWeight)
_backward_bias = differentiable(_BackwardBias)


def _is_stopped(mask: torch.Tensor, pool) -> torch.Tensor:
    """Where no gradient passes."""
    return mask == _NO_GRADIENT if has_pooling(pool) else mask <= 0


def _pick(conv: torch.Tensor, mask: torch.Tensor, pool) -> torch.Tensor:
    """P conv: the elements that the mask names, 0 where no gradient passes."""
    stopped = _is_stopped(mask, pool)
    if has_pooling(pool):
        window = (*pool, (0, 0, 0, 0), (1, 1), False)
        conv = max_pool2d_gather(conv, mask.masked_fill(stopped, 0), window)
    return conv.masked_fill(stopped, 0.0)


def conv2d_relu_max_pool2d(input: torch.Tensor, weight: torch.Tensor, bias, geometry, pool, **hints) -> torch.Tensor:
    """The fused operator. ``geometry`` is that of autograd.conv2d, ``pool`` is (pool_size, pool_stride)."""
    return _forward(input, weight, bias, geometry, pool, needs_backward(input, weight, bias), **hints)[0]
