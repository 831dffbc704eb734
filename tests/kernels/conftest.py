"""The kernels are tested where they are built; elsewhere these tests are skipped, with the reason."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from kpdeploy.decision import Skipped
from kpdeploy.ops.libraries import ONNX, TORCH, find


@pytest.fixture(params=["avx512", "avx2", "baseline"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this CPU has, one after the other."""
    core = pytest.importorskip("kpdeploy._core")
    best = core.isa()
    try:
        core.use_isa(request.param)
    except ValueError as error:
        pytest.skip(str(error))
    yield request.param
    core.use_isa(best)


def _needs(name: str) -> str:
    path = find(name)
    if isinstance(path, Skipped):
        pytest.skip(path.reason)
    return str(path)


@pytest.fixture(scope="session")
def torch_library() -> str:
    return _needs(TORCH)


@pytest.fixture(scope="session")
def onnx_library() -> str:
    return _needs(ONNX)


@pytest.fixture(scope="session")
def registered(torch_library: str) -> None:
    """The kernels, and not their references, behind torch.ops.kpdeploy."""
    from kpdeploy.decision import Applied
    from kpdeploy.ops import register

    assert isinstance(register(), Applied)
