"""The VAE on tiles of an image, on the devices: the functions that `tiling.vae_tiles.process_in_tiles` calls.

The VAE's layers depend on their surroundings in two ways. Convolutions see a few positions: each tile has a margin that
is wide enough for all of them. Tiles at the border are shifted inwards, so zero padding occurs only at true image
borders or in cropped margins. GroupNorm and attention depend on the whole image: their statistics and keys are
arguments, and those of the tiles are measured and returned.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from pisa_jax.runtime.distributed import replicated
from pisa_jax.runtime.trees import flatten
from pisa_jax.sd import backbone as bb
from pisa_jax.sd import layers
from pisa_jax.sd.backbone import Backbone, Hooks, Params
from pisa_jax.tiling.memory import Footprint
from pisa_jax.tiling.vae_tiles import (
    EPSILON,
    AttentionKeys,
    SampleMeasurements,
    TileFunctions,
    TileMeasurements,
    TilePlacement,
)

# Mean errors in standard deviations that change an image by about 0.1 gray levels on average (docs/vae_tiling.md).
DECODER_TOLERANCE, ENCODER_TOLERANCE = 2e-3, 6e-3
# Rows of an activation whose moments are computed at once.
ROWS_PER_BLOCK = 16


def decoder_margins(backbone: Backbone) -> list[int]:
    """Return the positions that the decoder needs around its output: in the latents, then before each upsampler."""
    convs = 2 * (backbone.vae.layers_per_block + 1)  # 3x3 convolutions of a level: two in each residual block
    margin, before_upsamplers = 1 + convs, []
    for _ in backbone.vae.block_out_channels[1:]:
        before_upsamplers.insert(0, -(-(margin + 1) // 2))
        margin = before_upsamplers[0] + convs
    return [margin + 4 + 1, *before_upsamplers]  # 4 convolutions in the mid block, and conv_in


def encoder_margin(backbone: Backbone) -> int:
    """Return the latents around a tile that the encoder sees: three quarters of its receptive field.

    The last quarter has no measurable effect (docs/vae_tiling.md) and would cost a fifth of the encoder's time.
    """
    convs = 2 * backbone.vae.layers_per_block
    margin = 1 + 4 + convs  # conv_out and the mid block
    for _ in backbone.vae.block_out_channels[1:]:
        margin = 2 * margin + 1 + convs
    return math.ceil(0.75 * (margin + 1) / backbone.vae_scale_factor)


def footprint(backbone: Backbone, shape: Sequence[int]) -> Footprint:
    """Estimate the memory of the VAE for a batch of images of `shape` (b, h, w, 3).

    The largest activations are four with the channels of the last upsampler at the resolution of the image; a CPU holds
    two and a half of them at a time (measured, docs/vae_tiling.md). On other devices, the scores of attention that is
    not computed in chunks are added.
    """
    batch, height, width, _ = shape
    channels = backbone.vae.block_out_channels
    per_pixel = 4 * channels[min(1, len(channels) - 1)] * jnp.dtype(backbone.vae.dtype).itemsize
    positions = height * width // backbone.vae_scale_factor**2
    scores = 0 if jax.default_backend() == "cpu" else 8 * min(positions**2, layers.MOST_SCORES)
    untiled = batch * (per_pixel * height * width + scores)
    return Footprint(untiled, per_pixel, encoder_margin(backbone) * backbone.vae_scale_factor)


def tiled_decoder(backbone: Backbone, params: Params, mesh: Mesh, run: Callable) -> TileFunctions:
    """Return the decoder, scaled latents -> images; `run(stage, static, *arrays)` runs a stage with the weights."""
    margin, scale = decoder_margins(backbone)[0], backbone.vae_scale_factor
    return _tile_functions(backbone, params["decoder"], mesh, run, decode_tile, margin, 1, scale, 3, DECODER_TOLERANCE)


def tiled_encoder(backbone: Backbone, params: Params, mesh: Mesh, run: Callable) -> TileFunctions:
    """Return the encoder, images -> mean and standard deviation of unscaled latents, concatenated as channels."""
    margin, scale = encoder_margin(backbone), backbone.vae_scale_factor
    geometry = margin, scale, 1, 2 * backbone.latent_channels
    return _tile_functions(backbone, params["encoder"], mesh, run, encode_tile, *geometry, ENCODER_TOLERANCE)


def _tile_functions(
    backbone, params, mesh, run, tile_fn, margin, input_scale, output_scale, channels, tolerance
) -> TileFunctions:
    norms = sum(path.endswith("/scale") for path in flatten(params))
    return TileFunctions(
        process_tiles=lambda size, *arrays: run(process_tiles, (backbone, tile_fn, mesh, size), *arrays),
        measure_sample=lambda size, *arrays: run(measure_sample, (backbone, tile_fn, size), *arrays),
        transfer=functools.partial(jax.device_put, device=replicated(mesh)),
        margin=margin,
        input_scale=input_scale,
        output_scale=output_scale,
        output_channels=channels,
        statistics_shape=(norms, 2, backbone.vae.norm_num_groups),
        tolerance=tolerance,
        batch_size=mesh.size,
    )


def process_tiles(
    backbone: Backbone,
    tile_fn: Callable,
    mesh: Mesh,
    size: tuple[int, int],
    weights: Any,
    windows: Float[Any, "b h w c"],
    placement: TilePlacement,
    statistics: Float[Any, "norms 2 groups"],
    keys: AttentionKeys,
) -> tuple[Float[Array, "b y x d"], TileMeasurements]:
    """Stage: compute `tile_fn` (`encode_tile` or `decode_tile`) on tiles of `size` latents, sharded over the mesh."""

    def on_device(params, windows, placement, statistics, keys):
        hooks = _TileHooks(backbone, size, placement, keys, statistics)
        result = tile_fn(backbone, params, windows, hooks)
        return result, hooks.measurements()

    sharded = P(mesh.axis_names)
    specs = (P(), sharded, sharded, P(), P())
    return jax.shard_map(on_device, mesh=mesh, in_specs=specs, out_specs=sharded, check_vma=False)(
        weights.vae, windows, placement, statistics, keys
    )


def measure_sample(
    backbone: Backbone,
    tile_fn: Callable,
    size: tuple[int, int],
    weights: Any,
    windows: Float[Any, "b h w c"],
    placement: TilePlacement,
    shift: Float[Any, "norms 2 groups"],
    keys: AttentionKeys | None,
) -> SampleMeasurements:
    """Stage: compute `tile_fn` on the patches of a sample in one batch; return its statistics, keys and values."""
    hooks = _SampleHooks(backbone, size, placement, keys, shift)
    tile_fn(backbone, weights.vae, windows, hooks)
    return hooks.measurements()


def decode_tile(backbone, params, windows, hooks):
    """Decode latents to images and crop the margins."""
    images = bb.decode(backbone, params, windows, hooks.vae_hooks())
    return hooks.crop(images, hooks.placement.output * hooks.scale, [side * hooks.scale for side in hooks.size])


def encode_tile(backbone, params, windows, hooks):
    """Encode images to the means and deviations of their latents and crop the margins."""
    hooks.scale, hooks.origin = backbone.vae_scale_factor, hooks.placement.window * backbone.vae_scale_factor
    moments = jnp.concatenate(bb.posterior(backbone, params, windows, hooks.vae_hooks()), axis=-1)
    return hooks.crop(moments, hooks.placement.output, hooks.size)


class _Hooks:
    """Overrides of the VAE's layers for tiles. They track the position and scale of activations in the image."""

    def __init__(self, backbone, size, placement, keys):
        self.size, self.placement, self.keys = size, placement, keys
        # Positions per latent, and the position of an activation's first element; initially those of latents.
        self.scale, self.origin = 1, placement.window
        self.margins = decoder_margins(backbone)[1:]
        self.measured = []

    def vae_hooks(self) -> Hooks:
        """Return the overrides for `backbone.decode` and `backbone.posterior`."""
        return Hooks(self.norm, self.attention, self.before_upsample, self.after_downsample)

    def norm(self, x, scale, bias, groups, epsilon):
        """GroupNorm with the mean and variance of `statistics_for`."""
        mean, variance = self.statistics_for(x, groups)
        gain = _per_channel(jax.lax.rsqrt(variance + epsilon), x) * scale.astype(jnp.float32)
        return ((x.astype(jnp.float32) - _per_channel(mean, x)) * gain + bias.astype(jnp.float32)).astype(x.dtype)

    def moments(self, x, mean):
        """Return (b, 2, groups): means over each tile's own area of x - mean and of its square.

        The sum goes over blocks of rows: in one piece, a CPU would hold three more arrays of the size of x, which
        triples the memory of a tile.
        """
        height, step = x.shape[1], min(ROWS_PER_BLOCK, x.shape[1])
        rows, columns = (self.own_weights(axis, x.shape[1 + axis]) for axis in range(2))

        def add(index, total):
            first = jnp.minimum(index * step, height - step)
            block = jax.lax.dynamic_slice_in_dim(x, first, step, axis=1).astype(jnp.float32) - _per_channel(mean, x)
            unseen = first + jnp.arange(step) >= index * step  # the last block is moved back to end at the border
            row_weights = jax.lax.dynamic_slice_in_dim(rows, first, step, axis=1) * unseen
            weights = row_weights[:, :, None, None] * columns[:, None, :, None]
            return total + jnp.stack([(term * weights).sum((1, 2)) for term in (block, jnp.square(block))], axis=1)

        channels = jax.lax.fori_loop(0, -(-height // step), add, jnp.zeros((x.shape[0], 2, x.shape[-1])))
        return channels.reshape(x.shape[0], 2, len(mean), -1).mean(-1)

    def own_weights(self, axis, length):
        """Return (b, length): equal weights, of sum 1, for the positions along an axis in the tile's own area."""
        position = self.origin[:, axis, None] + jnp.arange(length)
        start, stop = (self.scale * side[:, axis, None] for side in (self.placement.start, self.placement.stop))
        own = ((position >= start) & (position < stop)).astype(jnp.float32)
        return own / own.sum(1, keepdims=True)

    def attention(self, query, key, value, size):
        """Attend to the given keys, or, without any, to those of the batch; keep the keys of the batch."""
        self.own_keys = [
            self.crop(array.reshape(-1, *size, *array.shape[2:]), self.placement.output, self.size)
            for array in (key, value)
        ]
        keys = self.keys
        if keys is None:
            flat = [array.reshape(-1, *array.shape[3:]) for array in self.own_keys]
            keys = AttentionKeys(*flat, jnp.array(len(flat[0])))
        return jax.lax.map(lambda one: layers.attention_over_first_keys(one, *keys), query)

    def before_upsample(self, x):
        """Crop to the margin that the remaining layers of the decoder need: early layers see further than late ones."""
        margin = self.margins.pop(0)
        given = x.shape[1:3]
        size = [min(side * self.scale + 2 * margin, length) for side, length in zip(self.size, given, strict=True)]
        last = self.origin + jnp.array(given) - jnp.array(size)
        first = jnp.clip(self.placement.output * self.scale - margin, self.origin, last)
        x = self.crop(x, first, size)
        self.origin, self.scale = 2 * first, 2 * self.scale
        return x

    def after_downsample(self, x):
        """Track the halved resolution; the encoder crops its margins only at the end."""
        self.origin, self.scale = self.origin // 2, self.scale // 2
        return x

    def crop(self, x, first, size):
        """Return `size` positions of the activations (b, h, w, ...), starting at position `first` of the image."""
        rest = [0] * (x.ndim - 3)
        cropped = [
            jax.lax.dynamic_slice(array, (*start, *rest), (*size, *array.shape[2:]))
            for array, start in zip(x, first - self.origin, strict=True)
        ]
        return jnp.stack(cropped)


class _TileHooks(_Hooks):
    """Normalize with given statistics, and measure the moments of the tiles around the given means."""

    def __init__(self, backbone, size, placement, keys, statistics):
        super().__init__(backbone, size, placement, keys)
        self.statistics = statistics

    def statistics_for(self, x, groups):
        """Return the given mean and variance of the next GroupNorm."""
        del groups
        mean, variance = self.statistics[len(self.measured)]
        self.measured.append(self.moments(x, mean))
        return mean, variance

    def measurements(self) -> TileMeasurements:
        """Return what was measured; call it after the last layer."""
        return TileMeasurements(jnp.stack(self.measured, axis=1), *self.own_keys)


class _SampleHooks(_Hooks):
    """Normalize with the shifted statistics of the sample itself."""

    def __init__(self, backbone, size, placement, keys, shift):
        super().__init__(backbone, size, placement, keys)
        self.shift, self.applied = shift, []

    def statistics_for(self, x, groups):
        """Return the mean and variance over all patches, shifted."""
        mean = self.moments(x, jnp.zeros(groups)).mean(0)[0]
        variance = self.moments(x, mean).mean(0)[1]
        self.measured.append(jnp.stack([mean, variance]))
        self.applied.append(apply_shift(self.measured[-1], self.shift[len(self.applied)]))
        return self.applied[-1]

    def measurements(self) -> SampleMeasurements:
        """Return what was measured; call it after the last layer."""
        own = (array.reshape(-1, *array.shape[3:]) for array in self.own_keys)
        return SampleMeasurements(jnp.stack(self.measured), jnp.stack(self.applied), *own)


def apply_shift(statistics: Float[Any, "2 g"], shift: Float[Any, "2 g"]) -> Float[Array, "2 g"]:
    """Inverse of `vae_tiles.statistics_shift`: apply_shift(a, statistics_shift(a, b)) == b."""
    variance = statistics[1] + EPSILON
    return jnp.stack([statistics[0] + shift[0] * jnp.sqrt(variance), variance * jnp.exp(shift[1]) - EPSILON])


def _per_channel(grouped, x):
    """Repeat values per group (groups,) to the channels of x (b, h, w, channels), for broadcasting."""
    return jnp.repeat(grouped, x.shape[-1] // len(grouped))[None, None, None]
