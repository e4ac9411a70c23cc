"""Any image file as the model wants it: white digit on black, 28x28."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cnn_ext.mnist.errors import InputError, reason

SIDE = 28


def read(path: Path) -> torch.Tensor:
    """The image in ``path`` as [1, 28, 28] uint8.

    It becomes greyscale; if its border is bright on the median, as with ink on paper, it is inverted; then it is padded
    with black to a square and scaled to 28x28. A 28x28 image with a dark border, such as MNIST's, stays as it is.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such image file")
    try:
        with Image.open(path) as image:
            grey = _on_white(image).convert("L")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as an image: {reason(error)}") from error
    if _bright_border(np.asarray(grey)):
        grey = grey.point(lambda value: 255 - value)
    if grey.size != (SIDE, SIDE):
        grey = _square(grey).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(grey)).unsqueeze(0)


def _on_white(image: Image.Image) -> Image.Image:
    """Transparent parts become white paper; wide greyscale pixels become bytes."""
    if image.mode.startswith(("I", "F")):
        pixels = np.asarray(image, dtype=np.float32)
        return Image.fromarray((pixels * (255 / max(float(pixels.max()), 1.0))).clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image


def _bright_border(pixels: np.ndarray) -> bool:
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return bool(np.median(border) > 127)


def _square(grey: Image.Image) -> Image.Image:
    side = max(grey.size)
    square = Image.new("L", (side, side))
    square.paste(grey, ((side - grey.width) // 2, (side - grey.height) // 2))
    return square
