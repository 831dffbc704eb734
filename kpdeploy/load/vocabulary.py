"""The vocabulary of a text_classifier (source_vocab.pt), read so that none of its pickle runs.

It is a dict of ids by token, or a Vocab of torchtext. Of both, only what is data is made: classes of torchtext become
boxes that hold their state, and whatever else the pickle asks for is refused.
"""

from __future__ import annotations

import collections
import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kpdeploy.errors import ModelUnsafe

MOST_BYTES = 256 << 20
VOCABULARY = "source_vocab.pt"


class _Box:
    """Stands for an object of torchtext: what it was made with is dropped, its state is kept."""

    def __init__(self, *_: Any) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _zero() -> int:
    return 0


_MADE: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("collections", "defaultdict"): collections.defaultdict,
    ("collections", "Counter"): collections.Counter,
    # torch writes the names of Python 2.
    **{(place, kind.__name__): kind for place in ("builtins", "__builtin__") for kind in (int, set, list, dict)},
    ("__builtin__", "long"): int,
    ("torchtext.vocab", "_default_unk_index"): _zero,
    ("torchtext.vocab.vocab", "_default_unk_index"): _zero,
    **{(place, "Vocab"): _Box for place in ("torchtext.vocab", "torchtext.vocab.vocab", "torchtext._torchtext")},
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _MADE:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return _MADE[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it holds tensors")


def read_vocabulary(path: Path) -> tuple[dict[str, int], int | None]:
    """The id of each token, and that of all others; None where they have none.

    Raises:
        ModelUnsafe: it holds anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            (name,) = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if archive.getinfo(name).file_size > MOST_BYTES:
                raise ValueError("it is larger than a vocabulary")
            found = _Reader(io.BytesIO(archive.read(name))).load()
        ids, unknown = _taken(found)
        if not ids or not all(isinstance(t, str) and type(i) is int and 0 <= i < 2**31 for t, i in ids.items()):
            raise ValueError("it does not hold an id for each token")
    except Exception as error:  # a pickle's reader raises whatever its content provokes
        raise ModelUnsafe(
            f"{path.name} is no vocabulary that can be read as data",
            why=f"{type(error).__name__}: {error}",
            next_step="save it as a dict: torch.save(vocab.get_stoi(), 'source_vocab.pt')",
        ) from None
    return ids, unknown


def _taken(found: Any) -> tuple[dict[str, int], int | None]:
    if isinstance(found, collections.Counter):
        return dict(found), 0
    if isinstance(found, collections.defaultdict):
        return dict(found), None if found.default_factory is None else int(found.default_factory())
    if isinstance(found, dict):
        return dict(found), None
    state = found.state
    # Since 0.10: a module around the Vocab of C++, whose state is its release, the default index, and the tokens.
    if isinstance(state, dict) and isinstance(state.get("vocab"), _Box):
        _, integers, tokens, *_ = state["vocab"].state
        return {token: index for index, token in enumerate(tokens)}, integers[0] if integers else None
    # Before: a Python object with stoi.
    ids: Any = state["stoi"] if isinstance(state, dict) else None
    return _taken(ids)
