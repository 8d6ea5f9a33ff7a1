"""Inference: three jitted stages (encode, predict, render) and the host-side steps before and after them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from pisa_jax import model
from pisa_jax.adapters import files
from pisa_jax.adapters.adapter_tree import with_sem
from pisa_jax.config import AdapterSpec, check_seed, scales_by_name
from pisa_jax.imaging import network_input, scale_maps
from pisa_jax.imaging.any_image import to_image_data
from pisa_jax.imaging.arrays import stack_images
from pisa_jax.imaging.color import COLOR_FIXES, WAVELET_REACH, adain_in_place
from pisa_jax.imaging.image_data import ImageData
from pisa_jax.imaging.ranges import signed_to_unit, unit_to_signed
from pisa_jax.model import BaseModel, Predictions
from pisa_jax.runtime import distributed
from pisa_jax.runtime.compilation import StageRunner
from pisa_jax.runtime.trees import suggest
from pisa_jax.sd import pretrained
from pisa_jax.tiling import memory, vae_tiles
from pisa_jax.tiling.windows import blend_windows
from pisa_jax.weights import Weights, make_weights


@dataclass(frozen=True)
class Settings:
    """Options of inference that do not depend on the model."""

    # "adain", "wavelet" or "none": how the colors of the input are restored.
    color_fix: str = "adain"
    # Small inputs are upscaled until the model works on at least this many pixels per side; it was trained on 512.
    min_size: int = 512
    # Side of the UNet's windows and their overlap, in latents; 0: no windows. Latents larger than tile^2 are split.
    tile: int = 96
    overlap: int = 32
    # Windows of an image in one call of the UNet.
    tile_batch: int = 1
    # Side of the VAE's tiles in output pixels, for larger images; 0: no tiles, "auto": as large as memory allows.
    vae_tile: int | str = "auto"
    # Devices over which tiles and images are distributed.
    devices: int = 1

    def __post_init__(self):
        if self.color_fix not in COLOR_FIXES:
            hint = suggest(self.color_fix, COLOR_FIXES)
            raise ValueError(f"unknown color fix {self.color_fix!r}; use one of {', '.join(COLOR_FIXES)}{hint}")
        if self.tile and not 0 <= self.overlap < self.tile:
            raise ValueError(f"overlap is {self.overlap}; with tile {self.tile} it must be in 0..{self.tile - 1}")
        memory.check_tile(self.vae_tile)


DEFAULT = Settings()


def encode(base: BaseModel, weights: Weights, batch: Any, noise: Any) -> jax.Array:
    """Stage 1: encode network inputs in [-1, 1] to scaled latents."""
    return base.encode(weights.vae, batch, noise)


def predict(base: BaseModel, specs: tuple[AdapterSpec, ...], rows: tuple, weights: Weights, latents: Any) -> jax.Array:
    """Stage 2: predict the residuals at every row of scales of the later adapters, concatenated along the channels."""
    out = model.predict_rows(base, weights.unet, weights.adapters, specs, latents, weights.prompt, rows)
    return jnp.concatenate(list(out), axis=-1)


def render(
    base: BaseModel, color_fix: str, size: tuple, weights: Weights, predictions: Predictions, scales: Any, style: Any
) -> jax.Array:
    """Stage 3: decode images in [-1, 1] at given scales, cropped to `size`, with the colors of `style`."""
    height, width = size
    decoded = base.decode(weights.vae, model.combine(*predictions, scales))[:, :height, :width]
    return recolor(color_fix, weights, decoded, style[:, :height, :width])


def recolor(color_fix: str, weights: Weights, decoded: Any, style: Any) -> jax.Array:
    """Apply the color fix: the end of stage 3, and a stage of its own for tiled images."""
    del weights
    # AdaIN's epsilon depends on the range of the values: the original's is for images in [0, 1].
    content, source = signed_to_unit(jnp.clip(decoded, -1, 1)), signed_to_unit(style)
    return unit_to_signed(jnp.clip(COLOR_FIXES[color_fix](content, source), 0, 1))


class Pipeline:
    """The three stages on batches of network inputs, in windows and tiles where the settings or memory require it."""

    def __init__(
        self,
        base: BaseModel,
        weights: Weights,
        specs: Mapping[str, AdapterSpec],
        settings: Settings,
        on_compile: Callable[[str, float], None],
        notice: Callable[[str], None],
    ):
        self.base, self.specs, self.settings, self.notice = base, dict(specs), settings, notice
        self.mesh = distributed.local_mesh(settings.devices)
        replicated = distributed.replicated(self.mesh)
        placed = jax.device_put(weights, replicated) if settings.devices > 1 else weights
        self.runner = StageRunner(placed, on_compile, mesh=self.mesh if settings.devices > 1 else None)
        self.memory = memory.TileSizePolicy(settings.vae_tile, memory.free_bytes(self.mesh.devices.flat[0]), notice)

    def encode(self, batch: Float[np.ndarray, "b h w 3"], noise: Float[Any, "1 y x c"] | None) -> Any:
        """Encode network inputs in [-1, 1] to scaled latents: the posterior mean, or mean + std noise."""

        def untiled():
            return jax.block_until_ready(self.runner.run(encode, (self.base,), self._spread(batch), noise))

        def tiled(tile):
            moments = stack_images([self._tiled_vae("encoder", image, tile) for image in batch])
            mean, std = np.split(moments, 2, axis=-1)
            latents = mean if noise is None else mean + std * np.asarray(noise)
            return jnp.asarray(latents * self.base.tiled_vae.latent_scale)

        return self._within_memory(batch, untiled, tiled)

    def predict(self, latents: Float[Any, "b y x c"], adjustable: bool) -> Predictions:
        """Predict eps with the first 1, ..., n adapters; without `adjustable`, only the last, in place of each."""
        settings, count = self.settings, len(self.specs)
        live = len(self.runner.weights.adapters)  # the others are merged: the first, or none
        ones = range(live - count + 1, live + 1)
        rows = tuple((1.0,) * number + (0.0,) * (live - number) for number in ones)
        static = (self.base, tuple(self.specs.values())[count - live :], rows if adjustable else rows[-1:])

        def unet(array):
            return self.runner.run(predict, static, self._spread(array))

        batch, height, width, channels = latents.shape
        if settings.tile and height * width > settings.tile**2:
            windows = batch * settings.tile_batch * settings.devices
            blended = blend_windows(unet, np.asarray(latents), settings.tile, settings.overlap, windows)
            found = jnp.asarray(blended)
        else:
            found = unet(latents)
        eps = [found[..., first : first + channels] for first in range(0, found.shape[-1], channels)]
        return Predictions(latents, tuple(eps if adjustable else eps * count))

    def render(
        self,
        predictions: Predictions,
        scales: Sequence[float | Float[np.ndarray, "#b _ _ 1"]],
        style: Float[np.ndarray, "b h w 3"],
        size: tuple[int, int],
    ) -> Float[np.ndarray, "b y x 3"]:
        """Decode images in [-1, 1] at given scales, cropped to `size`, with the colors of the inputs `style`.

        A scale is a number or has a value for each latent. Numbers are repeated for each latent, too: one compiled
        function serves both, and a constant map gives the same bits as its number.
        """
        shape = (*predictions.latents.shape[:3], 1)
        maps = [np.broadcast_to(np.asarray(scale, np.float32), shape) for scale in scales]
        height, width = size

        def untiled():
            static = (self.base, self.settings.color_fix, (height, width))
            arrays = (self._spread(predictions), self._spread(maps), self._spread(style))
            return np.asarray(self.runner.run(render, static, *arrays))

        def tiled(tile):
            results = []
            combined = np.asarray(model.combine(*predictions, [jnp.asarray(each) for each in maps]))
            for latents, source in zip(combined, style, strict=True):
                decoded = self._tiled_vae("decoder", latents, tile)[:height, :width]
                results.append(self._recolored(decoded, source[:height, :width], tile))
            return stack_images(results)

        return self._within_memory(style, untiled, tiled)

    def _tiled_vae(self, part: str, array: np.ndarray, tile: int) -> np.ndarray:
        """Run one image, or its latents, through the VAE in tiles of `tile` pixels."""
        make = getattr(self.base.tiled_vae, part)
        functions = make(self.runner.weights.vae, self.mesh, self.runner.run)
        out, residual = vae_tiles.process_in_tiles(functions, array, max(tile // self.base.vae_scale_factor, 1))
        if residual > vae_tiles.TOLERANCE:
            limit = vae_tiles.TOLERANCE
            self.notice(
                f"the VAE {part}'s tiles did not converge (residual {residual:.1g} > {limit:g}); seams may be visible"
            )
        return out

    def _recolored(self, decoded: np.ndarray, style: np.ndarray, tile: int) -> np.ndarray:
        """Apply the color fix to one tiled image: on the host over the whole of it, or in tiles where it is local."""
        if self.settings.color_fix == "adain":
            adain_in_place(np.clip(decoded, -1, 1, out=decoded), style)
            return decoded
        stage = functools.partial(self.runner.run, recolor, (self.settings.color_fix,))
        return vae_tiles.map_tiles(stage, (decoded, style), tile, WAVELET_REACH)

    def _within_memory(self, batch: np.ndarray, untiled: Callable, tiled: Callable) -> Any:
        if self.base.tiled_vae is None:
            return untiled()
        return self.memory.execute(self.base.tiled_vae.footprint(batch.shape), max(batch.shape[1:3]), untiled, tiled)

    def _spread(self, arrays: Any) -> Any:
        """Shard batches over the devices where their size allows it."""
        count = self.settings.devices
        if count == 1 or any(len(leaf) % count for leaf in jax.tree.leaves(arrays)):
            return arrays
        return jax.device_put(arrays, distributed.batch_sharding(self.mesh))


class Session:
    """Images after the encoder and the UNet: further scales cost one VAE decode.

    `Upscaler.open` makes it. `latents`, `eps_pix` and `eps_full` are the arrays (b, y, x, c) of PiSA-SR, eq. 8.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        images: Sequence[ImageData],
        scale: float | int,
        seed: int | None,
        adjustable: bool,
        convert: Callable[[ImageData], Any] = lambda image: image,
        on_stage: Callable[[str], None] = lambda stage: None,
    ):
        base, settings = pipeline.base, pipeline.settings
        check_seed(seed)
        prepared = [
            network_input.prepare_input(image, scale, settings.min_size, base.vae_scale_factor) for image in images
        ]
        self._pipeline, self._images, self._adjustable, self._convert = pipeline, images, adjustable, convert
        self._inputs = np.stack([array for array, _ in prepared])
        self._plans = [plan for _, plan in prepared]
        noise = None if seed is None else model.posterior_noise(base, self._inputs.shape, seed)
        on_stage("encode")
        latents = pipeline.encode(self._inputs, noise)
        on_stage("predict")
        self._predictions = pipeline.predict(latents, adjustable)

    @property
    def latents(self) -> Float[Any, "b y x c"]:
        """Scaled latents z_L of the network inputs."""
        return self._predictions.latents

    @property
    def eps(self) -> tuple[Float[Any, "b y x c"], ...]:
        """Residuals of the UNet with the first 1, ..., n adapters; all the last in a session that is not adjustable."""
        return self._predictions.eps

    @property
    def eps_pix(self) -> Float[Any, "b y x c"]:
        """Residual of the UNet with the first adapter, `pix`."""
        return self._predictions.eps_pix

    @property
    def eps_full(self) -> Float[Any, "b y x c"]:
        """Residual of the UNet with all adapters."""
        return self._predictions.eps_full

    def render(self, *scales: Any, **named: Any) -> Any:
        """Return the (first) image, in the type of the image that was opened.

        The scales are given in the order of the adapters or by their names, `render(0.8, sem=0.5)`; others are 1. A
        scale is a number, or a map: an array (h, w) of any resolution that covers the image and whose values are the
        scales, `render(sem=mask)`.

        Raises:
            ValueError: unknown names, too many scales, scales that are not finite, or maps that are empty or not
                (h, w); other scales than 1 in a session opened with adjustable=False.
        """
        return self._convert(self.render_all(*scales, **named)[0])

    def render_all(self, *scales: Any, **named: Any) -> list[ImageData]:
        """Return all images of the session at given scales; raises as `render` does.

        In place of a scale, a list has one number or map for each image.
        """
        names = list(self._pipeline.specs)
        values = scale_maps.check_scales_or_maps(scales_by_name(names, scales, named), names, len(self._images))
        if not self._adjustable and not scale_maps.are_one(values):
            raise ValueError(
                "scales other than 1 need all predictions, and this session holds eps_full alone; open it with "
                "adjustable=True"
            )
        size, padded, grid = self._plans[0].working, self._inputs.shape[1:3], self.latents.shape[1:3]
        at_latents = [scale_maps.scale_at_latents(value, size, padded, grid) for value in values]
        arrays = self._pipeline.render(self._predictions, at_latents, self._inputs, size)
        return [network_input.finish_output(*each) for each in zip(arrays, self._plans, self._images, strict=True)]


class Upscaler:
    """Adjustable one-step super-resolution.

    >>> upscaler = Upscaler.load()  # the demo model; else Upscaler.load("path/to/sd21-base", "pisa_sr.pkl")
    >>> better = upscaler(image, scale=4, scales=(1.0, 0.7))
    >>> session = upscaler.open(image, scale=4)  # encoder and UNet run once
    >>> variants = [session.render(pix=1.0, sem=sem) for sem in (0.0, 0.5, 1.0)]

    Stages are compiled once per image size; other scales never compile anything.
    """

    def __init__(
        self,
        base: BaseModel,
        weights: Weights,
        specs: Mapping[str, AdapterSpec],
        settings: Settings = DEFAULT,
        on_compile: Callable[[str, float], None] = lambda description, seconds: None,
        notice: Callable[[str], None] = lambda line: None,
    ):
        self.pipeline = Pipeline(base, weights, specs, settings, on_compile, notice)

    @classmethod
    def load(
        cls,
        model: str | Path = "demo",
        adapters: str | Path | Sequence[str | Path] | None = None,
        *,
        dtype: str | None = None,
        vae_dtype: str = "float32",
        prompt: str = "",
        on_compile: Callable[[str, float], None] = lambda description, seconds: None,
        notice: Callable[[str], None] = lambda line: None,
        **settings: Any,
    ) -> "Upscaler":
        """Load a base model (diffusers folder, hub id, or "demo") and adapter files (.pkl or .safetensors), in order.

        The demo model ships with the package and has adapters of its own.

        Args:
            dtype: of the UNet, "float32" or "bfloat16"; None: float32 on CPUs, else bfloat16.
            prompt: the text encoder runs once, on this, and is dropped.
            on_compile: called with a description and the seconds of every compilation.
            notice: called with every other line that is worth reporting.
            settings: the fields of `Settings`.

        Raises:
            ValueError: a file does not hold what it should.
            OSError: a file cannot be read, or the hub does not provide it.
        """
        if model == "demo":
            adapters = adapters or pretrained.DEMO / "adapters.safetensors"
        if adapters is None:
            raise ValueError("no adapters: give the pisa_sr.pkl of PiSA-SR or an adapters.safetensors of this project")
        checked, trained = Settings(**settings), with_sem(files.load_all_adapters(adapters))
        loaded = pretrained.load_pretrained(
            model, jnp.dtype(dtype or distributed.default_dtype()), jnp.dtype(vae_dtype)
        )
        try:
            weights = make_weights(loaded, trained, prompt, notice)
        except ValueError as error:
            raise ValueError(f"{adapters}: {error}") from error
        return cls(loaded.base, weights, trained.specs, checked, on_compile, notice)

    @property
    def adapter_names(self) -> list[str]:
        """Names of the adapters, in the order of their scales."""
        return list(self.pipeline.specs)

    def __call__(
        self,
        image: Any,
        scale: float | int = 4,
        scales: Sequence[Any] | None = None,
        seed: int | None = None,
    ) -> Any:
        """Upscale `image` at one scale for each adapter, such as (pix, sem), or all 1: one `open` and one `render`.

        A scale is a number or a map, as for `Session.render`.

        A list of images gives the list of their results; all images are converted before the first is upscaled.
        """
        names = self.adapter_names
        values = scale_maps.check_scales_or_maps([1.0] * len(names) if scales is None else scales, names)
        adjustable = not scale_maps.are_one(values)
        several = isinstance(image, list | tuple)
        sources = [to_image_data(each) for each in (image if several else [image])]
        sessions = (Session(self.pipeline, [data], scale, seed, adjustable, like) for data, like in sources)
        results = [session.render(*values) for session in sessions]
        return results if several else results[0]

    def open(self, image: Any, scale: float | int = 4, seed: int | None = None, *, adjustable: bool = True) -> Session:
        """Run the encoder and the UNet on an image: the session then renders it at any pair of scales.

        Args:
            image: a path, a PIL image, or a NumPy or JAX array (h, w[, 1|3|4]): uint8, uint16, or float in [0, 1].
            scale: upscale factor, at least 1.
            seed: samples the latent, 0 to 2^64 - 1; without it the latent is the posterior mean.
            adjustable: predict with the first adapters alone, too; without it all scales are 1.
        """
        data, like = to_image_data(image)
        return Session(self.pipeline, [data], scale, seed, adjustable, like)

    def open_all(
        self,
        images: Sequence[ImageData],
        scale: float | int,
        seed: int | None,
        adjustable: bool,
        on_stage: Callable[[str], None] = lambda stage: None,
    ) -> Session:
        """Open decoded images of equal size as one batch, for `Session.render_all`.

        `on_stage` is called with "encode" and "predict", the names of the stages, before each begins.
        """
        return Session(self.pipeline, images, scale, seed, adjustable, on_stage=on_stage)
