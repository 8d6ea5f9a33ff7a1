"""The orbax checkpoints of a run: asynchronous writes, checksums, and recovery from damaged checkpoints."""

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from pisa_jax.runtime.checksums import CHECKSUMS_FILE, find_damage, write_checksums
from pisa_jax.runtime.messages import error_text

logger = logging.getLogger(__name__)

# Items of a checkpoint that hold arrays.
ARRAYS = ("adapters", "state")


class Progress(NamedTuple):
    """Position of a run: the index of its stage, the state of the data loader, and the model."""

    stage: int
    loader: dict[str, Any]
    # Digest of the weights of the base model; None: from a program that did not record it.
    model: str | None = None


class Checkpoints:
    """The checkpoints of a run, written asynchronously; the newest `keep` are kept. Steps count over all stages.

    A checkpoint has the items `adapters` (all adapters trained so far), `state` (of the training step) and `progress`.
    The checksums of its files are written before it receives its final name. A checkpoint that does not match them is
    renamed to `damaged_STEP` when the run is resumed, and the newest sound one is used.
    """

    def __init__(self, folder: Path, keep: int = 2):
        self._folder = folder.absolute() / "checkpoints"
        # The step that is known to be sound, after the first use of a saved checkpoint.
        self._sound: int | None = None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=True,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,  # of a run that was killed; the run directory is locked
            async_options=ocp.AsyncOptions(post_finalization_callback=self._write_checksums),
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    @property
    def latest(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, adapters: Any, state: Any, progress: Progress) -> None:
        """Start to write a checkpoint; the arrays may be donated as soon as this returns.

        Raises:
            OSError: there is a checkpoint of this step or a later one, or this checkpoint or the previous one could
                not be written; older ones are intact.
        """
        if self.latest is not None and step <= self.latest:
            raise OSError(
                f"checkpoint {step} cannot be saved, because {self._folder / str(self.latest)} exists and is not "
                "older; move it to another folder and continue with --resume"
            )
        items = {
            "adapters": ocp.args.StandardSave(adapters),
            "state": ocp.args.StandardSave(state),
            "progress": ocp.args.JsonSave(progress._asdict()),
        }
        with _disk_errors(self._folder):
            if not self._manager.save(step, args=ocp.args.Composite(**items)):
                raise OSError(f"orbax skipped checkpoint {step}")

    def _write_checksums(self) -> None:
        """Add the checksums to the checkpoint that is complete but not yet renamed; orbax calls this."""
        if jax.process_index() == 0:
            for unfinished in self._folder.iterdir():
                if unfinished.name.partition(".")[0].isdecimal() and not unfinished.name.isdecimal():
                    write_checksums(unfinished)

    def recover(self) -> int | None:
        """Return the step of the newest sound checkpoint, or None if there is none yet; rename newer, damaged ones.

        Raises:
            OSError: there are checkpoints, and all of them are damaged.
        """
        if self._sound is not None and self._sound == self.latest:
            return self._sound
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            if (damage := self._find_damage(step)) is None:
                self._sound = step
                self._set_aside(damaged, step)
                return step
            damaged[step] = damage
        if damaged:
            listing = "; ".join(f"{self._folder / str(step)}: {reason}" for step, reason in damaged.items())
            raise OSError(
                f"no checkpoint of this run can be used ({listing}); restore one from a copy, or start again with "
                "--overwrite"
            )
        return None

    def _find_damage(self, step: int) -> str | None:
        """Describe the damage of a checkpoint, on which all processes agree; None if it is sound."""
        damage = self._find_damage_in_this_process(step)
        if multihost_utils.process_allgather(np.bool_(damage is not None)).any():
            return damage or "another process cannot read it"
        return None

    def _find_damage_in_this_process(self, step: int) -> str | None:
        folder = self._folder / str(step)
        if (folder / CHECKSUMS_FILE).exists():
            return find_damage(folder)
        # From a program that wrote no checksums yet: read everything once, as host arrays.
        try:
            Progress(**json.loads((folder / "progress" / "metadata").read_text()))
            for item in ARRAYS:
                reader = ocp.PyTreeCheckpointer()
                tree = reader.metadata(folder / item).item_metadata.tree
                host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
                reader.restore(folder / item, args=ocp.args.PyTreeRestore(restore_args=host))
        except Exception as error:  # orbax and tensorstore raise errors of many types for damaged files
            return error_text(error)[:200]
        return None

    def _set_aside(self, damaged: dict[int, str], sound: int) -> None:
        """Rename damaged checkpoints, which would prevent that their steps are saved again, and report them."""
        if not damaged:
            return
        multihost_utils.sync_global_devices("checkpoints verified")
        if jax.process_index() == 0:
            for step, reason in damaged.items():
                folder, renamed = self._folder / str(step), self._folder / f"damaged_{step}"
                if renamed.exists():  # damaged before at the same step
                    shutil.rmtree(renamed)
                folder.rename(renamed)
                logger.warning("checkpoint %s is damaged (%s); it was renamed to %s", folder, reason, renamed.name)
            repeated = max(damaged) - sound
            logger.warning("continuing from checkpoint %d; repeated steps: %d", sound, repeated)
        multihost_utils.sync_global_devices("damaged checkpoints renamed")
        self._manager.reload()

    def progress(self) -> Progress:
        """Return the progress of the newest sound checkpoint; raises as `recover`."""
        item = ocp.args.Composite(progress=ocp.args.JsonRestore())
        return Progress(**self._manager.restore(self.recover(), args=item)["progress"])

    def restore(self, adapters: Any, state: Any) -> tuple[Any, Any]:
        """Return the newest sound (adapters, state) with the shapes, dtypes and shardings of the abstract trees.

        Raises:
            OSError: as `recover`.
            ValueError: the checkpoint is sound and has other arrays.
        """
        step = self.recover()
        items = {"adapters": ocp.args.StandardRestore(adapters), "state": ocp.args.StandardRestore(state)}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"checkpoint {self._folder / str(step)} does not fit the adapters of this run; continue with the model "
                f"and the stages that it was started with: {error_text(error)[:300]}"
            ) from error
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
