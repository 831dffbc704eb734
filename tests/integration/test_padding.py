"""Requests of different lengths in one batch: proven on the artifact, and merged by the real server."""

from __future__ import annotations

import re
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from kpdeploy.artifact import Artifact, Manifest, Verdict
from kpdeploy.baseline import Baseline, Exchange
from kpdeploy.compare import TOLERANCES, relative_error
from kpdeploy.decision import Applied, Skipped
from kpdeploy.hardware import environment
from kpdeploy.inputs import sample
from kpdeploy.runtimes.process import RuntimeProcess
from kpdeploy.serving.client import connect
from kpdeploy.serving.repository import read_repository
from kpdeploy.serving.triton.repository import publish
from kpdeploy.serving.triton.server import Server, serve
from kpdeploy.signature import Signature, parse_inputs
from kpdeploy.verify import Question, prove

TABLE = np.random.default_rng(3).standard_normal((50, 8)).astype(np.float32)
IDS, MASK = "ids:int64[batch=1..16,seq=1..64]{0..49}", "mask:int64[batch,seq]{mask}"


def signature(*texts: str) -> Signature:
    outputs = parse_inputs([*texts, "pooled:float32[batch,8]", "rows:float32[batch,seq,8]"]).inputs[-2:]
    return parse_inputs(texts).with_outputs(outputs)


def reference(ids: Any, mask: Any, *, masked: bool = True) -> dict[str, Any]:
    """rows = table[ids]; pooled is their mean, over the mask or over all positions."""
    rows = TABLE[ids]
    weight = mask[:, :, None].astype(np.float32) if masked else np.ones((*mask.shape, 1), np.float32)
    return {"pooled": (rows * weight).sum(axis=1) / weight.sum(axis=1), "rows": rows}


def onnx_file(*, masked: bool) -> bytes:
    nodes = [helper.make_node("Gather", ["table", "ids"], ["rows"]), helper.make_node("Cast", ["mask"], ["m"], to=1)]
    if masked:
        nodes += [
            helper.make_node("Unsqueeze", ["m", "last"], ["weight"]),
            helper.make_node("Mul", ["rows", "weight"], ["weighted"]),
            helper.make_node("ReduceSum", ["weighted", "seq_axis"], ["sum"], keepdims=0),
            helper.make_node("ReduceSum", ["weight", "seq_axis"], ["count"], keepdims=0),
            helper.make_node("Div", ["sum", "count"], ["pooled"]),
        ]
    else:
        nodes.append(helper.make_node("ReduceMean", ["rows"], ["pooled"], axes=[1], keepdims=0))
    constants = {"table": TABLE, "last": np.array([-1]), "seq_axis": np.array([1])}
    graph = helper.make_graph(
        nodes,
        "pooling",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "seq"]) for name in ("ids", "mask")],
        [
            helper.make_tensor_value_info("pooled", TensorProto.FLOAT, ["batch", 8]),
            helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", "seq", 8]),
        ],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    return bytes(model.SerializeToString())


def verdict(folder: Path, *texts: str, masked: bool = True) -> Verdict:
    """The proof of the pooling model as an ONNX artifact."""
    (folder / "model.onnx").write_bytes(onnx_file(masked=masked))
    described, rng = signature(*texts), np.random.default_rng(0)
    artifact = Artifact(
        format="onnx",
        folder=folder,
        filename="model.onnx",
        input_names=("ids", "mask"),
        output_names=("pooled", "rows"),
        settings={"threads": 1},
    )
    inputs = sample(described, {"batch": 3, "seq": 9}, rng)
    asked = Question(point={"batch": 3, "seq": 9}, inputs=inputs, expected=reference(**inputs, masked=masked))
    with RuntimeProcess(artifact) as process:
        found = prove(process, described, [asked], TOLERANCES, rng)
    assert found.passed
    assert found.max_batch_size == 16
    return found


def test_a_model_that_minds_its_mask_may_be_padded(tmp_path: Path) -> None:
    found = verdict(tmp_path, IDS, MASK)
    assert found.padded_axes == ("seq",)
    assert isinstance(found.padding, Applied)
    assert re.fullmatch(r"padding proven neutral, worst error \d\.\de-\d\d", found.padding.detail), found.padding


def test_a_model_that_looks_at_all_positions_is_not_padded_and_says_by_how_much_it_changes(tmp_path: Path) -> None:
    found = verdict(tmp_path, IDS, MASK, masked=False)
    assert found.padded_axes == ()
    assert isinstance(found.padding, Skipped)
    assert re.match(r"padding changes pooled at seq \d+ by \d\.\de[-+]\d\d, at most 1e-05", found.padding.reason)


def test_where_zero_is_no_valid_value_nothing_is_padded(tmp_path: Path) -> None:
    found = verdict(tmp_path, IDS.replace("{0..", "{1.."), MASK)
    assert found.padding == Skipped(
        what="requests of different seq are merged", reason="0, the padding, is no valid value of ids"
    )


def test_without_a_mask_there_is_nothing_to_decide(tmp_path: Path) -> None:
    found = verdict(tmp_path, IDS, MASK.replace("{mask}", "{1..1}"))
    assert (found.padded_axes, found.padding) == ((), None)


# Served


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("padding")
    files = folder / "files"
    files.mkdir()
    found = verdict(files, IDS, MASK)
    described = signature(IDS, MASK)
    inputs = sample(described, {"batch": 2, "seq": 5}, np.random.default_rng(1))
    Baseline(exchanges=(Exchange(inputs=inputs, outputs=reference(**inputs)),), latencies=(), environment={}).write(
        files
    )
    manifest = Manifest(
        model="pooling",
        version=0,
        target="triton",
        format="onnx",
        filename="model.onnx",
        signature=described,
        max_batch_size=found.max_batch_size,
        input_names=("ids", "mask"),
        output_names=("pooled", "rows"),
        settings={"threads": 1},
        files={},
        tolerances=TOLERANCES,
        decisions=(),
        formats=(),
        source={},
        environment=environment(),
        created="2026-01-01T00:00:00Z",
        padded_axes=found.padded_axes,
    )
    publish(str(folder / "models"), manifest, files)
    publish(str(folder / "models"), replace(manifest, model="apart", padded_axes=()), files)
    # A delay in which the burst of a busy machine gathers.
    patient = "dynamic_batching { max_queue_delay_microseconds: 200000 }"
    for config in (folder / "models").glob("*/config.pbtxt"):
        config.write_text(re.sub(r"dynamic_batching {[^}]*}", patient, config.read_text()))
    return folder / "models"


@pytest.fixture(scope="module")
def server(repo: Path) -> Iterator[Server]:
    with serve(repo, http_port=0, grpc_port=0, metrics_port=0) as running:
        yield running


def executions(server: Server, model: str) -> float:
    text = urllib.request.urlopen(server.metrics, timeout=10).read().decode()
    return sum(float(v) for v in re.findall(rf'^nv_inference_exec_count{{model="{model}"[^}}]*}} (\S+)$', text, re.M))


def burst(server: Server, repo: Path, model: str, lengths: list[int]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Requests of these lengths, all at once: (request, answer) of each."""
    manifest = next(d.manifest for d in read_repository(str(repo)) if d.model == model)
    rng = np.random.default_rng(5)
    requests = [sample(manifest.signature, {"batch": 1 + i % 2, "seq": n}, rng) for i, n in enumerate(lengths)]
    start = threading.Barrier(len(requests))

    def one(request: dict[str, Any]) -> dict[str, Any]:
        with connect(server.grpc) as client:
            start.wait()
            return dict(client.infer(manifest, request))

    with ThreadPoolExecutor(len(requests)) as pool:
        return list(zip(requests, pool.map(one, requests), strict=True))


LENGTHS = [1, 64, 7, 12, 2, 9, 30, 8]


def test_requests_of_different_lengths_share_an_execution_and_are_answered_as_if_alone(
    server: Server, repo: Path
) -> None:
    assert server.served["pooling"].padding
    before = executions(server, "pooling")
    for request, answer in burst(server, repo, "pooling", LENGTHS):
        for name, wanted in reference(**request).items():
            assert relative_error(answer[name], wanted) <= TOLERANCES["float32"]
    assert executions(server, "pooling") - before < len(LENGTHS)


def test_where_padding_is_not_proven_only_equal_lengths_share_one(server: Server, repo: Path) -> None:
    assert not server.served["apart"].padding
    before = executions(server, "apart")
    for request, answer in burst(server, repo, "apart", LENGTHS):
        for name, wanted in reference(**request).items():
            assert relative_error(answer[name], wanted) <= TOLERANCES["float32"]
    assert executions(server, "apart") - before == len(LENGTHS)
