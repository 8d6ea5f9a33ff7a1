"""Train adapters: `python train.py configs/sd21.py --data.source folder --data.path DIR`; `--help` lists all fields."""

import logging
import os
import runpy
import sys
from pathlib import Path

import tyro

from pisa_jax.config import Config

USAGE = """usage: python train.py CONFIG_FILE [--resume | --overwrite] [--FIELD VALUE ...]

--resume goes on with the run in --out, --overwrite deletes it and starts anew."""


def read(arguments: list[str]) -> tuple[Config, set[str]]:
    """The config that a command line describes, and which of --resume and --overwrite it has.

    Raises ValueError where the line or the config file is wrong; tyro prints and exits by itself.
    """
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"no config file given\n{USAGE}")
    path = Path(arguments[0])
    if not path.is_file():
        known = ", ".join(sorted(map(str, Path("configs").glob("*.py")))) or "none here"
        raise ValueError(f"no config file {path}; known: {known}")
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:  # whatever the code in the file raises
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ValueError(f"{path} must define `config`, a pisa_jax.config.Config")
    switches = {"--resume", "--overwrite"}
    fields = [argument for argument in arguments[1:] if argument not in switches]
    changed = tyro.cli(Config, default=config, args=fields, prog=f"train.py {path}", description=USAGE)
    return changed, switches.intersection(arguments)


def _all_but_abandoned_writes(unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def main() -> int:
    """The exit code: 0 trained, 1 failed, 2 wrong usage, 130 interrupted, 143 told to stop and saved."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    # When a checkpoint cannot be written, orbax logs, with its traceback, what it raises anyway, asyncio each of the
    # hundreds of writes that orbax then abandons, and tensorstore's threads that nobody waits for them any more.
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    sys.unraisablehook = _all_but_abandoned_writes
    try:
        config, switches = read(sys.argv[1:])
    except ValueError as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from pisa_jax import sharding

    sharding.start_processes()
    from pisa_jax import training

    try:
        adapters = training.run(config, "--resume" in switches, "--overwrite" in switches)
        print(f"adapters in {adapters}")
    except training.Stop as stop:
        print(f"train.py: {stop}", file=sys.stderr)
        return 143
    except KeyboardInterrupt:
        print("train.py: interrupted; go on from the newest checkpoint with --resume", file=sys.stderr)
        return 130
    except (OSError, ValueError, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
