"""`pisa-sr evaluate`: measure the quality of result files, or upscale with a model and measure.

With --model and --lq the results are computed first, at all --scales. Results are matched with ground truths
by file name: equal names, else equal stems, else stems that are equal without marks such as _x4, _LR4, _SR.
"""

import argparse
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2

from pisa_jax import __version__
from pisa_jax.cli.adapter_scales import adapter_names, complete_scales
from pisa_jax.cli.arguments import (
    adapter_file,
    add_buckets,
    add_tile_mode,
    integer_at_least,
    local,
    local_path,
    scales_of_adapters,
    seed,
    upscale_factor,
)
from pisa_jax.cli.output_files import check_output_files
from pisa_jax.config import Scales
from pisa_jax.imaging.image_files import find_images
from pisa_jax.imaging.image_writing import WRITABLE
from pisa_jax.metrics import registry, report
from pisa_jax.metrics.evaluation import (
    RESULT,
    Evaluation,
    UpscaleFunction,
    evaluate,
    scales_label,
    write_contact_sheet,
)
from pisa_jax.metrics.pairing import EvaluationItem, pair_files
from pisa_jax.runtime.atomic_write import atomic_write
from pisa_jax.runtime.console import progress_bar, say, show_any_name
from pisa_jax.runtime.messages import error_text

# File name suffixes that --plot and --sheet can write.
FIGURE_SUFFIXES = {"plot": (".png", ".svg", ".pdf"), "sheet": tuple(WRITABLE)}


def parser(prog: str = "pisa-sr evaluate") -> argparse.ArgumentParser:
    """The argument parser of the command."""
    p = argparse.ArgumentParser(
        prog=prog,
        description="Measure image quality with the metrics of published tables, of results or of a model at several "
        "scales.",
        epilog=f"Metrics: {', '.join(registry.METRICS)}; lpips is lpips-alex. dists, clipiqa, musiq, maniqa-pipal and "
        "fid are computed by pyiqa: pip install -e '.[metrics]'. Exit code: 0 all images measured, 1 some images "
        "not measured (the reasons are printed), 2 wrong usage.",
        allow_abbrev=False,
    )
    add = p.add_argument
    add("--sr", type=local_path, metavar="PATH", help="results: a folder of images, or one image")
    add("--gt", type=local_path, metavar="PATH", help="ground truths of the results")
    add("--lq", type=local_path, metavar="PATH", help="low-quality inputs; MATLAB's bicubic of them is measured too")
    add("--metrics", metavar="LIST", help="comma-separated names (default: psnr, ssim, niqe and LPIPS with the given "
        "weights, or perceptual without weights)")  # fmt: skip
    add("--color", choices=["y", "rgb"], default="y", help="compute PSNR and SSIM on luma or on RGB (default y)")
    add("--crop-border", type=integer_at_least(0), default=0, metavar="N",
        help="pixels to crop at each side for PSNR and SSIM (default 0; Set5, Set14: upscale factor)")  # fmt: skip
    add("--lpips-vgg", type=local, metavar="FILE|ID", help="VGG16 weights, such as timm/vgg16.tv_in1k")
    add("--lpips-alex", type=local, metavar="FILE|ID", help="AlexNet weights: torchvision's alexnet state dict")
    add("--perceptual", type=local, metavar="FILE", help="SqueezeNet 1.1 weights (default: those of the package)")
    add("--json", type=local_path, metavar="FILE", help="write per_image, mean and settings as JSON")
    add("--csv", type=local_path, metavar="FILE", help="write one row per image as CSV")
    add("--markdown", type=local_path, metavar="FILE", help="write tables as Markdown")
    grid = p.add_argument_group("upscale and measure")
    add = grid.add_argument
    add("--model", type=local, metavar="FOLDER|ID", help="base model, as for infer.py; needs --lq")
    add("--adapters", nargs="+", type=adapter_file, metavar="FILE",
        help="pisa_sr.pkl or adapters.safetensors; several files are joined in this order")  # fmt: skip
    add("--decomposition", nargs="+", default=[], metavar="MODULE:FUNCTION",
        help="import decompositions of your own that an adapter file names")  # fmt: skip
    add("--scales", nargs="+", type=scales_of_adapters, metavar="PIX,SEM",
        help="pairs of scales (default 1,1); with other adapters one number each, in their order")  # fmt: skip
    add("-s", "--scale", type=upscale_factor, default=4.0, help="upscale factor of --lq (default 4)")
    add("--dtype", choices=["bfloat16", "float32"], help="dtype of the UNet")
    add_buckets(add)
    add("--batch-size", type=integer_at_least(1), default=1, metavar="N",
        help="images per call of the model, of equal size or of one bucket (default 1)")  # fmt: skip
    add_tile_mode(add)
    add("--seed", type=seed, metavar="N",
        help="sample the latents with this seed (default: deterministic latents)")  # fmt: skip
    add("--plot", type=local_path, metavar="FILE", help="plot fidelity against perception (PNG, SVG, PDF)")
    add("--sheet", type=local_path, metavar="FILE", help="write a contact sheet of one image by all methods")
    add("--sheet-of", metavar="NAME", help="file name of the image of the contact sheet (default: the first)")
    return p


def choose_metrics(args: argparse.Namespace) -> list[str]:
    """Names of the metrics of --metrics, or the default for the given files and weights."""
    if args.metrics:
        names = [name.strip().lower() for name in args.metrics.split(",") if name.strip()]
        return list(dict.fromkeys(registry.ALIASES.get(name, name) for name in names))
    if not args.gt:
        return ["niqe"]
    given = [name for name, source in (("lpips-alex", args.lpips_alex), ("lpips-vgg", args.lpips_vgg)) if source]
    return ["psnr", "ssim", *(given or ["perceptual"]), "niqe"]


def usage_problem(args: argparse.Namespace, names: Sequence[str]) -> str | None:
    """The reason why these arguments cannot be used together, or None."""
    if not names:
        return "--metrics is empty"
    if not args.sr and not args.lq:
        return "give --sr (results), or --lq, alone or with --model"
    if args.model and (args.sr or not args.lq):
        return "--model computes the results from --lq: give --lq and no --sr"
    if (args.adapters or args.scales) and not args.model:
        return "--adapters and --scales need --model"
    compared = [name for name in names if registry.METRICS[name].needs_gt]
    if compared and not args.gt:
        return f"ground truths are missing for {', '.join(compared)}: give --gt"
    for name, source in (("lpips-vgg", args.lpips_vgg), ("lpips-alex", args.lpips_alex)):
        if name in names and not source:
            return f"{name} needs the weights of its network: --{name} FILE, a state dict of torchvision's"
    if "fid" in names and not (args.sr and args.sr.is_dir() and args.gt.is_dir()):
        return "fid compares two folders: give --sr and --gt as folders"
    return _output_problem(args, names)


def _output_problem(args: argparse.Namespace, names: Sequence[str]) -> str | None:
    """The reason why an output file cannot be written, or None."""
    missing = [path for path in output_files(args).values() if not path.absolute().parent.is_dir()]
    if missing:
        return f"the folder of {missing[0]} does not exist"
    for name, suffixes in FIGURE_SUFFIXES.items():
        path = getattr(args, name)
        if path and path.suffix.lower() not in suffixes:
            return f"--{name} {path} cannot be written: use a name ending in one of {' '.join(suffixes)}"
    if args.plot and find_spec("matplotlib") is None:
        return "--plot needs matplotlib: pip install -e '.[plot]'"
    if args.plot and not (set(names) & set(registry.FIDELITY) and set(names) - set(registry.FIDELITY)):
        return "--plot needs psnr or ssim and one other metric"
    return None


def output_files(args: argparse.Namespace) -> dict[str, Path]:
    """The files to write: {flag: path}."""
    paths = {f"--{name}": getattr(args, name) for name in ("json", "csv", "markdown", "plot", "sheet")}
    return {flag: path for flag, path in paths.items() if path}


def name_scales(args: argparse.Namespace) -> dict[str, Scales]:
    """The scales of the adapters by their name in tables; {} without a model.

    Raises:
        ValueError: not one scale for each adapter of the files.
    """
    if not args.model:
        return {}
    names = adapter_names(args.adapters)
    return {scales_label(row, names): row for row in complete_scales(args.scales, names)}


def list_files(args: argparse.Namespace) -> list[Path]:
    """The images of --sr, --gt and --lq."""
    return [file for path in (args.sr, args.gt, args.lq) if path for file in find_images(path)]


def load_upscale(args: argparse.Namespace) -> UpscaleFunction:
    """Load the model of the command line; returns its upscale function for the images of --lq."""
    from pisa_jax.adapters.registry import import_decomposition
    from pisa_jax.cli.evaluate_model import BatchUpscaler
    from pisa_jax.inference import Upscaler

    for name in args.decomposition:
        import_decomposition(name)

    def on_compile(what: str, seconds: float) -> None:
        say(f"compiled {what} in {seconds:.1f} s", sys.stderr)

    upscaler = Upscaler.load(
        args.model,
        args.adapters,
        dtype=args.dtype,
        on_compile=on_compile,
        buckets=args.buckets,
        vae_tile_mode=args.vae_tile_mode,
    )
    return BatchUpscaler(upscaler, find_images(args.lq), args.scale, args.seed, args.batch_size)


def settings_of(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """The settings that the scores depend on, for the JSON file."""
    settings = {
        "version": __version__,
        "metrics": {name: registry.definition(name, args.color, args.crop_border) for name in names},
        "color": args.color,
        "crop_border": args.crop_border,
        **{key: str(getattr(args, key)) for key in ("sr", "gt", "lq") if getattr(args, key)},
    }
    if args.lq:
        settings["scale"] = args.scale
    if args.model:
        from pisa_jax.runtime.distributed import default_dtype

        files = args.adapters or [None]
        settings |= {"model": args.model, "adapters": files[0] if len(files) == 1 else files}
        settings |= {"scales": list(args.scales.values()), "seed": args.seed, "dtype": args.dtype or default_dtype()}
    return settings


def write_reports(args: argparse.Namespace, names: list[str], evaluation: Evaluation, folder_scores: dict) -> None:
    """Print the table of means and write the requested files."""
    scores, problems = evaluation.scores, evaluation.problems
    means = report.method_means(scores, folder_scores)
    settings = settings_of(args, names)
    conditions = "; ".join(settings["metrics"].values()) + "."
    say(f"{report.mean_table(scores, means, names)}\n\n{conditions}", sys.stdout)
    as_json = json.dumps(report.as_json(scores, means, settings, problems), indent=1, allow_nan=False) + "\n"
    for path, text in (
        (args.json, as_json),
        (args.csv, report.as_csv(scores, means, names)),
        (args.markdown, report.as_markdown(scores, means, names, conditions, problems)),
    ):
        if path:
            with atomic_write(path) as file:
                file.write_text(text, encoding="utf-8", errors="backslashreplace")  # of names that are not UTF-8
    if args.plot:
        with atomic_write(args.plot) as file:
            report.plot(means, names, file)
    if args.sheet and evaluation.sheet_images:
        write_contact_sheet(evaluation.sheet_images, args.scales, args.sheet)


def evaluate_items(
    args: argparse.Namespace,
    functions: Mapping[str, registry.MetricFunction],
    items: Sequence[EvaluationItem],
    upscale: UpscaleFunction | None,
) -> Evaluation:
    """Evaluate the items with the options of the command line and a progress bar."""
    # Items are evaluated in parallel threads; OpenCV's own threads would compete with them.
    cv2.setNumThreads(1)
    sheet_item = (args.sheet_of or (items[0].name if items else None)) if args.sheet else None
    with progress_bar(len(items)) as bar:
        evaluation = evaluate(
            items,
            functions,
            scale=args.scale,
            scales=args.scales,
            upscale=upscale,
            sheet_item=sheet_item,
            workers=os.cpu_count() or 1,
            on_done=bar.update,
        )
    if args.sheet and not evaluation.sheet_images:
        evaluation.problems[str(sheet_item)] = "no contact sheet: there is no such image, or it could not be measured"
    return evaluation


def evaluate_folders(args: argparse.Namespace, problems: dict[str, str]) -> dict[str, dict[str, float]]:
    """Compute FID, which exists for whole folders only: {method: {"fid": value}}; a failure goes to `problems`."""
    try:
        return {RESULT: {"fid": registry.fid(args.sr, args.gt)}}
    except Exception as error:  # pyiqa raises errors of any type; the other scores remain valid
        problems[str(args.sr)] = f"fid: {error_text(error)}"
        return {}


def main(argv: Sequence[str] | None = None, prog: str = "pisa-sr evaluate") -> int:
    """Run the command; returns 0 if everything was measured, else 1. Wrong usage exits with 2."""
    show_any_name()
    p = parser(prog)
    args = p.parse_args(argv)
    names = choose_metrics(args)
    try:
        registry.check_names(names)
    except ValueError as error:
        p.error(str(error))
    if problem := usage_problem(args, names):
        p.error(problem)
    try:
        args.scales = name_scales(args)
    except ValueError as error:
        p.error(f"argument --scales: {error}")
    try:
        check_output_files(output_files(args), list_files(args))
        weights = {"lpips-vgg": args.lpips_vgg, "lpips-alex": args.lpips_alex, "perceptual": args.perceptual}
        functions = registry.make_metrics(names, args.color, args.crop_border, weights)
        items, unmatched = pair_files(args.sr, args.gt, args.lq)
        upscale = load_upscale(args) if args.model and items else None
    except (OSError, ValueError) as error:
        say(f"{prog}: {error}", sys.stderr)
        return 1
    evaluation = evaluate_items(args, functions, items, upscale)
    evaluation.problems.update(unmatched)
    folder_scores = evaluate_folders(args, evaluation.problems) if "fid" in names else {}
    for name, text in evaluation.problems.items():
        say(f"{name}: {text}", sys.stderr)
    written = True
    if evaluation.scores:
        try:
            write_reports(args, names, evaluation, folder_scores)
        except Exception as error:  # matplotlib raises errors of any type
            written = False
            say(f"{prog}: {error_text(error)}", sys.stderr)
    summary = f"{len(evaluation.problems)} with problems" if evaluation.problems else "no problems"
    say(f"{len(items)} images matched, {summary}", sys.stderr)
    return 0 if evaluation.scores and written and not evaluation.problems else 1
