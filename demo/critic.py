"""A patch discriminator (critic) and the losses of adversarial training.

The losses are relativistic: they compare the score of a result with that of its target at the same position
(Jolicoeur-Martineau 2019), with a penalty on gradients at both (Huang et al. 2024).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Kernel size, stride and output channels of the convolutions. A score depends on 28 x 28 pixels.
CONVOLUTIONS = ((3, 1, 24), (4, 2, 48), (4, 2, 96), (3, 1, 96), (3, 1, 1))
# Weight of the penalty, and standard deviation of the noise from which it is computed.
PENALTY, SIGMA = 0.2, 0.05


def initial_params(rng: np.random.Generator) -> dict[str, dict[str, jax.Array]]:
    """Draw weights (He et al. 2015, eq. 10); the first scores are small."""
    params, inputs = {}, 3
    for index, (size, _, outputs) in enumerate(CONVOLUTIONS):
        deviation = (2 / (size * size * inputs)) ** 0.5 * (0.1 if outputs == 1 else 1)
        kernel = rng.normal(0, deviation, (size, size, inputs, outputs))
        params[f"conv{index}"] = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.zeros(outputs)}
        inputs = outputs
    return params


def scores(params: Mapping, images: Float[Array, "b h w 3"]) -> Float[Array, "b y x 1"]:
    """Score patches of images in [-1, 1]: high scores mean that a patch looks like a target."""
    x = images
    for index, (_, stride, _) in enumerate(CONVOLUTIONS):
        layer = params[f"conv{index}"]
        x = jax.nn.leaky_relu(x, 0.2) if index else x
        x = jax.lax.conv_general_dilated(
            x, layer["kernel"], (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = x + layer["bias"]
    return x


def generator_loss(params: Mapping, results: Float[Array, "b h w 3"], targets: Float[Array, "b h w 3"]) -> Array:
    """Compute mean log(1 + exp(c(target) - c(result))), whose gradient reaches only the results."""
    both = scores(jax.lax.stop_gradient(params), jnp.concatenate([results, targets]))
    return jnp.mean(jax.nn.softplus(both[len(results) :] - both[: len(results)]))


def critic_losses(
    params: Mapping, results: Float[Array, "b h w 3"], targets: Float[Array, "b h w 3"], key: jax.Array
) -> tuple[Array, Array]:
    """Compute mean log(1 + exp(c(result) - c(target))) and the penalty, whose gradients reach only the critic.

    The penalty is PENALTY / 2 |dc/dx|^2 for results and targets x. A second derivative would cost more than its
    estimate, mean (c(x + SIGMA n) - c(x))^2 / SIGMA^2 with normal noise n (Lin et al. 2025, "Diffusion
    adversarial post-training", approximated R1).
    """
    images = jax.lax.stop_gradient(jnp.concatenate([results, targets]))
    noisy = images + SIGMA * jax.random.normal(key, images.shape)
    found, changed = jnp.split(scores(params, jnp.concatenate([images, noisy])), 2)
    of_results, of_targets = jnp.split(found, 2)
    penalty = PENALTY / 2 * jnp.mean((changed - found) ** 2) / SIGMA**2
    return jnp.mean(jax.nn.softplus(of_results - of_targets)), penalty
