"""The table of decompositions. To add one, write its factory in a file of its own and add a line here."""

from collections.abc import Callable

from pisa_jax.adapters.decomposition import Decomposition
from pisa_jax.adapters.loha import loha
from pisa_jax.adapters.lora import lora
from pisa_jax.config import AdapterSpec
from pisa_jax.runtime.trees import suggest

DECOMPOSITIONS: dict[str, Callable[[float], Decomposition]] = {"lora": lora, "loha": loha}


def get_decomposition(spec: AdapterSpec) -> Decomposition:
    """Return the decomposition that `spec` names, with its alpha.

    Raises:
        ValueError: unknown name.
    """
    if spec.decomposition not in DECOMPOSITIONS:
        hint = suggest(spec.decomposition, DECOMPOSITIONS)
        raise ValueError(f"unknown decomposition {spec.decomposition!r}, known: {', '.join(DECOMPOSITIONS)}{hint}")
    return DECOMPOSITIONS[spec.decomposition](spec.alpha)
