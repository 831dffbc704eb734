"""Handlers made from TorchServe's stock ones, without a server: what they make of files and texts, and vocabularies."""

from __future__ import annotations

import collections
import io
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_version import manifest as tiny_manifest

from kpdeploy.baseline import Baseline, Exchange
from kpdeploy.bench.requests import from_repository
from kpdeploy.bench.wire import WIRES
from kpdeploy.compare import TOLERANCES, compare
from kpdeploy.errors import ModelUnsafe, OutputUnusable
from kpdeploy.inputs import of_bytes
from kpdeploy.load.vocabulary import read_vocabulary
from kpdeploy.pipeline.handlers import png
from kpdeploy.serving.repository import find_deployment
from kpdeploy.serving.triton import image_classifier, text_classifier
from kpdeploy.serving.triton.config import model_config, warmup_files
from kpdeploy.serving.triton.handler import KINDS, Vocabulary, settings_of, write_handler
from kpdeploy.serving.triton.repository import publish
from kpdeploy.signature import Axis, Signature, TensorSpec

IMAGES = Signature(
    inputs=(TensorSpec(name="data", dtype="float32", shape=("batch", 3, 224, 224)),),
    outputs=(TensorSpec(name="output", dtype="float32", shape=("batch", 6)),),
    axes=(Axis(name="batch", min=1, max=4),),
)
MODEL = tiny_manifest(
    signature=IMAGES, input_names=("data",), output_names=("output",), max_batch_size=4, format="onnx", target="triton"
)
LABELS = ["cat", "dog", "", "cow", "hen", "pig"]


def scores(data: Any) -> Any:
    """A model: six numbers of each image, far apart."""
    return np.arange(6, dtype=np.float32)[None] / 15 * np.ones((len(data), 1), np.float32)


@pytest.fixture
def images() -> image_classifier.Handler:
    return image_classifier.Handler(settings_of(KINDS["image_classifier"], MODEL, labels=LABELS))


@pytest.mark.parametrize("size", [(320, 240), (240, 320), (256, 256), (257, 255), (100, 37), (1000, 256), (225, 1024)])
def test_an_image_becomes_the_tensor_of_torchvisions_transforms(
    size: tuple[int, int], images: image_classifier.Handler
) -> None:
    """Step by step as torchvision's source has them (tests/integration/test_migrate.py asks the stock handler)."""
    image = Image.open(io.BytesIO(png(*size)))
    short, long = 256, int(256 * max(size) / min(size))
    wanted = (short, long) if size[0] <= size[1] else (long, short)
    if min(size) != 256:
        image = image.resize(wanted, Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).to(torch.float32).div(255)
    top, left = (round((side - 224) / 2.0) for side in pixels.shape[1:])
    cropped = pixels[:, top : top + 224, left : left + 224]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    expected = cropped.sub(mean).div(std)[None]
    found = images.prepare(png(*size))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_images_of_other_modes_are_taken_as_rgb(mode: str, images: image_classifier.Handler) -> None:
    file = io.BytesIO()
    Image.open(io.BytesIO(png(300, 280))).convert(mode).save(file, "TIFF" if mode == "CMYK" else "PNG")
    assert images.prepare(file.getvalue()).shape == (1, 3, 224, 224)


@pytest.mark.parametrize(
    "body", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", png(300, 300)[:900]]
)
def test_what_is_no_image_is_told(body: bytes, images: image_classifier.Handler) -> None:
    with pytest.raises(ValueError, match="image"):
        images.prepare(body)


def test_the_likeliest_classes_have_their_labels_or_numbers(images: image_classifier.Handler) -> None:
    labels, chances = images.answer(np.array([0.1, 0.3, 0.25, 0.05, 0.2, 0.1], np.float32))
    assert labels == ["dog", "2", "hen", "cat", "pig"]
    np.testing.assert_allclose(chances, [0.3, 0.25, 0.2, 0.1, 0.1])


# What TextClassifier of TorchServe 0.12.0 made of these texts (and, once, of 200,000 random ones).
STOCK_WORDS = [
    ("The Cat's on <b>a</b> mat, isn't it?", ["the", "cats", "on", "a", "mat", "is", "not", "it"]),
    (
        "I can't've said: 'cause ain't won't y'all'd've",
        ["i", "cannotve", "said", "ecause", "as", "not", "will", "not", "you", "alldve"],
    ),
    (
        "Ｆｕｌｌ ℌalf naïve café &amp; &#169; <br /> x\ty\n\xa0z",
        ["full", "half", "naive", "cafe", "x", "y", "z"],
    ),
    ("...", []),
    ("it's   2,000.5 km!", ["it", "is", "20005", "km"]),
    ("o'clock ma'am shan't she'll've", ["of", "the", "clock", "madam", "shall", "not", "she", "willve"]),
]


@pytest.mark.parametrize(("text", "words"), STOCK_WORDS)
def test_a_text_becomes_the_words_of_the_stock_handler(text: str, words: list[str]) -> None:
    assert text_classifier.words_of(text) == words


def test_words_and_their_pairs_have_ids_and_what_has_none_is_told() -> None:
    settings = {"labels": [], "vocabulary": {"a": 1, "cat": 2, "a cat": 3}, "unknown": None, "most": 4}
    handler = text_classifier.Handler(settings)
    assert handler.prepare(b"A cat!").tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="'dog' is not in the vocabulary"):
        handler.prepare(b"a dog")
    with pytest.raises(ValueError, match="0 tokens"):
        handler.prepare(b"!")
    with pytest.raises(ValueError, match="5 tokens, the model takes 1 to 4"):
        text_classifier.Handler({**settings, "unknown": 0}).prepare(b"a a a")
    with pytest.raises(ValueError, match="UTF-8"):
        handler.prepare(b"\xff")
    assert text_classifier.Handler({**settings, "unknown": 0}).prepare(b"a dog").tolist() == [1, 0, 0]
    assert handler.answer(np.array([0.25, 0.75], np.float32))[0] == ["0", "1"]


def published(tmp_path: Path) -> Any:
    files = tmp_path / "files"
    files.mkdir()
    kind = KINDS["image_classifier"]
    settings = settings_of(kind, MODEL, labels=LABELS)
    handler = write_handler(kind, MODEL, settings, [png(300, 260), png(230, 330)], scores, files)
    return publish(str(tmp_path / "models"), handler, files)


def test_a_handler_is_a_model_of_the_python_backend_with_golden_requests(tmp_path: Path) -> None:
    deployment = published(tmp_path)
    manifest, folder = deployment.manifest, Path(deployment.folder)
    manifest.check_files(folder)
    assert (manifest.model, manifest.format, manifest.max_batch_size) == ("tiny_image", "handler", 4)
    baseline = Baseline.read(folder)
    first = baseline.exchanges[0]
    assert first.inputs["image"].tolist() == [png(300, 260)]
    assert first.outputs["labels"].tolist() == [[b"pig", b"hen", b"cow", b"2", b"dog"]]
    config = model_config(manifest, baseline)
    assert config.backend == "python"
    # Its model may not be loaded when it is.
    assert not config.model_warmup
    assert not warmup_files(manifest, baseline)
    script = folder / "launch.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert "--load-model=tiny)" in script.read_text()
    assert (folder / "requirements.txt").read_text().startswith("numpy\npillow==")
    assert find_deployment(str(tmp_path / "models"), "tiny_image").manifest == manifest


def test_golden_labels_of_chances_that_are_nearly_equal_are_not_held(tmp_path: Path) -> None:
    tmp_path.joinpath("files").mkdir()
    kind = KINDS["image_classifier"]
    settings = settings_of(kind, MODEL, labels=LABELS)
    even = np.full((1, 6), 1 / 6, np.float32)
    write_handler(kind, MODEL, settings, [png(300, 260)], lambda data: even, tmp_path / "files")
    assert list(Baseline.read(tmp_path / "files").exchanges[0].outputs) == ["probabilities"]


def test_no_classifier_gets_no_handler() -> None:
    boxes = TensorSpec(name="boxes", dtype="float32", shape=("batch", 10, 4))
    no_classifier = tiny_manifest(signature=IMAGES.with_outputs([boxes]))
    with pytest.raises(OutputUnusable):
        settings_of(KINDS["image_classifier"], no_classifier, labels=())


def test_bench_sends_the_golden_requests_of_a_handler(tmp_path: Path) -> None:
    published(tmp_path)
    recipe = from_repository(tmp_path / "models", "tiny_image", "1", {})
    found = recipe.requests(3)
    assert [request["image"].tolist() for request in found] == [[[png(300, 260)]], [[png(230, 330)]], [[png(300, 260)]]]
    assert set(WIRES) == {"grpc", "http"}
    from kpdeploy.bench.wire import grpc_body, http_body

    for body in (grpc_body("tiny_image", found[0]), http_body(found[0])[0]):
        assert len(png(300, 260)).to_bytes(4, "little") + png(300, 260) in body


def test_bytes_are_stored_whole_and_compared_whole(tmp_path: Path) -> None:
    bodies = of_bytes([b"", b"\x00ends in zeros\x00\x00", b"x" * 9, b"\xff"], (2, 2))
    Baseline(exchanges=(Exchange(inputs={"x": bodies}, outputs={"x": bodies}),), latencies=(), environment={}).write(
        tmp_path
    )
    found = Baseline.read(tmp_path).exchanges[0].outputs["x"]
    assert found.tolist() == bodies.tolist()
    assert compare({"x": found}, {"x": bodies}, TOLERANCES)[0].passed
    other = of_bytes([b"", b"\x00ends in zeros\x00", b"x" * 9, b"\xff"], (2, 2))
    assert not compare({"x": other}, {"x": bodies}, TOLERANCES)[0].passed


def saved(value: Any, path: Path) -> Path:
    torch.save(value, path)
    return path


def test_vocabularies_that_are_data_are_read(tmp_path: Path) -> None:
    path = tmp_path / "source_vocab.pt"
    for kind, unknown in ((dict, None), (collections.OrderedDict, None), (collections.Counter, 0)):
        assert read_vocabulary(saved(kind({"a": 1, "b": 2}), path)) == ({"a": 1, "b": 2}, unknown)
    assert read_vocabulary(saved(collections.defaultdict(int, a=1), path)) == ({"a": 1}, 0)


@pytest.fixture
def torchtext(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The classes of torchtext 0.18 as far as a pickle knows them: a module, and in it an object of C++ whose state is
    its release, the default index if there is one, the tokens, and tensors, of which it has none."""
    names = ("torchtext", "torchtext.vocab", "torchtext.vocab.vocab", "torchtext._torchtext")
    modules = {name: types.ModuleType(name) for name in names}

    class Core:
        __module__, __qualname__ = "torchtext._torchtext", "Vocab"

        def __getstate__(self) -> Any:
            return ("0.0.2", [1], ["a", "<unk>", "b"], [])

    class Vocab(torch.nn.Module):
        __module__, __qualname__ = "torchtext.vocab.vocab", "Vocab"

        def __init__(self) -> None:
            super().__init__()
            self.vocab = Core()

    modules["torchtext._torchtext"].Vocab = Core  # type: ignore[attr-defined]
    modules["torchtext.vocab.vocab"].Vocab = Vocab  # type: ignore[attr-defined]
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return Vocab()


def test_a_vocab_of_torchtext_is_read_without_torchtext(
    torchtext: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = saved(torchtext, tmp_path / "source_vocab.pt")
    for name in [name for name in sys.modules if name.startswith("torchtext")]:
        monkeypatch.delitem(sys.modules, name)
    assert read_vocabulary(path) == ({"a": 0, "<unk>": 1, "b": 2}, 1)


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


def test_whatever_else_a_vocabulary_holds_is_refused_and_nothing_of_it_runs(tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "source_vocab.pt"
    for value in (
        Evil(mark), {"a": Evil(mark)}, collections.defaultdict(Evil(mark).__reduce__, a=1), {"a": torch.zeros(1)},
        {"a": "b"}, {"a": -1}, {1: 2}, {}, [], None,
    ):  # fmt: skip
        with pytest.raises(ModelUnsafe, match=r"source_vocab\.pt"):
            read_vocabulary(saved(value, path))
    path.write_bytes(b"no zip")
    with pytest.raises(ModelUnsafe):
        read_vocabulary(path)
    assert not mark.exists()


def test_handler_json_says_what_the_handler_needs(tmp_path: Path) -> None:
    tokens = Signature(
        inputs=(TensorSpec(name="data", dtype="int64", shape=("tokens",)),),
        outputs=(TensorSpec(name="output", dtype="float32", shape=(1, 3)),),
        axes=(Axis(name="tokens", min=1, max=20),),
    )
    model = tiny_manifest(signature=tokens, max_batch_size=0)
    vocabulary = Vocabulary(ids={"a": 1}, unknown=0)
    found = settings_of(KINDS["text_classifier"], model, labels=(), vocabulary=vocabulary)
    assert (found["top"], found["most"], found["rows"], found["unknown"]) == (3, 20, 1, 0)
    json.dumps(found)
