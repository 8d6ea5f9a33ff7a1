"""Checkpoints of small trees whose values tell the step."""

import jax
import jax.numpy as jnp
import numpy as np

from pisa_jax.runtime.checkpoint import Checkpoints, Progress


def tree(step):
    return {"a": jnp.arange(5000.0) * step, "b": {"c": jnp.ones((30, 20)) * step}}


def save(folder, *steps):
    run = Checkpoints(folder)
    for step in steps:
        run.save(step, {"pix": tree(step)}, tree(step), Progress(0, {"batches": step}))
    run.close()


def restored(folder):
    """Return the step whose progress, adapters and state are restored."""
    run = Checkpoints(folder)
    try:
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree(1))
        step = run.progress().loader["batches"]
        adapters, state = run.restore({"pix": shapes}, shapes)
        for found in (adapters["pix"], state):
            jax.tree.map(np.testing.assert_array_equal, found, tree(step))
        return step
    finally:
        run.close()
