"""Adapters sharded over devices, in every decomposition: equal to one device, and exact after a checkpoint."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_base_model import toy_model
from tiny import close

from pisa_jax import Objective, init_adapter, init_state, jit_train_step, make_frozen, make_mesh
from pisa_jax.adapters import registry
from pisa_jax.config import AdapterSpec
from pisa_jax.runtime import distributed
from pisa_jax.runtime.checkpoint import Checkpoints, Progress
from pisa_jax.train_step import Batch

# The default suite has one of each kind: low-rank, needs W for the start, needs W in every step, all of W.
OFTEN = ("lora", "pissa", "dora", "full")
every_name = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in OFTEN)) for name in registry.DECOMPOSITIONS]
)


class UNet(nn.Module):
    """A convolution, a linear layer and a 1x1 convolution."""

    @nn.compact
    def __call__(self, latents, prompt):
        hidden = nn.tanh(nn.Conv(16, (3, 3), name="conv_in")(latents)) + prompt.mean((1, 2))[:, None, None, None]
        return nn.Conv(12, (1, 1), name="conv_out")(nn.tanh(nn.Dense(16, name="proj_in")(hidden)))


@functools.cache
def small_model():
    model = toy_model()
    unet = jax.device_get(UNet().init(jax.random.key(0), jnp.zeros((1, 4, 4, 12)), jnp.zeros((1, 1, 3)))["params"])
    base = dataclasses.replace(model.base, predict_noise=lambda params, z, t, p: UNet().apply({"params": params}, z, p))
    return model._replace(base=base, params=model.params | {"unet": unet})


class Case:
    """Training of one adapter on a mesh, with all weights and factors sharded where their sizes allow it."""

    def __init__(self, name, monkeypatch, data, fsdp):
        for limit in ("MIN_SIZE_TO_SHARD", "MIN_FACTOR_SIZE_TO_SHARD"):
            monkeypatch.setattr(distributed, limit, 1)
        model, self.mesh, spec = small_model(), make_mesh(data, fsdp), AdapterSpec(name, rank=4, alpha=6.0)
        # With its usual epsilon, Adam's first steps are the signs of gradients, which rounding flips.
        optimizer, self.frozen = optax.adamw(1e-2, eps=1e-2), make_frozen(model, self.mesh)
        rng = np.random.default_rng(0)
        adapter = jax.tree.map(
            lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32),
            jax.device_get(init_adapter(jax.random.key(1), self.frozen.unet, spec)),
        )
        state = jax.device_get(init_state(adapter, optimizer, ema=True, spec=spec))
        self.start = distributed.make_global_arrays(state, distributed.factor_shardings(self.mesh, state))
        objective = Objective(spec, ema=0.5)
        self.step = jit_train_step(model.base, objective, optimizer, self.frozen, self.mesh, self.start)

    def next(self, state):
        images = jnp.tanh(jax.random.normal(jax.random.key(2), (4, 16, 16, 3))) / 2
        batch = Batch(images, images[::-1], jnp.zeros((4, 1), jnp.int32), jnp.zeros(4, bool))
        return self.step(self.frozen, state, batch, jax.random.key(3))[0]


@every_name
def test_sharded_training_is_that_of_one_device_and_exact_after_a_restart(name, monkeypatch, tmp_path):
    alone, sharded = (Case(name, monkeypatch, *sides) for sides in ((1, 1), (2, 2)))
    found = sharded.next(sharded.start)
    for leaf in jax.tree.leaves((found.adapter, found.optimizer, found.ema)):
        halves = any(size % 2 == 0 for size in leaf.shape)
        assert leaf.addressable_shards[0].data.size == leaf.size // (2 if halves else 1), leaf.shape
    expected = alone.next(alone.start)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"pix": found.adapter}, found, Progress(0, {}))
    checkpoints.wait()
    start = jax.device_get(found.adapter)
    found, expected = sharded.next(found), alone.next(expected)
    changed = jax.tree.map(lambda one, other: np.abs(one - other).max() > 1e-5, jax.device_get(found.adapter), start)
    assert sum(jax.tree.leaves(changed)) >= 3
    jax.tree.map(
        lambda one, other: close(one, other, 2e-6), (found.adapter, found.ema), (expected.adapter, expected.ema)
    )

    shapes = distributed.factor_shapes(sharded.mesh, found)
    adapters, restored = checkpoints.restore({"pix": shapes.adapter}, shapes)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(adapters["pix"]), start)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(lambda leaf: leaf.sharding, found)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(sharded.next(restored)), jax.device_get(found))
    assert sharded.step._cache_size() == 1
    checkpoints.close()
