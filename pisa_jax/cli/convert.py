"""`pisa-sr convert`: convert adapter files between this project's format and that of the original PiSA-SR."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from pisa_jax.adapters.adapter_tree import summary
from pisa_jax.adapters.files import export_pisa_sr, load_adapters, save_adapters
from pisa_jax.runtime.console import say, show_any_name
from pisa_jax.runtime.messages import error_text


def main(argv: Sequence[str] | None = None, prog: str = "pisa-sr convert") -> int:
    """Run the command line; returns the exit code."""
    show_any_name()
    parser = argparse.ArgumentParser(
        prog=prog,
        description="Convert adapters between this project's format and the original PiSA-SR's key names.",
    )
    parser.add_argument("source", metavar="IN", help="pisa_sr.pkl, or a safetensors file of either kind")
    parser.add_argument("target", metavar="OUT", help="safetensors file to write")
    parser.add_argument("--to", choices=["adapters", "original"], default="adapters", help="kind of OUT (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    args = parser.parse_args(argv)
    if Path(args.target).suffix != ".safetensors":
        parser.error(f"OUT is {args.target}; its name must end with .safetensors")
    try:
        if Path(args.target).exists() and not args.overwrite:
            raise FileExistsError(f"{args.target} exists; give another name, or --overwrite")
        adapters = load_adapters(args.source)
        (save_adapters if args.to == "adapters" else export_pisa_sr)(args.target, adapters)
    except (ValueError, OSError) as error:
        say(f"{prog}: {error_text(error)}", sys.stderr)
        return 1
    say(f"{args.target}: {os.path.getsize(args.target):,} bytes, {args.to}\n{summary(adapters)}", sys.stdout)
    return 0
