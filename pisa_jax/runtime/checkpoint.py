"""The orbax checkpoints of a run: asynchronous writes, checksums, and recovery from damaged checkpoints."""

import contextlib
import json
import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers as policies

from pisa_jax.runtime.checksums import CHECKSUMS_FILE, find_damage, write_checksums
from pisa_jax.runtime.messages import error_text
from pisa_jax.runtime.remote_paths import AnyPath, absolute, is_bucket, rename

logger = logging.getLogger(__name__)

# Items of a checkpoint that hold arrays.
ARRAYS = ("adapters", "state")
# The last file of a checkpoint that orbax writes into a bucket, where a folder cannot be renamed at once.
COMMIT_FILE = "commit_success.txt"
HIGHER_IS_BETTER = ("psnr", "ssim")


class Progress(NamedTuple):
    """Position of a run: the index of its stage, the state of the data loader, and the model."""

    stage: int
    loader: dict[str, Any]
    # Digest of the weights of the base model; None: from a program that did not record it.
    model: str | None = None


class Checkpoints:
    """The checkpoints of a run, written asynchronously; the newest `keep` are kept. Steps count over all stages.

    A checkpoint has the items `adapters` (all adapters trained so far), `state` (of the training step) and `progress`.
    The checksums of its files are written before it is complete: on a disk it then receives its final name, in a bucket
    the file commit_success.txt. A checkpoint that does not match its checksums is renamed to `damaged_STEP` when the
    run is resumed, and the newest sound one is used.

    With `best`, the name of a validation metric, the best checkpoint of the newest stage that has one is also kept.
    """

    def __init__(self, folder: AnyPath, keep: int = 2, best: str | None = None):
        self._folder = absolute(folder) / "checkpoints"
        # The step that is known to be sound, after the first use of a saved checkpoint.
        self._sound: int | None = None
        self._best = best
        kept: list[Any] = [policies.LatestN(keep)]
        if best:

            def rank(metrics: Mapping[str, Any]) -> Any:
                value = metrics[best]
                return metrics["stage"], value if best in HIGHER_IS_BETTER else -value

            kept.append(policies.BestN(get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False))
        options = ocp.CheckpointManagerOptions(
            best_fn=rank if best else None,
            preservation_policy=policies.AnyPreservationPolicy(kept),
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

    @property
    def best(self) -> int | None:
        """Step of the best checkpoint; None without `best` or a checkpoint with metrics."""
        return self._manager.best_step() if self._best else None

    def save(
        self,
        step: int,
        adapters: Any,
        state: Any,
        progress: Progress,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Start to write a checkpoint; the arrays may be donated as soon as this returns.

        `metrics` are those of a validation at this step.

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
        ranked = {"stage": progress.stage, **metrics} if metrics and self._best else None
        with _disk_errors(self._folder):
            if not self._manager.save(step, args=ocp.args.Composite(**items), metrics=ranked):
                raise OSError(f"orbax skipped checkpoint {step}")

    def _write_checksums(self) -> None:
        """Add the checksums to the checkpoint that has all its files and is not yet marked as complete; for orbax."""
        if jax.process_index() == 0:
            for folder in self._folder.iterdir():
                if folder.name.partition(".")[0].isdecimal() and not _is_complete(folder):
                    write_checksums(folder)

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
                rename(folder, renamed)  # replaces one that was damaged before at the same step
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

    def wait(self) -> None:
        """Wait until the pending checkpoint is written."""
        with _disk_errors(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait until the pending checkpoint is written, and close the manager."""
        self.wait()
        with _disk_errors(self._folder):
            self._manager.close()


def _is_complete(folder: AnyPath) -> bool:
    """Return True if a folder is a complete checkpoint; a name that is a number proves it on a disk only."""
    return folder.name.isdecimal() and (not is_bucket(folder) or (folder / COMMIT_FILE).exists())


@contextlib.contextmanager
def _disk_errors(folder: AnyPath) -> Iterator[None]:
    """Convert the errors of orbax and tensorstore for a full or read-only disk, or a bucket, to one short OSError."""
    try:
        yield
    except Exception as error:
        if not (is_bucket(folder) or isinstance(error, OSError | ValueError | RuntimeError)):
            raise
        advice = "check the bucket" if is_bucket(folder) else "free space"
        text = error_text(error)[:300]
        raise OSError(
            f"a checkpoint could not be written ({_newest_complete(folder)}); {advice} and continue with --resume: "
            f"{text}"
        ) from error


def _newest_complete(folder: AnyPath) -> str:
    """Describe the newest complete checkpoint; orbax's manager also counts the incomplete one."""
    try:
        complete = [int(path.name) for path in folder.iterdir() if _is_complete(path)]
    except Exception:  # of a bucket that cannot be reached
        return "older ones are intact"
    return f"checkpoint {max(complete)} is intact" if complete else "there is none yet"
