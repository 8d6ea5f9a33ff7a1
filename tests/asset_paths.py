"""Paths of the files that tests read; assets/README.md describes them."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "assets"
SHARED = Path(os.environ.get("PISA_JAX_SHARED", ROOT.parent / "shared"))


def golden(relative: str) -> Path:
    """Path of a file recorded from the original program; tests/assets/README.md lists those of the repository."""
    committed = DATA / "fixtures" / relative
    return committed if committed.exists() else SHARED / "fixtures" / relative
