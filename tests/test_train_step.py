"""One step of each stage against the original program, also with accumulation, rematerialization and sharding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from recorded import STAGES, gradient_deviations, recorded_case, recorded_gradient
from tiny import close, random_base

from pisa_jax import losses, train_step, training_run
from pisa_jax.adapters import injection
from pisa_jax.config import AdapterSpec, Config, Stage
from pisa_jax.runtime import distributed
from pisa_jax.train_step import Batch, Frozen, Objective


def sharded_gradient(name, remat, mesh):
    """Compute the losses and the gradient of the recorded step on several devices."""
    tree, frozen, batch, draws, base, objective = recorded_case(name)
    function = functools.partial(train_step.gradient, base=base, objective=dataclasses.replace(objective, remat=remat))
    layouts = distributed.weight_shardings(mesh, frozen)
    sharded = [layout for layout in jax.tree.leaves(layouts) if not layout.is_fully_replicated]
    assert len(sharded) > 20 or mesh.shape["fsdp"] == 1
    frozen = jax.device_put(frozen, layouts)
    batch, draws = jax.device_put((batch, draws), distributed.batch_sharding(mesh))
    with jax.set_mesh(mesh):
        return jax.jit(function)(jax.device_put(tree, distributed.replicated(mesh)), frozen, batch, draws)


def check_against_the_original(name, measured, grads):
    deviations = gradient_deviations(name, measured, grads)
    assert {what: each for what, each in deviations.items() if not each.error <= each.tolerance} == {}
    assert sum(what.startswith("grad/") for what in deviations) >= 20


@pytest.mark.parametrize("name", list(STAGES))
def test_losses_and_gradients_equal_the_original(name):
    check_against_the_original(name, *recorded_gradient(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", list(STAGES))
def test_rematerialization_changes_nothing(name):
    check_against_the_original(name, *recorded_gradient(name, remat=True))


# The default suite shards the pixel step with all options; whole runs of both stages over two devices are tested in
# test_training.py.
SHARDED = [
    pytest.param(name, fsdp, remat, marks=[] if (name, fsdp, remat) == ("pix", 2, True) else pytest.mark.slow)
    for name in STAGES
    for fsdp in (1, 2)
    for remat in (False, True)
]


@pytest.mark.parametrize(("name", "fsdp", "remat"), SHARDED)
def test_sharding_changes_nothing(name, fsdp, remat):
    """One image per device; with fsdp = 2 the weights are sharded over both devices as well."""
    mesh = distributed.make_mesh(data=2 // fsdp, fsdp=fsdp)
    check_against_the_original(name, *sharded_gradient(name, remat, mesh))


@pytest.mark.slow
def test_accumulation_changes_nothing():
    check_against_the_original("pix", *recorded_gradient("pix", accumulate=2))


@functools.cache
def random_case():
    """Compile the pixel step of a random model (8 latent channels, factor 4); returns its arguments as well."""
    base, params = random_base("nano")
    objective = Objective(AdapterSpec(rank=2), ema=0.5)
    optimizer = training_run.make_optimizer(
        Config(out="", stages=(Stage("pix", 1),)), Stage("pix", 1, learning_rate=1e-2)
    )
    prompt = jax.random.normal(jax.random.key(0), (1, 5, 32))
    alphas = losses.ddpm_schedule().alphas_cumprod
    frozen = Frozen(params["unet"], None, params["vae"], None, prompt, prompt, None, alphas)
    images = jnp.tanh(jax.random.normal(jax.random.key(1), (2, 2, 32, 32, 3)))
    batch = Batch(images[0], images[1], jnp.zeros((2, 1), jnp.int32), jnp.array([True, False]))
    state = train_step.init_state(
        injection.init_adapter(jax.random.key(2), params["unet"], objective.spec), optimizer, ema=True
    )
    step = jax.jit(functools.partial(train_step.train_step, base=base, objective=objective, optimizer=optimizer))
    return step, frozen, state, batch


def test_the_error_of_latents_decodes_nothing():
    base, _ = random_base("nano")
    _, frozen, state, batch = random_case()
    objectives = [
        Objective(AdapterSpec(rank=2), **weights) for weights in ({}, {"l2": 0.0, "latent": 1.0, "latent_window": 2})
    ]
    draws = train_step.draw(jax.random.key(0), base, (20, 499), batch.lq.shape)
    functions = (functools.partial(train_step.gradient, base=base, objective=each) for each in objectives)
    l2, latent = (jax.jit(function).lower(state.adapter, frozen, batch, draws).compile() for function in functions)

    @jax.jit
    def expected(noise):
        z_lq = base.encode(frozen.vae, batch.lq, noise)
        eps = base.predict_noise(frozen.unet, z_lq, 1, frozen.null_prompt)
        error = z_lq - eps - base.encode(frozen.vae, batch.gt, None)
        corners = [error[:, y : y + 7, x : x + 7] for y in (0, 1) for x in (0, 1)]
        return jnp.mean((sum(corners) / 4) ** 2)

    measured, _ = latent(state.adapter, frozen, batch, draws)
    assert set(measured) == {"latent", "total"}
    assert float(measured["latent"]) == pytest.approx(float(expected(draws.posterior)), rel=1e-5)
    assert latent.cost_analysis()["flops"] < 0.6 * l2.cost_analysis()["flops"]


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (Stage("a", 10, learning_rate=2.0), [2.0, 2.0, 2.0]),
        (Stage("a", 10, learning_rate=2.0, warmup=4), [0.0, 1.0, 2.0]),
        (Stage("a", 8, learning_rate=2.0, schedule="cosine"), [2.0, 2.0 * (0.5 + 0.5 * np.cos(np.pi / 4)), 0.0]),
    ],
)
def test_learning_rates(stage, expected):
    rate = training_run.learning_rate(stage)
    assert [float(rate(step)) for step in (0, 2, stage.steps)] == pytest.approx(expected, abs=1e-6)


def test_a_target_is_learnt():
    step, frozen, state, batch = random_case()
    batch, found = batch._replace(gt=jnp.zeros_like(batch.gt)), []
    for _ in range(25):
        # Step 0 again and again: the same draws, so the loss can fall steadily.
        state, measured = step(frozen, state._replace(step=jnp.zeros_like(state.step)), batch, jax.random.key(0))
        found.append(float(measured["l2"]))
    assert found[-1] < 0.65 * found[0], found
    assert int(state.skipped) == 0
    # The average lags behind.
    path, factor = "conv_in", "b"
    assert 0 < jnp.abs(state.ema[path][factor]).max() < jnp.abs(state.adapter[path][factor]).max()


def test_steps_that_are_not_finite_are_left_out_and_counted():
    step, frozen, state, batch = random_case()
    broken = batch._replace(gt=batch.gt.at[0, 0, 0, 0].set(jnp.nan))
    good, _ = step(frozen, state, batch, jax.random.key(0))
    bad, measured = step(frozen, good, broken, jax.random.key(0))
    bad, measured = step(frozen, bad, broken, jax.random.key(0))
    assert (int(measured["skipped"]), int(measured["bad_streak"]), int(bad.step)) == (2, 2, 3)
    for old, new in zip(jax.tree.leaves(good[1:4]), jax.tree.leaves(bad[1:4]), strict=True):
        assert jnp.array_equal(old, new)
    _, measured = step(frozen, bad, batch, jax.random.key(0))
    assert (int(measured["skipped"]), int(measured["bad_streak"])) == (2, 0)


def test_draws_differ_between_steps_and_are_reproducible():
    step, frozen, state, batch = random_case()
    first, a = step(frozen, state, batch, jax.random.key(0))
    _, again = step(frozen, state, batch, jax.random.key(0))
    _, later = step(frozen, state._replace(step=state.step + 1), batch, jax.random.key(0))
    assert float(a["l2"]) == float(again["l2"]) != float(later["l2"])

    images = (500, 8, 8, 3)
    draws = train_step.draw(jax.random.key(3), random_base("nano")[0], (20, 499), images)
    assert draws.posterior.shape == draws.csd_noise.shape == (500, 2, 2, 8)
    draws = train_step.draw(jax.random.key(3), random_base()[0], (20, 499), images)
    assert draws.posterior.shape == (500, 1, 1, 4)
    assert (int(draws.csd_timesteps.min()) >= 20, int(draws.csd_timesteps.max()) <= 499) == (True, True)
    close(first.step, 1, 0)
