"""VeRA: vectors that scale fixed random matrices (Kopiczko et al. 2024)."""

import math

import jax
import jax.numpy as jnp

from pisa_jax.adapters.decomposition import Decomposition, low_rank_output


def vera(alpha: float) -> Decomposition:
    """Return dW = diag(lambda_b) B diag(lambda_d) A with random A and B that are saved and never trained.

    `alpha` has no effect. For a convolution, A is a k x k kernel and B a 1 x 1 kernel. The paper shares A and B between
    layers to save memory, and adapts linear layers only. At initialization lambda_b = 0 and lambda_d = 0.1.

    Reference: Kopiczko et al. 2024 (arXiv 2310.11454).
    """
    del alpha

    def init(key, kernel, rank):
        *window, c_in, c_out = kernel.shape
        keys = jax.random.split(key)
        fan_in = math.prod(window) * c_in
        return {
            "a": _kaiming(keys[0], (*window, c_in, rank), fan_in),
            "b": _kaiming(keys[1], (rank, c_out), rank),
            "lambda_d": jnp.full(rank, 0.1),
            "lambda_b": jnp.zeros(c_out),
        }

    def output_matrix(factors):
        return factors["lambda_d"][:, None] * factors["b"] * factors["lambda_b"]

    def delta(factors, kernel):
        del kernel
        return factors["a"] @ output_matrix(factors)

    def apply(factors, call):
        return low_rank_output(call, factors["a"], output_matrix(factors))

    return Decomposition(init, delta, apply, constants=("a", "b"), dropout=True)


def _kaiming(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
    bound = math.sqrt(6 / fan_in)
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)
