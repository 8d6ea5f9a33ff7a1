"""Operations of a traced program."""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core


def count_operations(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> float:
    """Count the operations of matrix products and convolutions, 2 per multiplication and addition, over all devices.

    In contrast to XLA's cost analysis, the body of a scan counts once per iteration, and kernels written in Pallas are
    counted. The body of a loop with an unknown number of iterations counts once, and of a conditional the most
    expensive branch.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum((_of_equation(equation) for equation in jaxpr.eqns), 0.0)


def _of_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        return 2.0 * equation.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, features = equation.invars[1].aval, params["dimension_numbers"].rhs_spec[0]
        # Positions between those of a dilated input are zeros, which need no multiplication.
        zeros = math.prod(params["lhs_dilation"])
        return 2.0 * equation.outvars[0].aval.size * kernel.size / kernel.shape[features] / zeros
    inner = [count_operations(body) for body in _bodies(params)]
    if name == "cond":
        return max(inner, default=0.0)
    times = {"scan": lambda: params["length"], "pallas_call": lambda: math.prod(params["grid_mapping"].grid)}
    return sum(inner, 0.0) * times.get(name, lambda: 1)()


def _bodies(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            if isinstance(each, core.Jaxpr | core.ClosedJaxpr):
                yield each
