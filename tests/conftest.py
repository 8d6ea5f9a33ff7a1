"""Test infrastructure: paths of recorded data, quick compilation, worker processes, and which skips are allowed."""

import atexit
import gc
import os
import shutil
import signal
import tempfile
import uuid
from pathlib import Path

import pytest
from asset_paths import DATA, ROOT, SHARED, golden
from emulated_bucket import emulated_bucket

# Set once, by the process that starts the workers; they and the programs that tests start inherit it.
if "PYTEST_XDIST_WORKER" not in os.environ:
    # Several devices for the tests of sharding. Most of the suite's time is compilation: without optimization it takes
    # half the time, with the older generator of fused loops a fifth less, and programs that several tests compile come
    # from one cache.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="pisa_jax_tests_")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

# Tests import the paths from here.
__all__ = ["DATA", "ROOT", "SHARED", "golden", "shared_data"]

# In CI, a skip whose reason begins otherwise is a failure: the default suite leaves nothing unproven.
ALLOWED_SKIPS = ("needs pip install", "needs a browser", "needs an accelerator", "needs mount namespaces")
# The files that take longest, longest first: started last, one would keep a worker busy while the others are idle.
LONGEST = ("test_training.py",)
MOST_WORKERS = 4  # each needs about 3 GB


def shared_data(relative: str) -> Path:
    """Path of images that are not in the repository. Mark the test `external`."""
    return SHARED / "data" / relative


@pytest.fixture
def interruptible():
    """Let SIGINT reach this process and its children also where the tests run in the background of a shell script."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def emulator():
    """The storage of an emulated Google Cloud Storage with the bucket "tests"."""
    with emulated_bucket() as storage:
        yield storage


@pytest.fixture
def bucket(emulator):
    """An empty folder in an emulated bucket."""
    return f"gs://tests/{uuid.uuid4().hex[:8]}"


def pytest_xdist_auto_num_workers(config):
    """Number of workers for `-n auto`: none where files or tests are named, since starting them takes seconds."""
    if any(not Path(argument).is_dir() for argument in config.option.file_or_dir):
        return 0
    return min(os.cpu_count() or 1, MOST_WORKERS)


def pytest_collection_modifyitems(config, items):
    """Order the files by duration, and deselect tests of images that are not there."""
    position = {name: index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: position.get(item.path.name, len(LONGEST)))
    if not SHARED.exists():
        external = [item for item in items if item.get_closest_marker("external")]
        config.hook.pytest_deselected(items=external)
        items[:] = [item for item in items if item not in external]


DESELECTED = pytest.StashKey[dict[str, int]]()
HINTS = {
    "slow": "run them with: pytest -m slow",
    "external": f"they need images that are not in the repository, and there is no {SHARED}",
}


def pytest_deselected(items):
    """Count what the summary reports."""
    for item in items:
        counts = item.config.stash.setdefault(DESELECTED, dict.fromkeys(HINTS, 0))
        slow = item.get_closest_marker("slow") is not None
        counts["slow" if slow else "external"] += 1


def pytest_sessionfinish(session):
    """Workers collect, and the process that started them reports."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["deselected"] = session.config.stash.get(DESELECTED, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Every worker collects the same tests."""
    if deselected := getattr(node, "workeroutput", {}).get("deselected"):
        node.config.stash[DESELECTED] = deselected


def pytest_terminal_summary(terminalreporter, config):
    """Report which tests were deselected, and how to run them."""
    for name, count in config.stash.get(DESELECTED, {}).items():
        if count:
            terminalreporter.write_line(f"{count} {name} tests deselected; {HINTS[name]}")


def refuse_skip(report):
    """Turn a skip into a failure in CI, unless an optional package, an accelerator or a right is missing."""
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("CI") == "true":
        _, _, reason = report.longrepr
        reason = reason.removeprefix("Skipped: ")
        if not reason.startswith(ALLOWED_SKIPS):
            report.outcome = "failed"
            report.longrepr = f"skipped, which fails in CI: {reason!r}; allowed reasons begin with {ALLOWED_SKIPS}"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    return refuse_skip((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    return refuse_skip((yield))


@pytest.fixture(scope="module", autouse=True)
def _forget_programs():
    """Compiled programs of a whole suite would fill the memory of a small machine."""
    yield
    import jax

    jax.clear_caches()
    gc.collect()
