"""Where the tests find their goldens and pictures, and what keeps them quick."""

import atexit
import gc
import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Set once, by the process that starts the workers; they and the programs that tests start inherit it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    # Several devices for the tests of sharding. Most of the suite's time goes into compiling, so programs are not
    # optimised, in half the time to compile, and those that several tests compile come from one cache.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="pisa_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "assets"
SHARED = Path(os.environ.get("PISA_JAX_SHARED", ROOT.parent / "shared"))


def _find(relative: str, committed: Path, shared: Path) -> Path:
    for folder in (committed, shared):
        if (folder / relative).exists():
            return folder / relative
    assert not SHARED.exists(), f"{relative} is neither in {committed} nor in {shared}"
    pytest.skip(f"{relative} is only in the shared folder, and there is no {SHARED}")


def golden(relative: str) -> Path:
    """Path of a file recorded from the original program (see tests/assets/README.md)."""
    return _find(relative, DATA / "fixtures", SHARED / "fixtures")


def shared_data(relative: str) -> Path:
    """Path of a picture, or a folder of pictures, of the project's data set."""
    return _find(relative, DATA / "pictures", SHARED / "data")


def pytest_collection_modifyitems(items):
    """The file that takes longest comes first: begun last, it would keep one worker busy while the other is idle."""
    items.sort(key=lambda item: item.path.name != "test_training.py")


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs of a whole suite would fill the memory of a small machine."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()
