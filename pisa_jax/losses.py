"""Training losses as functions of arrays: l2 and classifier score distillation (CSD), and the DDPM noise schedule.

All losses are computed in float32 for any input dtype. The perceptual loss is `pisa_jax.metrics.lpips.distance`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

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
    """Return the "scaled linear" schedule of Stable Diffusion: sqrt(beta) is linear from start to end.

    Raises:
        ValueError: the betas do not satisfy 0 < start <= end < 1, or there is no step.

    Reference: Ho et al., "Denoising Diffusion Probabilistic Models", 2020, section 2; Rombach et al. 2022.
    """
    if not (0 < beta_start <= beta_end < 1 and steps > 0):
        raise ValueError(f"betas must satisfy 0 < start <= end < 1 over >= 1 steps, got {beta_start, beta_end, steps}")
    betas = np.linspace(beta_start**0.5, beta_end**0.5, steps) ** 2
    return Schedule(jnp.asarray(betas, jnp.float32), jnp.asarray(np.cumprod(1 - betas), jnp.float32))


def schedule_of(scheduler_config: Mapping[str, Any]) -> Schedule:
    """Return the schedule that a diffusers `scheduler_config.json` describes.

    Raises:
        ValueError: another beta schedule than "scaled_linear".
    """
    kind = scheduler_config.get("beta_schedule", "scaled_linear")
    if kind != "scaled_linear":
        raise ValueError(f"the model's scheduler has beta_schedule {kind!r}; only 'scaled_linear' is supported")
    names = {"beta_start": "beta_start", "beta_end": "beta_end", "num_train_timesteps": "steps"}
    return ddpm_schedule(**{ours: scheduler_config[name] for name, ours in names.items() if name in scheduler_config})


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
    """Compute z_t = sqrt(a_t) z + sqrt(1 - a_t) n (Ho et al. 2020, equation 4)."""
    signal, sigma = _signal_and_noise(t, alphas_cumprod)
    return signal * latents + sigma * noise


def predict_x0(
    noisy: Float[Array, "b h w c"],
    eps: Float[Array, "b h w c"],
    t: Int[Array, " b"],
    alphas_cumprod: Float[Array, " steps"],
) -> Float[Array, "b h w c"]:
    """Invert `add_noise`: x0(e) = (z_t - sqrt(1 - a_t) e) / sqrt(a_t) (Ho et al. 2020, equation 15)."""
    signal, sigma = _signal_and_noise(t, alphas_cumprod)
    return (noisy - sigma * eps) / signal


def l2(x: Float[Array, "*shape"], y: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Compute mean (x - y)^2 over all elements."""
    return jnp.mean((x.astype(jnp.float32) - y.astype(jnp.float32)) ** 2)


def smooth_l2(x: Float[Array, "b h w c"], y: Float[Array, "b h w c"], window: int) -> Float[Array, ""]:
    """Compute mean m^2, m the average of x - y over every window x window positions; with window 1 this is l2."""
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
    """Compute g = (x0(e_neg) - x0(e_cfg)) / mean|z - x0(e_cfg)| with e_cfg = e_neg + guidance (e_pos - e_neg).

    The mean is taken per sample. The result is float32 and carries no gradient. Arguments as for `csd`.
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
    """Compute the classifier score distillation loss mean g^2; its gradient in the latents is exactly 2 g / numel.

    Args:
        eps_fn: (z_t, t) -> (eps_neg, eps_pos), the frozen UNet without adapters under the negative prompt and the
            prompt. It is called once, with noisy latents in the dtype of `latents`, and receives no gradient.
        latents: scaled latents (VAE latents * 0.18215); the gradient flows into them.
        noise: standard normal.
        t: timesteps in [0, steps).

    Reference: Sun et al., PiSA-SR, arXiv 2412.03017, section 3.3; Yu et al., "Text-to-3D with Classifier Score
    Distillation", 2023. The paper writes (z - stop_gradient(z - g))^2; g + (z - stop_gradient(z)) has the same value
    and gradient, and no rounding error, because z - stop_gradient(z) is exactly zero.
    """
    g = csd_direction(eps_fn, latents, noise, t, alphas_cumprod, guidance)
    z = latents.astype(jnp.float32)
    return jnp.mean((g + (z - stop_gradient(z))) ** 2)
