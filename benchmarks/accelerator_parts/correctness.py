"""Part 2: results on this device against recordings, float32, and plain formulas."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import recorded
from asset_paths import DATA
from PIL import Image

from pisa_jax import Upscaler
from pisa_jax.sd import layers, pretrained

# Name: queries, keys, heads, channels. Those of Stable Diffusion at 512x512, and one that no fused kernel supports.
ATTENTION = {
    "UNet, self": (4096, 4096, 5, 64),
    "UNet, text": (4096, 77, 5, 64),
    "VAE": (4096, 4096, 1, 512),
    "odd": (1023, 1023, 2, 64),
}
# A run of each size; the first is compared before everything else.
FIRST_RUNS = ("A_default-mode", "A_adj_p0p5_s1p3-mode", "A_adj_p0p5_s1p3-noise")
# Relative errors that are expected of one rounding to bfloat16, 2^-9 = 0.2 %, in attention and in a whole model.
TOLERANCES = {"float32": 1e-5, "bfloat16": 0.02}
MODEL_TOLERANCE, MODEL_PSNR = 0.06, 45.0


def run(rows, size: str) -> None:
    """Compare, most important first."""
    runs = recorded.recorded_runs(DATA)
    with jax.default_matmul_precision("highest"):
        for name in FIRST_RUNS:
            recorded_run(rows, name, runs.pop(name))
        gradient(rows, "pix")
    attention(rows, size)
    with jax.default_matmul_precision("highest"):
        gradient(rows, "sem")
    dtypes(rows, size)
    with jax.default_matmul_precision("highest"):
        for name, each in runs.items():
            recorded_run(rows, name, each)


def recorded_run(rows, name: str, each: dict) -> None:
    """Repeat a run of the original program."""
    rows.attempt(f"recorded run {name}, float32", lambda: worst(recorded.run_deviations(each)), expected=1)


def gradient(rows, stage: str) -> None:
    """Repeat a training step of the original program."""
    rows.attempt(
        f"recorded gradient {stage}, float32",
        lambda: worst(recorded.gradient_deviations(stage, *recorded.recorded_gradient(stage))),
        expected=2,
    )


def worst(deviations: dict[str, recorded.Deviation]) -> dict:
    """Return the values of a row: the quantity that is closest to its tolerance, or furthest beyond it."""

    def badness(name):
        share = deviations[name].error / deviations[name].tolerance
        return math.inf if math.isnan(share) else share

    name = max(deviations, key=badness)
    error, tolerance = deviations[name]
    status = "ok" if error <= tolerance else "wrong"
    return {"status": status, "quantities": len(deviations), "worst": name, "error": error, "tolerance": tolerance}


def attention(rows, size: str) -> None:
    """Compare the kernels of attention and their gradients with the formula in float32."""
    for dtype, (name, shape) in itertools.product(TOLERANCES, ATTENTION.items()):
        if size != "sd21":
            shape = (*(length // 4 for length in shape[:2]), *shape[2:])
        rows.attempt(f"attention {name}, {dtype}", functools.partial(attention_deviation, shape, dtype), expected=1)


def attention_deviation(shape: tuple[int, int, int, int], dtype: str) -> dict:
    """Return the row of one shape and dtype: relative errors of the result and of the gradient."""
    queries, keys, heads, channels = shape
    draws = jax.random.split(jax.random.key(0), 4)
    lengths = (queries, keys, keys, queries)
    *inputs, weights = (
        jax.random.normal(draw, (1, length, heads, channels)).astype(dtype)
        for draw, length in zip(draws, lengths, strict=True)
    )

    def plain(query, key, value):
        scores = jnp.einsum("bnhd,bmhd->bhnm", query, key) / channels**0.5
        return jnp.einsum("bhnm,bmhd->bnhd", jax.nn.softmax(scores, axis=-1), value)

    def outputs(function, inputs):
        def weighted(*inputs):
            out = function(*inputs)
            return jnp.sum(out.astype(jnp.float32) * weights.astype(jnp.float32)), out

        grads, out = jax.jit(jax.grad(weighted, argnums=(0, 1, 2), has_aux=True))(*inputs)
        return {"result": out, **dict(zip(("d query", "d key", "d value"), grads, strict=True))}

    with jax.default_matmul_precision("highest"):
        found = outputs(layers.attention, inputs)
        exact = outputs(plain, [array.astype(jnp.float32) for array in inputs])
    fused = bool(layers.cudnn_attention_compiles(inputs[0].dtype, channels))
    tolerance = TOLERANCES[dtype]
    deviations = {
        name: recorded.Deviation(recorded.relative(array.astype(jnp.float32), exact[name]), tolerance)
        for name, array in found.items()
    }
    return worst(deviations) | {"cudnn_compiles": fused}


def dtypes(rows, size: str) -> None:
    """Compare the demo model in the dtypes of inference with itself in float32 and the highest precision."""
    side = 128 if size == "sd21" else 32
    exact = functools.cache(functools.partial(demo_results, side, "float32", "float32", "highest"))
    for dtype, vae_dtype in (("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")):
        rows.attempt(
            f"demo model, {dtype}, VAE {vae_dtype}, default precision",
            lambda dtypes=(dtype, vae_dtype): compare_results(demo_results(side, *dtypes, "default"), exact()),
            expected=3,
        )


def demo_results(side: int, dtype: str, vae_dtype: str, precision: str) -> dict[str, np.ndarray]:
    """Upscale a part of a sample image; returns latents, both predictions and the image."""
    with Image.open(pretrained.DEMO / "samples" / "perched_osprey.png") as sample:
        image = np.asarray(sample.convert("RGB"))[:side, :side]
    with jax.default_matmul_precision(precision):
        upscaler = Upscaler.load(dtype=dtype, vae_dtype=vae_dtype, min_size=4 * side)
        session = upscaler.open(image, scale=4)
        arrays = {name: getattr(session, name) for name in ("latents", "eps_pix", "eps_full")}
        return {**{name: np.asarray(array) for name, array in arrays.items()}, "image": session.render(1.0, 0.7)}


def compare_results(found: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> dict:
    """Return relative errors of the predictions, and the PSNR and the largest difference of the images."""
    errors = {name: recorded.relative(found[name], exact[name]) for name in ("latents", "eps_pix", "eps_full")}
    difference = np.abs(found["image"].astype(float) - exact["image"])
    square = np.mean(difference**2)
    psnr = 10 * math.log10(255**2 / square) if square else math.inf
    good = max(errors.values()) <= MODEL_TOLERANCE and psnr >= MODEL_PSNR
    values = {**errors, "tolerance": MODEL_TOLERANCE, "PSNR_dB": min(psnr, 99.0), "gray_levels": difference.max()}
    return {"status": "ok" if good else "wrong", **values}
