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

    Exits with a message where the line is wrong.
    """
    if not arguments or arguments[0].startswith("-"):
        sys.exit(USAGE)
    path = Path(arguments[0])
    if not path.is_file():
        known = ", ".join(sorted(map(str, Path("configs").glob("*.py")))) or "none here"
        sys.exit(f"train.py: no config file {path}; known: {known}")
    config = runpy.run_path(str(path)).get("config")
    if not isinstance(config, Config):
        sys.exit(f"train.py: {path} must define `config`, a pisa_jax.config.Config")
    switches = {"--resume", "--overwrite"}
    fields = [argument for argument in arguments[1:] if argument not in switches]
    changed = tyro.cli(Config, default=config, args=fields, prog=f"train.py {path}", description=USAGE)
    return changed, switches.intersection(arguments)


def main() -> int:
    """The exit code: 0 trained, 1 failed, 2 wrong usage, 130 interrupted, 143 told to stop and saved."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        config, switches = read(sys.argv[1:])
    except ValueError as error:  # the checks of the dataclasses
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
