"""Run directories: the config of a run, the lock of the program that uses it, and the rules for resuming."""

import contextlib
import dataclasses
import json
import logging
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from pisa_jax.config import Config
from pisa_jax.runtime.agreement import gather
from pisa_jax.runtime.remote_paths import AnyPath, absolute, bucket_errors, delete, is_bucket, open_path, write_text
from pisa_jax.runtime.run_lock import LOCK_FILE, check_lock, lock, require_lock, write_errors

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
# Compiled programs of a run in a bucket, so that a restarted run compiles nothing again.
CACHE_FOLDER = "compilation_cache"
# Config fields that may change when a run is resumed: they do not affect the result. Another mesh, `accumulate` or
# `remat` changes the adapters only by rounding.
CHANGEABLE_FIELDS = (
    "out",
    "mesh_data",
    "mesh_fsdp",
    "accumulate",
    "remat",
    "log_every",
    "save_every",
    "keep",
    "keep_best",
    "profile_steps",
    "validation",
    "data/workers",
    "data/max_bad_share",
    "max_bad_steps",
    "hang_minutes",
)
# Config fields that may change because the same content is in another place; the change is reported.
MOVABLE_FIELDS = ("model", "data/path", "data/hq_path", "data/prompts", "perceptual_weights")


def holds_run(config: Config) -> bool:
    """Return True if the run directory holds a run that can be resumed, or a damaged one; only process 0 looks."""
    return gather("holds_run", jax.process_index() == 0 and (open_path(config.out) / CONFIG_FILE).exists())[0]


def config_fields(config: Config) -> dict[str, Any]:
    """Flatten a config to path -> value, as in its saved form."""
    return _leaves(_as_json(config))


def check_run_directory(config: Config, resume: bool, overwrite: bool) -> None:
    """Raise the errors of `claim_run_directory` without changing anything."""
    _on_first_process(config, lambda: _check(config, resume, overwrite))


def claim_run_directory(
    config: Config, resume: bool, overwrite: bool, lifetime: contextlib.ExitStack | None = None
) -> AnyPath:
    """Create the run directory `config.out` with the config in it, or check it for `resume`; returns its path.

    The directory is locked against other programs until `lifetime` is closed; without it, during the call only. The
    operating system releases the lock of a program that is killed. Only process 0 accesses the directory; the others
    wait for its result.

    Raises:
        FileExistsError: the directory holds a run and neither flag is given, or it holds other files.
        FileNotFoundError: there is no run to resume.
        ValueError: both flags, a path that orbax cannot use, a saved config that is damaged, or one that differs in
            fields that a resumed run cannot change.
        OSError: another program uses the directory, it cannot be written, or process 0 failed.
    """
    with contextlib.ExitStack() as call:
        _on_first_process(config, lambda: _claim(config, resume, overwrite, lifetime or call))
    return open_path(config.out)


def use_compilation_cache(config: Config) -> None:
    """Keep compiled programs of a run in a bucket in its run directory, unless JAX was told to keep them elsewhere.

    Call it before anything is compiled. JAX's own variable JAX_COMPILATION_CACHE_DIR may name a bucket, too.
    """
    if is_bucket(config.out) and not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(open_path(config.out) / CACHE_FOLDER))


def require_run_directory(config: Config) -> None:
    """Raise OSError in all processes if a program that was started later uses the run directory, in a bucket."""
    if is_bucket(config.out):
        _on_first_process(config, lambda: require_lock(open_path(config.out)))


def _on_first_process(config: Config, function: Callable[[], None]) -> None:
    """Call a function in process 0; its OSError or ValueError ends all processes."""
    error = None
    open_path(config.out)  # an error of all processes
    if jax.process_index() == 0:
        try:
            with bucket_errors(config.out):
                function()
        except (OSError, ValueError) as raised:
            error = raised
    if multihost_utils.broadcast_one_to_all(np.bool_(error is not None)):
        raise error or OSError(f"the run directory {config.out} cannot be used; process 0 reports the reason")


def _check(config: Config, resume: bool, overwrite: bool) -> None:
    folder = open_path(config.out)
    _check_content(folder, config, resume, overwrite)
    check_lock(folder)


def _check_content(folder: AnyPath, config: Config, resume: bool, overwrite: bool) -> None:
    if resume and overwrite:
        raise ValueError("--resume continues a run and --overwrite deletes it: give only one of them")
    if found := re.search(r"[*?[]", str(absolute(folder))):
        raise ValueError(
            f"the path of the run directory, {str(absolute(folder))!r}, contains {found[0]!r}, which orbax takes "
            "for a pattern; give another with --out"
        )
    if resume:
        check_same_config(_read_config(folder), config)
    elif _content(folder):
        if not _is_run(folder):
            raise FileExistsError(f"{folder} exists and is not a run directory; give another with --out")
        if not overwrite:
            raise FileExistsError(
                f"{folder} exists; give --resume to continue the run, or --overwrite to delete it and start again"
            )


def _claim(config: Config, resume: bool, overwrite: bool, lifetime: contextlib.ExitStack) -> None:
    folder, content = open_path(config.out), _as_json(config)
    _check_content(folder, config, resume, overwrite)
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    lifetime.enter_context(lock(folder))
    _check_content(folder, config, resume, overwrite)  # another program may have been faster
    if resume and (changes := check_same_config(_read_config(folder), config)):
        logger.warning("the resumed run continues with another config: %s", "; ".join(changes))
    with write_errors(folder):
        if not resume and _content(folder):  # an older run; its config is replaced at the end
            for path in folder.iterdir():
                if path.name not in (LOCK_FILE, CONFIG_FILE):
                    delete(path)
        if not resume or _read_config(folder) != content:
            write_text(folder / CONFIG_FILE, json.dumps(content, indent=1))


def _content(folder: AnyPath) -> list[AnyPath]:
    """List a directory without what a run that was killed at its start may leave.

    These are hidden files, .part folders and compiled programs.
    """
    if not folder.exists():
        return []
    found = [path for path in folder.iterdir() if path.suffix != ".part" and not path.name.startswith(".")]
    return [path for path in found if path.name != CACHE_FOLDER]


def _is_run(folder: AnyPath) -> bool:
    """Return True if the directory has the config of a run; many other programs write a file of this name."""
    try:
        _read_config(folder)
    except (OSError, ValueError):
        return False
    return True


def _read_config(folder: AnyPath) -> dict[str, Any]:
    """Read the saved config of a run."""
    path = folder / CONFIG_FILE
    if not path.exists():
        raise FileNotFoundError(f"nothing to resume: {folder} is not a run directory (it has no {CONFIG_FILE})")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; restore it from a copy, or start a new run") from error
    if not isinstance(content, dict) or not {"stages", "out"} <= content.keys():
        raise ValueError(f"{path} is not the config of a run; restore it from a copy, or start a new run")
    return content


def _as_json(config: Config) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config)))


def check_same_config(saved: Mapping[str, Any], config: Config) -> list[str]:
    """Compare a saved config with the one of a resumed run; returns the accepted changes that are worth a report.

    Fields that a later version added have their defaults. `CHANGEABLE_FIELDS` may differ without a report. Changes of
    `MOVABLE_FIELDS`, more steps of the last stage, a lower learning rate and a change to float32 are accepted.

    Raises:
        ValueError: other fields differ; the message lists them.
    """
    before, now = _leaves(saved), _leaves(_as_json(config))
    for name, default in _leaves(json.loads(json.dumps(_defaults(config)))).items():
        before.setdefault(name, default)
    last = f"stages/{len(config.stages) - 1}/steps"
    refused, accepted = [], []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old != new and not _is_in(name, CHANGEABLE_FIELDS):
            changes = accepted if _may_change(name, old, new, last) else refused
            changes.append(f"{name} was {old!r} and is {new!r}")
    if refused:
        raise ValueError(
            f"the config differs from the saved run's: {'; '.join(refused)}; restore these values or start a new run"
        )
    return accepted


def _is_in(name: str, fields: tuple[str, ...]) -> bool:
    return any(name == field or name.startswith(f"{field}/") for field in fields)


def _may_change(name: str, old: Any, new: Any, last_steps: str) -> bool:
    """Accept what the messages of a stopped run recommend, and more steps."""
    both_numbers = isinstance(old, int | float) and isinstance(new, int | float)
    if name == last_steps:
        return both_numbers and new > old
    if re.fullmatch(r"stages/\d+/learning_rate", name):
        return both_numbers and new < old
    return name in MOVABLE_FIELDS or (name in ("dtype", "vae_dtype") and new == "float32")


def _defaults(value: Any) -> dict[str, Any]:
    """Return the defaults of the fields of a dataclass, and of the dataclasses in its fields."""
    found = {}
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        if dataclasses.is_dataclass(inner):
            found[field.name] = _defaults(inner)
        elif isinstance(inner, tuple) and inner and dataclasses.is_dataclass(inner[0]):
            found[field.name] = list(map(_defaults, inner))
        elif field.default is not dataclasses.MISSING:
            found[field.name] = field.default
    return found


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten a config (as JSON) to path -> value."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        items = enumerate(value)
    else:
        return {prefix: value}
    return {k: v for name, item in items for k, v in _leaves(item, f"{prefix}/{name}".lstrip("/")).items()}
