"""Inference: an upscaler, and sessions that render one image at many scales."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from pisa_jax import model
from pisa_jax.adapters import files
from pisa_jax.adapters.adapter_tree import with_sem
from pisa_jax.config import AdapterSpec, check_seed, scales_by_name
from pisa_jax.imaging import network_input, scale_maps
from pisa_jax.imaging.any_image import to_image_data
from pisa_jax.imaging.arrays import pad_images
from pisa_jax.imaging.image_data import ImageData, from_array
from pisa_jax.model import BaseModel
from pisa_jax.pipeline import DEFAULT, Pipeline, Settings, compiled_pixels
from pisa_jax.runtime import distributed
from pisa_jax.runtime.compilation import CompilingRunner
from pisa_jax.sd import pretrained
from pisa_jax.tiling.buckets import covering
from pisa_jax.weights import Weights, make_weights


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
        self._plans = [plan for _, plan in prepared]
        self._inputs, noise, self._sizes = _as_batch(pipeline, [array for array, _ in prepared], seed)
        on_stage("encode")
        latents = pipeline.encode(self._inputs, noise, self._sizes)
        on_stage("predict")
        self._predictions = pipeline.predict(latents, adjustable, self._sizes)

    @property
    def latents(self) -> Float[Any, "b y x c"]:
        """Scaled latents z_L of the network inputs."""
        return self._without_padding(self._predictions.latents)

    @property
    def eps(self) -> tuple[Float[Any, "b y x c"], ...]:
        """Residuals of the UNet with the first 1, ..., n adapters; all the last in a session that is not adjustable."""
        return tuple(map(self._without_padding, self._predictions.eps))

    @property
    def eps_pix(self) -> Float[Any, "b y x c"]:
        """Residual of the UNet with the first adapter, `pix`."""
        return self._without_padding(self._predictions.eps_pix)

    @property
    def eps_full(self) -> Float[Any, "b y x c"]:
        """Residual of the UNet with all adapters."""
        return self._without_padding(self._predictions.eps_full)

    def _without_padding(self, array: Any) -> Any:
        """Crop an array to the largest height and width of the images."""
        if self._sizes is None:
            return array
        height, width = self._sizes.max(0)
        return jnp.asarray(np.asarray(array)[:, :height, :width])

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
        at_latents = [self._at_latents(value) for value in values]
        size = self._plans[0].working if self._sizes is None else np.array([plan.working for plan in self._plans])
        arrays = self._pipeline.render(self._predictions, at_latents, self._inputs, size)
        return [network_input.finish_output(*each) for each in zip(arrays, self._plans, self._images, strict=True)]

    def _at_latents(self, value: scale_maps.ScaleOrMap) -> float | Float[np.ndarray, "#b y x 1"]:
        """Return a number as it is, and maps as the scale of every latent of every image."""
        if isinstance(value, float):
            return value
        grid = self._predictions.latents.shape[1:3]
        if self._sizes is None:
            return scale_maps.scale_at_latents(value, self._plans[0].working, self._inputs.shape[1:3], grid)
        factor, maps = self._pipeline.base.vae_scale_factor, []
        each = value if isinstance(value, list) else [value] * len(self._images)
        for scale, plan, (height, width) in zip(each, self._plans, self._sizes.tolist(), strict=True):
            padded = (height * factor, width * factor)
            [at_latents] = np.asarray(scale_maps.scale_at_latents([scale], plan.working, padded, (height, width)))
            maps.append(at_latents)
        return pad_images(maps, grid)


def _as_batch(
    pipeline: Pipeline, arrays: Sequence[np.ndarray], seed: int | None
) -> tuple[np.ndarray, Any, Int[np.ndarray, "b 2"] | None]:
    """Return network inputs as one array, the noise of their latents, and their sizes in latents if they are padded."""
    base, factor = pipeline.base, pipeline.base.vae_scale_factor
    if pipeline.buckets is None:
        batch = np.stack(arrays)
        return batch, None if seed is None else model.posterior_noise(base, batch.shape, seed), None
    sizes = [(len(array) // factor, array.shape[1] // factor) for array in arrays]
    height, width = bucket = pipeline.buckets.of(covering(sizes))
    noise = None
    if seed is not None:
        own = [np.asarray(model.posterior_noise(base, (1, *array.shape), seed))[0] for array in arrays]
        noise = pad_images(own, bucket)
    return pad_images(arrays, (height * factor, width * factor)), noise, np.array(sizes, np.int32)


class Upscaler:
    """Adjustable one-step super-resolution.

    >>> upscaler = Upscaler.load()  # the demo model; else Upscaler.load("path/to/sd21-base", "pisa_sr.pkl")
    >>> better = upscaler(image, scale=4, scales=(1.0, 0.7))
    >>> session = upscaler.open(image, scale=4)  # encoder and UNet run once
    >>> variants = [session.render(pix=1.0, sem=sem) for sem in (0.0, 0.5, 1.0)]

    Stages are compiled once per bucket, a size of arrays for images of about this size; other scales never compile
    anything.
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
        """Open decoded images as one batch, for `Session.render_all`: of equal size with buckets="off".

        `on_stage` is called with "encode" and "predict", the names of the stages, before each begins.
        """
        return Session(self.pipeline, images, scale, seed, adjustable, on_stage=on_stage)

    def plan_buckets(self, sizes: Sequence[tuple[int, int]], scale: float | int) -> None:
        """Choose the buckets for images of these heights and widths, upscaled by `scale`, that will be opened."""
        if self.pipeline.buckets is not None:
            self.pipeline.plan_buckets([self._latent_size(size, scale) for size in sizes])

    def batch_key(self, size: tuple[int, int], scale: float | int) -> Hashable:
        """Return a key that is equal for the heights and widths of images that one batch can hold."""
        if self.pipeline.buckets is None:
            return size
        latents = self._latent_size(size, scale)
        return self.pipeline.buckets.of(latents), self.pipeline.needs_windows(latents)

    def compile(self, size: tuple[int, int], scale: float | int, adjustable: bool, count: int = 1) -> None:
        """Compile all programs for a batch of `count` images of this height and width, and compute nothing."""
        blank = [from_array(np.zeros((*size, 3), np.uint8))] * count
        runner = self.pipeline.runner
        self.pipeline.runner = CompilingRunner(runner)
        try:
            with np.errstate(all="ignore"):  # of NaN
                self.open_all(blank, scale, None, adjustable).render_all()
        finally:
            self.pipeline.runner = runner

    def filling(self, count: int, batch_size: int, size: tuple[int, int], scale: float | int) -> int:
        """Return the number of copies of an image of this height and width that fill a batch of `count` images.

        It is 0 if computing the copies takes longer than compiling for `count` images.
        """
        height, width = self._latent_size(size, scale)
        missing = batch_size - count
        added = missing * height * width * self.pipeline.base.vae_scale_factor**2
        return missing if missing and added < compiled_pixels() else 0

    def _latent_size(self, size: tuple[int, int], scale: float | int) -> tuple[int, int]:
        factor = self.pipeline.base.vae_scale_factor
        height, width = network_input.working_size(size, scale, self.pipeline.settings.min_size)
        return -(-height // factor), -(-width // factor)
