"""A mixture of LoRA experts: in every layer, a router weighs k low-rank differences by the input.

    python train.py debug --out experts --stages.1.spec.decomposition lora_experts:lora_experts
    python infer.py -i PHOTO --model experts/model --adapters experts/adapters.safetensors --min-size 64 \
        --decomposition lora_experts:lora_experts --scales 1,0.5

Both commands run in the folder of this file, or with this folder in PYTHONPATH.

There is no weight W + dW, because what is added depends on the input: `delta` is `no_delta`. Such an adapter runs as an
additive path, at every scale. It is refused where a weight is needed: `merge`, files of other programs, and a later
adapter that depends on the weights (DoRA). Windows of the UNet are routed one by one.

Reference: Wu et al. 2024 (Mixture of LoRA Experts, arXiv 2404.13628) for the softmax over experts in every layer; the
mean over positions, one choice for each image, is as in FreqOrtho-SR (Hoang et al. 2026), whose router sees features of
the degradation instead.
"""

import jax
import jax.numpy as jnp

from pisa_jax.adapters.decomposition import Decomposition, no_delta


def lora_experts(alpha: float, *, experts: int = 4) -> Decomposition:
    """Return dy = (alpha / r) sum_j g_j B_j A_j x with g = softmax(R^T mean(x)), the mean over the positions of x.

    At initialization A is that of LoRA, B = 0 and R = 0: equal weights. A scale multiplies dy, and every layer is
    affine in it for given inputs. All experts are computed, so all receive gradients without a balancing loss.

    Args:
        experts: k. The rank is that of each expert.
    """

    def init(key, kernel, rank):
        *window, c_in, c_out = kernel.shape
        return {
            "a": jax.random.normal(key, (*window, c_in, experts * rank)) / rank,
            "b": jnp.zeros((experts * rank, c_out)),
            "router": jnp.zeros((c_in, experts)),
        }

    def apply(factors, call):
        rank = len(factors["b"]) // experts
        inner = call.linear(call.x, factors["a"])  # the inner channels of all experts
        mean = call.x.astype(jnp.float32).mean(axis=range(1, call.x.ndim - 1))
        gates = jnp.repeat(jax.nn.softmax(mean @ factors["router"]), rank, axis=-1)
        gates = gates.reshape(len(gates), *[1] * (inner.ndim - 2), -1)
        return (inner * gates.astype(inner.dtype)) @ (alpha / rank * factors["b"]).astype(inner.dtype)

    return Decomposition(init, no_delta, apply)
