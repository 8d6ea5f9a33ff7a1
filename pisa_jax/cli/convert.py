"""`pisa-sr convert`: convert adapter files between this project's format and those of other programs."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pisa_jax.cli.arguments import adapter_file, local
from pisa_jax.runtime.console import say, show_any_name
from pisa_jax.runtime.messages import error_text

# Modules that import jax are imported inside functions: --help and usage errors must not wait for jax.
if TYPE_CHECKING:
    from pisa_jax.adapters.adapter_tree import Adapters
    from pisa_jax.adapters.foreign_files import Kernels

FORMATS = """\
formats (--to):
  adapters   this project's format; any decomposition, any number of adapters
  original   key names of PiSA-SR; lora
  peft       a folder with adapter_model.safetensors and adapter_config.json; lora, rslora, dora, loha, lokr, hra; read
             only: vera, and oft as full; written as lora: pissa, olora, tucker, vera
  diffusers  pytorch_lora_weights.safetensors; lora, rslora, dora, and written as lora: pissa, olora, tucker, vera
  kohya      lora_unet_* keys, read by A1111, ComfyUI and LyCORIS; lora, rslora, dora, loha, lokr, oft, full, and
             written as lora: pissa, olora, tucker, vera
IN may have any of them. The last three hold one adapter: --adapter selects it, or names it when it is read. Its layers
are those of --model, by default Stable Diffusion 2.1; dora and PEFT's oft need the weights of the model.
"""


def parser(prog: str) -> argparse.ArgumentParser:
    """Build the parser."""
    p = argparse.ArgumentParser(
        prog=prog,
        description="Convert adapters between this project's format and those of other programs.",
        epilog=FORMATS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "source", type=adapter_file, metavar="IN", help="pisa_sr.pkl, a safetensors file, or a folder of PEFT"
    )
    p.add_argument("target", type=local, metavar="OUT", help="safetensors file to write; for peft, a folder")
    p.add_argument("--to", choices=["adapters", "original", "peft", "diffusers", "kohya"], default="adapters",
        help="format of OUT (%(default)s)")  # fmt: skip
    p.add_argument("--adapter", metavar="NAME", help="the adapter of a format that holds one (default pix, if read)")
    p.add_argument(
        "--model", type=local, metavar="FOLDER|ID", help="base model of the adapters, for formats of other programs"
    )
    p.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return p


def main(argv: Sequence[str] | None = None, prog: str = "pisa-sr convert") -> int:
    """Run the command line; returns the exit code."""
    show_any_name()
    p = parser(prog)
    args = p.parse_args(argv)
    target = Path(args.target)
    if args.to != "peft" and target.suffix != ".safetensors":
        p.error(f"OUT is {target}; its name must end with .safetensors")
    try:
        if target.exists() and not args.overwrite:
            raise FileExistsError(f"{target} exists; give another name, or --overwrite")
        adapters = read(args.source, args.model, args.adapter)
        write(target, adapters, args)
    except (ValueError, OSError) as error:
        say(f"{prog}: {error_text(error)}", sys.stderr)
        return 1
    from pisa_jax.adapters.adapter_tree import summary

    files = target.iterdir() if target.is_dir() else [target]
    say(f"{target}: {sum(map(os.path.getsize, files)):,} bytes, {args.to}\n{summary(adapters)}", sys.stdout)
    return 0


def read(source: str, model: str | None, name: str | None) -> "Adapters":
    """Load adapters of any format; an adapter of another program gets the name `name`, by default pix."""
    from pisa_jax.adapters.files import load_adapters
    from pisa_jax.adapters.foreign_keys import is_foreign
    from pisa_jax.runtime.remote_paths import is_bucket, local_copy

    if is_bucket(source):
        with local_copy(source) as file:
            return read(str(file), model, name)
    if not is_foreign(source):
        return load_adapters(source)
    from pisa_jax.adapters.fit import check_adapters
    from pisa_jax.adapters.foreign_files import load_foreign

    kernels = base_kernels(model)
    adapters = load_foreign(source, kernels, name or "pix")
    check_adapters(adapters.trees, adapters.specs, {path: kernel.shape for path, kernel in kernels.items()})
    return adapters._replace(base_model=model)


def write(target: Path, adapters: "Adapters", args: argparse.Namespace) -> None:
    """Write adapters in the format of the command line."""
    from pisa_jax.adapters.files import export_pisa_sr, save_adapters

    if args.to in ("adapters", "original"):
        (save_adapters if args.to == "adapters" else export_pisa_sr)(target, adapters)
        return
    from pisa_jax.adapters.foreign_files import save_foreign

    names = list(adapters.specs)
    name = args.adapter or names[0]
    if name not in names or (len(names) > 1 and not args.adapter):
        raise ValueError(f"the format {args.to} holds one adapter: give --adapter, one of {', '.join(names)}")
    save_foreign(target, adapters, name, base_kernels(args.model), args.to)


def base_kernels(model: str | None) -> "Kernels":
    """Return the kernels of a base model; None: the shapes of those of Stable Diffusion 2.1."""
    from pisa_jax.adapters.injection import kernels_of
    from pisa_jax.sd import backbone, pretrained, random_model

    if model:
        return kernels_of(pretrained.load_pretrained(model).params["unet"])
    return kernels_of(backbone.param_shapes(backbone.build_modules(*random_model.model_configs("sd21")))["unet"])
