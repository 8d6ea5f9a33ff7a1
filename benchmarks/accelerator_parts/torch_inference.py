"""Part 5: the inference of part 3 in PyTorch: diffusers and peft, bfloat16, channels_last, eager and compiled.

Both adapters are active in peft's modules, as in the original program; the setting "adjustable" runs the UNet with one
adapter, then with both.
"""

import functools
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"  # the device is PyTorch's

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig

from accelerator_parts.random_sd import SETTINGS
from pisa_jax.model import TIMESTEP
from pisa_jax.sd import random_model

# peft's spelling of `config.UNET_TARGETS`.
TARGETS = (
    r".*(to_q|to_k|to_v|to_out\.0|conv|conv1|conv2|conv_in|conv_out|conv_shortcut|proj_in|proj_out|"
    r"ff\.net\.0\.proj|ff\.net\.2)"
)
ADAPTERS = ("pix", "sem")
SCALES = (1.0, 0.7)
TIMED = 3.0


class Model(NamedTuple):
    """The modules, and their functions, which may be compiled."""

    unet: Any
    vae: Any
    predict: Callable[..., Any]
    encode: Callable[..., Any]
    decode: Callable[..., Any]


def run(rows, size: str) -> None:
    """Measure eagerly, for all batches, then compiled."""
    setting, made = SETTINGS[size], []

    def load():
        start = time.perf_counter()
        made.append(make_model(size))
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        return {"device": device, "torch": torch.__version__, "seconds": time.perf_counter() - start}

    if rows.attempt("load", load) is None:
        return
    eager = made[0]
    with torch.inference_mode():
        measure(rows, eager, setting.side, setting.batches[0], "eager", 0.0)
        compiled = eager._replace(
            predict=torch.compile(eager.predict), encode=torch.compile(eager.encode), decode=torch.compile(eager.decode)
        )
        slowest = measure(rows, compiled, setting.side, setting.batches[0], "compiled", 0.0)
        for batch in setting.batches[1:]:
            measure(rows, eager, setting.side, batch, "eager", 0.0)
            # Another batch size compiles again.
            slowest = max(slowest, measure(rows, compiled, setting.side, batch, "compiled", slowest))


def make_model(size: str) -> Model:
    """Make the modules with random weights and two adapters."""
    unet_config, vae_config, _ = random_model.model_configs(size)
    with torch.device(place()):
        unet, vae = UNet2DConditionModel.from_config(unet_config), AutoencoderKL.from_config(vae_config)
        for name in ADAPTERS:
            unet.add_adapter(
                LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False), adapter_name=name
            )
    unet, vae = (
        module.to(torch.bfloat16).to(memory_format=torch.channels_last).eval().requires_grad_(False)
        for module in (unet, vae)
    )

    def encode(images):
        return vae.encode(images).latent_dist.mode() * vae.config.scaling_factor

    def decode(latents):
        return vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)

    def predict(latents, prompt):
        return unet(latents, TIMESTEP, prompt).sample

    return Model(unet, vae, predict, encode, decode)


def measure(rows, model: Model, side: int, batch: int, mode: str, expected: float) -> float:
    """Time the three settings; returns the seconds that the slowest first call took."""
    settings, slowest = inference_settings(model, side, batch), 0.0
    for kind, function in settings.items():

        def timed(function=function):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            synchronized(function)
            first = time.perf_counter() - start
            taken = median(functools.partial(synchronized, function))
            peak = {"peak_GiB": torch.cuda.max_memory_allocated() / 2**30} if torch.cuda.is_available() else {}
            return {"ms": 1000 * taken, "images_per_s": batch / taken, "first_call_s": first, **peak}

        values = rows.attempt(f"{side}x{side}, batch {batch}, VAE bfloat16, {kind}, {mode}", timed, expected)
        slowest = max(slowest, values["first_call_s"] if values else 0.0)
    return slowest


def inference_settings(model: Model, side: int, batch: int) -> dict[str, Callable[[], Any]]:
    """Return the three settings, as functions of no arguments that return images."""
    latent_side = side // 2 ** (len(model.vae.config.block_out_channels) - 1)
    images = normal(batch, 3, side, side).clamp(-1, 1)
    prompt = normal(batch, 77, model.unet.config.cross_attention_dim)
    size = (batch, model.vae.config.latent_channels, latent_side, latent_side)
    fixed = [normal(*size) for _ in range(3)]

    def combine(latents, eps_pix, eps_full):
        return latents - (SCALES[0] * eps_pix + SCALES[1] * (eps_full - eps_pix))

    def default():
        model.unet.set_adapters(list(ADAPTERS))
        latents = model.encode(images)
        return model.decode(latents - model.predict(latents, prompt))

    def adjustable():
        latents = model.encode(images)
        model.unet.set_adapters(["pix"])
        eps_pix = model.predict(latents, prompt)
        model.unet.set_adapters(list(ADAPTERS))
        return model.decode(combine(latents, eps_pix, model.predict(latents, prompt)))

    return {
        "default": default,
        "adjustable": adjustable,
        "further pair of scales": lambda: model.decode(combine(*fixed)),
    }


def place() -> str:
    """PyTorch's device."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def normal(*shape: int) -> Any:
    """Draw N(0, 1) in bfloat16 and, for images, channels_last."""
    array = torch.randn(*shape, device=place(), dtype=torch.bfloat16)
    return array.to(memory_format=torch.channels_last) if len(shape) == 4 else array


def synchronized(function: Callable[[], Any]) -> None:
    """Call a function and wait for the device."""
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median(function: Callable[[], Any]) -> float:
    """Median of the seconds of up to 9 calls in about `TIMED` seconds, as `random_sd.median_seconds`."""
    taken, start = [], time.perf_counter()
    while not taken or (len(taken) < 9 and time.perf_counter() - start + taken[-1] < TIMED):
        before = time.perf_counter()
        function()
        taken.append(time.perf_counter() - before)
    return sorted(taken)[len(taken) // 2]
