"""The stages of inference on batches of network inputs: windows, tiles, padding to buckets, and devices."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pisa_jax import model
from pisa_jax.config import AdapterSpec
from pisa_jax.imaging.arrays import crop_images, pad_images, stack_images
from pisa_jax.imaging.color import COLOR_FIXES, WAVELET_REACH, adain_in_place
from pisa_jax.model import BaseModel, Predictions
from pisa_jax.runtime import distributed
from pisa_jax.runtime.compilation import StageRunner
from pisa_jax.runtime.trees import suggest
from pisa_jax.stages import encode, predict, recolor, render, render_padded
from pisa_jax.tiling import memory, placements, vae_tiles
from pisa_jax.tiling.buckets import Buckets, Size, check_mode, choose_buckets, grid_size
from pisa_jax.tiling.windows import blend_windows
from pisa_jax.weights import Weights

# Programs of a run whose image sizes are known beforehand: eight buckets with three each.
MOST_PROGRAMS = 24
# Pixels that are computed in the time that compiling the stages takes. On a CPU at Stable Diffusion's size: 7 s for the
# three programs and 10.7 s for 512 x 512 pixels (benchmarks/README.md). An accelerator compiles for tens of seconds and
# computes them in tens of milliseconds.
COMPILED_PIXELS = {"cpu": 2 * 512**2 // 3}
ACCELERATOR_PIXELS = 256 * 512**2


def compiled_pixels() -> int:
    """Return the number of pixels that this device computes in the time that compiling the stages takes."""
    return COMPILED_PIXELS.get(jax.default_backend(), ACCELERATOR_PIXELS)


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
    # "exact": passes over the tiles until they equal the whole image to a tolerance; "fast": one pass, unchecked.
    vae_tile_mode: str = "exact"
    # Devices over which tiles and images are distributed.
    devices: int = 1
    # "exact": images are computed in arrays of a few sizes, so that few programs are compiled, with the results that
    # they have in arrays of their own size; "off": every size is compiled.
    buckets: str = "exact"

    def __post_init__(self):
        if self.color_fix not in COLOR_FIXES:
            hint = suggest(self.color_fix, COLOR_FIXES)
            raise ValueError(f"unknown color fix {self.color_fix!r}; use one of {', '.join(COLOR_FIXES)}{hint}")
        if self.tile and not 0 <= self.overlap < self.tile:
            raise ValueError(f"overlap is {self.overlap}; with tile {self.tile} it must be in 0..{self.tile - 1}")
        memory.check_tile(self.vae_tile)
        if self.vae_tile_mode not in memory.TILE_MODES:
            raise ValueError(f"vae_tile_mode is {self.vae_tile_mode!r}; allowed are {', '.join(memory.TILE_MODES)}")
        check_mode(self.buckets)


DEFAULT = Settings()


class Pipeline:
    """The three stages on batches of network inputs, in windows and tiles where the settings or memory require it.

    Images of different sizes are one batch if they are padded to a bucket; `sizes` then has the height and width in
    latents of each. Without `sizes`, an array has no padding.
    """

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
        self.buckets = Buckets() if settings.buckets == "exact" and base.takes_sizes else None

    def encode(
        self,
        batch: Float[np.ndarray, "b h w 3"],
        noise: Float[Any, "#b y x c"] | None,
        sizes: Int[np.ndarray, "b 2"] | None = None,
    ) -> Any:
        """Encode network inputs in [-1, 1] to scaled latents: the posterior mean, or mean + std noise."""
        factor = self.base.vae_scale_factor

        def untiled():
            arrays = self._spread(batch), self._spread(noise), self._spread(sizes)
            return jax.block_until_ready(self.runner.run(encode, (self.base,), *arrays))

        def tiled(tile):
            latents = []
            for index, image in enumerate(batch if sizes is None else crop_images(batch, sizes * factor)):
                mean, std = np.split(self._tiled_vae("encoder", image, tile), 2, axis=-1)
                own = None if noise is None else np.asarray(noise[index % len(noise)])[: len(mean), : mean.shape[1]]
                latents.append(mean if own is None else mean + std * own)
            if sizes is None:
                stacked = stack_images(latents)
            else:
                stacked = pad_images(latents, (batch.shape[1] // factor, batch.shape[2] // factor))
            return jnp.asarray(stacked * self.base.tiled_vae.latent_scale)

        return self._within_memory(batch, untiled, tiled)

    def predict(
        self, latents: Float[Any, "b y x c"], adjustable: bool, sizes: Int[np.ndarray, "b 2"] | None = None
    ) -> Predictions:
        """Predict eps with the first 1, ..., n adapters; without `adjustable`, only the last, in place of each."""
        settings, count = self.settings, len(self.specs)
        live = len(self.runner.weights.adapters)  # the others are merged: the first, or none
        ones = range(live - count + 1, live + 1)
        rows = tuple((1.0,) * number + (0.0,) * (live - number) for number in ones)
        static = (self.base, tuple(self.specs.values())[count - live :], rows if adjustable else rows[-1:])

        def unet(array, sizes=None):
            return self.runner.run(predict, static, self._spread(array), self._spread(sizes))

        batch, height, width, channels = latents.shape
        if sizes is not None:
            found = jnp.asarray(self._predict_padded(unet, latents, sizes))
        elif self.needs_windows((height, width)):
            windows = batch * settings.tile_batch * settings.devices
            blended = blend_windows(unet, np.asarray(latents), settings.tile, settings.overlap, windows)
            found = jnp.asarray(blended)
        else:
            found = unet(latents)
        eps = [found[..., first : first + channels] for first in range(0, found.shape[-1], channels)]
        return Predictions(latents, tuple(eps if adjustable else eps * count))

    def needs_windows(self, size: Size) -> bool:
        """Return True if latents of this height and width are larger than a window of the UNet."""
        return bool(self.settings.tile) and math.prod(size) > self.settings.tile**2

    def plan_buckets(self, sizes: Sequence[Size]) -> None:
        """Choose the buckets for images of these sizes in latents that will be encoded."""

        def programs(members):
            whole = {self.needs_windows(size) for size in members}
            return 2 + (False in whole)  # encoder, decoder, and the UNet, except for windows, which are of one size

        saved = compiled_pixels() / self.base.vae_scale_factor**2
        self.buckets.plan(choose_buckets(sizes, programs, MOST_PROGRAMS - 1, saved, self.buckets.known))

    def _predict_padded(self, unet: Callable, latents: Any, sizes: Int[np.ndarray, "b 2"]) -> Any:
        """Run the UNet on a padded batch: in windows of the images that need them, and else on the whole of it."""
        in_windows = [index for index, size in enumerate(sizes.tolist()) if self.needs_windows(tuple(size))]
        found = unet(latents, sizes) if len(in_windows) < len(sizes) else latents
        if not in_windows:
            return found
        images, results = (crop_images(np.asarray(array), sizes) for array in (latents, found))
        count = self.settings.tile_batch * self.settings.devices
        window = functools.partial(self._predict_window, unet)
        for index in in_windows:
            tile, overlap = self.settings.tile, self.settings.overlap
            results[index] = blend_windows(window, images[index][None], tile, overlap, count)[0]
        return pad_images(results, latents.shape[1:3])

    def _predict_window(self, unet: Callable, array: Float[np.ndarray, "n h w c"]) -> np.ndarray:
        """Run the UNet on windows; those with a side that is shorter than the tile are padded."""
        size, tile = array.shape[1:3], self.settings.tile
        if size == (tile, tile):
            return np.asarray(unet(array))
        padded = tuple(min(side, tile) for side in grid_size(size))
        sizes = np.full((len(array), 2), size, np.int32)
        return np.asarray(unet(pad_images(list(array), padded), sizes))[:, : size[0], : size[1]]

    def render(
        self,
        predictions: Predictions,
        scales: Sequence[float | Float[np.ndarray, "#b _ _ 1"]],
        style: Float[np.ndarray, "b h w 3"],
        size: tuple[int, int] | Int[np.ndarray, "b 2"],
    ) -> Any:
        """Decode images in [-1, 1] at given scales, cropped to `size`, with the colors of the inputs `style`.

        `size` is that of all images, in pixels, and the result an array; or it has a row for each image of a padded
        batch, and the result is a list. A scale is a number or has a value for each latent. Numbers are repeated for
        each latent, too: one compiled function serves both, and a constant map gives the same bits as its number.
        """
        shape = (*predictions.latents.shape[:3], 1)
        maps = [np.broadcast_to(np.asarray(scale, np.float32), shape) for scale in scales]
        padded = not isinstance(size, tuple)
        sizes = np.asarray(size, np.int32) if padded else np.tile(np.int32(size), (len(style), 1))

        def untiled():
            arrays = (self._spread(predictions), self._spread(maps), self._spread(style))
            if not padded:
                return np.asarray(self.runner.run(render, (self.base, self.settings.color_fix, size), *arrays))
            static = (self.base, self.settings.color_fix)
            rendered = self.runner.run(render_padded, static, *arrays, self._spread(sizes))
            return crop_images(np.asarray(rendered), sizes)

        def tiled(tile):
            results = []
            combined = np.asarray(model.combine(*predictions, [jnp.asarray(each) for each in maps]))
            if padded:
                combined = crop_images(combined, -(-sizes // self.base.vae_scale_factor))
            for latents, source, (height, width) in zip(combined, style, sizes, strict=True):
                decoded = self._tiled_vae("decoder", latents, tile)[:height, :width]
                results.append(self._recolored(decoded, source[:height, :width], tile))
            return results if padded else stack_images(results)

        return self._within_memory(style, untiled, tiled)

    def _tiled_vae(self, part: str, array: np.ndarray, tile: int) -> np.ndarray:
        """Run one image, or its latents, through the VAE in tiles of `tile` pixels."""
        make = getattr(self.base.tiled_vae, part)
        fast, side = self.settings.vae_tile_mode == "fast", max(tile // self.base.vae_scale_factor, 1)
        for functions in make(self.runner.weights.vae, self.mesh, self.runner.run):
            array, residual = vae_tiles.process_in_tiles(functions, array, side, fast)
            if residual > functions.tolerance:
                self.notice(
                    f"the VAE {part}'s tiles did not converge (residual {residual:.1g} > {functions.tolerance:g}); "
                    "colors and contrast may deviate"
                )
        return array

    def _recolored(self, decoded: np.ndarray, style: np.ndarray, tile: int) -> np.ndarray:
        """Apply the color fix to one tiled image: on the host over the whole of it, or in tiles where it is local."""
        if self.settings.color_fix == "adain":
            adain_in_place(np.clip(decoded, -1, 1, out=decoded), style)
            return decoded
        stage = functools.partial(self.runner.run, recolor, (self.settings.color_fix,))
        return placements.map_tiles(stage, (decoded, style), tile, WAVELET_REACH)

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
