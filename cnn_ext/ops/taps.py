"""Which taps of a convolution meet its input; each axis by itself."""


def taps_inside(size: int, outputs: int, kernel: int, stride: int, before: int, dilation: int) -> int:
    """Taps of all windows along one axis that lie inside the input."""
    count = 0
    for tap in range(kernel):
        first = before - tap * dilation  # inside: first <= output * stride < first + size
        begin = max(0, -(-first // stride))
        end = min(outputs, -(-(first + size) // stride))
        count += max(0, end - begin)
    return count


def nearest_taps(size: int, outputs: int, kernel: int, stride: int, before: int, dilation: int) -> tuple[int, int]:
    """(before, dilation) of an axis padded with zeros, for the same sums.

    Taps so far apart that at most one of them meets the input are brought as near as that allows: kernels stage what
    lies between.
    """
    way = (outputs - 1) * stride
    reach = max(way + size, 1)  # positions of the first window at which a tap meets the input, for some output
    if kernel == 1 or dilation <= reach:
        return before, dilation
    tap = (before + size - 1) // dilation  # the only one that may
    if tap >= kernel or tap * dilation < before - way:
        return kernel * reach, reach  # none does: all lie before the input
    return before - tap * (dilation - reach), reach
