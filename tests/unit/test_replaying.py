"""What `migrate --replay` asks and compares, with servers that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tiny_version import manifest

from kpdeploy.errors import AnswersDiffer, InputMismatch, InputsUnknown
from kpdeploy.pipeline.replaying import _Both, numbers
from kpdeploy.signature import Axis, Signature, TensorSpec

SIGNATURE = Signature(
    inputs=(TensorSpec(name="data", dtype="float32", shape=("batch", 3)),),
    outputs=(TensorSpec(name="output", dtype="float32", shape=("batch", 3)),),
    axes=(Axis(name="batch", min=1, max=4),),
)
MODEL = manifest("net", signature=SIGNATURE, input_names=("data",), output_names=("output",))


class TorchServe:
    """A handler that takes requests of one form and doubles them; `factor` makes it wrong."""

    def __init__(self, form: str, factor: float = 2.0, status: int = 500) -> None:
        self.form, self.factor, self.status = form, factor, status

    def predict(self, model: str, body: bytes, kind: str) -> tuple[int, bytes]:
        said = json.loads(body)
        rows = {
            "row": lambda: [said] if isinstance(said, list) and isinstance(said[0], float) else None,
            "instances": lambda: said.get("instances") if isinstance(said, dict) else None,
            "none": lambda: None,
        }[self.form]()
        if rows is None:
            return self.status, b'{"message": "no"}'
        return 200, json.dumps({"scores": [[self.factor * x for x in row] for row in rows]}).encode()


class Triton:
    def infer(self, model: Any, inputs: Any) -> Any:
        return {"output": 2 * np.asarray(inputs["data"])}


def both(form: str, **options: Any) -> _Both:
    archive: Any = SimpleNamespace(name="net", path=Path("net.mar"))
    torchserve: Any = TorchServe(form, **options)
    triton: Any = Triton()
    return _Both(archive, torchserve, triton)


@pytest.mark.parametrize(("form", "said"), [("row", "a row"), ("instances", "instances")])
def test_the_form_that_the_handler_answers_is_found_and_the_answers_agree(form: str, said: str) -> None:
    found = both(form).tensors(MODEL, [])
    assert said in found.form
    assert len(found.exchanges) == 4
    assert found.worst <= 1e-5


def test_a_difference_is_told_with_both_answers() -> None:
    with pytest.raises(AnswersDiffer, match="off by") as caught:
        both("row", factor=2.1).tensors(MODEL, [])
    assert "random 1: TorchServe [" in caught.value.why


@pytest.mark.parametrize("body", [b"[1, 2, 3]", b'{"data": [1, 2, 3]}', b'{"instances": [[1, 2, 3]]}'])
def test_files_are_read_in_any_form(body: bytes) -> None:
    bodies = [("a.json", json.dumps([1.0, 2.0, 3.0]).encode())]
    assert [e.request for e in both("row").tensors(MODEL, bodies).exchanges] == ["a.json"]
    with pytest.raises((InputMismatch, AnswersDiffer)):
        both("none").tensors(MODEL, [("b.json", body)])


@pytest.mark.parametrize("body", [b"no json", b'{"other": 1}', b'["a"]', b'{"data": [[1], [1, 2]]}'])
def test_files_that_hold_no_inputs_are_told(body: bytes) -> None:
    with pytest.raises(InputMismatch, match=r"b\.json"):
        both("row").tensors(MODEL, [("b.json", body)])


def test_a_handler_that_takes_nothing_made_up_wants_a_request() -> None:
    with pytest.raises(InputsUnknown) as caught:
        both("none").tensors(MODEL, [])
    assert "--request" in caught.value.next_step


def test_numbers_are_found_wherever_they_are() -> None:
    assert list(numbers({"a": [1, {"b": 2.5}], "c": "3", "d": [[4]]})) == [1, 2.5, 4]
