"""The program `pisa-sr`, also `python -m pisa_jax`: one sub-command per module of `pisa_jax.cli`, and the page."""

import argparse
import importlib
import sys
from collections.abc import Sequence

from pisa_jax import __version__

COMMANDS = {
    "infer": "upscale images",
    "train": "train adapters",
    "evaluate": "measure image quality of results, or of a model over a grid of scales",
    "degrade": "make fixed LQ/GT evaluation sets",
    "prepare": "pack a folder of images into array_record files",
    "warmup": "compile in advance, so that `infer` starts at once",
    "convert": "convert adapter files",
    "app": "open a page with live scales",
    "inspect": "describe and compare adapter files",
}


def module_of(command: str) -> str:
    """Return the name of the module whose `main` runs a command."""
    return "pisa_jax.app.main" if command == "app" else f"pisa_jax.cli.{command}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first argument names; returns its exit code."""
    listing = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="pisa-sr",
        description="Adjustable one-step super-resolution (PiSA-SR) in JAX.",
        epilog=f"commands:\n{listing}\n\n`pisa-sr COMMAND --help` lists the options of a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"pisa_jax {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help="one of the commands below")
    # Only the first argument is parsed here: everything after it belongs to the command.
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = parser.parse_args(arguments[:1]).command
    return importlib.import_module(module_of(command)).main(arguments[1:], prog=f"pisa-sr {command}")


if __name__ == "__main__":
    sys.exit(main())
