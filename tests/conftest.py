"""Where the tests find their goldens and pictures, and what keeps them quick."""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Many tests compile the same programs: one cache for all workers (which inherit it) and the processes they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="pisa_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

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


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs of a whole suite would fill the memory of a small machine."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()
