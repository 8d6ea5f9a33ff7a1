"""Upscale photographs: `python infer.py -i photo.jpg -o out --scales 1,0.7`; alone: the samples that ship with it."""

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

# Nothing that imports jax may be imported here: --help and usage errors answer at once.

# Sample images of the demo model, the default input.
SAMPLES = Path(__file__).parents[1] / "assets" / "demo" / "samples"


def pair(text: str) -> tuple[float, float]:
    """ "1.0,0.7" or "0.7" (both) to (pix, sem)."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in (1, 2) or not all(map(math.isfinite, values)):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not PIX,SEM (two numbers) or one number for both, such as 1.0,0.7"
        )
    return values[0], values[-1]


def enlargement(text: str) -> float:
    """A finite number of at least 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return value


def whole(least: int):
    """A parser of integers of at least `least`."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return parse


def vae_tile(text: str) -> int | str:
    """ "auto", 0 or a number of pixels."""
    return text if text == "auto" else whole(0)(text)


def parser(prog: str = "infer.py") -> argparse.ArgumentParser:
    """Every flag; the names that the original program has for them work too."""
    p = argparse.ArgumentParser(
        prog=prog,
        description="Adjustable one-step super-resolution of photographs (PiSA-SR).",
        epilog="A first scale that is negative needs '=': --scales=-0.2,1",
        allow_abbrev=False,
    )
    add = p.add_argument
    add("-i", "--input", "--input_image", nargs="+", metavar="PATH",
        help="pictures, or folders of them (default: the samples of the demo model)")  # fmt: skip
    add("-o", "--output", "--output_dir", type=Path, default=Path("out"), metavar="FOLDER",
        help="where results go (default out)")  # fmt: skip
    add("-s", "--scale", "--upscale", type=enlargement, default=4.0, help="enlargement, any number >= 1 (default 4)")
    add("--scales", nargs="+", type=pair, metavar="PIX,SEM",
        help="how much fidelity and detail to add, one or many pairs (default 1,1)")  # fmt: skip
    add("--lambda_pix", type=float, metavar="PIX", help=argparse.SUPPRESS)
    add("--lambda_sem", type=float, metavar="SEM", help=argparse.SUPPRESS)
    add("--default", action="store_true", help=argparse.SUPPRESS)
    add("--grid", action="store_true", help="also write a labelled contact sheet of all pairs beside the input")
    add("--model", "--pretrained_model_path", default="demo", metavar="FOLDER|ID",
        help="Stable Diffusion 2.1-base: a diffusers folder or a hub id (default: the small demo model)")  # fmt: skip
    add("--adapters", "--pretrained_path", metavar="FILE",
        help="pisa_sr.pkl or adapters.safetensors (default: the demo's)")  # fmt: skip
    add("--color-fix", "--align_method", default="adain", choices=["adain", "wavelet", "none", "nofix"],
        help="how the colours of the input are kept (default adain)")  # fmt: skip
    add("--min-size", "--process_size", type=whole(1), default=512, metavar="PIXELS",
        help="enlarge small inputs so that the model works on at least this size (default 512)")  # fmt: skip
    add("-t", "--tile", "--latent_tiled_size", type=whole(0), default=96, metavar="LATENTS",
        help="side of the UNet's windows, for larger pictures (default 96; 0 = never)")  # fmt: skip
    add("--overlap", "--latent_tiled_overlap", type=whole(0), default=32, metavar="LATENTS",
        help="overlap of the windows (default 32)")  # fmt: skip
    add("--vae-tile", type=vae_tile, default=None, metavar="PIXELS|auto|0",
        help="side of the VAE's tiles, for larger pictures (default auto: what memory allows; 0 = never)")  # fmt: skip
    add("--vae_encoder_tiled_size", type=whole(0), metavar="PIXELS", help=argparse.SUPPRESS)
    add("--vae_decoder_tiled_size", type=whole(0), metavar="LATENTS", help=argparse.SUPPRESS)
    add("--devices", type=whole(1), default=1, metavar="N", help="spread tiles and pictures over N devices (default 1)")
    add("--dtype", choices=["bfloat16", "float32"], help="of the UNet (default float32 on CPUs, else bfloat16)")
    add("--vae-dtype", choices=["bfloat16", "float32"], default="float32", help="of the VAE (default float32)")
    add("--seed", type=whole(0), metavar="N", help="sample the latent; without it the result is deterministic")
    add("--prompt", default="", help="text for the UNet (default empty, as it was trained)")
    add("--batch-size", type=whole(1), default=1, metavar="N", help="pictures of equal size done together (default 1)")
    add(
        "--ext",
        default="auto",
        choices=["auto", "png", "jpg", "webp", "tiff"],
        help="output format (default: the input's)",
    )
    add("--suffix", default="", help="put at the end of output names")
    add("--skip-existing", action="store_true", help="leave out inputs whose outputs are there")
    add(
        "--compile-cache",
        default=None,
        metavar="DIR|off",
        help="compiled programs (default: in the user's cache folder)",
    )
    add("--json", type=Path, metavar="FILE", help="write a record per file")
    return p


def chosen_vae_tile(args: argparse.Namespace) -> int | str:
    """--vae-tile, or the smaller of the two sizes that the original program has, in pixels."""
    # The original counts the decoder's tiles in latents, each of 8 pixels.
    sizes = [args.vae_encoder_tiled_size or 0, 8 * (args.vae_decoder_tiled_size or 0)]
    given = min((size for size in sizes if size), default="auto")
    return given if args.vae_tile is None else args.vae_tile


def main(argv: Sequence[str] | None = None, prog: str = "infer.py") -> int:
    """The exit code: 0 all done, 1 something failed, 2 wrong usage, 130 interrupted."""
    p = parser(prog)
    args = p.parse_args(argv)
    if args.tile and args.overlap >= args.tile:
        p.error(f"--overlap {args.overlap} must be less than --tile {args.tile}")
    if not args.input:  # a first look: what turning the scale of the details does
        args.input, args.grid = [str(SAMPLES)], True
        args.scales = args.scales or [(1.0, 0.0), (1.0, 0.5), (1.0, 1.0)]
    pairs = [(1.0, 1.0)] if args.default or not args.scales else list(dict.fromkeys(args.scales))
    if args.lambda_pix is not None or args.lambda_sem is not None:
        pairs = [tuple(1.0 if value is None else value for value in (args.lambda_pix, args.lambda_sem))]

    from tqdm import tqdm

    enable_cache(args.compile_cache)
    from pisa_jax.cli import infer_files
    from pisa_jax.inference import Upscaler

    def on_compile(what: str, seconds: float) -> None:
        tqdm.write(f"compiled {what} in {seconds:.1f} s", file=sys.stderr)

    try:
        args.output.mkdir(parents=True, exist_ok=True)
        upscaler = Upscaler.load(
            args.model,
            args.adapters,
            dtype=args.dtype,
            vae_dtype=args.vae_dtype,
            prompt=args.prompt,
            on_compile=on_compile,
            color_fix={"nofix": "none"}.get(args.color_fix, args.color_fix),
            min_size=args.min_size,
            tile=args.tile,
            overlap=args.overlap,
            vae_tile=chosen_vae_tile(args),
            devices=args.devices,
            notice=functools.partial(tqdm.write, file=sys.stderr),
        )
        inputs = infer_files.find_inputs(args.input)
    except (OSError, ValueError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    if not inputs:
        print(
            f"{prog}: no pictures in {' '.join(args.input)}: {' '.join(infer_files.PICTURE_SUFFIXES)}",
            file=sys.stderr,
        )
        return 1
    options = infer_files.Options(
        args.output, args.scale, tuple(pairs), args.seed, args.batch_size, args.ext, args.suffix, args.skip_existing,
        args.grid,
    )  # fmt: skip
    return upscale(inputs, upscaler, options, args.json)


def enable_cache(choice: str | None) -> None:
    """Keep compiled programs in a folder, so that the next start compiles nothing."""
    if choice == "off":
        return
    import jax

    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(choice or home / "pisa_jax" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def upscale(inputs: list[Path], upscaler, options, json_file: Path | None) -> int:
    """Run over the files with a progress bar, write the records, say what happened."""
    from tqdm import tqdm

    from pisa_jax.cli import infer_files
    from pisa_jax.runtime.atomic_write import atomic_write

    records, start, interrupted = [], time.perf_counter(), False

    def done(record: infer_files.Record) -> None:
        records.append(record)
        for text in [*record.notes, *([f"FAILED: {record.error}"] if record.error else [])]:
            tqdm.write(f"{record.input}: {text}", file=sys.stderr)
        bar.update()

    with tqdm(total=len(inputs), unit="picture", disable=None) as bar:
        try:
            infer_files.run(inputs, upscaler, options, done)
        except KeyboardInterrupt:
            interrupted = True
    if json_file:
        with atomic_write(json_file) as file:
            file.write_text(json.dumps([dataclasses.asdict(record) for record in records], indent=1))
    counts = infer_files.summary(records)
    told = ", ".join(f"{counts[outcome]} {outcome}" for outcome in ("ok", "skipped", "failed") if counts[outcome])
    print(
        f"{told or 'nothing done'} of {len(inputs)} in {time.perf_counter() - start:.1f} s; results in {options.output}"
    )
    if interrupted:
        return 130
    return 1 if counts["failed"] else 0
