"""launch.sh: how one version is served by NVIDIA's container, written into the version's folder."""

from __future__ import annotations

import shlex

from kpdeploy.artifact import Manifest
from kpdeploy.ops.libraries import TORCH
from kpdeploy.runtimes import PACKAGES
from kpdeploy.serving.triton.config import HANDLER_FORMAT, holds_model_py

LAUNCH = "launch.sh"
REQUIREMENTS = "requirements.txt"
"""What a model of the python backend needs of Python in the server's container."""

TORCH_LIBRARIES = "/opt/tritonserver/backends/pytorch"
"""Where the container has libtorch, which a kernel library for torch looks for when it is preloaded."""

_SCRIPT = """\
#!/usr/bin/env bash
# Serve {name} v{version} in NVIDIA's container:  bash {launch} [more options of tritonserver]
# Written by kpdeploy. What it reads of the environment:
#   TRITON_IMAGE  another image; `kpdeploy doctor REPO --container TAG` says what would load in it
#   REPO          the repository, where it is not two folders above this file
#   HTTP_PORT, GRPC_PORT, METRICS_PORT   on 127.0.0.1, in place of 8000, 8001 and 8002
#   DOCKER        what runs containers, in place of docker
# The server loads this model; --load-model=NAME adds another one of the repository.
set -euo pipefail

image=${{TRITON_IMAGE:-{image}}}
repo=${{REPO:-"$(dirname -- "${{BASH_SOURCE[0]}}")/../.."}}
repo=$(cd -- "$repo" && pwd)
model={model}
mount={mount}

# The server reads the version from config.pbtxt; the options below are those of this one.
if ! grep -Eqs 'versions: *\\[? *{version}( |\\]|$)' "$repo/$model/config.pbtxt"; then
    echo "$repo/$model/config.pbtxt does not name version {version}: run the launch.sh of the version it names" >&2
    exit 1
fi

options=(
    --rm
    --publish "127.0.0.1:${{HTTP_PORT:-8000}}:8000"
    --publish "127.0.0.1:${{GRPC_PORT:-8001}}:8001"
    --publish "127.0.0.1:${{METRICS_PORT:-8002}}:8002"
    --mount "type=bind,source=$repo,target=$mount,readonly"
)
{preload}server+=("--model-repository=$mount" --model-control-mode=explicit "--load-model=$model")
exec "${{DOCKER:-docker}}" run "${{options[@]}}" "$image" "${{server[@]}}" "$@"
"""

_PLAIN = "server=(tritonserver)\n"

_PRELOADED = """\
# The kernel library is there before libtorch reads the model. Only the server gets it, not what the container runs
# before; $0 is the library.
# shellcheck disable=SC2016
preloaded='exec env "LD_PRELOAD=$0" "LD_LIBRARY_PATH={torch}${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}" tritonserver "$@"'
server=(bash -c "$preloaded" "$mount/$model/{version}/{library}")
"""

_INSTALLED = """\
# shellcheck disable=SC2016
installed='python3 -m pip install --quiet --requirement "$0" && exec tritonserver "$@"'
server=(bash -c "$installed" "$mount/$model/{version}/{requirements}"{more})
"""

_HANDLER = "# The container's Python lacks its packages, and the server does not load by itself the model behind it.\n"

_GPU = """\
# On the machine's GPUs{lacks}.
options+=(--gpus all)
"""


def launch_script(manifest: Manifest, image: str) -> str:
    """The script of a version: its container, ports and mount, and a preloaded kernel library where libtorch needs
    one. It holds no path of this machine."""
    preload = _PLAIN
    if holds_model_py(manifest):
        lacks = _GPU.format(lacks=f"; the container's Python lacks {PACKAGES[manifest.format][0]}")
        preload = lacks + _INSTALLED.format(version=manifest.version, requirements=REQUIREMENTS, more="")
    elif manifest.settings.get("device") == "cuda":
        preload = _GPU.format(lacks="") + _PLAIN
    elif TORCH in manifest.settings.get("op_libraries", ()):
        preload = _PRELOADED.format(torch=TORCH_LIBRARIES, version=manifest.version, library=TORCH)
    elif manifest.format == HANDLER_FORMAT:
        more = f" --load-model={shlex.quote(str(manifest.source['model']))}"
        preload = _HANDLER + _INSTALLED.format(version=manifest.version, requirements=REQUIREMENTS, more=more)
    return _SCRIPT.format(
        name=manifest.model,
        model=shlex.quote(manifest.model),
        version=manifest.version,
        launch=LAUNCH,
        image=image,
        mount=shlex.quote(manifest.mount),
        preload=preload,
    )
