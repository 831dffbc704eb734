"""What all pictures of this step share: their colours, and what must hold before one is drawn."""

from __future__ import annotations

from pathlib import Path

from kpdeploy.errors import PackageMissing, RepositoryUnwritable, UnknownName

SUFFIXES = (".png", ".svg", ".pdf")
BLUE, ORANGE, GREY, FAINT = "#1f5fa8", "#d1651a", "#5b6470", "#d9dde2"


def check_picture(path: Path) -> None:
    """Raise before a long measurement where its picture could not be written."""
    if path.suffix.lower() not in SUFFIXES:
        raise UnknownName(f"{path} is no kind of picture", next_step=f"end it in {', '.join(SUFFIXES)}")
    if not path.resolve().parent.is_dir():
        raise RepositoryUnwritable(f"the folder of {path} does not exist", next_step="make it first")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise PackageMissing("--plot needs matplotlib", next_step="pip install 'kpdeploy[plot]'") from None
