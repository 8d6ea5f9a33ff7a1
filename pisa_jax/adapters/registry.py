"""The table of decompositions, and those of other modules by name ("module:function").

To add one to the table, write its factory in a file of its own and add a line here.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Any

from pisa_jax.adapters.decomposition import Decomposition, no_delta
from pisa_jax.adapters.dora import dora
from pisa_jax.adapters.full import full
from pisa_jax.adapters.hira import hira
from pisa_jax.adapters.hra import hra
from pisa_jax.adapters.loha import loha
from pisa_jax.adapters.lokr import lokr
from pisa_jax.adapters.lora import lora
from pisa_jax.adapters.oft import oft
from pisa_jax.adapters.pissa import olora, pissa
from pisa_jax.adapters.tucker import tucker
from pisa_jax.adapters.vera import vera
from pisa_jax.config import AdapterSpec
from pisa_jax.runtime.imports import import_own
from pisa_jax.runtime.trees import suggest

Factory = Callable[..., Decomposition]
"""factory(alpha, **options) -> functions; options are keyword-only arguments with defaults."""

DECOMPOSITIONS: dict[str, Factory] = {
    "lora": lora,
    "rslora": functools.partial(lora, rank_stabilized=True),
    "pissa": pissa,
    "olora": olora,
    "tucker": tucker,
    "dora": dora,
    "loha": loha,
    "lokr": lokr,
    "vera": vera,
    "oft": oft,
    "hra": hra,
    "hira": hira,
    "full": full,
}


def get_decomposition(spec: AdapterSpec) -> Decomposition:
    """Return the decomposition that `spec` names, with its alpha and options.

    Nothing is imported: `spec` may come from an adapter file. A "module:function" must have been imported, for instance
    with `import_decomposition`.

    Raises:
        ValueError: unknown name or option, or a module that is not imported.
    """
    factory = _find_factory(spec.decomposition)
    known = [
        name
        for name, parameter in inspect.signature(factory).parameters.items()
        if parameter.kind == parameter.KEYWORD_ONLY
    ]
    for name, _ in spec.options:
        if name not in known:
            raise ValueError(
                f"the decomposition {spec.decomposition!r} has no option {name!r}, it has "
                f"{', '.join(known) or 'none'}{suggest(name, known)}"
            )
    return _make(factory, spec.alpha, spec.options)


def import_decomposition(name: str) -> None:
    """Import the module of "module:function", also from the working directory; names of the table need no import.

    Call it with names from configs and command lines only, never with one from an adapter file: importing runs code.

    Raises:
        ValueError: there is no such module or no such decomposition in it.
    """
    if ":" in name:
        import_own(name.partition(":")[0], f"decomposition {name!r}")
    _find_factory(name)


def _find_factory(name: str) -> Factory:
    if ":" not in name:
        if name not in DECOMPOSITIONS:
            hint = suggest(name, DECOMPOSITIONS)
            raise ValueError(
                f"unknown decomposition {name!r}, known: {', '.join(DECOMPOSITIONS)}{hint}; one of your own is named "
                "module:function"
            )
        return DECOMPOSITIONS[name]
    module, _, function = name.partition(":")
    if module not in sys.modules:
        raise ValueError(
            f"the decomposition {name!r} is in a module that is not imported, and reading an adapter never runs code: "
            f"give --decomposition {name} with the module in the working directory or in PYTHONPATH, or import "
            f"{module} first"
        )
    found: Any = getattr(sys.modules[module], function, None)
    if not _is_factory(found):
        raise ValueError(
            f"{name!r} is no decomposition: {module} needs a function {function}(alpha, *, ...) -> Decomposition, with "
            "this annotation of its result"
        )
    return found


def _is_factory(found: Any) -> bool:
    """Return True for a function annotated to return a Decomposition: a name in a file must not call anything else."""
    return inspect.isfunction(found) and found.__annotations__.get("return") in (Decomposition, "Decomposition")


@functools.cache
def _make(factory: Factory, alpha: float, options: tuple[tuple[str, Any], ...]) -> Decomposition:
    """Return the same functions for the same arguments: they are keys of compiled programs."""
    functions = factory(alpha, **dict(options))
    if functions.delta is no_delta and functions.apply is None:
        raise ValueError(f"a decomposition without delta needs apply; {factory} has none")
    return functions
