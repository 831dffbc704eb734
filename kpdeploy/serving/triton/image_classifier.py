"""What TorchServe's stock image_classifier does before and after its model, without torchvision: NumPy and Pillow.

Copied into a version's folder as handler.py, where it stands alone. Image.resize is what torchvision calls for an image
of Pillow's, so the tensors are the same to the last bit.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

Array = np.ndarray[Any, Any]

RESIZED, CROPPED = 256, 224
MEAN = np.array([0.485, 0.456, 0.406], np.float32)[:, None, None]
STD = np.array([0.229, 0.224, 0.225], np.float32)[:, None, None]
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Those that Pillow reads by itself: for others, such as EPS, it starts programs."""


class Handler:
    """`settings`: labels (by class; may be empty) and top, how many classes are answered."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._labels: Sequence[str] = settings["labels"]
        self._top: int = settings["top"]

    def prepare(self, body: bytes) -> Array:
        """float32 [1, 3, 224, 224] of an image file: resized, cropped in the middle, and normalized.

        Raises:
            ValueError: it is no image that can be read.
        """
        try:
            image: Image.Image = Image.open(io.BytesIO(body), formats=FORMATS)
            # The stock handler fails on images of other than three channels.
            image = image if len(image.getbands()) == 3 else image.convert("RGB")
            pixels = np.asarray(cropped(resized(image)), np.float32)
        except UnidentifiedImageError:
            raise ValueError(f"this is no image ({', '.join(FORMATS)})") from None
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"the image cannot be read: {error}") from None
        scaled = pixels.transpose(2, 0, 1) / np.float32(255)
        found: Array = ((scaled - MEAN) / STD)[None]
        return found

    def answer(self, scores: Array) -> tuple[list[str], Array]:
        """The labels of the likeliest classes and their probabilities, the likeliest first; scores: float32 [classes],
        after the softmax, which is a part of the model."""
        classes = np.argsort(-scores, kind="stable")[: self._top]
        return [label(self._labels, int(c)) for c in classes], scores[classes]


def resized(image: Image.Image) -> Image.Image:
    """The shorter side becomes RESIZED."""
    width, height = image.size
    if min(width, height) == RESIZED:
        return image
    longer = int(RESIZED * max(width, height) / min(width, height))
    return image.resize((RESIZED, longer) if width <= height else (longer, RESIZED), Image.Resampling.BILINEAR)


def cropped(image: Image.Image) -> Image.Image:
    left, top = (int(round((side - CROPPED) / 2.0)) for side in image.size)  # noqa: RUF046  # as torchvision has it
    return image.crop((left, top, left + CROPPED, top + CROPPED))


def label(labels: Sequence[str], index: int) -> str:
    """A class without a label has its number."""
    return (labels[index] if index < len(labels) else "") or str(index)
