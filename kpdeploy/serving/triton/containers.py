"""What NVIDIA's tritonserver containers hold, by tag: what a repository is checked against before it meets one.

Where the numbers come from (looked up in November 2026; a cell without a source is None, which means not known):

- ONNX Runtime, Python: docs/introduction/compatibility.md of triton-inference-server/server (for 24.12 its release
  notes say 1.19.2 where that table says 1.20.1). CUDA: the release notes, docs.nvidia.com/deeplearning/
  triton-inference-server/release-notes, and for the months whose page was not at hand that same table; by major and
  minor, in which the two agree wherever both speak. 26.09: the README of ai-dynamo/dynamo names its CUDA.
- Driver: the release the notes demand ("requires NVIDIA Driver release 575 or later"); data-centre GPUs have more ways.
- PyTorch: the pytorch backend is built from nvcr.io/nvidia/pytorch of the same month (its README; issue 8414 of the
  server repository for 25.09), and those containers report their torch as `2.9.0a0+50eac811a6.nv25.09`. An `a0` is a
  snapshot from before that release, so 2.10.0a0 does not count as 2.10. Of 25.07 none was found.
- OpenVINO: 24.12 as its release notes say; 25.03 as build.py of 25.03dev; 25.05 as the pull request (8196) that brought
  it together with ONNX Runtime 1.22. All others are not told.
- Ubuntu follows from the Python: 3.10.12 is that of 22.04, 3.12.3 that of 24.04 (24.12's notes name both). glibc and
  libstdc++ (of GCC 12.3 and 14) are those of the Ubuntu; symbol versions as in libstdc++'s manual, "ABI Policy".
- torch_aoti: since 26.03, Beta, and its names by call spec since 26.05: what pytorch_backend's documentation said when
  the format pt2 was added here.
- ONNX opsets and IR versions: tried with ONNX Runtime's own packages of these releases, one tiny model a version.
- OpenVINO's operation sets: docs.openvino.ai, "Available Operation Sets"; opset16 as in the package of 2025.0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from kpdeploy.errors import UnknownName

REGISTRY = "nvcr.io/nvidia/tritonserver"


@dataclass(frozen=True, kw_only=True)
class Container:
    """The versions of what loads a model; None where they are not known.

    `driver` is the NVIDIA driver that the container demands of its host. `glibcxx` is the newest symbol version of
    its libstdc++. `torch_aoti`: does the pytorch backend run AOTInductor packages?
    """

    tag: str
    ubuntu: str | None = None
    python: str | None = None
    glibc: str | None = None
    glibcxx: str | None = None
    cuda: str | None = None
    driver: str | None = None
    onnxruntime: str | None = None
    torch: str | None = None
    openvino: str | None = None
    torch_aoti: bool = False

    @property
    def image(self) -> str:
        return f"{REGISTRY}:{self.tag}-py3"

    def __str__(self) -> str:
        return f"tritonserver:{self.tag}" if self.tag[:1].isdigit() else self.tag


VERSIONS = ("glibc", "glibcxx", "cuda", "driver", "onnxruntime", "torch", "openvino")
"""The fields of a Container that are versions of what a model may need."""

# tag, Python, CUDA, driver, ONNX Runtime, PyTorch, OpenVINO
_ROWS = (
    ("24.10", "3.10.12", "12.6", "560", "1.19.2", "2.5.0a0", None),
    ("24.11", "3.12.3", "12.6", None, "1.19.2", "2.6.0a0", None),
    ("24.12", "3.12.3", "12.6", "560", "1.20.1", "2.6.0a0", "2024.4.0"),
    ("25.01", "3.12.3", "12.8", None, "1.20.1", "2.6.0a0", None),
    ("25.02", "3.12.3", "12.8", None, "1.20.1", "2.7.0a0", None),
    ("25.03", "3.12.3", "12.8", "560", "1.21.0", "2.7.0a0", "2025.0.0"),
    ("25.04", "3.12.3", "12.9", "575", "1.21.0", "2.7.0a0", None),
    ("25.05", "3.12.3", "12.9", None, "1.22.0", "2.8.0a0", "2025.1.0"),
    ("25.06", "3.12.3", "12.9", "575", "1.22.0", "2.8.0a0", None),
    ("25.07", "3.12.3", "12.9", None, "1.22.0", None, None),
    ("25.08", "3.12.3", "13.0", "575", "1.23.0", "2.8.0a0", None),
    ("25.09", "3.12.3", "13.0", None, "1.23.0", "2.9.0a0", None),
    ("25.10", "3.12.3", "13.0", "575", "1.23.1", "2.9.0a0", None),
    ("25.11", "3.12.3", "13.0", None, "1.23.2", "2.10.0a0", None),
    ("25.12", "3.12.3", "13.1", "575", "1.23.2", "2.10.0a0", None),
    ("26.01", "3.12.3", "13.1", None, "1.23.2", "2.10.0a0", None),
    ("26.02", "3.12.3", "13.1", "575", "1.24.1", "2.11.0a0", None),
    ("26.03", "3.12.3", "13.2", None, "1.24.2", "2.11.0a0", None),
    ("26.04", "3.12.3", "13.2", "575", "1.24.4", "2.12.0a0", None),
    ("26.05", "3.12.3", "13.2", None, "1.24.4", "2.12.0a0", None),
    ("26.06", "3.12.3", "13.3", None, "1.24.4", "2.13.0a0", None),
    ("26.07", "3.12.3", "13.3", None, "1.27.0", "2.13.0a0", None),
    ("26.08", "3.12.3", "13.4", None, "1.28.0", "2.14.0a0", None),
    ("26.09", None, "13.4", None, None, "2.14.0a0", None),
    ("26.10", None, "13.4", None, None, None, None),
)

# Python: Ubuntu, its glibc, the newest GLIBCXX of its libstdc++.
_UBUNTU = {"3.10.12": ("22.04", "2.35", "3.4.30"), "3.12.3": ("24.04", "2.39", "3.4.33"), None: (None, None, None)}

TORCH_AOTI_SINCE = "26.03"
CALL_SPEC_SINCE = "26.05"
"""The container whose torch_aoti knows inputs by more names than INPUT__<index>."""


def _container(row: tuple[str, str | None, str | None, str | None, str | None, str | None, str | None]) -> Container:
    tag, python, cuda, driver, onnxruntime, torch, openvino = row
    ubuntu, glibc, glibcxx = _UBUNTU[python]
    return Container(
        tag=tag,
        ubuntu=ubuntu,
        python=python,
        glibc=glibc,
        glibcxx=glibcxx,
        cuda=cuda,
        driver=driver,
        onnxruntime=onnxruntime,
        torch=torch,
        openvino=openvino,
        torch_aoti=tag >= TORCH_AOTI_SINCE,
    )


CONTAINERS = {row[0]: _container(row) for row in _ROWS}
"""Oldest first."""

# The newest opset and IR version that a release of ONNX Runtime loads, from that release on.
_ONNX = {"1.19": (21, 10), "1.21": (22, 10), "1.23": (23, 11), "1.24": (25, 13), "1.27": (26, 13)}

# The release of OpenVINO that brought an operation set.
_OPSETS = {
    8: "2022.1",
    9: "2022.2",
    10: "2022.3",
    11: "2023.0",
    12: "2023.1",
    13: "2023.2",
    14: "2024.0",
    15: "2024.5",
    16: "2025.0",
}


def find_container(name: str) -> Container:
    """A container by `25.09`, `tritonserver:25.09`, or a whole image such as nvcr.io/nvidia/tritonserver:25.09-py3.

    Raises:
        UnknownName: it is not in the table; names the nearest that is.
    """
    tag = re.sub(r"-.*$", "", name.strip().rpartition(":")[2])
    place = name.strip().rpartition(":")[0].rpartition("/")[2]
    if tag in CONTAINERS and place in ("", "tritonserver"):
        return CONTAINERS[tag]
    raise UnknownName(
        f"no container {name!r} is known",
        why=f"the table holds tritonserver:{min(CONTAINERS)} to {max(CONTAINERS)}",
        next_step=f"did you mean tritonserver:{_near(tag)}?",
    )


def _near(tag: str) -> str:
    """The closest tag: by time where it is a month, else by spelling, else the newest."""
    import difflib

    if re.fullmatch(r"\d\d\.\d\d", tag):
        return min(CONTAINERS, key=lambda known: abs(_months(known) - _months(tag)))
    return (*difflib.get_close_matches(tag, CONTAINERS, n=1), max(CONTAINERS))[0]


def _months(tag: str) -> int:
    return 12 * int(tag[:2]) + int(tag[3:])


def settled(container: Container) -> tuple[Container, dict[str, str]]:
    """The container with its unknown versions taken from the nearest earlier one that is known, since they never go
    back; and, for each that was, the container that it came from. What no earlier one tells stays None."""
    origins = {}
    for name in VERSIONS:
        if getattr(container, name) is None and container.tag in CONTAINERS:
            earlier = [c for c in CONTAINERS.values() if c.tag < container.tag and getattr(c, name) is not None]
            if earlier:
                origins[name] = str(earlier[-1])
                container = replace(container, **{name: getattr(earlier[-1], name)})
    return container, origins


def order(version: str) -> tuple[int, ...]:
    """A version for comparisons. An alpha comes before its release: 2.10.0a0 < 2.10."""
    numbers = tuple(map(int, re.findall(r"\d+", re.split(r"[a-z+]", version)[0])))
    trimmed = (*numbers, 0, 0, 0)[:4]
    alpha = re.match(r"[0-9.]+(a|b|rc|\.?dev)", version) is not None
    return (*trimmed, -1 if alpha else 0)


def onnxruntime_since(opset: int, ir: int) -> str | None:
    """The oldest release of ONNX Runtime that loads a file of this opset and IR version; None where none that was
    tried does. Asked for what is older than the table, it names the table's first."""
    return next((since for since, (newest, newest_ir) in _ONNX.items() if opset <= newest and ir <= newest_ir), None)


def openvino_since(opset: int) -> str | None:
    """The oldest release of OpenVINO with an operation set; None where it is not known."""
    return _OPSETS.get(max(opset, min(_OPSETS)))
