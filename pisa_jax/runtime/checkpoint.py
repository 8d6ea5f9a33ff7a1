"""Run directories: the config of a run, its orbax checkpoints, and the rules for new, resumed and overwritten runs."""

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
from pisa_jax.runtime.messages import error_text

# Config fields that may change when a run is resumed: they do not affect the result. A different mesh changes the
# adapters only by rounding.
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
    """Position of a run: the index of its stage, and the state of the data loader."""

    stage: int
    loader: dict[str, Any]


def claim_run_directory(config: Config, resume: bool, overwrite: bool) -> Path:
    """Create the run directory `config.out` with the config in it, or check it for `resume`; returns its path.

    Only process 0 accesses the directory; the others wait for its result.

    Raises:
        FileExistsError: the directory holds a run and neither flag is given, or it holds other files.
        FileNotFoundError: there is no run to resume.
        ValueError: both flags, or a resumed run whose config differs in more than `CHANGEABLE_FIELDS`.
        OSError: the directory cannot be written, or process 0 failed.
    """
    folder, error = Path(config.out), None
    if jax.process_index() == 0:
        try:
            _prepare(folder, json.loads(json.dumps(dataclasses.asdict(config))), resume, overwrite)
        except (OSError, ValueError) as raised:
            error = raised
    failed = multihost_utils.broadcast_one_to_all(np.bool_(error is not None))
    if failed:
        raise error or OSError(f"the run directory {folder} could not be created; process 0 reports the reason")
    return folder


def _prepare(folder: Path, content: dict[str, Any], resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ValueError("--resume continues a run and --overwrite deletes it: give only one of them")
    saved = folder / CONFIG_FILE
    if resume:
        if not saved.exists():
            raise FileNotFoundError(f"nothing to resume: {folder} is not a run directory (it has no {CONFIG_FILE})")
        check_same_config(json.loads(saved.read_text()), content)
        return
    # A run that was killed at its start may leave hidden files and .part folders.
    if folder.exists() and any(path.suffix != ".part" and path.name[0] != "." for path in folder.iterdir()):
        if not _is_run(saved):
            raise FileExistsError(f"{folder} exists and is not a run directory; give another with --out")
        if not overwrite:
            raise FileExistsError(
                f"{folder} exists; give --resume to continue the run, or --overwrite to delete it and start again"
            )
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(saved) as file:
            file.write_text(json.dumps(content, indent=1))
    except OSError as error:
        raise OSError(f"the run directory cannot be written, give another with --out: {error}") from error


def _is_run(saved: Path) -> bool:
    """Return True if a file is the config of a run; many other programs write a file of this name."""
    try:
        return {"stages", "out"} <= json.loads(saved.read_text()).keys()
    except (OSError, ValueError, AttributeError):
        return False


def check_same_config(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ValueError with every field, except `CHANGEABLE_FIELDS`, in which two configs (as dicts) differ."""
    before, after = _leaves(saved), _leaves(now)
    changed = [
        f"{name} was {before.get(name)!r} and is {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not name.startswith(CHANGEABLE_FIELDS)
    ]
    if changed:
        raise ValueError(
            f"the config differs from the saved run's: {'; '.join(changed)}; restore these values or start a new run"
        )


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        items = enumerate(value)
    else:
        return {prefix: value}
    return {k: v for name, item in items for k, v in _leaves(item, f"{prefix}/{name}".lstrip("/")).items()}


class Checkpoints:
    """The checkpoints of a run, written asynchronously; the newest `keep` are kept. Steps count over all stages.

    A checkpoint has the items `adapters` (all adapters trained so far), `state` (of the training step) and `progress`.
    """

    def __init__(self, folder: Path, keep: int = 2):
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        self._folder = folder.absolute() / "checkpoints"
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, adapters: Any, state: Any, progress: Progress) -> None:
        """Start to write a checkpoint; the arrays may be donated as soon as this returns.

        Raises:
            OSError: this checkpoint or the previous one could not be written; older ones are intact.
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
        """Return the progress of the newest checkpoint."""
        item = ocp.args.Composite(progress=ocp.args.JsonRestore())
        return Progress(**self._manager.restore(self.latest, args=item)["progress"])

    def restore(self, adapters: Any, state: Any) -> tuple[Any, Any]:
        """Return the newest (adapters, state) with the shapes, dtypes and shardings of the given abstract trees."""
        items = {"adapters": ocp.args.StandardRestore(adapters), "state": ocp.args.StandardRestore(state)}
        restored = self._manager.restore(self.latest, args=ocp.args.Composite(**items))
        return restored["adapters"], restored["state"]

    def preempted(self, step: int) -> bool:
        """Return True if the processes agreed to stop at this step because one of them received SIGTERM."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Wait until the pending checkpoint is written."""
        with _disk_errors(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until the pending checkpoint is written, and close the manager."""
        self.wait()
        with _disk_errors(self._folder):
            self._manager.close()


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Convert the errors of orbax and tensorstore for a full or read-only disk to one short OSError."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        # A checkpoint is renamed to its number once it is complete; the manager also counts the incomplete one.
        complete = [int(path.name) for path in folder.iterdir() if path.name.isdecimal()]
        intact = f"checkpoint {max(complete)} is intact" if complete else "there is none yet"
        text = error_text(error)[:300]
        raise OSError(
            f"a checkpoint could not be written ({intact}); free space and continue with --resume: {text}"
        ) from error
