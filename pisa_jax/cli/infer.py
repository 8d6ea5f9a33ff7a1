"""Upscale photographs: `python infer.py -i photo.jpg -o out --scales 1,0.7`; without arguments: the shipped samples."""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pisa_jax.cli.adapter_scales import adapter_names, complete_scales
from pisa_jax.cli.arguments import (
    adapter_file,
    add_buckets,
    add_tile_mode,
    integer_at_least,
    local,
    local_path,
    megapixels,
    name_part,
    prompt,
    scales_of_adapters,
    seed,
    upscale_factor,
)
from pisa_jax.cli.output_files import check_output_files
from pisa_jax.runtime.console import progress_bar, say, show_any_name

# Modules that import jax are imported inside functions: --help and usage errors must not wait for jax.
if TYPE_CHECKING:
    from pisa_jax.cli.infer_files import FileReport
    from pisa_jax.cli.infer_plan import Plan, UpscaleOptions
    from pisa_jax.inference import Upscaler

# Sample images of the demo model, the default input.
SAMPLES = Path(__file__).parents[1] / "assets" / "demo" / "samples"

# Adapters whose scales a map can multiply.
MAPPED = ("pix", "sem")


def parse_vae_tile(text: str) -> int | str:
    """Parse "auto", or an integer of at least 0 (pixels)."""
    return text if text == "auto" else integer_at_least(0)(text)


def parser(prog: str = "infer.py") -> argparse.ArgumentParser:
    """Build the parser; the flag names of the original program are accepted as well."""
    p = argparse.ArgumentParser(
        prog=prog,
        description="Adjustable one-step super-resolution of photographs (PiSA-SR).",
        epilog="A negative first scale needs '=': --scales=-0.2,1",
        allow_abbrev=False,
    )
    _add_main_arguments(p.add_argument)
    add_model_arguments(p.add_argument)
    _add_run_arguments(p.add_argument)
    _add_output_arguments(p.add_argument)
    return p


def _add_main_arguments(add: Callable[..., Any]) -> None:
    add("-i", "--input", "--input_image", nargs="+", type=local, metavar="PATH",
        help="images, or folders of images (default: the samples of the demo model)")  # fmt: skip
    add("-o", "--output", "--output_dir", type=local_path, default=Path("out"), metavar="FOLDER",
        help="output folder (default out)")  # fmt: skip
    add("-s", "--scale", "--upscale", type=upscale_factor, default=4.0,
        help="upscale factor, any number >= 1 (default 4)")  # fmt: skip
    add("--scales", nargs="+", type=scales_of_adapters, metavar="PIX,SEM",
        help="strength of the adapters pix (fidelity) and sem (detail), one or more pairs (default 1,1); with other "
        "adapters one number each, in the order of the file")  # fmt: skip
    for name in MAPPED:
        add(f"--{name}-map", type=Path, metavar="FILE|FOLDER",
            help=f"gray image that multiplies the scale of {name} place by place (white 1, black 0), or a folder with "
            "such a file of equal name for each image")  # fmt: skip
    add("--lambda_pix", type=float, metavar="PIX", help=argparse.SUPPRESS)
    add("--lambda_sem", type=float, metavar="SEM", help=argparse.SUPPRESS)
    add("--default", action="store_true", help=argparse.SUPPRESS)
    add("--grid", action="store_true",
        help="also write a labeled contact sheet of the input and the results at all pairs of scales")  # fmt: skip


def add_model_arguments(add: Callable[..., Any]) -> None:
    """Add the flags of the model and of the way it is run; `complete_model_arguments` checks them."""
    add("--model", "--pretrained_model_path", type=local, default="demo", metavar="FOLDER|ID",
        help="Stable Diffusion 2.1-base: a diffusers folder or a hub id (default: the small demo model)")  # fmt: skip
    add("--adapters", "--pretrained_path", nargs="+", type=adapter_file, metavar="FILE",
        help="pisa_sr.pkl or adapters.safetensors; several files are joined in this order (default: the adapters of "
        "the demo model)")  # fmt: skip
    add("--decomposition", nargs="+", default=[], metavar="MODULE:FUNCTION",
        help="import decompositions of your own that an adapter file names")  # fmt: skip
    add("--color-fix", "--align_method", default="adain", choices=["adain", "wavelet", "none", "nofix"],
        help="color correction towards the input (default adain)")  # fmt: skip
    add("--min-size", "--process_size", type=integer_at_least(1), default=512, metavar="PIXELS",
        help="shortest side at which the model works: smaller images are first upscaled (default 512)")  # fmt: skip
    add("-t", "--tile", "--latent_tiled_size", type=integer_at_least(0), default=96, metavar="LATENTS",
        help="side of the UNet's windows for larger images (default 96; 0: no windows)")  # fmt: skip
    add("--overlap", "--latent_tiled_overlap", type=integer_at_least(0), default=32, metavar="LATENTS",
        help="overlap of the windows (default 32)")  # fmt: skip
    add("--vae-tile", type=parse_vae_tile, default=None, metavar="PIXELS|auto|0",
        help="side of the VAE's tiles for larger images (default auto: by the free memory; 0: no tiles)")  # fmt: skip
    add_tile_mode(add)
    add("--vae_encoder_tiled_size", type=integer_at_least(0), metavar="PIXELS", help=argparse.SUPPRESS)
    add("--vae_decoder_tiled_size", type=integer_at_least(0), metavar="LATENTS", help=argparse.SUPPRESS)
    add_buckets(add)
    add("--devices", type=integer_at_least(1), default=1, metavar="N",
        help="shard tiles and images over N devices (default 1)")  # fmt: skip
    add("--dtype", choices=["bfloat16", "float32"], help="type of the UNet (default float32 on CPUs, else bfloat16)")
    add("--vae-dtype", choices=["bfloat16", "float32"], default="float32", help="type of the VAE (default float32)")
    add("--prompt", type=prompt, default="", help="text for the UNet (default empty, as in training)")
    add("--compile-cache", type=local, default=None, metavar="DIR|off",
        help="folder of the compilation cache (default: in the user's cache folder)")  # fmt: skip


def _add_run_arguments(add: Callable[..., Any]) -> None:
    add("--seed", type=seed, metavar="N",
        help="sample the latent with this seed (default: use its mean, which is deterministic)")  # fmt: skip
    add("--batch-size", type=integer_at_least(1), default=1, metavar="N",
        help="images per call of the model, of equal size or of one bucket (default 1)")  # fmt: skip
    add("--max-megapixels", type=megapixels, metavar="N",
        help="refuse larger input images before they are decoded (default 178.9)")  # fmt: skip


def _add_output_arguments(add: Callable[..., Any]) -> None:
    add("--ext", default="auto", choices=["auto", "png", "jpg", "webp", "tiff"],
        help="output format (default auto: the format of the input)")  # fmt: skip
    add("--suffix", type=name_part, default="", help="text appended to the stems of output files")
    add("--skip-existing", action="store_true", help="skip inputs whose output files exist")
    add("--json", type=local_path, metavar="FILE", help="write a report of every input file")


def parse_arguments(argv: Sequence[str] | None, prog: str) -> argparse.Namespace:
    """Parse the command line and fill in what depends on several flags; exits with code 2 on wrong usage."""
    p = parser(prog)
    args = p.parse_args(argv)
    complete_model_arguments(p, args)
    if not args.input:  # a first demonstration: the samples with increasing strength of the detail adapter
        args.input, args.grid = [str(SAMPLES)], True
        args.scales = args.scales or [(1.0, 0.0), (1.0, 0.5), (1.0, 1.0)]
    if args.lambda_pix is not None or args.lambda_sem is not None:
        args.scales = [tuple(1.0 if value is None else value for value in (args.lambda_pix, args.lambda_sem))]
    names = adapter_names(args.adapters)
    args.maps = {name: path for name in MAPPED if (path := getattr(args, f"{name}_map"))}
    for name in args.maps.keys() - set(names):
        p.error(f"argument --{name}-map: there is no adapter {name!r}; the adapters are {', '.join(names)}")
    try:
        args.scales = complete_scales([] if args.default else args.scales, names)
    except ValueError as error:
        p.error(f"argument --scales: {error}")
    return args


def complete_model_arguments(p: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in what depends on several flags of `add_model_arguments`; exits with code 2 on wrong usage."""
    if args.tile and args.overlap >= args.tile:
        p.error(f"--overlap {args.overlap} must be less than --tile {args.tile}")
    args.color_fix = {"nofix": "none"}.get(args.color_fix, args.color_fix)
    args.vae_tile = choose_vae_tile(args)


def choose_vae_tile(args: argparse.Namespace) -> int | str:
    """Return --vae-tile, or the smaller of the two tile sizes of the original program, in pixels."""
    # The original program counts the decoder's tiles in latents, each of 8 pixels.
    sizes = [args.vae_encoder_tiled_size or 0, 8 * (args.vae_decoder_tiled_size or 0)]
    given = min((size for size in sizes if size), default="auto")
    return given if args.vae_tile is None else args.vae_tile


def main(argv: Sequence[str] | None = None, prog: str = "infer.py") -> int:
    """Run the command. Exit code: 0 every file done, 1 a file failed, 2 wrong usage, 130 interrupted."""
    show_any_name()
    args = parse_arguments(argv, prog)
    if args.max_megapixels:
        limit_megapixels(args.max_megapixels)
    cache = enable_compilation_cache(args.compile_cache)
    from pisa_jax.cli.infer_plan import make_plan

    try:
        args.output.mkdir(parents=True, exist_ok=True)
        inputs = list_inputs(args.input)
        plan = make_plan(inputs, upscale_options(args), args.json)
        if args.json:
            check_output_files(
                {"--json": args.json}, [*inputs, *(path for file in plan.files for path in file.maps.values())]
            )
        upscaler = load_upscaler(args)
    except (OSError, ValueError) as error:
        say(f"{prog}: {error}", sys.stderr)
        return 1
    adjustable = bool(args.maps) or any(set(row) != {1.0} for row in args.scales)
    with buckets_recorded(upscaler, args, cache, adjustable, args.batch_size):
        return upscale_with_progress(plan, upscaler, args.json)


def limit_megapixels(limit: float) -> None:
    """Let Pillow refuse images of more megapixels: small files can hold images that fill the memory."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = math.ceil(limit * 1e6 / 2)  # Pillow warns from here on, and refuses twice as many pixels


def list_inputs(paths: Sequence[str]) -> list[Path]:
    """List the input files; raises ValueError if there are none."""
    from pisa_jax.cli.infer_names import find_inputs
    from pisa_jax.imaging.image_files import IMAGE_SUFFIXES

    inputs = find_inputs(paths)
    if not inputs:
        raise ValueError(f"no images in {' '.join(paths)}; suffixes of images: {' '.join(IMAGE_SUFFIXES)}")
    return inputs


def upscale_options(args: argparse.Namespace) -> "UpscaleOptions":
    """Options of the run from the command line."""
    from pisa_jax.cli.infer_plan import UpscaleOptions

    return UpscaleOptions(
        output=args.output,
        scale=args.scale,
        scales=tuple(args.scales),
        maps=args.maps,
        seed=args.seed,
        batch_size=args.batch_size,
        ext=args.ext,
        suffix=args.suffix,
        skip_existing=args.skip_existing,
        grid=args.grid,
    )


def enable_compilation_cache(choice: str | None) -> Path | None:
    """Keep compiled functions in the folder `choice`, in the user's cache folder (None), or not at all ("off").

    Returns the folder. If it cannot be made, compiled functions are not kept, and a line says so.
    """
    if choice == "off":
        return None
    try:
        folder = Path(
            choice or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "pisa_jax", "compiled")
        )
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: the user has no home
        say(f"compiled functions are not kept: {error}; give a folder as --compile-cache", sys.stderr)
        return None
    import jax

    jax.config.update("jax_compilation_cache_dir", str(folder))
    # A start compiles about a hundred small operations (the text encoder, the merge of an adapter) as well.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    return folder


def load_upscaler(args: argparse.Namespace) -> "Upscaler":
    """Load the model and the adapters of the command line; raises as `Upscaler.load` does."""
    from pisa_jax.adapters.registry import import_decomposition
    from pisa_jax.inference import Upscaler

    for name in args.decomposition:
        import_decomposition(name)

    def on_compile(stage: str, seconds: float) -> None:
        say(f"compiled {stage} in {seconds:.1f} s", sys.stderr)

    return Upscaler.load(
        args.model,
        args.adapters,
        dtype=args.dtype,
        vae_dtype=args.vae_dtype,
        prompt=args.prompt,
        on_compile=on_compile,
        notice=lambda line: say(line, sys.stderr),
        color_fix=args.color_fix,
        min_size=args.min_size,
        tile=args.tile,
        overlap=args.overlap,
        vae_tile=args.vae_tile,
        vae_tile_mode=args.vae_tile_mode,
        devices=args.devices,
        buckets=args.buckets,
    )


@contextlib.contextmanager
def buckets_recorded(
    upscaler: "Upscaler", args: argparse.Namespace, cache: Path | None, adjustable: bool, batch_size: int
) -> Iterator[None]:
    """Prefer the buckets of earlier runs, whose programs are in the compilation cache, and record those of this run."""
    if cache is None or (buckets := upscaler.pipeline.buckets) is None:
        yield
        return
    from pisa_jax.cli.known_buckets import KnownBuckets

    known = KnownBuckets(cache, args, adjustable, batch_size)
    buckets.known = known.read()
    try:
        yield
    finally:
        known.add(buckets.used)


def upscale_with_progress(plan: "Plan", upscaler: "Upscaler", json_file: Path | None) -> int:
    """Upscale files with a progress bar, write the reports to `json_file`, print a summary, return the exit code."""
    from pisa_jax.cli.infer_files import count_outcomes, upscale_files

    reports, start, interrupted = [], time.perf_counter(), False

    def on_report(report: "FileReport") -> None:
        reports.append(report)
        for text in [*report.notes, *([f"FAILED: {report.error}"] if report.error else [])]:
            say(f"{report.input}: {text}", sys.stderr)
        bar.update()

    with progress_bar(len(plan.files)) as bar:
        try:
            upscale_files(plan, upscaler, on_report)
        except KeyboardInterrupt:
            interrupted = True
    written = write_reports(reports, json_file) if json_file else True
    counts = count_outcomes(reports)
    summary = ", ".join(f"{count} {outcome}" for outcome, count in counts.items() if count) or "nothing done"
    seconds = time.perf_counter() - start
    say(f"{summary} of {len(plan.files)} in {seconds:.1f} s; results in {plan.options.output}", sys.stdout)
    if interrupted:
        return 130
    return 1 if counts["failed"] or not written else 0


def write_reports(reports: Sequence["FileReport"], path: Path) -> bool:
    """Write the file of --json; if that fails, print why and return False."""
    from pisa_jax.runtime.atomic_write import atomic_write

    try:
        with atomic_write(path) as file:
            file.write_text(json.dumps([dataclasses.asdict(report) for report in reports], indent=1))
    except OSError as error:
        say(f"the reports cannot be written to {path}: {error}", sys.stderr)
        return False
    return True
