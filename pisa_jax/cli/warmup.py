"""Fill the compilation cache in advance: `pisa-sr warmup`, with the options of the model as for `pisa-sr infer`."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pisa_jax.cli.arguments import image_size, integer_at_least, local, upscale_factor
from pisa_jax.cli.infer import (
    add_model_arguments,
    complete_model_arguments,
    enable_compilation_cache,
    list_inputs,
    load_upscaler,
)
from pisa_jax.runtime.console import say, show_any_name

if TYPE_CHECKING:
    from pisa_jax.inference import Upscaler

# Aspect ratios of the default sizes, upright and flat; the shorter side is --min-size.
RATIOS = (1.0, 5 / 4, 4 / 3, 3 / 2, 16 / 9)


def parser(prog: str = "pisa-sr warmup") -> argparse.ArgumentParser:
    """Build the parser."""
    p = argparse.ArgumentParser(
        prog=prog,
        description="Compile the programs of inference into the compilation cache, so that later runs start at once. "
        "Give the options of the model that these runs will have: other dtypes, tiles or adapters need other programs.",
        epilog="Without --input and --sizes, the programs for images with a shorter side of --min-size after upscaling "
        "and common aspect ratios are compiled, to 16:9 in both orientations.",
        allow_abbrev=False,
    )
    _add_size_arguments(p.add_argument)
    add_model_arguments(p.add_argument)
    return p


def _add_size_arguments(add: Callable[..., Any]) -> None:
    add("-i", "--input", nargs="+", type=local, metavar="PATH", help="compile for these images or folders of images")
    add("-s", "--scale", type=upscale_factor, default=4.0, help="upscale factor of --input (default 4)")
    add("--sizes", nargs="+", type=image_size, metavar="WxH", help="compile for images that have these sizes in pixels "
        "after upscaling")  # fmt: skip
    add("--batch-size", type=integer_at_least(1), default=1, metavar="N", help="images per call of the model "
        "(default 1)")  # fmt: skip


def main(argv: Sequence[str] | None = None, prog: str = "pisa-sr warmup") -> int:
    """Run the command. Exit code: 0 everything is compiled, 1 it failed, 2 wrong usage, 130 interrupted."""
    show_any_name()
    p = parser(prog)
    args = p.parse_args(argv)
    complete_model_arguments(p, args)
    if args.compile_cache == "off":
        p.error("argument --compile-cache: off leaves nothing to fill")
    try:
        sizes, scale = wanted_sizes(args)
        if (cache := enable_compilation_cache(args.compile_cache)) is None:
            return 1
        start, before = time.perf_counter(), folder_bytes(cache)
        compile_sizes(load_upscaler(args), sizes, scale, args, cache)
    except (OSError, ValueError) as error:
        say(f"{prog}: {error}", sys.stderr)
        return 1
    except KeyboardInterrupt:
        say(f"{prog}: interrupted; what has been compiled is kept", sys.stderr)
        return 130
    seconds, megabytes = time.perf_counter() - start, (folder_bytes(cache) - before) / 1e6
    say(f"ready in {seconds:.0f} s; {megabytes:.1f} MB more in {cache}", sys.stdout)
    return 0


def wanted_sizes(args: argparse.Namespace) -> tuple[list[tuple[int, int]], float]:
    """Return heights and widths of images, and the factor by which they are upscaled.

    Raises:
        ValueError: there are no images in --input.
    """
    from pisa_jax.cli.infer_plan import header_shape

    if args.input:
        shapes = map(header_shape, list_inputs(args.input))
        scaled = [(round(height / args.scale), round(width / args.scale)) for width, height in args.sizes or ()]
        return [*filter(None, shapes), *scaled], args.scale
    return [(height, width) for width, height in args.sizes or default_sizes(args.min_size)], 1.0


def default_sizes(side: int) -> list[tuple[int, int]]:
    """Return widths and heights of common aspect ratios with a shorter side of `side` pixels.

    >>> default_sizes(512)[:3]
    [(512, 512), (640, 512), (512, 640)]
    """
    sizes = [(round(side * ratio), side) for ratio in RATIOS]
    return list(dict.fromkeys(size for flat in sizes for size in (flat, flat[::-1])))


def compile_sizes(
    upscaler: "Upscaler", sizes: Sequence[tuple[int, int]], scale: float, args: argparse.Namespace, cache: Path
) -> None:
    """Compile the programs for scales of 1 and for others, and record their buckets."""
    from pisa_jax.cli.known_buckets import KnownBuckets

    if args.input:  # as the run on these images will do; else every size has a bucket of its own
        upscaler.plan_buckets(sizes, scale)
    distinct = {upscaler.batch_key(size, scale): size for size in sizes}.values()
    for adjustable in (False, True):
        for size in distinct:
            upscaler.compile(size, scale, adjustable, args.batch_size)
        if upscaler.pipeline.buckets is not None:
            known = KnownBuckets(cache, args, adjustable, args.batch_size)
            known.add(upscaler.pipeline.buckets.used)


def folder_bytes(folder: Path) -> int:
    """Return the size of the files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
