"""The method of PiSA-SR (Sun et al. 2025): residual predictions on one latent, combined with two scales."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from pisa_jax.adapters import injection
from pisa_jax.adapters.adapter_tree import AdapterTree
from pisa_jax.config import AdapterSpec
from pisa_jax.sd.backbone import Backbone, Params, eps

# The UNet is always asked at this timestep, and what it predicts is used as a residual (PiSA-SR, sec. 3.2).
TIMESTEP = 1


def predict(
    backbone: Backbone,
    unet_pix: Params,
    sem: AdapterTree,
    spec: AdapterSpec,
    latents: Float[Array, "b h w c"],
    prompt: Float[Array, "1 n d"],
    sem_scales: tuple[float, ...] = (0.0, 1.0),
) -> Float[Array, "k b h w c"]:
    """eps(l) = UNet(z_L, 1, c; W + dW_pix + l dW_sem) for every l of `sem_scales`: eps_pix at 0 and eps_full at 1.

    One UNet call on a batch repeated for each of them; `unet_pix` are the weights W + dW_pix.
    """
    count, batch = len(sem_scales), latents.shape[0]
    scale = jnp.repeat(jnp.array(sem_scales), batch)
    with nn.intercept_methods(injection.interceptor({"sem": sem}, {"sem": spec}, {"sem": scale})):
        out = eps(backbone, unet_pix, jnp.tile(latents, (count, 1, 1, 1)), TIMESTEP, prompt)
    return out.reshape(count, *latents.shape)


def combine(
    latents: Float[Array, "b h w c"],
    eps_pix: Float[Array, "b h w c"],
    eps_full: Float[Array, "b h w c"],
    scales: Float[Array, "2"],
) -> Float[Array, "b h w c"]:
    """z_H = z_L - [l_pix eps_pix + l_sem (eps_full - eps_pix)] for scales (l_pix, l_sem) (PiSA-SR, eq. 8)."""
    return latents - (scales[0] * eps_pix + scales[1] * (eps_full - eps_pix))
