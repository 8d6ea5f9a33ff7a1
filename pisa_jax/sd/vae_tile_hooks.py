"""Overrides of the VAE's layers for tiles: statistics, keys, margins and positions in the image.

`vae_tiling` describes when they are used.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pisa_jax.sd import layers
from pisa_jax.sd.backbone import Hooks
from pisa_jax.tiling import vae_tiles
from pisa_jax.tiling.vae_tiles import EPSILON, AttentionKeys, SampleMeasurements, TileMeasurements

# Rows of an activation whose moments are computed at once.
ROWS_PER_BLOCK = 16


class Split:
    """Hooks that end or begin a call of the VAE at one of its resamplers, so that it computes only one part.

    Without `features`, the part before the resampler is computed, and its output becomes `features`. With `features`,
    they replace the input of the part after it. The other part gets arrays of one position per latent at most.
    """

    def __init__(self, hooks, features=None):
        self.hooks, self.features = hooks, features
        self.active = features is None

    def at_upsampler(self) -> Hooks:
        """Return the hooks for a call that is split before the first upsampler."""
        resamplers = []

        def before_upsample(x):
            resamplers.append(x)
            if len(resamplers) == 1:
                x = self._switch(x)
            return self.hooks.before_upsample(x) if self.active else x

        return Hooks(self.norm, self.attention, before_upsample)

    def at_downsampler(self, index: int) -> Hooks:
        """Return the hooks for a call that is split after the downsampler with this index."""
        resamplers = []

        def after_downsample(x):
            resamplers.append(x)
            if self.active:
                x = self.hooks.after_downsample(x)
            return self._switch(x) if len(resamplers) == index + 1 else x

        return Hooks(self.norm, self.attention, after_downsample=after_downsample)

    def _switch(self, x):
        self.active = not self.active
        if self.active:
            return self.features
        self.features = x
        return x[:, :1, :1]

    def norm(self, x, *arguments):
        """Normalize in the part that is computed."""
        return self.hooks.norm(x, *arguments) if self.active else x

    def attention(self, query, key, value, size):
        """Attend in the part that is computed."""
        return self.hooks.attention(query, key, value, size) if self.active else value


class WholeHooks:
    """Layers of a trunk on the whole image; attention uses the keys of at most MAX_KEYS positions."""

    norm = staticmethod(layers.group_norm)

    def attention(self, query, key, value, size):
        """Attend to the keys of every position, or of every second (third, ...) row and column."""
        stride = vae_tiles.key_stride(size)
        keys = (
            array.reshape(-1, *size, *array.shape[2:])[:, ::stride, ::stride].reshape(len(array), -1, *array.shape[2:])
            for array in (key, value)
        )
        return layers.attention(query, *keys)

    def after_downsample(self, x):
        """Change nothing."""
        return x

    def cropped(self, x):
        """Change nothing: there are no margins."""
        return x


class _Hooks:
    """Overrides of the VAE's layers for tiles. They track the position and scale of activations in the image."""

    def __init__(self, size, placement, keys):
        self.size, self.placement, self.keys = size, placement, keys
        self.set_scale(1)
        self.margins: list[int] = []  # before each upsampler
        self.measured: list[Array] = []
        # Parts without attention have no keys. Zeros stand for them.
        self.own_keys = [jnp.zeros((len(placement.window), *size, 1, 1))] * 2

    def set_scale(self, scale):
        """Set the positions per latent, and with them the position of an activation's first element in the image."""
        self.scale, self.origin = scale, self.placement.window * scale

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

    def cropped(self, x):
        """Return the part of an activation that is the output of the tiles."""
        return self.crop(x, self.placement.output * self.scale, [side * self.scale for side in self.size])

    def crop(self, x, first, size):
        """Return `size` positions of the activations (b, h, w, ...), starting at position `first` of the image."""
        rest = [0] * (x.ndim - 3)
        cropped = [
            jax.lax.dynamic_slice(array, (*start, *rest), (*size, *array.shape[2:]))
            for array, start in zip(x, first - self.origin, strict=True)
        ]
        return jnp.stack(cropped)


class TileHooks(_Hooks):
    """Normalize with given statistics, and measure the moments of the tiles around the given means."""

    def __init__(self, size, placement, keys, statistics):
        super().__init__(size, placement, keys)
        self.statistics = statistics

    def statistics_for(self, x, groups):
        """Return the given mean and variance of the next GroupNorm."""
        del groups
        mean, variance = self.statistics[len(self.measured)]
        self.measured.append(self.moments(x, mean))
        return mean, variance

    def measurements(self) -> TileMeasurements:
        """Return all measurements; call it after the last layer."""
        return TileMeasurements(jnp.stack(self.measured, axis=1), *self.own_keys)


class SampleHooks(_Hooks):
    """Normalize with the shifted statistics of the sample itself."""

    def __init__(self, size, placement, keys, patch_weights, shift):
        super().__init__(size, placement, keys)
        self.patch_weights, self.shift, self.applied = patch_weights, shift, []

    def statistics_for(self, x, groups):
        """Return the weighted mean and variance over all patches, shifted."""
        mean = self.patch_weights @ self.moments(x, jnp.zeros(groups))[:, 0]
        variance = self.patch_weights @ self.moments(x, mean)[:, 1]
        self.measured.append(jnp.stack([mean, variance]))
        self.applied.append(apply_shift(self.measured[-1], self.shift[len(self.applied)]))
        return self.applied[-1]

    def measurements(self) -> SampleMeasurements:
        """Return all measurements; call it after the last layer."""
        own = (array.reshape(-1, *array.shape[3:]) for array in self.own_keys)
        return SampleMeasurements(jnp.stack(self.measured), jnp.stack(self.applied), *own)


def apply_shift(statistics: Float[Any, "2 g"], shift: Float[Any, "2 g"]) -> Float[Array, "2 g"]:
    """Inverse of `vae_tiles.statistics_shift`: apply_shift(a, statistics_shift(a, b)) == b."""
    variance = statistics[1] + EPSILON
    return jnp.stack([statistics[0] + shift[0] * jnp.sqrt(variance), variance * jnp.exp(shift[1]) - EPSILON])


def _per_channel(grouped, x):
    """Repeat values per group (groups,) to the channels of x (b, h, w, channels), for broadcasting."""
    return jnp.repeat(grouped, x.shape[-1] // len(grouped))[None, None, None]
