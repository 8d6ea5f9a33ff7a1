"""Measure results, or upscale and measure: `pisa-sr evaluate --sr DIR --gt DIR --metrics psnr,ssim`.

With --model and --lq the pictures are made first, at every pair of --scales. Results are paired with ground truths by
file name: equal names, else equal stems, else stems that are equal without marks such as _x4, _LR4, _SR.
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from pisa_jax import __version__
from pisa_jax.imaging.contact_sheet import contact_sheet
from pisa_jax.imaging.image_io import WRITABLE, from_pil, read_rgb8, write_picture
from pisa_jax.imaging.matlab_resize import matlab_bicubic
from pisa_jax.metrics import registry, report
from pisa_jax.metrics.pairing import EvaluationItem, pair_files
from pisa_jax.runtime.atomic_write import whole_file

Pair = tuple[float, float]
# An RGB uint8 picture and (pix, sem) pairs -> the enlarged picture at each pair.
Upscale = Callable[[np.ndarray, Sequence[Pair]], list[np.ndarray]]

# Endings of --plot and --sheet.
DRAWINGS = {"plot": (".png", ".svg", ".pdf"), "sheet": tuple(WRITABLE)}


class Measured(NamedTuple):
    """{method: {picture: {metric: value}}}, what went wrong by picture, and the pictures of the contact sheet."""

    methods: dict[str, dict[str, dict[str, float]]]
    problems: dict[str, str]
    sheet: dict[str, np.ndarray]


def label_of(pair: Pair) -> str:
    """How a pair of scales is called in tables: "pix 1 sem 0.5"."""
    return f"pix {pair[0]:g} sem {pair[1]:g}"


def produce(
    item: EvaluationItem, scale: float, pairs: Sequence[Pair], upscale: Upscale | None
) -> dict[str, np.ndarray]:
    """Every method's picture of one item: the file, the model at each pair, and MATLAB's bicubic of the LQ picture."""
    results = {"sr": read_rgb8(item.sr)} if item.sr else {}
    if item.lq:
        lq = read_rgb8(item.lq)
        if upscale:
            results |= dict(zip(map(label_of, pairs), upscale(lq, pairs), strict=True))
        results[report.REFERENCE] = matlab_bicubic(lq, scale)
    return results


def evaluate(
    items: Sequence[EvaluationItem],
    functions: dict[str, registry.MetricFunction],
    scale: float = 4.0,
    pairs: Sequence[Pair] = (),
    upscale: Upscale | None = None,
    sheet_of: str | None = None,
    workers: int = 1,
    advance: Callable[[], Any] = lambda: None,
) -> Measured:
    """Make and measure every item; one that fails is named with the reason and the others go on.

    `functions` come from `registry.make_metrics`; `advance` is called after each item; the pictures of the item called
    `sheet_of` are kept. Threads do: NumPy, OpenCV and JAX release the interpreter lock (1.9x on two cores, more than
    processes give).
    """

    def work(item: EvaluationItem) -> tuple[dict[str, np.ndarray], dict[str, dict], list[str]]:
        try:
            pictures = produce(item, scale, pairs, upscale)
            gt = read_rgb8(item.gt) if item.gt else None
        except (OSError, ValueError, MemoryError, RuntimeError) as error:  # a full device is a RuntimeError
            return {}, {}, [registry.one_line(error)]
        rows, wrong = {}, []
        for label, picture in pictures.items():
            try:
                rows[label], failed = registry.compute_metrics(functions, picture, gt)
            except ValueError as error:
                failed = [str(error)]
            wrong += [f"{label}: {text}" for text in failed]
        kept = pictures | ({"ground truth": gt} if item.gt else {}) if item.name == sheet_of else {}
        return kept, rows, wrong

    measured = Measured({}, {}, {})
    # The model is driven by one thread: it uses all cores, and its results must not pile up.
    for item, (pictures, rows, wrong) in zip(items, _run(work, items, 1 if upscale else workers), strict=True):
        measured.sheet.update(pictures)
        for label, row in rows.items():
            if row or not functions:
                measured.methods.setdefault(label, {})[item.name] = row
        if wrong:
            measured.problems[item.name] = "; ".join(wrong)
        advance()
    return measured


def _run(work: Callable, items: Sequence[EvaluationItem], workers: int) -> Iterator:
    if workers == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        yield from pool.map(work, items)


def save_sheet(pictures: dict[str, np.ndarray], pairs: Sequence[Pair], path: Path) -> None:
    """Labelled contact sheet: a row per pix scale if the pairs are a full grid; bicubic and ground truth come last."""
    columns = len({sem for _, sem in pairs})
    if len(pairs) != columns * len({pix for pix, _ in pairs}):
        columns = min(len(pairs), 4)
    order = [label_of(pair) for pair in sorted(pairs)]
    order += [label for label in pictures if label not in order]
    cells = [(label, Image.fromarray(pictures[label])) for label in order]
    write_picture(path, from_pil(contact_sheet(cells, columns=columns or len(cells))))


def _numbers(text: str, counts: Sequence[int], least: float, kind: type) -> list:
    """One or more comma-separated finite numbers, or argparse's error."""
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        values = []
    if len(values) not in counts or not all(least <= value < math.inf for value in values):
        wanted = (
            "PIX,SEM (two numbers) or one number for both" if len(counts) > 1 else f"a number of at least {least:g}"
        )
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return values


def _pair(text: str) -> Pair:
    values = _numbers(text, (1, 2), -math.inf, float)
    return values[0], values[-1]


def _count(text: str) -> int:
    return _numbers(text, (1,), 0.0, int)[0]


def _enlargement(text: str) -> float:
    return _numbers(text, (1,), 1.0, float)[0]


def parser(prog: str = "pisa-sr evaluate") -> argparse.ArgumentParser:
    """Every flag."""
    p = argparse.ArgumentParser(
        prog=prog,
        description="Image quality as this field publishes it, of results or of a model over a grid of scales.",
        epilog=f"Metrics: {', '.join(registry.METRICS)}; lpips is lpips-alex. dists, clipiqa, musiq, maniqa-pipal and "
        "fid are computed by pyiqa: pip install -e '.[metrics]'. Exit code: 0 all measured, 1 something was not (it is "
        "named), 2 usage.",
        allow_abbrev=False,
    )
    add = p.add_argument
    add("--sr", type=Path, metavar="PATH", help="results: a folder of pictures, or one")
    add("--gt", type=Path, metavar="PATH", help="their ground truths")
    add("--lq", type=Path, metavar="PATH", help="low-quality inputs; MATLAB's bicubic of them is measured too")
    add("--metrics", metavar="LIST", help="comma separated; default: psnr,ssim, LPIPS with the weights that are given "
        "or else perceptual, and niqe")  # fmt: skip
    add("--color", choices=["y", "rgb"], default="y", help="PSNR and SSIM of luma or of RGB (default y)")
    add("--crop-border", type=_count, default=0, metavar="N",
        help="pixels cut off each side for PSNR and SSIM (default 0; Set5 and Set14 figures: the scale)")  # fmt: skip
    add("--lpips-vgg", metavar="FILE|ID", help="VGG16 weights, such as timm/vgg16.tv_in1k")
    add("--lpips-alex", metavar="FILE|ID", help="AlexNet weights: torchvision's alexnet state dict")
    add("--perceptual", metavar="FILE", help="SqueezeNet 1.1 weights (default: those in the package)")
    add("--json", type=Path, metavar="FILE", help="write per_image, mean and settings")
    add("--csv", type=Path, metavar="FILE", help="write a row per picture")
    add("--markdown", type=Path, metavar="FILE", help="write tables")
    grid = p.add_argument_group("upscale and measure")
    add = grid.add_argument
    add("--model", metavar="FOLDER|ID", help="base model, as for infer.py; with --lq")
    add("--adapters", metavar="FILE", help="pisa_sr.pkl or adapters.safetensors")
    add("--scales", nargs="+", type=_pair, metavar="PIX,SEM", help="pairs (default 1,1)")
    add("-s", "--scale", type=_enlargement, default=4.0, help="enlargement of --lq (default 4)")
    add("--dtype", choices=["bfloat16", "float32"], help="of the UNet")
    add("--seed", type=_count, metavar="N", help="sample the latent; without it the result is deterministic")
    add("--plot", type=Path, metavar="FILE", help="plot fidelity against perception (PNG, SVG, PDF)")
    add("--sheet", type=Path, metavar="FILE", help="contact sheet of one picture over all methods")
    add("--sheet-of", metavar="NAME", help="file name of that picture (default: the first)")
    return p


def choose_metrics(args: argparse.Namespace) -> list[str]:
    """--metrics, or what can be measured with what is given."""
    if args.metrics:
        names = [name.strip().lower() for name in args.metrics.split(",") if name.strip()]
        return list(dict.fromkeys(registry.ALIASES.get(name, name) for name in names))
    if not args.gt:
        return ["niqe"]
    given = [name for name, source in (("lpips-alex", args.lpips_alex), ("lpips-vgg", args.lpips_vgg)) if source]
    return ["psnr", "ssim", *(given or ["perceptual"]), "niqe"]


def usage_problem(args: argparse.Namespace, names: Sequence[str]) -> str | None:
    """Why these arguments cannot work together, if so."""
    known = [registry.METRICS[name] for name in names]
    sources = {"lpips-vgg": args.lpips_vgg, "lpips-alex": args.lpips_alex}
    outputs = [path for path in (args.json, args.csv, args.markdown, args.plot, args.sheet) if path]
    lost = [path for path in outputs if not path.absolute().parent.is_dir()]
    if not names:
        return "--metrics is empty"
    if not args.sr and not args.lq:
        return "give --sr (results), or --lq, alone or with --model"
    if args.model and (args.sr or not args.lq):
        return "--model makes the results from --lq: give --lq and no --sr"
    if (args.adapters or args.scales) and not args.model:
        return "--adapters and --scales need --model"
    if not args.gt and any(metric.needs_gt for metric in known):
        return f"{', '.join(n for n in names if registry.METRICS[n].needs_gt)} compare with ground truths: give --gt"
    for name, source in sources.items():
        if name in names and not source:
            return f"{name} needs the weights of its backbone: --{name} FILE, a state dict of torchvision's"
    if "fid" in names and not (args.sr and args.sr.is_dir() and args.gt.is_dir()):
        return "fid compares two folders: give --sr and --gt as folders"
    if lost:
        return f"the folder of {lost[0]} does not exist"
    for name, endings in DRAWINGS.items():
        path = getattr(args, name)
        if path and path.suffix.lower() not in endings:
            return f"--{name} {path} cannot be written: use a name ending in one of {' '.join(endings)}"
    if args.plot and find_spec("matplotlib") is None:
        return "--plot needs matplotlib: pip install -e '.[plot]'"
    if args.plot and not (set(names) & set(registry.FIDELITY) and set(names) - set(registry.FIDELITY)):
        return "--plot needs psnr or ssim and one other metric"
    return None


def load_upscale(args: argparse.Namespace) -> Upscale:
    """The model of the command line as a function."""
    from pisa_jax.inference import Upscaler

    def on_compile(what: str, seconds: float) -> None:
        tqdm.write(f"compiled {what} in {seconds:.1f} s", file=sys.stderr)

    upscaler = Upscaler.load(args.model, args.adapters, dtype=args.dtype, on_compile=on_compile)

    def upscale(image, pairs):
        adjustable = any(pair != (1.0, 1.0) for pair in pairs)
        session = upscaler.open(image, args.scale, args.seed, adjustable=adjustable)
        return [session.render(*pair) for pair in pairs]

    return upscale


def settings_of(args: argparse.Namespace, names: Sequence[str]) -> dict[str, Any]:
    """What the numbers depend on, for the JSON file."""
    settings = {
        "version": __version__,
        "metrics": {name: _describe(name, args) for name in names},
        "color": args.color,
        "crop_border": args.crop_border,
        **{key: str(getattr(args, key)) for key in ("sr", "gt", "lq") if getattr(args, key)},
    }
    if args.lq:
        settings["scale"] = args.scale
    if args.model:
        from pisa_jax.inference import default_dtype

        settings |= {key: getattr(args, key) for key in ("model", "adapters", "scales", "seed")}
        settings["dtype"] = args.dtype or default_dtype()
    return settings


def _describe(name: str, args: argparse.Namespace) -> str:
    if name in registry.FIDELITY:
        colour = "Y of YCbCr" if args.color == "y" else "RGB"
        return f"{registry.METRICS[name].label} of {colour}, {args.crop_border} pixels of border cropped"
    return {
        "lpips-alex": "LPIPS 0.1 (AlexNet)",
        "lpips-vgg": "LPIPS 0.1 (VGG16)",
        "perceptual": "SqueezeNet 1.1 feature distance, no heads: not LPIPS",
        "niqe": "NIQE, statistics of its authors' release",
    }.get(name, f"{name} of pyiqa")


def measure_folders(args: argparse.Namespace, problems: dict[str, str]) -> dict[str, float]:
    """The figures that exist for a whole folder only; why there is none goes to `problems`."""
    try:
        return {"fid": registry.fid(args.sr, args.gt)}
    except Exception as error:  # whatever pyiqa raises, the other figures stand
        problems[str(args.sr)] = f"fid: {registry.one_line(error)}"
        return {}


def write_reports(args: argparse.Namespace, names: list[str], measured: Measured, whole_set: dict) -> None:
    """Print the table of means and write the files that were asked for."""
    methods, problems = measured.methods, measured.problems
    means = report.method_means(methods, whole_set)
    settings = settings_of(args, names)
    conditions = "; ".join(settings["metrics"].values()) + "."
    print(report.mean_table(methods, means, names), conditions, sep="\n\n")
    as_json = json.dumps(report.as_json(methods, means, settings, problems), indent=1, allow_nan=False) + "\n"
    for path, text in (
        (args.json, as_json),
        (args.csv, report.as_csv(methods, means, names)),
        (args.markdown, report.as_markdown(methods, means, names, conditions, problems)),
    ):
        if path:
            with whole_file(path) as file:
                file.write_text(text, encoding="utf-8")
    if args.plot:
        with whole_file(args.plot) as file:
            report.plot(means, names, file)
    if args.sheet and measured.sheet:
        save_sheet(measured.sheet, args.scales, args.sheet)


def main(argv: Sequence[str] | None = None, prog: str = "pisa-sr evaluate") -> int:
    """The exit code: 0 all measured, 1 something was not, 2 wrong usage (through argparse)."""
    p = parser(prog)
    args = p.parse_args(argv)
    names = choose_metrics(args)
    try:
        registry.check_names(names)
    except ValueError as error:
        p.error(str(error))
    if problem := usage_problem(args, names):
        p.error(problem)
    args.scales = list(dict.fromkeys(args.scales or [(1.0, 1.0)])) if args.model else []
    try:
        weights = {"lpips-vgg": args.lpips_vgg, "lpips-alex": args.lpips_alex, "perceptual": args.perceptual}
        functions = registry.make_metrics(names, args.color, args.crop_border, weights)
        items, unpaired = pair_files(args.sr, args.gt, args.lq)
        upscale = load_upscale(args) if args.model and items else None
    except (OSError, ValueError) as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 1
    # Pictures are measured side by side; OpenCV's own threads would only get in the way.
    cv2.setNumThreads(1)
    sheet_of = (args.sheet_of or (items[0].name if items else None)) if args.sheet else None
    with tqdm(total=len(items), unit="picture", disable=None) as bar:
        measured = evaluate(
            items, functions, args.scale, args.scales, upscale, sheet_of, os.cpu_count() or 1, bar.update
        )
    measured.problems.update(unpaired)
    if args.sheet and not measured.sheet:
        measured.problems[str(sheet_of)] = "no contact sheet: no such picture could be measured"
    whole_set = {"sr": measure_folders(args, measured.problems)} if "fid" in names else {}
    for name, text in measured.problems.items():
        print(f"{name}: {text}", file=sys.stderr)
    written = True
    if measured.methods:
        try:
            write_reports(args, names, measured, whole_set)
        except (OSError, ValueError) as error:
            written = False
            print(f"{prog}: {error}", file=sys.stderr)
    counted = f"{len(measured.problems)} with problems" if measured.problems else "no problems"
    print(f"{len(items)} pictures paired, {counted}", file=sys.stderr)
    return 0 if measured.methods and written and not measured.problems else 1
