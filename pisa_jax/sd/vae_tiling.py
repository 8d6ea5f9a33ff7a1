"""The VAE on tiles of an image, on the devices: the functions that `tiling.vae_tiles.process_in_tiles` calls.

The VAE's layers depend on their surroundings in two ways. Convolutions see a few positions: each tile has a margin that
is wide enough for all of them. Tiles at the border are shifted inwards, so zero padding occurs only at true image
borders or in cropped margins. GroupNorm and attention depend on the whole image: their statistics and keys are
arguments, and those of the tiles are measured and returned.

Encoder and decoder each have two parts. The *trunk* has the resolution of the latents: the layers before the first
upsampler or after the last downsampler. It has all attention and half of the GroupNorms, but needs a twentieth of the
memory, so most images that need tiles at all are computed without tiles in the trunk. The *levels* are the others.
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
from pisa_jax.sd import layers, vae_tile_hooks
from pisa_jax.sd.backbone import Backbone, Params
from pisa_jax.tiling.memory import Footprint
from pisa_jax.tiling.vae_tiles import AttentionKeys, SampleMeasurements, TileFunctions, TileMeasurements, TilePlacement

# Mean error in standard deviations: about 0.07 gray levels on average for the demo model (docs/vae_tiling.md).
TOLERANCE = 1e-3


def decoder_margins(backbone: Backbone) -> list[int]:
    """Return the positions that the decoder needs around its output: in the latents, then before each upsampler."""
    convs = 2 * (backbone.vae.layers_per_block + 1)  # 3x3 convolutions of a level: two in each residual block
    margin, before_upsamplers = 1 + convs, []
    for _ in backbone.vae.block_out_channels[1:]:
        before_upsamplers.insert(0, -(-(margin + 1) // 2))
        margin = before_upsamplers[0] + convs
    return [margin + 4 + 1, *before_upsamplers]  # 4 convolutions in the mid block, and conv_in


def encoder_margins(backbone: Backbone) -> list[int]:
    """Return the latents that the trunk and the levels of the encoder need around their output."""
    convs = 2 * backbone.vae.layers_per_block
    margin = 0
    for _ in backbone.vae.block_out_channels[1:]:
        margin = 2 * margin + 1 + convs
    return [1 + 4 + convs, -(-(margin + 1) // backbone.vae_scale_factor)]  # conv_out, the mid block, and the last level


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
    margin = max(decoder_margins(backbone)[1], encoder_margins(backbone)[1]) * backbone.vae_scale_factor
    return Footprint(untiled, per_pixel, margin)


def trunk_tiles(backbone: Backbone) -> int:
    """Return the side of the trunk's tiles in sides of the levels' tiles, such that both need the same memory.

    At its resolution, the trunk holds up to seven activations at a time (measured, docs/vae_tiling.md).
    """
    channels = backbone.vae.block_out_channels
    levels = 4 * channels[min(1, len(channels) - 1)] * backbone.vae_scale_factor**2
    return max(math.isqrt(levels // (7 * channels[-1])), 1)


def tiled_decoder(backbone: Backbone, params: Params, mesh: Mesh, run: Callable) -> list[TileFunctions]:
    """Return the parts of the decoder, scaled latents -> features -> images.

    `run(stage, static, *arrays)` runs a stage with the weights.
    """
    margins, channels = decoder_margins(backbone), backbone.vae.block_out_channels
    make = functools.partial(_tile_functions, backbone, mesh, run)
    norms, in_trunk = _norms(params["decoder"]), 2 * (backbone.vae.layers_per_block + 1) + 5
    return [
        make(decode_trunk, margins[0] - margins[1], (1, 1), channels[-1], in_trunk),
        make(decode_levels, margins[1], (1, backbone.vae_scale_factor), 3, norms - in_trunk),
    ]


def tiled_encoder(backbone: Backbone, params: Params, mesh: Mesh, run: Callable) -> list[TileFunctions]:
    """Return the parts of the encoder: images -> features -> mean and standard deviation of unscaled latents.

    Means and deviations are concatenated as channels.
    """
    trunk, levels = encoder_margins(backbone)
    make = functools.partial(_tile_functions, backbone, mesh, run)
    norms, in_trunk = _norms(params["encoder"]), 2 * backbone.vae.layers_per_block + 6
    return [
        make(
            encode_levels, levels, (backbone.vae_scale_factor, 1), backbone.vae.block_out_channels[-2], norms - in_trunk
        ),
        make(encode_trunk, trunk, (1, 1), 2 * backbone.latent_channels, in_trunk),
    ]


def _norms(params):
    return sum(path.endswith("/scale") for path in flatten(params))


def _tile_functions(backbone, mesh, run, tile_fn, margin, scales, channels, norms) -> TileFunctions:
    is_trunk = tile_fn in (decode_trunk, encode_trunk)
    return TileFunctions(
        process_tiles=lambda size, *arrays: run(process_tiles, (backbone, tile_fn, mesh, size), *arrays),
        measure_sample=lambda size, *arrays: run(measure_sample, (backbone, tile_fn, size), *arrays),
        process_whole=lambda source: run(process_whole, (backbone, tile_fn), source),
        transfer=functools.partial(jax.device_put, device=replicated(mesh)),
        margin=margin,
        input_scale=scales[0],
        output_scale=scales[1],
        output_channels=channels,
        statistics_shape=(norms, 2, backbone.vae.norm_num_groups),
        tolerance=TOLERANCE,
        has_attention=is_trunk,
        whole_tiles=trunk_tiles(backbone) if is_trunk else 1,
        batch_size=mesh.size,
    )


def process_whole(
    backbone: Backbone, tile_fn: Callable, weights: Any, source: Float[Any, "b h w c"]
) -> Float[Array, "b y x d"]:
    """Stage: compute a trunk on the whole image."""
    return tile_fn(backbone, weights.vae, source, vae_tile_hooks.WholeHooks())


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
    """Stage: compute `tile_fn`, a part of the encoder or decoder, on tiles of `size`, sharded over the mesh."""

    def on_device(params, windows, placement, statistics, keys):
        hooks = vae_tile_hooks.TileHooks(size, placement, keys, statistics)
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
    patch_weights: Float[Any, " b"],
    shift: Float[Any, "norms 2 groups"],
    keys: AttentionKeys | None,
) -> SampleMeasurements:
    """Stage: compute `tile_fn` on the patches of a sample in one batch; return its statistics, keys and values."""
    hooks = vae_tile_hooks.SampleHooks(size, placement, keys, patch_weights, shift)
    tile_fn(backbone, weights.vae, windows, hooks)
    return hooks.measurements()


# Each part runs the whole encoder or decoder; what it replaces gets a single position, and costs nothing.


def decode_trunk(backbone, params, latents, hooks):
    """Decode latents to the input of the first upsampler, and crop the margins."""
    split = vae_tile_hooks.Split(hooks)
    bb.decode(backbone, params, latents, split.at_upsampler())
    return hooks.cropped(split.features)


def decode_levels(backbone, params, features, hooks):
    """Decode the input of the first upsampler to images, and crop the margins."""
    hooks.margins = decoder_margins(backbone)[1:]
    split = vae_tile_hooks.Split(hooks, features)
    nothing = jnp.zeros((len(features), 1, 1, backbone.latent_channels))
    return hooks.cropped(bb.decode(backbone, params, nothing, split.at_upsampler()))


def encode_levels(backbone, params, images, hooks):
    """Encode images to the output of the last downsampler, and crop the margins."""
    hooks.set_scale(backbone.vae_scale_factor)
    split = vae_tile_hooks.Split(hooks)
    bb.posterior(backbone, params, images, split.at_downsampler(_last_downsampler(backbone)))
    return hooks.cropped(split.features)


def encode_trunk(backbone, params, features, hooks):
    """Encode the output of the last downsampler to the means and deviations of latents, and crop the margins."""
    split = vae_tile_hooks.Split(hooks, features)
    nothing = jnp.zeros((len(features), *[backbone.vae_scale_factor] * 2, 3))
    moments = bb.posterior(backbone, params, nothing, split.at_downsampler(_last_downsampler(backbone)))
    return hooks.cropped(jnp.concatenate(moments, axis=-1))


def _last_downsampler(backbone):
    return len(backbone.vae.block_out_channels) - 2
