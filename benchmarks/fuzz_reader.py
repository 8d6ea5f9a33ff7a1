"""The child process of fuzz.py: reads files as `pisa-sr infer` does, under a memory limit, and answers on stdout.

A request is a line of JSON {"kind": "image" | "adapters" | "checkpoint", "path": ..., "sound": ...}; `sound` is the
file from which `path` was made. An answer is a line of JSON, see `_answer`.
"""

import argparse
import functools
import json
import os
import resource
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from pisa_jax.adapters.files import load_adapters
from pisa_jax.adapters.fit import check_adapters
from pisa_jax.adapters.registry import get_decomposition
from pisa_jax.cli.infer import limit_megapixels
from pisa_jax.imaging.image_data import ImageError
from pisa_jax.imaging.image_files import READABLE
from pisa_jax.imaging.image_reading import read_image
from pisa_jax.imaging.image_writing import output_suffix, write_image
from pisa_jax.imaging.network_input import finish_output, prepare_input
from pisa_jax.runtime.messages import error_text
from pisa_jax.runtime.tensor_files import read_tensors

MEGAPIXELS = 16  # as --max-megapixels
LARGEST_WRITTEN = 2**20  # pixels of an image that is also prepared for the network and written

# Reads the file and returns a function for the rest of the work, whose memory is not measured.
Reader = Callable[[Path, Path], Callable[[], object]]


def read_image_file(path: Path, sound: Path) -> Callable[[], object]:
    """Read an image; the rest is to prepare it for the network, and to write what a network without effect returns."""
    image = read_image(path)
    if not np.isfinite(image.rgb).all():
        raise AssertionError(f"{path} was read with values that are not finite")

    def write() -> None:
        if image.rgb[..., 0].size > LARGEST_WRITTEN:
            return
        prepared, plan = prepare_input(image, 1, 64, 8)
        result = finish_output(prepared, plan, image)
        target = Path(f"written{output_suffix(image)}")
        write_image(target, result)  # what a failure leaves is reported
        try:
            with Image.open(target) as written:
                written.load()
                if written.size != result.rgb.shape[1::-1]:
                    raise AssertionError(f"{path} was written as {written.size}, not {result.rgb.shape[1::-1]}")
        finally:
            target.unlink()

    return write


def read_adapter_file(path: Path, sound: Path) -> Callable[[], object]:
    """Load adapters; the rest is what `Upscaler.load` does: check them against a model, and compute dW."""
    adapters = load_adapters(path)

    def merge() -> None:
        try:
            check_adapters(adapters.trees, adapters.specs, _kernel_shapes(sound))
            functions = {name: get_decomposition(spec) for name, spec in adapters.specs.items()}
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        with np.errstate(all="ignore"):  # JAX does not warn either
            for name, tree in adapters.trees.items():
                for layer, factors in tree.items():
                    functions[name].delta(factors, np.zeros(_kernel_shapes(sound)[layer], np.float32))

    return merge


def read_checkpoint(path: Path, sound: Path) -> Callable[[], object]:
    """Read the tensors of a model's weight file; the rest is to read every value."""
    tensors = read_tensors(path)
    return lambda: [tensor.copy() for tensor in tensors.values()]


@functools.cache
def _kernel_shapes(sound: Path) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for tree in load_adapters(sound).trees.values():
        for path, factors in tree.items():
            names = sorted(factors)  # a, b or a1, a2, b1, b2
            shapes[path] = (*factors[names[0]].shape[:-1], factors[names[-1]].shape[-1])
    return shapes


READERS: dict[str, Reader] = {"image": read_image_file, "adapters": read_adapter_file, "checkpoint": read_checkpoint}
# What the documentation of the readers and writers allows. ValueError has subclasses for images and pickles.
DOCUMENTED = {"image": (ImageError, OSError), "adapters": (ValueError, OSError), "checkpoint": (ValueError, OSError)}


def serve(readers: Mapping[str, Reader] = READERS) -> None:
    """Answer requests until stdin ends. Warnings count as errors: users would see them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", type=float, required=True, help="GiB of address space on top of the libraries'")
    arguments = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout, too
    cv2.setNumThreads(1)
    limit_megapixels(MEGAPIXELS)
    Image.init()
    used = 1024 * _status("VmSize")
    resource.setrlimit(resource.RLIMIT_AS, (used + round(arguments.memory * 2**30),) * 2)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        path, sound = Path(request["path"]), Path(request["sound"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", DeprecationWarning)  # as Python does
            answer = _answer(readers[request["kind"]], DOCUMENTED[request["kind"]], path, sound)
        print(json.dumps(answer), file=answers, flush=True)


def _answer(reader: Reader, documented: tuple, path: Path, sound: Path) -> dict:
    """Read one file: {outcome, text, memory: bytes above those in use before, pixels: in the file}."""
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the memory in use
    before, memory = _status("VmRSS"), None
    answer = {"outcome": "read", "text": ""}
    try:
        rest = reader(path, sound)
        memory = _status("VmHWM") - before
        rest()
    except documented as error:
        # `pisa-sr infer` prints an image's failure on one line, and that of the adapters as it is.
        text = error_text(error) if isinstance(error, ImageError) else str(error)
        clear = str(path) in text and text.isprintable() and len(text) < 1500
        answer = {"outcome": "refused" if clear else "unclear", "text": text[:2000]}
    except MemoryError:
        answer = {"outcome": "memory", "text": traceback.format_exc()[-2000:]}
    except BaseException:
        answer = {"outcome": "traceback", "text": traceback.format_exc()[-4000:]}
    memory = _status("VmHWM") - before if memory is None else memory
    return answer | {"memory": 1024 * memory, "pixels": _pixels(path)}


def _status(name: str) -> int:
    """Return a number, in KiB, from the kernel's record of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


def _pixels(path: Path) -> int:
    """Return the number of pixels that the header of an image announces, at most `MEGAPIXELS`; 0 without a header."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path, formats=[name for name in READABLE if name in Image.OPEN]) as image:
                return min(image.width * image.height, round(MEGAPIXELS * 1e6))
    except Exception:  # a damaged file
        return 0


if __name__ == "__main__":
    serve()
