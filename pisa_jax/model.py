"""The method of PiSA-SR (Sun et al. 2025): noise predictions used as residuals, combined with two scales.

A base model is a record of functions, so this module, the training step and inference work with any latent diffusion
model whose layers are `flax.linen` modules; `pisa_jax.sd` makes the record for Stable Diffusion 2.1.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from pisa_jax.adapters import injection
from pisa_jax.adapters.adapter_tree import AdapterTree
from pisa_jax.adapters.registry import get_decomposition
from pisa_jax.config import AdapterSpec

Params = Mapping[str, Any]

# The UNet always runs at this timestep, and its noise prediction is used as a residual (PiSA-SR, sec. 3.2).
TIMESTEP = 1


@dataclass(frozen=True, eq=False)
class BaseModel:
    """The functions of a latent diffusion model, without weights. Hashed by identity: static under `jax.jit`.

    Images are NHWC in [-1, 1], latents NHWC and scaled for the UNet; all results are float32.
    """

    # (vae params, images (b, h, w, 3), noise (b or 1, y, x, c) or None) -> latents; None: the mean of the posterior.
    encode: Callable[..., Array]
    # (vae params, latents) -> images, not clipped.
    decode: Callable[..., Array]
    # (unet params, latents, timesteps (b,) or one number, prompt (b or 1, n, d)) -> noise prediction.
    predict_noise: Callable[..., Array]
    # (text params, token ids (b, n)) -> prompt embedding (b, n, d).
    encode_text: Callable[..., Array]
    # Pixels per latent along each axis.
    vae_scale_factor: int
    latent_channels: int
    # Dtypes in which the weights of the UNet and of the VAE are placed on devices.
    unet_dtype: Any = jnp.float32
    vae_dtype: Any = jnp.float32
    # Names that `jax.ad_checkpoint.checkpoint_name` gives to block outputs: all that rematerialization keeps.
    block_outputs: tuple[str, ...] = ()
    # True if `encode`, `decode` and `predict_noise` take `sizes` (b, 2), the heights and widths in latents of images
    # that are padded at the bottom and at the right, and compute the images as without padding. `predict_noise` then
    # takes an `interceptor` of Flax's methods, too, for which the padding is zero in the inputs of convolutions.
    takes_sizes: bool = False
    # Functions that run the VAE in tiles (`tiling.vae_tiles.TiledVae`); None: large images are not tiled.
    tiled_vae: Any = None


class LoadedModel(NamedTuple):
    """A base model, its weights by part ("unet", "vae", "text"), its tokenizer and its noise schedule.

    The weights are host arrays in the dtype of the file, mapped from it: nothing is read before it is needed.
    """

    base: BaseModel
    params: dict[str, Any]
    # Prompts -> token ids.
    tokenize: Callable[[list[str]], np.ndarray]
    # scheduler_config.json.
    schedule: dict[str, Any]
    # Prompt -> number of its tokens, with those at its ends; more than `tokenize` returns are cut.
    count_tokens: Callable[[str], int] = lambda prompt: 0


class Predictions(NamedTuple):
    """Results of encoder and UNet for a batch of images; all further scales then cost one decode."""

    latents: Float[Any, "b y x c"]
    # eps[i]: the noise prediction with the first i + 1 adapters; (eps_pix, eps_full) in the method.
    eps: tuple[Float[Any, "b y x c"], ...]

    @property
    def eps_pix(self) -> Float[Any, "b y x c"]:
        """Noise prediction with the first adapter."""
        return self.eps[0]

    @property
    def eps_full(self) -> Float[Any, "b y x c"]:
        """Noise prediction with all adapters."""
        return self.eps[-1]


def predict(
    base: BaseModel,
    unet: Params,
    adapter: AdapterTree,
    spec: AdapterSpec,
    latents: Float[Array, "b h w c"],
    prompt: Float[Array, "#b n d"],
    adapter_scales: tuple[float, ...] = (1.0,),
    below: Sequence[tuple[AdapterTree, AdapterSpec]] = (),
    dropout_keys: Key[Array, " b"] | None = None,
) -> Float[Array, "k b h w c"]:
    """Predict the residual eps(l) = UNet(z_L, 1, c; W + l dW) for every l of `adapter_scales`.

    With W + dW_pix as `unet` and the sem adapter at the scales (0, 1), the results are eps_pix and eps_full. The UNet
    runs once, on the batch repeated for each scale. Adapters that cannot be merged into `unet` are given as `below`. In
    training, `dropout_keys` has a key for each sample; the adapters below drop nothing.
    """
    frozen = [(tree, dataclasses.replace(each, dropout=0.0)) for tree, each in below]
    adapters, specs = zip(*frozen, (adapter, spec), strict=True)
    rows = tuple((*[1.0] * len(below), scale) for scale in adapter_scales)
    return predict_rows(base, unet, adapters, specs, latents, prompt, rows, dropout_keys)


def predict_rows(
    base: BaseModel,
    unet: Params,
    adapters: Sequence[AdapterTree],
    specs: Sequence[AdapterSpec],
    latents: Float[Array, "b h w c"],
    prompt: Float[Array, "#b n d"],
    rows: tuple[tuple[float, ...], ...],
    dropout_keys: Key[Array, " b"] | None = None,
    sizes: Int[Array, "b 2"] | None = None,
) -> Float[Array, "k b h w c"]:
    """Predict the residual for every row of scales of several adapters, each trained on top of those before it.

    The UNet runs once, on the batch repeated for each row. If an adapter other than the first depends on the weights
    that it adapts, the UNet runs once per row instead, with the adapters merged one after the other: a second copy of
    its weights exists while it does. `sizes` are those of padded latents (`BaseModel.takes_sizes`).
    """
    if any(get_decomposition(spec).needs_kernel == "delta" for spec in specs[1:]):
        return jnp.stack([_predict_merged(base, unet, adapters, specs, latents, prompt, row, sizes) for row in rows])
    return _predict_additive(base, unet, adapters, specs, latents, prompt, rows, dropout_keys, sizes)


def _predict_additive(
    base: BaseModel,
    unet: Params,
    adapters: Sequence[AdapterTree],
    specs: Sequence[AdapterSpec],
    latents: Array,
    prompt: Array,
    rows: tuple[tuple[float, ...], ...],
    dropout_keys: Array | None = None,
    sizes: Array | None = None,
) -> Array:
    count, batch, names = len(rows), latents.shape[0], [str(index) for index in range(len(adapters))]
    columns = {
        name: jnp.repeat(jnp.array(row), batch) for name, row in zip(names, zip(*rows, strict=True), strict=True)
    }
    prompt = jnp.tile(jnp.broadcast_to(prompt, (batch, *prompt.shape[1:])), (count, 1, 1))
    trees, by_name = dict(zip(names, adapters, strict=True)), dict(zip(names, specs, strict=True))
    keys = None if dropout_keys is None else jnp.tile(dropout_keys, count)
    sizes = None if sizes is None else jnp.tile(sizes, (count, 1))
    latents_of_rows = jnp.tile(latents, (count, 1, 1, 1))
    interceptor = injection.interceptor(trees, by_name, columns, keys)
    if sizes is None:
        with nn.intercept_methods(interceptor):
            out = base.predict_noise(unet, latents_of_rows, TIMESTEP, prompt)
    else:
        # Within the masks: an adapter must see the zeros beyond an image that its convolution sees.
        out = base.predict_noise(unet, latents_of_rows, TIMESTEP, prompt, sizes=sizes, interceptor=interceptor)
    return out.reshape(count, *latents.shape)


def _predict_merged(
    base: BaseModel,
    unet: Params,
    adapters: Any,
    specs: Any,
    latents: Array,
    prompt: Array,
    scales: tuple[float, ...],
    sizes: Array | None = None,
) -> Array:
    for tree, spec, scale in zip(adapters, specs, scales, strict=True):
        if scale:
            unet = injection.merge(unet, {"": tree}, {"": spec}, {"": scale})
    prompt = jnp.broadcast_to(prompt, (len(latents), *prompt.shape[1:]))
    return base.predict_noise(unet, latents, TIMESTEP, prompt, **given(sizes))


def given(sizes: Array | None) -> dict[str, Array]:
    """Return the argument `sizes` of the functions of a base model, if there is one: not all of them take it."""
    return {} if sizes is None else {"sizes": sizes}


def combine(
    latents: Float[Array, "b h w c"],
    eps: Sequence[Float[Array, "b h w c"]],
    scales: Float[Array, " n"] | Sequence[Float[Array, "b h w 1"]],
) -> Float[Array, "b h w c"]:
    """Compute z_H = z_L - sum_i l_i (eps_i - eps_(i-1)), where eps_i is predicted with the first i adapters, eps_0 = 0.

    The scales l_i are numbers, or maps with one number for each latent. With (eps_pix, eps_full) and the numbers
    (l_pix, l_sem) this is PiSA-SR, eq. 8.
    """
    residual = scales[0] * eps[0]
    for index in range(1, len(eps)):
        residual = residual + scales[index] * (eps[index] - eps[index - 1])
    return latents - residual


def posterior_noise(base: BaseModel, shape: tuple[int, ...], seed: int) -> Float[Array, "1 y x c"]:
    """Draw the noise that samples the latents of images of `shape` (b, h, w, 3); `seed` has up to 64 bits.

    It is the same for every image of a size: results do not depend on which files share a batch.
    """
    spatial = (side // base.vae_scale_factor for side in shape[1:3])
    high, low = divmod(int(seed), 2**32)
    key = jax.random.key(low)  # without 64-bit types, jax ignores the other bits of a seed
    return jax.random.normal(jax.random.fold_in(key, high) if high else key, (1, *spatial, base.latent_channels))
