"""Part 3: inference with random weights: three settings, batches, dtypes of the VAE, and larger images."""

import functools
import gc
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from accelerator_parts import random_sd
from accelerator_parts.operations import operations
from accelerator_parts.random_sd import Program, compile_program, timed
from pisa_jax import stages
from pisa_jax.inference import Settings, Upscaler, Weights
from pisa_jax.model import BaseModel, Predictions
from pisa_jax.sd.base_model import make_base_model

VAE_DTYPES = ("float32", "bfloat16")
SCALES = (1.0, 0.7)
# Seconds that the timed calls of one row may take.
TIMED = 3.0
# Stages of each setting.
KINDS = {
    "default": ("encode", "predict", "render"),
    "adjustable": ("encode", "predict_both", "render"),
    "further pair of scales": ("render",),
}


class Model(NamedTuple):
    """Functions and weights."""

    base: BaseModel
    weights: Weights


class Case(NamedTuple):
    """Batches of images of one size."""

    side: int
    batch: int
    vae_dtype: str

    @property
    def name(self) -> str:
        """Start of the names of its rows."""
        return f"{self.side}x{self.side}, batch {self.batch}, VAE {self.vae_dtype}"


def run(rows, size: str) -> None:
    """Measure, most important first."""
    setting = random_sd.SETTINGS[size]
    models = make_models(size)
    counted = operations(size, setting.side)
    ceiling = random_sd.ceiling(rows.earlier)
    unets: dict[tuple[str, int], Program] = {}
    slowest: dict[str, float] = {}  # seconds of the slowest compilation of each stage
    for batch, vae_dtype in itertools.product(setting.batches, VAE_DTYPES):
        case = Case(setting.side, batch, vae_dtype)
        programs = compile_case(rows, models[vae_dtype], case, unets, slowest)
        if programs:
            measure_case(rows, models[vae_dtype], case, programs, counted, ceiling)
        if batch == setting.batches[0] and vae_dtype == VAE_DTYPES[0]:
            # Its programs come from the compilation cache.
            whole_image(rows, "Upscaler", models[vae_dtype], setting.side, sum(slowest.values()) / 4, {})
    large_images(rows, models["float32"], setting.large, sum(slowest.get(stage, 0.0) for stage in KINDS["adjustable"]))


def make_models(size: str) -> dict[str, Model]:
    """Make a model for each dtype of the VAE; they share the weights of the UNet."""
    weights = random_sd.inference_weights(size, VAE_DTYPES[0])
    return {
        vae_dtype: Model(
            make_base_model(random_sd.modules(size, "bfloat16", vae_dtype)),
            weights._replace(vae=jax.tree.map(lambda leaf: leaf.astype(vae_dtype), weights.vae)),  # noqa: B023
        )
        for vae_dtype in VAE_DTYPES
    }


def make_stages(model: Model, case: Case) -> dict[str, tuple[Callable, tuple]]:
    """Return the stages of inference as functions and their arguments."""
    base, weights = model
    latent_side = case.side // base.vae_scale_factor
    images = jnp.tanh(jax.random.normal(jax.random.key(0), (case.batch, case.side, case.side, 3)))
    latents = jax.random.normal(jax.random.key(1), (case.batch, latent_side, latent_side, base.latent_channels))
    predict = functools.partial(stages.predict, base, (random_sd.SPEC,))
    render = functools.partial(stages.render, base, "adain", (case.side, case.side))
    predictions = Predictions(latents, (latents, -latents))
    without_vae = weights._replace(vae=None)  # so that the compiled UNet accepts the weights of both models
    return {
        "encode": (functools.partial(stages.encode, base), (weights, images, None)),
        "predict": (functools.partial(predict, ((1.0,),)), (without_vae, latents)),
        "predict_both": (functools.partial(predict, ((0.0,), (1.0,))), (without_vae, latents)),
        "render": (render, (weights, predictions, jnp.array(SCALES), images)),
    }


def compile_case(
    rows, model: Model, case: Case, unets: dict[tuple[str, int], Program], slowest: dict[str, float]
) -> dict[str, Program] | None:
    """Compile the stages, several at a time; those of the UNet are in `unets` already where the VAE's dtype differs."""
    wanted = {name: stage for name, stage in make_stages(model, case).items() if (name, case.batch) not in unets}
    programs: dict[str, Program] = {}

    def build():
        programs.update(
            random_sd.compile_all(
                {name: functools.partial(compile_program, function, *args) for name, (function, args) in wanted.items()}
            )
        )
        values = {f"{name}_s": program.seconds for name, program in programs.items()}
        for name, program in programs.items():
            slowest[name] = max(slowest.get(name, 0.0), program.seconds)
        for name in ("predict", "predict_both"):
            programs[name] = unets.setdefault((name, case.batch), programs.get(name))
        return values | {"largest_program_GiB": max(program.memory_gib() for program in programs.values())}

    expected = sum(slowest.get(name, 0.0) for name in wanted) / min(random_sd.COMPILERS, len(wanted))
    return programs if rows.attempt(f"{case.name}, compile", build, expected) else None


def measure_case(rows, model: Model, case: Case, programs, counted: dict[str, float], ceiling: float | None) -> None:
    """Time the three settings, and each stage."""
    arguments = {name: arrays for name, (_, arrays) in make_stages(model, case).items()}
    calls = {name: program.compiled for name, program in programs.items()}
    default = None
    for kind, function in settings(model, calls, arguments).items():
        floor = 1000 * case.batch * sum(counted[stage] for stage in KINDS[kind]) / ceiling if ceiling else None
        measure = functools.partial(measure_setting, function, case.batch, floor, default)
        values = rows.attempt(f"{case.name}, {kind}", measure)
        default = default or (values and values["ms"])

    def each_stage():
        return {f"{name}_ms": timed(functools.partial(calls[name], *arguments[name]), 1.0)["ms"] for name in calls}

    rows.attempt(f"{case.name}, stages", each_stage)
    gc.collect()


def settings(model: Model, calls: dict[str, Callable], arguments: dict[str, tuple]) -> dict[str, Callable[[], Any]]:
    """Return the settings of `KINDS` as functions without arguments."""
    images, scales, channels = arguments["encode"][1], jnp.array(SCALES), model.base.latent_channels

    def whole(predict):
        latents = calls["encode"](model.weights, images, None)
        both = calls[predict](arguments[predict][0], latents)
        predictions = Predictions(latents, (both[..., :channels], both[..., -channels:]))
        return calls["render"](model.weights, predictions, scales, images)

    return {
        "default": lambda: whole("predict"),
        "adjustable": lambda: whole("predict_both"),
        "further pair of scales": lambda: calls["render"](*arguments["render"]),
    }


def measure_setting(function: Callable, batch: int, floor: float | None, default: float | None) -> dict[str, float]:
    """Return the row of a setting; `floor` and `default` are in milliseconds."""
    values = timed(function, TIMED)
    taken = values["ms"]
    values["images_per_s"] = 1000 * batch / taken
    values |= {"times_floor": taken / floor, "share_of_floor": floor / taken} if floor else {}
    return values | ({"of_default": taken / default} if default else {})


def large_images(rows, model: Model, side: int, expected: float) -> None:
    """Upscale to a larger size without tiles, with windows of the UNet, and with tiles of the VAE as well."""
    latent_side = side // model.base.vae_scale_factor
    windows = {"tile": 3 * latent_side // 4, "overlap": latent_side // 4}  # 96 and 32 at 1024, as the defaults
    for name, options in {
        "whole": {"tile": 0, "vae_tile": 0},
        "windows of the UNet": {**windows, "vae_tile": 0},
        "windows of the UNet, tiles of the VAE": {**windows, "vae_tile": side // 2},
    }.items():
        whole_image(rows, name, model, side, expected, options)


def whole_image(rows, name: str, model: Model, side: int, expected: float, options: dict[str, Any]) -> None:
    """Time `Upscaler` from an array to an array, with everything that the host does."""
    image = np.random.default_rng(0).integers(0, 256, (side // 4, side // 4, 3), np.uint8)

    def measure():
        compiled: list[float] = []
        settings = Settings(min_size=side, **options)
        upscaler = Upscaler(
            *model, dict.fromkeys(("pix", "sem"), random_sd.SPEC), settings, lambda _, taken: compiled.append(taken)
        )
        values = timed(lambda: upscaler(image, scales=SCALES), TIMED)
        return values | {"compile_s": sum(compiled), "programs": len(compiled)}

    rows.attempt(f"{side}x{side}, {name}, adjustable", measure, expected)
