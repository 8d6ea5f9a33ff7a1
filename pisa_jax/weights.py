"""The arrays of inference: a model with its adapters on the default device."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from pisa_jax.adapters import fit, injection
from pisa_jax.adapters.adapter_tree import Adapters, AdapterTree
from pisa_jax.model import LoadedModel
from pisa_jax.runtime import distributed
from pisa_jax.runtime.compilation import compiler_options
from pisa_jax.runtime.weights_digest import weights_digest


class Weights(NamedTuple):
    """All arrays of a model: arguments of the jitted stages, never closed over."""

    # With the first adapter merged, unless it has no merged weight.
    unet: Any
    # The adapters that are not merged, each trained on top of those before it.
    adapters: tuple[AdapterTree, ...]
    vae: Any
    prompt: Float[jax.Array, "1 n d"]


def make_weights(
    loaded: LoadedModel, adapters: Adapters, prompt: str = "", notice: Callable[[str], None] = lambda line: None
) -> Weights:
    """Place the weights of a model and of its adapters on the default device, the first adapter merged.

    `notice` is called with a line if the prompt is too long for the text encoder, or if the adapters were trained on
    other weights than those of the model: of a fine-tuned model, for instance.

    Raises:
        ValueError: the adapters do not fit the model or are not finite, or one is missing on top of which another was
            trained.
    """
    base = loaded.base
    fit.check_adapters(adapters.trees, adapters.specs, injection.target_shapes(loaded.params["unet"]))
    fit.check_order(adapters)
    fit.check_finite(adapters.trees)
    if difference := base_difference(loaded, adapters):
        notice(difference)
    first = next(iter(adapters.specs))
    to_merge = [first] if fit.is_mergeable(adapters.specs[first]) else []
    # The text encoder is placed first because it is dropped again; then one weight after the other.
    text = distributed.on_device(loaded.params["text"], jnp.float32)
    tokens = loaded.tokenize([prompt])
    if (count := loaded.count_tokens(prompt)) > tokens.shape[1]:
        notice(f"the prompt has {count} tokens and is cut: the text encoder takes {tokens.shape[1]}")
    embedding = jax.jit(base.encode_text, compiler_options=compiler_options())(text, jnp.asarray(tokens))
    del text
    return Weights(
        injection.merge(
            distributed.on_device(loaded.params["unet"], base.unet_dtype),
            {name: adapters.trees[name] for name in to_merge},
            adapters.specs,
            dict.fromkeys(to_merge, 1.0),
            donate=True,
        ),
        tuple(distributed.on_device(adapters.trees[name], None) for name in adapters.specs if name not in to_merge),
        distributed.on_device(loaded.params["vae"], base.vae_dtype),
        embedding,
    )


def base_difference(loaded: LoadedModel, adapters: Adapters) -> str | None:
    """Describe the model that adapters were trained on, if it is another one than `loaded`; None if it is not known."""
    digest = weights_digest(loaded.params["unet"]) if adapters.base_digest else None
    if digest == adapters.base_digest:
        return None
    return (
        f"the adapters were trained on another base model, {adapters.base_model} with the weights "
        f"{adapters.base_digest}; the UNet of this model has the weights {digest}, and results may be worse"
    )
