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

from pisa_jax import model
from pisa_jax.adapters import checks, files, injection
from pisa_jax.adapters.adapter_tree import AdapterTree
from pisa_jax.config import AdapterSpec
from pisa_jax.imaging import image_io, network_input
from pisa_jax.imaging.color import COLOR_FIXES, WAVELET_REACH, adain_in_place
from pisa_jax.runtime import distributed
from pisa_jax.runtime.compilation import compiler_options
from pisa_jax.runtime.tensor_files import release_mapped_pages
from pisa_jax.runtime.trees import suggest
from pisa_jax.sd import backbone as bb
from pisa_jax.sd import pretrained, vae_tiling
from pisa_jax.sd.backbone import Backbone
from pisa_jax.tiling import memory, vae_tiles
from pisa_jax.tiling.windows import blend_windows

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
    # Side of the VAE's tiles in pixels of the result, for larger pictures; 0 = never, "auto" = what memory allows.
    vae_tile: int | str = "auto"
    # Devices that tiles and pictures are spread over.
    devices: int = 1

    def __post_init__(self):
        if self.color_fix not in COLOR_FIXES:
            hint = suggest(self.color_fix, COLOR_FIXES)
            raise ValueError(f"unknown colour fix {self.color_fix!r}, known: {', '.join(COLOR_FIXES)}{hint}")
        if self.tile and not 0 <= self.overlap < self.tile:
            raise ValueError(
                f"the overlap of tiles is at least 0 and less than the tile, not {self.overlap} with tile {self.tile}"
            )
        memory.check_tile(self.vae_tile)


DEFAULT = Settings()


class Weights(NamedTuple):
    """All arrays of a model: arguments of the jitted stages, never closed over."""

    unet_pix: Any
    sem: AdapterTree
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
    return recolor(backbone, color_fix, weights, decoded, style[:, :height, :width])


def recolor(backbone: Backbone, color_fix: str, weights: Weights, decoded: Any, style: Any) -> jax.Array:
    """The end of stage 3, and the stage of its own that a tile of a picture passes."""
    del backbone, weights
    # Colour statistics are those of images in [0, 1]: AdaIN's epsilon is not free of scale.
    content, source = (jnp.clip(decoded, -1, 1) + 1) / 2, (style + 1) / 2
    return jnp.clip(COLOR_FIXES[color_fix](content, source), 0, 1) * 2 - 1


def default_dtype() -> str:
    """float32 on CPUs, where bfloat16 is slower; bfloat16 on GPUs and TPUs."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def on_device(tree: Any, dtype: Any) -> Any:
    """Host arrays cast and put on the default device one by one; the file they are mapped from takes no memory."""

    def place(leaf):
        placed = jax.block_until_ready(jax.device_put(np.asarray(leaf, dtype)))
        release_mapped_pages(leaf)
        return placed

    return jax.tree.map(place, tree)


class Upscaler:
    """Adjustable one-step super-resolution.

    >>> upscaler = Upscaler.load()  # the demo model; else Upscaler.load("path/to/sd21-base", "pisa_sr.pkl")
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
        notice: Callable[[str], None] = lambda line: None,
    ):
        self.backbone, self.sem_spec, self.settings = backbone, sem_spec, settings
        self.on_compile, self.notice = on_compile, notice
        self.mesh = distributed.local_mesh(settings.devices)
        everywhere = distributed.replicated(self.mesh)
        self.weights = jax.device_put(weights, everywhere) if settings.devices > 1 else weights
        self.compiled: dict[Any, Any] = {}
        self.memory = memory.TileSizePolicy(settings.vae_tile, memory.free_bytes(self.mesh.devices.flat[0]), notice)

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
        notice: Callable[[str], None] = lambda line: None,
        **settings: Any,
    ) -> "Upscaler":
        """The upscaler of a base model (diffusers folder or hub id) and an adapter file (.pkl or .safetensors).

        The demo model ships with the package and has adapters of its own.

        `dtype` is the UNet's ("float32" or "bfloat16"; None: float32 on CPUs, else bfloat16), `settings` are the fields
        of `Settings`. The text encoder runs once, on `prompt`, and is dropped. `on_compile(what, seconds)` is told of
        every compilation, `notice(line)` of what else is worth knowing.

        Raises:
            ValueError: files that do not hold what they should.
            OSError: files that cannot be had.
        """
        if model == "demo":
            adapters = adapters or pretrained.DEMO / "adapters.safetensors"
        if adapters is None:
            raise ValueError("no adapters: give the pisa_sr.pkl of PiSA-SR or an adapters.safetensors of this project")
        checked = Settings(**settings)
        trained = files.load_adapters(adapters)
        loaded = pretrained.load_pretrained(model, jnp.dtype(dtype or default_dtype()), jnp.dtype(vae_dtype))
        checks.check_adapters(trained.trees, injection.target_shapes(loaded.params["unet"], "."))
        if "pix" not in trained.trees:
            raise ValueError(f"{adapters} has no adapter 'pix', only {', '.join(trained.trees)}")
        # The text encoder first, as it is dropped again; then one weight after the other.
        text = on_device(loaded.params["text"], jnp.float32)
        prompt = bb.encode_text(loaded.backbone, text, jnp.asarray(loaded.tokenize([prompt])))
        del text
        weights = Weights(
            injection.merge(
                on_device(loaded.params["unet"], loaded.backbone.unet.dtype),
                {"pix": trained.trees["pix"]},
                trained.specs,
                {"pix": 1.0},
                donate=True,
            ),
            # After the pixel stage of a training there is no sem adapter yet: eps_full is then eps_pix.
            on_device(trained.trees.get("sem", {}), jnp.float32),
            on_device(loaded.params["vae"], loaded.backbone.vae.dtype),
            prompt,
        )
        return cls(loaded.backbone, weights, trained.specs.get("sem", AdapterSpec()), checked, on_compile, notice)

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
            picture, back = image_io.from_array(image), functools.partial(image_io.to_array, dtype=image.dtype.type)
        else:
            picture, back = image_io.from_pil(image), image_io.to_pil
        return [back(results[0]) for results in self.upscale([picture], scale, pairs, seed)]

    def upscale(
        self,
        pictures: Sequence[image_io.Picture],
        scale: float | int,
        pairs: Sequence[Pair],
        seed: int | None = None,
    ) -> list[list[image_io.Picture]]:
        """For every pair of scales, the results of `pictures`, which have equal sizes, as one batch."""
        prepared = [
            network_input.prepare(p, scale, self.settings.min_size, self.backbone.vae_scale_factor) for p in pictures
        ]
        batch = np.stack([array for array, _ in prepared])
        both = any(tuple(pair) != (1.0, 1.0) for pair in pairs)
        residuals = self.residuals(batch, both, None if seed is None else self._noise(batch.shape, seed))
        results = []
        for pair in pairs:
            out = self.render(residuals, pair, batch, prepared[0][1].working)
            results.append(
                [network_input.finish(o, plan, p) for o, (_, plan), p in zip(out, prepared, pictures, strict=True)]
            )
        return results

    def residuals(
        self, batch: Float[np.ndarray, "b h w 3"], both: bool = True, noise: Float[Any, "1 y x c"] | None = None
    ) -> Residuals:
        """The latents of network inputs in [-1, 1] and the two predictions, or eps_full in place of both of them."""
        settings = self.settings
        latents = self._encoded(batch, noise)

        def unet(array):
            return self._run(predict, (self.sem_spec, (0.0, 1.0) if both else (1.0,)), self._spread(array))

        _, height, width, channels = latents.shape
        if settings.tile and height * width > settings.tile**2:
            tiles_at_once = len(batch) * settings.tile_batch * settings.devices
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
        scales = np.asarray(scales, np.float32)

        def whole():
            static = (self.settings.color_fix, tuple(size))
            return np.asarray(self._run(render, static, self._spread(residuals), scales, self._spread(style)))

        def tiled(tile):
            results = []
            for latents, source in zip(np.asarray(model.combine(*residuals, jnp.asarray(scales))), style, strict=True):
                decoded = self._walked(vae_tiling.tiled_decoder, latents, tile)[: size[0], : size[1]]
                results.append(self._recolored(decoded, source[: size[0], : size[1]], tile))
            return _stacked(results)

        return self._within_memory(style, whole, tiled)

    def _encoded(self, batch, noise) -> Any:
        def whole():
            return jax.block_until_ready(self._run(encode, (), self._spread(batch), noise))

        def tiled(tile):
            mean, std = np.split(
                _stacked([self._walked(vae_tiling.tiled_encoder, one, tile) for one in batch]), 2, axis=-1
            )
            latents = mean if noise is None else mean + std * np.asarray(noise)
            return jnp.asarray(latents * self.backbone.latent_scale)

        return self._within_memory(batch, whole, tiled)

    def _walked(self, direction: Callable, array: np.ndarray, tile: int) -> np.ndarray:
        """One picture, or its latents, through the VAE by tiles of `tile` pixels."""
        functions = direction(self.backbone, self.weights.vae, self.mesh, self._run)
        out, off = vae_tiles.process_in_tiles(functions, array, max(tile // self.backbone.vae_scale_factor, 1))
        if off > vae_tiles.TOLERANCE:
            self.notice(f"the tiles of the VAE's {direction.__name__} agree to {off:.1g} only: seams may show")
        return out

    def _recolored(self, decoded: np.ndarray, style: np.ndarray, tile: int) -> np.ndarray:
        """`recolor` of one picture: over all of it on the host, or by tiles where it is local."""
        if self.settings.color_fix == "adain":
            adain_in_place(np.clip(decoded, -1, 1, out=decoded), style)
            return decoded
        stage = functools.partial(self._run, recolor, (self.settings.color_fix,))
        return vae_tiles.map_tiles(stage, (decoded, style), tile, WAVELET_REACH)

    def _within_memory(self, batch: np.ndarray, whole: Callable, tiled: Callable) -> Any:
        return self.memory.execute(
            vae_tiling.footprint(self.backbone, batch.shape), max(batch.shape[1:3]), whole, tiled
        )

    def _spread(self, arrays: Any) -> Any:
        """Batches cut over the devices, where they can be."""
        count = self.settings.devices
        if count == 1 or any(len(leaf) % count for leaf in jax.tree.leaves(arrays)):
            return arrays
        return jax.device_put(arrays, distributed.batch_sharding(self.mesh))

    def _noise(self, shape: tuple[int, ...], seed: int) -> jax.Array:
        # The same for every picture of a size: results do not depend on which files share a batch.
        spatial = (side // self.backbone.vae_scale_factor for side in shape[1:3])
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


def _stacked(pictures: list[np.ndarray]) -> np.ndarray:
    """A batch; one picture, which may be large, is not copied."""
    return np.stack(pictures) if len(pictures) > 1 else pictures[0][None]
