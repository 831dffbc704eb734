"""What a stock handler of TorchServe did around an archive's model, made for the server it moves to."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kpdeploy.artifact import Manifest
from kpdeploy.decision import Applied, Decision, Skipped
from kpdeploy.errors import ModelUnsafe, OutputUnusable
from kpdeploy.inputs import Array
from kpdeploy.serving.triton.handler import KINDS, Vocabulary, settings_of, write_handler
from kpdeploy.signature import Signature

if TYPE_CHECKING:
    import torch

    from kpdeploy.load.archive import Archive

IMAGE = (1, 3, 224, 224)
SIZES = ((320, 260), (224, 301), (256, 256))
"""Width and height of made-up images: both orders, and one that is not resized."""

DONE = {
    "image_classifier": "decoding, Resize(256), CenterCrop(224), Normalize, top 5 and labels of image_classifier",
    "text_classifier": "cleaning, tokens, vocabulary and labels of text_classifier",
}


def vocabulary_of(archive: Archive) -> tuple[Vocabulary | None, str]:
    """The vocabulary of a text_classifier; or why it has none."""
    from kpdeploy.load.vocabulary import VOCABULARY, read_vocabulary

    if not (archive.folder / VOCABULARY).is_file():
        return None, f"the archive holds no {VOCABULARY}"
    try:
        ids, unknown = read_vocabulary(archive.folder / VOCABULARY)
    except ModelUnsafe as error:
        return None, f"{error.in_a_line}; {error.next_step}"
    vocabulary = Vocabulary(ids=ids, unknown=unknown)
    return (vocabulary, "") if _words(vocabulary) else (None, f"no token of {VOCABULARY} is a word")


def write_handler_of(
    archive: Archive, model: str | torch.nn.Module, packaged: Manifest, vocabulary: Vocabulary | None, *, why_not: str,
    files: Path,
) -> tuple[Manifest | None, Decision]:  # fmt: skip
    """Write the handler of a stock classifier's model into the empty folder `files`; or say why there is none.

    Raises:
        PackageMissing: Pillow is not installed.
    """
    kind = KINDS[archive.classifier]
    if kind.name == "image_classifier":
        why_not = _other_size(packaged.signature)
    if not why_not:
        try:
            settings = settings_of(kind, packaged, labels=archive.labels, vocabulary=vocabulary)
            handler = write_handler(kind, packaged, settings, golden_bodies(vocabulary), _scores(model), files)
            return handler, Applied(what=DONE[kind.name], detail=f"the model {handler.model}, for {kind.suffix}s")
        except OutputUnusable as error:
            why_not = error.in_a_line
    return None, Skipped(what=DONE[kind.name], reason=f"{why_not}: send {packaged.signature.inputs[0]}")


def _other_size(signature: Signature) -> str:
    """Why the model does not take what the stock image_classifier makes; empty where it does."""

    def fits(dim: int | str, size: int) -> bool:
        return dim == size if isinstance(dim, int) else signature.axis(dim).min <= size <= signature.axis(dim).max

    (spec, *more) = signature.inputs
    if not more and len(spec.shape) == 4 and all(map(fits, spec.shape, IMAGE)) and spec.dtype == "float32":
        return ""
    return f"it makes float32 {list(IMAGE)}, which this model does not take"


def golden_bodies(vocabulary: Vocabulary | None) -> Iterator[bytes]:
    """Made-up requests of a handler: PNG files, or texts of words that it knows."""
    if vocabulary is None:
        yield from (png(width, height) for width, height in SIZES[:2])
        return
    words = _words(vocabulary)
    yield words[0].encode()
    # Pairs of words are tokens too.
    known = [" ".join(words[:12])] if vocabulary.unknown is not None else _pairs(vocabulary)
    yield from (text.encode() for text in known[:1])


def png(width: int, height: int, *, format: str = "PNG") -> bytes:
    """An image of waves, the same for the same size."""
    from PIL import Image

    y, x = np.mgrid[:height, :width] / 40
    waves = [np.sin(x * (c + 1) + y) + np.cos(y * (c + 2) - x) for c in range(3)]
    pixels = ((np.stack(waves, axis=-1) + 2) * 63.75).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def _words(vocabulary: Vocabulary) -> list[str]:
    """Tokens that stay what they are as a text."""
    return [token for token in vocabulary.ids if token.isascii() and token.isalpha() and token.islower()]


def _pairs(vocabulary: Vocabulary) -> list[str]:
    words = set(_words(vocabulary))
    return [token for token in vocabulary.ids if token.count(" ") == 1 and set(token.split()) <= words]


def _scores(model: str | torch.nn.Module) -> Callable[[Array], Array]:
    import torch

    module = torch.jit.load(model, map_location="cpu") if isinstance(model, str) else model

    def answer(data: Array) -> Array:
        with torch.inference_mode():
            found: Array = module(torch.from_numpy(data)).numpy()
        return found

    return answer
