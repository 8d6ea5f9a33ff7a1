"""Where the tests find their goldens and pictures."""

import os
from pathlib import Path

import pytest

# Several devices for the tests of sharding. Most of the suite's time goes into compiling, so programs are not
# optimised: the same operations, in half the time to compile.
os.environ["XLA_FLAGS"] = (
    f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"
SHARED = Path(os.environ.get("PISA_JAX_SHARED", ROOT.parent / "shared"))


def _find(relative: str, committed: Path, shared: Path) -> Path:
    for folder in (committed, shared):
        if (folder / relative).exists():
            return folder / relative
    assert not SHARED.exists(), f"{relative} is neither in {committed} nor in {shared}"
    pytest.skip(f"{relative} is only in the shared folder, and there is no {SHARED}")


def golden(relative: str) -> Path:
    """Path of a file recorded from the original program (see tests/data/README.md)."""
    return _find(relative, DATA / "fixtures", SHARED / "fixtures")


def shared_data(relative: str) -> Path:
    """Path of a picture, or a folder of pictures, of the project's data set."""
    return _find(relative, DATA / "pictures", SHARED / "data")
