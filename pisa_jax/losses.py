"""Training losses as functions of arrays: l2 and classifier score distillation (CSD), and the DDPM schedule they use.

Everything is computed in float32 whatever the inputs are. The perceptual loss is `pisa_jax.lpips.distance`.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax.lax import stop_gradient
from jaxtyping import Array, Float, Int


class Schedule(NamedTuple):
    """Noise schedule of a diffusion model: beta_t and prod(1 - beta) up to t, each of shape (steps,)."""

    betas: Float[Array, " steps"]
    alphas_cumprod: Float[Array, " steps"]


def ddpm_schedule(beta_start: float = 0.00085, beta_end: float = 0.012, steps: int = 1000) -> Schedule:
    """The "scaled linear" schedule of Stable Diffusion: sqrt(beta) runs linearly from start to end.

    Reference: Ho et al., "Denoising Diffusion Probabilistic Models", 2020, section 2; Rombach et al. 2022.
    """
    if not (0 < beta_start <= beta_end < 1 and steps > 0):
        raise ValueError(f"betas must satisfy 0 < start <= end < 1 over >= 1 steps, got {beta_start, beta_end, steps}")
    betas = np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2
    return Schedule(jnp.asarray(betas, jnp.float32), jnp.asarray(np.cumprod(1 - betas), jnp.float32))


def _signal_and_noise(
    t: Int[Array, " b"], alphas_cumprod: Float[Array, " steps"]
) -> tuple[Float[Array, "b 1 1 1"], Float[Array, "b 1 1 1"]]:
    a = alphas_cumprod[t][:, None, None, None]
    return jnp.sqrt(a), jnp.sqrt(1 - a)


def add_noise(
    latents: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    alphas_cumprod: Float[Array, " steps"],
) -> Float[Array, "b h w c"]:
    """z_t = sqrt(a_t) z + sqrt(1 - a_t) n (Ho et al. 2020, equation 4)."""
    signal, sigma = _signal_and_noise(t, alphas_cumprod)
    return signal * latents + sigma * noise


def predict_x0(
    noisy: Float[Array, "b h w c"],
    eps: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    alphas_cumprod: Float[Array, " steps"],
) -> Float[Array, "b h w c"]:
    """x0(e) = (z_t - sqrt(1 - a_t) e) / sqrt(a_t), the inverse of `add_noise` (Ho et al. 2020, equation 15)."""
    signal, sigma = _signal_and_noise(t, alphas_cumprod)
    return (noisy - sigma * eps) / signal


def l2(x: Float[Array, "*shape"], y: Float[Array, "*shape"]) -> Float[Array, ""]:
    """mean (x - y)^2 over all elements."""
    return jnp.mean((x.astype(jnp.float32) - y.astype(jnp.float32)) ** 2)


def smooth_l2(x: Float[Array, "b h w c"], y: Float[Array, "b h w c"], window: int) -> Float[Array, ""]:
    """mean m^2, m the means of x - y over every window x window positions: l2 where the window is 1."""
    error = x.astype(jnp.float32) - y.astype(jnp.float32)
    return jnp.mean(nn.avg_pool(error, (window, window)) ** 2)


def csd_direction(
    eps_fn: Callable[[Array, Array], tuple[Array, Array]],
    latents: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    alphas_cumprod: Float[Array, " steps"],
    guidance: float | Float[Array, ""],
) -> Float[Array, "b h w c"]:
    """g = (x0(e_neg) - x0(e_cfg)) / mean|z - x0(e_cfg)|, e_cfg = e_neg + guidance (e_pos - e_neg), float32.

    The mean is per sample; the result carries no gradient. Arguments as for `csd`.
    """
    z, n = (stop_gradient(v).astype(jnp.float32) for v in (latents, noise))
    noisy = add_noise(z, n, t, alphas_cumprod)
    eps_neg, eps_pos = (e.astype(jnp.float32) for e in eps_fn(noisy.astype(latents.dtype), t))
    guided = predict_x0(noisy, eps_neg + guidance * (eps_pos - eps_neg), t, alphas_cumprod)
    scale = jnp.mean(jnp.abs(z - guided), axis=(1, 2, 3), keepdims=True)
    return stop_gradient((predict_x0(noisy, eps_neg, t, alphas_cumprod) - guided) / scale)


def csd(
    eps_fn: Callable[[Array, Array], tuple[Array, Array]],
    latents: Float[Array, "b h w c"],
    noise: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    alphas_cumprod: Float[Array, " steps"],
    guidance: float | Float[Array, ""] = 7.5,
) -> Float[Array, ""]:
    """Classifier score distillation: mean g^2, whose gradient in the latents is exactly 2 g / numel.

    eps_fn(z_t, t) -> (eps_neg, eps_pos) is the frozen UNet without adapters under the negative prompt and the prompt.
    It is called once, on noisy latents of the latents' dtype, and receives no gradient.
    latents are scaled (VAE * 0.18215) and carry the gradient; noise ~ N(0, 1); t in [0, steps).
    Reference: Sun et al., PiSA-SR, arXiv 2412.03017, section 3.3; Yu et al., "Text-to-3D with Classifier Score
    Distillation", 2023. `z - stop_gradient(z)` is an exact zero, so unlike z - stop_gradient(z - g) nothing is rounded.
    """
    g = csd_direction(eps_fn, latents, noise, t, alphas_cumprod, guidance)
    z = latents.astype(jnp.float32)
    return jnp.mean((g + (z - stop_gradient(z))) ** 2)
