"""Train adapters: `python train.py configs/sd21.py --data.source folder --data.path DIR`; `--help` lists all fields."""

import logging
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import tyro

import pisa_jax
from pisa_jax.config import Config
from pisa_jax.runtime.console import say, show_any_name
from pisa_jax.runtime.stop_signals import StopSignals
from pisa_jax.runtime.trees import suggest
from pisa_jax.runtime.watchdog import Watchdog

USAGE = """usage: {prog} CONFIG [--resume [auto] | --overwrite] [--FIELD VALUE ...]

CONFIG is a Python file that defines `config`, or the name of one that ships with the package: {names}.
--config CONFIG is the same. --resume continues the run in --out; --resume auto starts it if there is none; --overwrite
deletes it and starts again."""


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


class Switches(NamedTuple):
    """The options of a command line that are no fields of the config."""

    resume: bool | Literal["auto"] = False
    overwrite: bool = False


def read(arguments: Sequence[str], prog: str = "train.py") -> tuple[Config, Switches]:
    """Parse a command line to a config and the other options.

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
    fields, switches = split_switches(arguments[1:])
    changed = tyro.cli(Config, default=config, args=fields, prog=f"{prog} {path}", description=usage(prog))
    return changed, switches


def split_switches(arguments: Sequence[str]) -> tuple[list[str], Switches]:
    """Separate the switches from the fields of the config.

    Raises:
        ValueError: --resume with another value than auto.
    """
    fields: list[str] = []
    switches, before = Switches(), ""
    for argument in arguments:
        name, _, value = argument.partition("=")
        if name == "--overwrite":
            switches = switches._replace(overwrite=True)
        elif name == "--resume" or (before == "--resume" and not argument.startswith("-")):
            value = value if name == "--resume" else argument
            if value not in ("", "auto"):
                raise ValueError(f"--resume {value}: give --resume alone, or --resume auto")
            switches = switches._replace(resume=value or True)
        else:
            fields.append(argument)
        before = argument
    return fields, switches


def _all_but_abandoned_writes(unraisable):
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


def main(argv: Sequence[str] | None = None, prog: str = "train.py") -> int:
    """Run the command.

    Returns 0 (trained), 1 (an error that the same command meets again), 2 (wrong usage), 75 (a lost process or a step
    that does not end), 130 (SIGINT) or 143 (SIGTERM).
    """
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
        with StopSignals() as stop:
            return _train(config, switches, prog, stop)
    except KeyboardInterrupt:  # at the start
        say(f"{prog}: interrupted; continue from the newest checkpoint with --resume", sys.stderr)
        return 130


def _train(config: Config, switches: Switches, prog: str, stop: StopSignals) -> int:
    from pisa_jax.runtime import cluster, failures

    try:
        cluster.connect()
    except (OSError, ValueError) as error:
        say(f"{prog}: {error}", sys.stderr)
        return failures.failure_of(error).code
    message = f"no step has ended for {config.hang_minutes:g} minutes (hang_minutes); the stacks of all threads follow"
    hang = failures.Failure(message, failures.TRY_AGAIN, stacks=True)
    with (
        failures.FailureWatch(prog) as watch,
        Watchdog(config.hang_minutes, lambda: watch.end(hang)) as watchdog,
    ):
        try:
            cluster.report_devices()
            return _run(config, switches, prog, stop, watchdog)
        except Exception as error:
            if watch.active:
                watch.end(error)
            if not failures.is_plain(error):
                raise
            say(f"{prog}: {error}", sys.stderr)
            return failures.failure_of(error).code


def _run(config: Config, switches: Switches, prog: str, stop: StopSignals, watchdog: Watchdog) -> int:
    from pisa_jax import training, training_run

    try:
        adapters = training.train(config, *switches, stop=stop, watchdog=watchdog)
    except training_run.Stop as stopped:
        say(f"{prog}: {stopped}", sys.stderr)
        return 128 + (stopped.number or signal.SIGTERM)
    say(f"adapters in {adapters}", sys.stdout)
    return 0
