"""Recordings of the original program, and how far results of this package are from them.

Needs no pytest, because benchmarks/accelerator.py makes the same comparisons on the device that it runs on.
"""

import dataclasses
import functools
import json
import re
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from asset_paths import golden
from safetensors.numpy import save_file

from pisa_jax import inference, losses, model, train_step
from pisa_jax.adapters import files, injection
from pisa_jax.adapters.adapter_tree import Adapters
from pisa_jax.config import Stage
from pisa_jax.metrics import lpips
from pisa_jax.model import LoadedModel
from pisa_jax.runtime import torch_layout
from pisa_jax.runtime.compilation import CompiledCache
from pisa_jax.runtime.distributed import on_device
from pisa_jax.sd import pretrained
from pisa_jax.train_step import Batch, Draws, Frozen, Objective

TOLERANCE = 1e-4  # float32 against the original program, from assets/README.md
STAGES = {
    "pix": Stage("pix", steps=10, learning_rate=1e-3),
    "sem": Stage("sem", steps=10, frozen=("pix",), perceptual=2.0, csd=1.0, learning_rate=1e-3),
}
decode = jax.jit(lambda base, *arrays: base.decode(*arrays), static_argnums=0)
COMPILED = CompiledCache(1000)  # of all recorded runs: they differ in shapes and not in settings


class Deviation(NamedTuple):
    """The error of a quantity, and the largest error that is accepted."""

    error: float
    tolerance: float


def nhwc(array: np.ndarray) -> jax.Array:
    """Convert a recorded array from NCHW to NHWC."""
    return jnp.asarray(array.transpose(0, 2, 3, 1))


def read_json(path: Path):
    """Read a JSON file."""
    return json.loads(path.read_text())


def relative(found, expected) -> float:
    """Compute the relative L2 difference."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def largest(found, expected, tolerance: float = TOLERANCE) -> Deviation:
    """The largest difference of two arrays of one shape."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return Deviation(float(np.abs(found - expected).max()), tolerance)


@functools.cache
def recorded_model() -> LoadedModel:
    """Load the checkpoint of Stable Diffusion 2.1's structure that the recorded runs used."""
    loaded = pretrained.load_pretrained(str(golden("sd_tiny")))
    return loaded._replace(params=on_device(loaded.params, np.float32))


@functools.cache
def recorded_adapters() -> Adapters:
    """Load the adapters in the published file format, as the original program writes it."""
    return files.load_adapters(golden("pisa_sr.pkl"))


@functools.cache
def recorded_vgg() -> dict:
    """Make the random VGG16 of the recordings, with the heads of LPIPS."""
    recipe = read_json(golden("train/vgg_recipe.json"))
    draw, layers = np.random.RandomState(recipe["seed"]), {}
    for name in recipe["order"]:
        shape = recipe["shapes"][name]
        spread = np.sqrt(6 / (9 * shape[1])) if name.endswith("weight") else 0.1
        layers[name] = ((draw.random_sample(shape) * 2 - 1) * spread).astype(np.float16).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        save_file(layers, f"{folder}/vgg16.safetensors")
        return on_device(lpips.load_weights(f"{folder}/vgg16.safetensors", "vgg"), np.float32)


def recorded_runs(folder: Path) -> dict[str, dict]:
    """Return the recorded runs of a folder, except those with the original's tiled VAE, which this package replaces."""
    index = folder / "fixtures" / "infer" / "index.json"
    runs = read_json(index)["runs"] if index.exists() else []
    return {f"{run['name']}-{run['variant']}": run for run in runs if not re.search("vaetile|alltile", run["name"])}


@functools.cache
def recorded_upscaler(**settings) -> inference.Upscaler:
    """Make an upscaler of the recorded model and adapters."""
    loaded, adapters = recorded_model(), recorded_adapters()
    merged = injection.merge(loaded.params["unet"], {"pix": adapters.trees["pix"]}, adapters.specs, {"pix": 1.0})
    prompt = loaded.base.encode_text(loaded.params["text"], jnp.asarray(loaded.tokenize([""])))
    weights = inference.Weights(merged, (adapters.trees["sem"],), loaded.params["vae"], prompt)
    upscaler = inference.Upscaler(loaded.base, weights, adapters.specs, inference.Settings(**settings))
    upscaler.pipeline.runner.compiled = COMPILED
    return upscaler


def run_deviations(run: dict) -> dict[str, Deviation]:
    """Repeat a recorded run and compare latents, predictions and decoded images."""
    args = run["args"]
    upscaler = recorded_upscaler(tile=args["latent_tiled_size"], overlap=args["latent_tiled_overlap"], tile_batch=4)
    pipeline = upscaler.pipeline
    batch = np.asarray(nhwc(np.load(golden(f"infer/{run['inputs']}.npz"))["c_t_uint8"]), np.float32) / 255 * 2 - 1
    noise = nhwc(np.load(golden(f"infer/{run['noise']}.npy"))) if run["noise"] else None
    expected = np.load(golden(f"infer/{run['name']}__{run['variant']}.npz"))
    scales = jnp.array((args["lambda_pix"], args["lambda_sem"]))

    # Both predictions at once serve the default setting too; A proves the single pass.
    adjustable = not args["default"] or run["image"] != "A"
    found = pipeline.predict(pipeline.encode(batch, noise), adjustable)
    combined = model.combine(*found, scales)
    compared = {
        "encoded": found.latents,
        "model_pred": scales[0] * found.eps_pix + scales[1] * (found.eps_full - found.eps_pix),
        "model_pred_full": found.eps_full,
        "model_pred_pix": found.eps_pix,
        "x_denoised": combined,
    }
    deviations = {name: largest(array, nhwc(expected[name])) for name, array in compared.items() if name in expected}
    if "decoded" in expected:
        # Element by element from their latents: the decoder doubles what rounding leaves between ours and theirs, up to
        # 6e-5 on one machine and more on another.
        ours, from_theirs = (
            decode(pipeline.base, pipeline.runner.weights.vae, latents)
            for latents in (combined, nhwc(expected["x_denoised"]))
        )
        deviations["decoded"] = largest(from_theirs, nhwc(expected["decoded"]))
        deviations["decoded, relative"] = Deviation(relative(ours, nhwc(expected["decoded"])), TOLERANCE)
    return deviations


def recorded_case(name: str) -> tuple:
    """Return (adapter, frozen, batch, draws, base model, objective) of the recorded step of a stage."""
    loaded, adapters = recorded_model(), recorded_adapters()
    arrays, described = np.load(golden("train/batch.npz")), read_json(golden("train/train.json"))
    tokens = [
        jnp.asarray(loaded.tokenize(prompts)) for prompts in (described["prompts"], [described["neg_prompt"]], [""])
    ]
    negative, null = (loaded.base.encode_text(loaded.params["text"], ids) for ids in tokens[1:])
    stage = dataclasses.replace(STAGES[name], spec=adapters.specs[name])
    merged = {earlier: adapters.trees[earlier] for earlier in stage.frozen}
    frozen = Frozen(
        unet=injection.merge(loaded.params["unet"], merged, adapters.specs, dict.fromkeys(merged, 1.0)),
        teacher=loaded.params["unet"],
        vae=loaded.params["vae"],
        text=loaded.params["text"],
        null_prompt=null,
        negative_prompt=negative,
        perceptual=recorded_vgg() if stage.perceptual else None,
        alphas_cumprod=losses.ddpm_schedule().alphas_cumprod,
    )
    batch = Batch(nhwc(arrays["x_src"]), nhwc(arrays["x_tgt"]), tokens[0], jnp.array([True, True]))
    draws = Draws(nhwc(arrays["enc_noise"]), nhwc(arrays["csd_noise"]), jnp.asarray(arrays["csd_t"]))
    tree = jax.tree.map(jnp.asarray, adapters.trees[name])
    objective = Objective(stage.spec, l2=stage.l2, perceptual=stage.perceptual, csd=stage.csd)
    return tree, frozen, batch, draws, loaded.base, objective


def recorded_gradient(name: str, remat: bool = False, accumulate: int = 1) -> tuple:
    """Compute the losses and the gradient of the recorded step of a stage."""
    *arrays, base, objective = recorded_case(name)
    objective = dataclasses.replace(objective, remat=remat, accumulate=accumulate)
    return jax.jit(functools.partial(train_step.gradient, base=base, objective=objective))(*arrays)


def gradient_deviations(name: str, measured: dict, grads: dict) -> dict[str, Deviation]:
    """Compare the losses and the gradient of a stage with the recorded step; all errors are relative."""
    described, recorded = (
        read_json(golden("train/train.json"))["stages"][name],
        np.load(golden(f"train/step_{name}.npz")),
    )
    deviations = {}
    for ours, theirs in (("l2", "loss_l2"), ("perceptual", "loss_lpips"), ("csd", "loss_csd")):
        if expected := described[theirs]:
            # The original logs losses with their weights.
            found = getattr(STAGES[name], ours) * float(measured[ours])
            deviations[ours] = Deviation(abs(found / expected - 1), 2e-5)
        else:
            assert ours not in measured  # a loss of weight 0 is not computed
    norm = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(grads)))
    deviations["norm"] = Deviation(abs(float(norm) / described["total_grad_norm"] - 1), 1e-3)
    for key in recorded.files:
        if key.startswith("grad/"):
            module, _, rest = key.removeprefix("grad/").partition(".lora_")
            found = grads[torch_layout.flax_module_path(module)][rest[0].lower()]
            deviations[key] = Deviation(relative(found, torch_layout.flax_kernel(recorded[key])), 1e-3)
    return deviations
