"""Adaptive pooling, whose windows follow from the sizes, and the unpooling of max pooling."""

from cnn_ext import autograd
from cnn_ext._arguments import adaptive_output_size, check_bool, unpool2d_output_size
from cnn_ext.functional.overridable import overridable
from cnn_ext.functional.pooling import max_pool2d_of


@overridable
def adaptive_avg_pool2d(input, output_size):
    """Mean of each of ``output_size`` windows, as :func:`torch.nn.functional.adaptive_avg_pool2d`.

    Args:
        input: [N, C, H, W] or [C, H, W].
        output_size: an int or a pair (height, width); None stands for the input's own size.

    Returns:
        [N, C, OH, OW]; the window of output i covers the rows floor(i * H / OH) to ceil((i + 1) * H / OH) - 1.

    Raises:
        RuntimeError, TypeError, ValueError, NotImplementedError: as torch, with its messages.
    """
    output_size = adaptive_output_size("adaptive_avg_pool2d", input, output_size)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    window = _window(batched.shape, output_size)
    if window is None:
        output = autograd.adaptive_avg_pool2d(batched, output_size)
    else:
        output = autograd.avg_pool2d(batched, window, (True, None))
    return output if batched is input else output.squeeze(0)


@overridable
def adaptive_max_pool2d(input, output_size, return_indices=False):
    """Maximum of each of ``output_size`` windows, as :func:`torch.nn.functional.adaptive_max_pool2d`.

    Args:
        input, output_size: as for :func:`adaptive_avg_pool2d`.
        return_indices: whether to return the place of each maximum as well.

    Returns:
        [N, C, OH, OW], or a pair of it and the int64 indices h * W + w, which have no gradient. The first of equal
        maxima counts; a NaN is above all numbers, and the last NaN of a window counts.

    Raises:
        RuntimeError, TypeError, ValueError, NotImplementedError: as adaptive_avg_pool2d.
    """
    output_size = adaptive_output_size("adaptive_max_pool2d", input, output_size)
    check_bool("adaptive_max_pool2d", "return_indices", return_indices)
    batched = input if input.dim() == 4 else input.unsqueeze(0)
    window = _window(batched.shape, output_size)
    if window is None:
        results = autograd.adaptive_max_pool2d(batched, output_size, return_indices)[: 1 + return_indices]
    else:
        results = max_pool2d_of(batched, window, return_indices)
    results = [result if batched is input else result.squeeze(0) for result in results]
    return tuple(results) if return_indices else results[0]


def _window(input_size, output_size):
    """The window of the ordinary pooling that an adaptive one is where its sizes divide the input's; else None.

    An ordinary pooling refuses an input without channels, an adaptive one does not.
    """
    _, channels, height, width = input_size
    if channels == 0 or 0 in output_size or height % output_size[0] != 0 or width % output_size[1] != 0:
        return None
    kernel_size = (height // output_size[0], width // output_size[1])
    return kernel_size, kernel_size, (0, 0, 0, 0), (1, 1), False


@overridable
def max_unpool2d(input, indices, kernel_size, stride=None, padding=0, output_size=None):
    """Puts each value to the place that its index names, as :func:`torch.nn.functional.max_unpool2d`.

    Args:
        input: [N, C, OH, OW] or [C, OH, OW].
        indices: int64, of the same size: h * W + w within the plane of the result, as max_pool2d returns them.
        kernel_size, stride, padding: of the pooling that is undone: an int or a pair; ``stride`` is ``kernel_size`` if
            omitted. They give the default of ``output_size`` and the bounds of another one, nothing else.
        output_size: (height, width) of the result, or a size that ends with it.

    Returns:
        [N, C, H, W] with 0 where no index points; of several values at one place the last one. The gradient of each of
        them is what arrives there.

    Raises:
        RuntimeError, TypeError, ValueError, NotImplementedError: as torch, with its messages. An index outside the
            output is ignored on a GPU.
    """
    output_size = unpool2d_output_size(input, indices, kernel_size, stride, padding, output_size)
    if input.dim() == 4:
        return autograd.max_unpool2d(input, indices, output_size)
    return autograd.max_unpool2d(input.unsqueeze(0), indices.unsqueeze(0), output_size).squeeze(0)
