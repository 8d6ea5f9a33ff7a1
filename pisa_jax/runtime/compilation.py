"""Options of the XLA compiler."""

import functools

import jax
import jax.numpy as jnp


@functools.cache
def compiler_options() -> dict[str, str]:
    """Options for `jax.jit(..., compiler_options=)` that make the CPU back end fast; empty elsewhere.

    jax 0.10 hands CPU convolutions to a library path that is slower than XLA's own at every shape we tried. The flag is
    experimental: where this jaxlib does not know it, it is left out.
    """
    if jax.default_backend() != "cpu":
        return {}
    options = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
    try:
        jax.jit(lambda x: x + 1, compiler_options=options)(jnp.zeros(()))
    except Exception:  # jaxlib raises its own XlaRuntimeError or a plain one for unknown options, by version
        return {}
    return options
