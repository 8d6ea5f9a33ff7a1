"""Train adapters: `python train.py configs/sd21.py --data.source folder --data.path DIR`; `--help` lists all fields."""

import contextlib
import logging
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

import pisa_jax
from pisa_jax.config import Config
from pisa_jax.runtime.console import say, show_any_name
from pisa_jax.runtime.stop_signals import StopSignals
from pisa_jax.runtime.trees import suggest

USAGE = """usage: {prog} CONFIG [--resume | --overwrite] [--FIELD VALUE ...]

CONFIG is a Python file that defines `config`, or the name of one that ships with the package: {names}.
--config CONFIG is the same. --resume continues the run in --out; --overwrite deletes it and starts again."""


def config_folder() -> Path:
    """Return the folder of the shipped configs: inside the package in a wheel, beside it in a checkout."""
    package = Path(pisa_jax.__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def usage(prog: str) -> str:
    """Return the usage text with the names of the shipped configs."""
    names = sorted(path.stem for path in config_folder().glob("*.py") if path.stem != "__init__")
    return USAGE.format(prog=prog, names=", ".join(names))


def find_config(name: str) -> Path:
    """Find the config file for `name`: a path, or the name of a shipped config.

    Raises:
        ValueError: there is neither such a file nor such a config.
    """
    shipped = config_folder() / f"{name}.py"
    for path in (Path(name), shipped):
        if path.is_file():
            return path
    names = [path.stem for path in config_folder().glob("*.py")]
    known = ", ".join(sorted(names))
    raise ValueError(f"no config file {name!r}; give a file, or one of {known}{suggest(Path(name).stem, names)}")


def read(arguments: Sequence[str], prog: str = "train.py") -> tuple[Config, set[str]]:
    """Parse a command line to a config and the switches --resume and --overwrite that it has.

    Raises:
        ValueError: no config, an unknown one, or a config file that fails; tyro reports wrong fields and exits itself.
    """
    arguments = list(arguments)
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage(prog))
        raise SystemExit(0)
    if arguments[:1] == ["--config"]:
        arguments.pop(0)
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"no config given\n{usage(prog)}")
    path = find_config(arguments[0])
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:  # the code in the file may raise any error
        raise ValueError(f"{path}: {type(error).__name__}: {error}") from error
    if not isinstance(config, Config):
        raise ValueError(f"{path} must define `config`, a pisa_jax.config.Config")
    switches = {"--resume", "--overwrite"}
    fields = [argument for argument in arguments[1:] if argument not in switches]
    changed = tyro.cli(Config, default=config, args=fields, prog=f"{prog} {path}", description=usage(prog))
    return changed, switches.intersection(arguments)


def _all_but_abandoned_writes(unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def main(argv: Sequence[str] | None = None, prog: str = "train.py") -> int:
    """Run the command; returns 0 (trained), 1 (failed), 2 (wrong usage), 130 (SIGINT) or 143 (SIGTERM)."""
    show_any_name()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("pisa_jax").setLevel(logging.INFO)
    # When a checkpoint cannot be written, orbax logs the traceback of an error that it also raises, asyncio logs each
    # of the hundreds of abandoned writes, and the threads of tensorstore report that nothing waits for them.
    for logger in ("absl", "asyncio"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    sys.unraisablehook = _all_but_abandoned_writes
    try:
        config, switches = read(sys.argv[1:] if argv is None else argv, prog)
    except ValueError as error:
        say(f"{prog}: {error}", sys.stderr)
        return 2
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    try:
        return _train(config, "--resume" in switches, "--overwrite" in switches, prog)
    except KeyboardInterrupt:  # at the start, or in one of several processes
        say(f"{prog}: interrupted; continue from the newest checkpoint with --resume", sys.stderr)
        return 130


def _train(config: Config, resume: bool, overwrite: bool, prog: str) -> int:
    import jax

    from pisa_jax.runtime import distributed

    distributed.initialize()
    from pisa_jax import training, training_run

    # With several processes, jax.distributed handles SIGTERM, and the processes agree on a step.
    with contextlib.nullcontext() if jax.process_count() > 1 else StopSignals() as stop:
        try:
            say(f"adapters in {training.train(config, resume, overwrite, stop=stop)}", sys.stdout)
        except training_run.Stop as stopped:
            say(f"{prog}: {stopped}", sys.stderr)
            return 128 + (stop.received if stop else signal.SIGTERM)
        except (OSError, ValueError, FloatingPointError) as error:
            say(f"{prog}: {error}", sys.stderr)
            return 1
    return 0
