"""Gradients of the weight for each image apart."""

from cnn_ext import autograd, policy
from cnn_ext._arguments import CONV_WORDS, check_tensor, conv_pair, integer, resolve_padding
from cnn_ext.functional.overridable import overridable


@overridable
def conv2d_weight_per_sample(input, weight_size, grad_output, stride=1, padding=0, dilation=1, groups=1):
    """The gradient of conv2d's weight for each image apart, in one call of a kernel.

    As :func:`torch.nn.grad.conv2d_weight`, whose result is the sum over the images of this one's. The images become
    groups of one image, so that memory holds nothing but the arguments and the result. ``torch.func.vmap`` of a
    gradient for the weight does the same.

    Args:
        input: [N, C, H, W].
        weight_size: (K, C / groups, R, S).
        grad_output: [N, K, OH, OW], the gradient of the output.
        stride, padding, dilation, groups: as for :func:`conv2d`.

    Returns:
        [N, K, C / groups, R, S], differentiable for ``input`` and ``grad_output``.

    Raises:
        RuntimeError, TypeError, ValueError, NotImplementedError: as conv2d.
    """
    op = "conv2d_weight_per_sample"
    for name, tensor in (("input", input), ("grad_output", grad_output)):
        check_tensor(op, name, tensor)
        if tensor.dim() != 4:
            raise RuntimeError(f"Expected 4D {name} to {op}, but got {name} of size: {list(tensor.shape)}")
    if len(weight_size) != 4:
        raise RuntimeError(f"Expected 4D weight to {op}, but got weight of size: {list(weight_size)}")
    if grad_output.shape[0] != input.shape[0]:
        raise RuntimeError(f"Expected grad_output of {input.shape[0]} images, but got {grad_output.shape[0]}")
    batch, (out_channels, *filter_size) = input.shape[0], weight_size
    if batch == 0:
        return input.new_zeros((0, *weight_size))
    stride, dilation = conv_pair(op, "stride", stride), conv_pair(op, "dilation", dilation)
    padding = resolve_padding(
        op, padding, input.shape, weight_size, stride, dilation, words=CONV_WORDS, as_ints=conv_pair
    )
    geometry = stride, padding, dilation, integer(op, "groups", groups) * batch, policy.allowed.winograd
    form = (batch * out_channels, *filter_size), False
    grad_output, input = (tensor.flatten(0, 1).unsqueeze(0) for tensor in (grad_output, input))
    return autograd.conv2d_backward_weight(grad_output, input, geometry, form).unflatten(0, (batch, out_channels))
