"""Tiles of the VAE on the device, computed as if each saw the whole picture: what `vae_tiles.walk` walks with.

Convolutions reach a few positions: a tile sees a margin around its result that is wide enough for all of them, and
border tiles are moved inwards, so that what a convolution pads with is the picture's border or of no consequence.
Statistics and keys come from outside (see `vae_tiles`), and the tile's own are reported.
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
from pisa_jax.sd.backbone import Backbone, Params, VaeHooks
from pisa_jax.tiling.memory import Footprint
from pisa_jax.tiling.vae_tiles import EPSILON, Direction, Keys, Place, Report, Sampled

# Rows of an activation that are summed up at once.
ROWS = 16


def decoder_margins(backbone: Backbone) -> list[int]:
    """Positions that the decoder needs around a result: in its latents, then in the input of every upsampler."""
    resnets = 2 * (backbone.vae.layers_per_block + 1)  # each has two 3x3 convolutions
    margin, before_up = 1 + resnets, []
    for _ in backbone.vae.block_out_channels[1:]:
        before_up.insert(0, -(-(margin + 1) // 2))
        margin = before_up[0] + resnets
    return [margin + 4 + 1, *before_up]  # the mid block and conv_in


def encoder_margin(backbone: Backbone) -> int:
    """Latents that the encoder sees around a result: three quarters of what it would need to be exact.

    The last quarter changes nothing that could be measured (docs/vae_tiling.md), and costs a fifth of the encoder.
    """
    resnets = 2 * backbone.vae.layers_per_block
    margin = 1 + 4 + resnets  # conv_out and the mid block
    for _ in backbone.vae.block_out_channels[1:]:
        margin = 2 * margin + 1 + resnets
    return math.ceil(0.75 * (margin + 1) / backbone.factor)


def footprint(backbone: Backbone, shape: Sequence[int]) -> Footprint:
    """What a batch of pictures of this shape needs.

    Four activations of the last upsampler's width at the picture's resolution: a CPU keeps two and a half (measured,
    docs/vae_tiling.md), other back ends may need more. And the attention's scores, where they are not cut into chunks.
    """
    batch, height, width, _ = shape
    channels = backbone.vae.block_out_channels
    per_pixel = 4 * channels[min(1, len(channels) - 1)] * jnp.dtype(backbone.vae.dtype).itemsize
    scores = 0 if jax.default_backend() == "cpu" else 8 * (height * width // backbone.factor**2) ** 2
    whole = batch * (per_pixel * height * width + scores)
    return Footprint(whole, per_pixel, encoder_margin(backbone) * backbone.factor)


def decoder(backbone: Backbone, params: Params, mesh: Mesh, run: Callable) -> Direction:
    """Scaled latents to pictures; `run(stage, static, *arrays)` executes a stage with the weights."""
    margin = decoder_margins(backbone)[0]
    return _direction(backbone, params["decoder"], mesh, run, decode_part, margin, 1, backbone.factor, 3)


def encoder(backbone: Backbone, params: Params, mesh: Mesh, run: Callable) -> Direction:
    """Pictures to the mean and the deviation of their latents, unscaled, one after the other along the channels."""
    channels = 2 * backbone.latent_channels
    return _direction(
        backbone, params["encoder"], mesh, run, encode_part, encoder_margin(backbone), backbone.factor, 1, channels
    )


def _direction(backbone, params, mesh, run, part, margin, source, result, channels):
    norms = sum(path.endswith("/scale") for path in flatten(params))
    return Direction(
        lambda size, *arrays: run(tiles, (backbone, part, mesh, size), *arrays),
        lambda size, *arrays: run(sample, (backbone, part, size), *arrays),
        functools.partial(jax.device_put, device=replicated(mesh)),
        margin, source, result, channels, (norms, 2, backbone.vae.norm_num_groups), mesh.size,
    )  # fmt: skip


def tiles(
    backbone: Backbone,
    part: Callable,
    mesh: Mesh,
    size: tuple[int, int],
    weights: Any,
    windows: Float[Any, "b h w c"],
    places: Place,
    stats: Float[Any, "norms 2 groups"],
    keys: Keys,
) -> tuple[Float[Array, "b y x d"], Report]:
    """Stage: `part` of the VAE on tiles of `size` latents, spread over the devices of the mesh."""

    def on_one(params, windows, places, stats, keys):
        flow = _Tiles(backbone, size, places, keys, stats)
        result = part(backbone, params, windows, flow)
        return result, flow.report()

    spread = P(mesh.axis_names)
    specs = (P(), spread, spread, P(), P())
    return jax.shard_map(on_one, mesh=mesh, in_specs=specs, out_specs=spread, check_vma=False)(
        weights.vae, windows, places, stats, keys
    )


def sample(
    backbone: Backbone,
    part: Callable,
    size: tuple[int, int],
    weights: Any,
    windows: Float[Any, "b h w c"],
    places: Place,
    shift: Float[Any, "norms 2 groups"],
    keys: Keys | None,
) -> Sampled:
    """Stage: statistics, keys and values of a sample, its pieces computed together."""
    flow = _Sample(backbone, size, places, keys, shift)
    part(backbone, weights.vae, windows, flow)
    return flow.sampled()


def decode_part(backbone, params, windows, flow):
    """Latents to pictures under the hooks of `flow`, without the margins."""
    pictures = bb.decode(backbone, params, windows, flow.hooks())
    return flow.crop(pictures, flow.place.output * flow.scale, [side * flow.scale for side in flow.size])


def encode_part(backbone, params, windows, flow):
    """Pictures to means and deviations of their latents under the hooks of `flow`, without the margins."""
    flow.scale, flow.origin = backbone.factor, flow.place.window * backbone.factor
    moments = jnp.concatenate(bb.posterior(backbone, params, windows, flow.hooks()), axis=-1)
    return flow.crop(moments, flow.place.output, flow.size)


class _Flow:
    """The VAE's hooks; they follow the activations from layer to layer: which parts of the picture they are."""

    def __init__(self, backbone, size, place, keys):
        self.size, self.place, self.keys = size, place, keys
        # Positions of the activations per latent, and the first of them in the picture; these are of latents.
        self.scale, self.origin = 1, place.window
        self.margins = decoder_margins(backbone)[1:]
        self.found = []

    def hooks(self) -> VaeHooks:
        """For `backbone.decode` and `backbone.posterior`."""
        return VaeHooks(self.norm, self.attention, self.before_up, self.after_down)

    def norm(self, x, scale, bias, groups, epsilon):
        """GroupNorm with the statistics of `stats_for`."""
        mean, variance = self.stats_for(x, groups)
        gain = _spread(jax.lax.rsqrt(variance + epsilon), x) * scale.astype(jnp.float32)
        return ((x.astype(jnp.float32) - _spread(mean, x)) * gain + bias.astype(jnp.float32)).astype(x.dtype)

    def moments(self, x, mean):
        """(b, 2, groups): means over every tile's own positions of x - mean and of its square.

        Row by row, as it were: in one go a CPU keeps three more arrays like x, and a tile takes three times the memory.
        """
        height, step = x.shape[1], min(ROWS, x.shape[1])
        rows, columns = (self.own(axis, x.shape[1 + axis]) for axis in range(2))

        def add(index, total):
            first = jnp.minimum(index * step, height - step)
            centred = jax.lax.dynamic_slice_in_dim(x, first, step, axis=1).astype(jnp.float32) - _spread(mean, x)
            fresh = first + jnp.arange(step) >= index * step  # the last block is moved back to end at the border
            row = jax.lax.dynamic_slice_in_dim(rows, first, step, axis=1) * fresh
            share = row[:, :, None, None] * columns[:, None, :, None]
            return total + jnp.stack([(part * share).sum((1, 2)) for part in (centred, jnp.square(centred))], axis=1)

        channels = jax.lax.fori_loop(0, -(-height // step), add, jnp.zeros((x.shape[0], 2, x.shape[-1])))
        return channels.reshape(x.shape[0], 2, len(mean), -1).mean(-1)

    def own(self, axis, length):
        """(b, length): which positions along an axis are a tile's own, summing to 1."""
        position = self.origin[:, axis, None] + jnp.arange(length)
        start, stop = (self.scale * side[:, axis, None] for side in (self.place.start, self.place.stop))
        own = ((position >= start) & (position < stop)).astype(jnp.float32)
        return own / own.sum(1, keepdims=True)

    def attention(self, query, key, value, size):
        """Attention over the keys that are given; own ones are kept."""
        self.own_keys = [
            self.crop(array.reshape(-1, *size, *array.shape[2:]), self.place.output, self.size)
            for array in (key, value)
        ]
        keys = self.keys
        if keys is None:
            flat = [array.reshape(-1, *array.shape[3:]) for array in self.own_keys]
            keys = Keys(*flat, jnp.array(len(flat[0])))
        return jax.lax.map(lambda one: layers.attention_over(one, *keys), query)

    def before_up(self, x):
        """Leaves what the rest of the decoder needs: its first layers see further than the last."""
        margin = self.margins.pop(0)
        given = x.shape[1:3]
        size = [min(side * self.scale + 2 * margin, length) for side, length in zip(self.size, given, strict=True)]
        last = self.origin + jnp.array(given) - jnp.array(size)
        first = jnp.clip(self.place.output * self.scale - margin, self.origin, last)
        x = self.crop(x, first, size)
        self.origin, self.scale = 2 * first, 2 * self.scale
        return x

    def after_down(self, x):
        """Notes that there are half as many positions; the encoder keeps its margins."""
        self.origin, self.scale = self.origin // 2, self.scale // 2
        return x

    def crop(self, x, first, size):
        """`size` positions of the (b, h, w, ...) activations, from `first` on."""
        rest = [0] * (x.ndim - 3)
        parts = [
            jax.lax.dynamic_slice(array, (*start, *rest), (*size, *array.shape[2:]))
            for array, start in zip(x, first - self.origin, strict=True)
        ]
        return jnp.stack(parts)


class _Tiles(_Flow):
    """Normalises with given statistics and finds the tiles' moments around them."""

    def __init__(self, backbone, size, place, keys, stats):
        super().__init__(backbone, size, place, keys)
        self.stats = stats

    def stats_for(self, x, groups):
        """The given ones."""
        del groups
        mean, variance = self.stats[len(self.found)]
        self.found.append(self.moments(x, mean))
        return mean, variance

    def report(self) -> Report:
        """After the last layer."""
        return Report(jnp.stack(self.found, axis=1), *self.own_keys)


class _Sample(_Flow):
    """Normalises with its own statistics, shifted."""

    def __init__(self, backbone, size, place, keys, shift):
        super().__init__(backbone, size, place, keys)
        self.shift, self.used = shift, []

    def stats_for(self, x, groups):
        """Those of all pieces together, shifted."""
        mean = self.moments(x, jnp.zeros(groups)).mean(0)[0]
        variance = self.moments(x, mean).mean(0)[1]
        self.found.append(jnp.stack([mean, variance]))
        self.used.append(shifted(self.found[-1], self.shift[len(self.used)]))
        return self.used[-1]

    def sampled(self) -> Sampled:
        """After the last layer."""
        own = (array.reshape(-1, *array.shape[3:]) for array in self.own_keys)
        return Sampled(jnp.stack(self.found), jnp.stack(self.used), *own)


def shifted(stats: Float[Any, "2 g"], shift: Float[Any, "2 g"]) -> Float[Array, "2 g"]:
    """The inverse of `vae_tiles.shift_between`: shifted(a, shift_between(a, b)) == b."""
    wide = stats[1] + EPSILON
    return jnp.stack([stats[0] + shift[0] * jnp.sqrt(wide), wide * jnp.exp(shift[1]) - EPSILON])


def _spread(grouped, x):
    """(groups,) to what can be added to x (b, h, w, channels)."""
    return jnp.repeat(grouped, x.shape[-1] // len(grouped))[None, None, None]
