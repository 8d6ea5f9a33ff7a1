"""The digest of weights: the same in every precision, another one for other weights."""

import hashlib

import jax
import numpy as np
import pytest

from pisa_jax.runtime.trees import flatten, unflatten
from pisa_jax.runtime.weights_digest import weights_digest


def weights(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"conv/kernel": (3, 3, 32, 48), "conv/bias": (48,), "proj/kernel": (64, 96), "table/embedding": (40, 64)}
    return unflatten({path: rng.normal(0, 0.02, shape).astype(np.float32) for path, shape in shapes.items()})


def cast(tree, dtype):
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_it_does_not_depend_on_the_precision(dtype):
    """Also for values that are 0 in float16."""
    given = weights()
    given["conv"]["bias"][:2] = (1e-12, -1e-12)
    assert weights_digest(cast(given, dtype)) == weights_digest(given)
    assert weights_digest(cast(cast(given, dtype), np.float32)) == weights_digest(given)


def test_it_does_not_depend_on_the_layout_in_memory_or_the_order_of_the_tree():
    given = weights()
    torch = np.ascontiguousarray(given["conv"]["kernel"].transpose(3, 2, 0, 1)).transpose(2, 3, 1, 0)
    view = given | {"conv": {"kernel": torch, "bias": given["conv"]["bias"]}}
    assert weights_digest(dict(reversed(view.items()))) == weights_digest(given)
    assert weights_digest(jax.tree.map(jax.numpy.asarray, given)) == weights_digest(given)


def test_other_weights_have_another_digest():
    given, rng = weights(), np.random.default_rng(1)
    changed = [weights(1)]
    for path, leaf in flatten(given).items():
        other = dict(flatten(given))
        changed.append(unflatten(other | {path: leaf[..., :-1]}))
        changed.append(unflatten(other | {path: -leaf}))
        changed.append(unflatten(other | {path: leaf + 0.02 * rng.normal(size=leaf.shape)}))
        del other[path]
        changed.append(unflatten(other))
        changed.append(unflatten(other | {path.replace("/", "_/"): leaf}))
    assert weights_digest(given) not in {weights_digest(tree) for tree in changed}
    assert len({weights_digest(tree) for tree in changed}) == len(changed)


def test_a_small_step_of_training_is_noticed():
    """A change of 1e-3 of the weights' magnitude, in 100 layers of ordinary size."""
    rng = np.random.default_rng(0)
    given = {str(index): {"kernel": rng.normal(0, 0.02, (640, 64)).astype(np.float32)} for index in range(100)}
    moved = jax.tree.map(lambda leaf: leaf + 2e-5 * rng.normal(size=leaf.shape).astype(np.float32), given)
    assert weights_digest(moved) != weights_digest(given)


def test_the_digest_is_that_of_earlier_versions():
    """Files record it: a change would make every adapter one of another model."""
    layer = {"kernel": np.array([[1.0, -2.0], [3.0, -4.0], [5.0, 6.0]]), "bias": np.array([0.5, -0.5])}
    content = b"layer/bias (2,)" + bytes([0b01000000]) + b"layer/kernel (3, 2)" + bytes([0b11000000])
    assert weights_digest({"layer": layer}) == hashlib.sha256(content).hexdigest()[:16] == "52f2dfa9aebcb65e"
