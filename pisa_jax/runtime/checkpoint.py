"""What a run writes so that it can go on: orbax checkpoints, the config beside them, and the rules of its folder."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from pisa_jax.config import Config
from pisa_jax.runtime.atomic_write import atomic_write

# Fields that may change when a run goes on: where and how it computes and reports, not what. Another mesh changes the
# adapters by rounding only.
CHANGEABLE_FIELDS = (
    "out",
    "mesh_data",
    "mesh_fsdp",
    "log_every",
    "save_every",
    "validation",
    "data/workers",
    "max_bad_steps",
)
CONFIG_FILE = "config.json"


class Progress(NamedTuple):
    """Where a run stands: index of the stage, and the loader's state."""

    stage: int
    loader: dict[str, Any]


def claim_run_directory(config: Config, resume: bool, overwrite: bool) -> Path:
    """The run's folder with its config in it, ready for a new run, or for going on with `resume`.

    One process looks at and changes the folder, the others wait for what it found.

    Raises:
        FileExistsError: it holds a run, and neither flag is given, or something else than a run.
        FileNotFoundError: nothing to resume. ValueError: resuming with a config that differs in what matters.
        OSError: the folder cannot be written, or the process that claims it failed.
    """
    folder, error = Path(config.out), None
    if jax.process_index() == 0:
        try:
            _claim(folder, json.loads(json.dumps(dataclasses.asdict(config))), resume, overwrite)
        except (OSError, ValueError) as raised:
            error = raised
    failed = multihost_utils.broadcast_one_to_all(np.bool_(error is not None))
    if failed:
        raise error or OSError(f"{folder} could not be claimed; process 0 says why")
    return folder


def _claim(folder: Path, described: dict[str, Any], resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ValueError("--resume goes on with a run and --overwrite deletes it: give one of them")
    saved = folder / CONFIG_FILE
    if resume:
        if not saved.exists():
            raise FileNotFoundError(f"nothing to resume: {folder} holds no run (no {CONFIG_FILE})")
        check_same_config(json.loads(saved.read_text()), described)
        return
    # Hidden files and .part are what a run that was killed at its start leaves.
    if folder.exists() and any(path.suffix != ".part" and path.name[0] != "." for path in folder.iterdir()):
        if not _is_run(saved):
            raise FileExistsError(f"{folder} holds other things than a run; give another folder with --out")
        if not overwrite:
            raise FileExistsError(f"{folder} exists; give --resume to go on with it, --overwrite to start it anew")
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(saved) as file:
            file.write_text(json.dumps(described, indent=1))
    except OSError as error:
        raise OSError(f"the run's folder cannot be written, give another with --out: {error}") from error


def _is_run(saved: Path) -> bool:
    """Whether a file is the config of a run, and not one of the many other things that are called so."""
    try:
        return {"stages", "out"} <= json.loads(saved.read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def check_same_config(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """ValueError naming every field, other than the free ones, in which two configs as dicts differ."""
    before, after = _leaves(saved), _leaves(now)
    changed = [
        f"{name} was {before.get(name)!r} and is {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not name.startswith(CHANGEABLE_FIELDS)
    ]
    if changed:
        raise ValueError(f"the config differs from the saved run's: {'; '.join(changed)}; restore these or start anew")


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        items = enumerate(value)
    else:
        return {prefix: value}
    return {k: v for name, item in items for k, v in _leaves(item, f"{prefix}/{name}".lstrip("/")).items()}


class Checkpoints:
    """The checkpoints of a run, written in the background, the newest kept; steps count over all stages.

    Each has the items `adapters` (for inference: every adapter trained so far), `state` (for resuming) and `progress`.
    """

    def __init__(self, folder: Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._folder = folder.absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    @property
    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, adapters: Any, state: Any, progress: Progress) -> None:
        """Start writing a checkpoint; arrays may be donated as soon as this returns.

        Raises:
            OSError: this one, or the one before, could not be written; older ones are intact.
        """
        if step == self.latest:
            return
        items = {
            "adapters": ocp.args.StandardSave(adapters),
            "state": ocp.args.StandardSave(state),
            "progress": ocp.args.JsonSave(progress._asdict()),
        }
        with _disk_errors(self._folder):
            self._manager.save(step, args=ocp.args.Composite(**items))

    def progress(self) -> Progress:
        """Where the newest checkpoint stands."""
        item = ocp.args.Composite(progress=ocp.args.JsonRestore())
        return Progress(**self._manager.restore(self.latest, args=item)["progress"])

    def restore(self, adapters: Any, state: Any) -> tuple[Any, Any]:
        """The newest (adapters, state) in the shapes, dtypes and shardings of the abstract trees given."""
        items = {"adapters": ocp.args.StandardRestore(adapters), "state": ocp.args.StandardRestore(state)}
        restored = self._manager.restore(self.latest, args=ocp.args.Composite(**items))
        return restored["adapters"], restored["state"]

    def preempted(self, step: int) -> bool:
        """Whether all processes of the run have agreed to stop at this step because one was told to (SIGTERM)."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Wait for what is being written."""
        with _disk_errors(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait for what is being written, and end."""
        self.wait()
        with _disk_errors(self._folder):
            self._manager.close()


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Turns what orbax and tensorstore raise for a full or read-only disk into one sentence."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        # A checkpoint gets its number as its name when it is complete; the manager counts the broken one, too.
        complete = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
        intact = f"checkpoint {max(complete)} is intact" if complete else "none is there yet"
        text = " ".join(str(error).split())[:300]
        raise OSError(
            f"a checkpoint could not be written ({intact}); free space and go on with --resume: {text}"
        ) from error
