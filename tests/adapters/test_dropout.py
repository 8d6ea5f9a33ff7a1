"""Dropout on the input of dW: formula, expectation, and independence of how a batch is split."""

import dataclasses
import functools
import zlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_base_model import toy_model
from tiny import close

from pisa_jax import Objective, init_adapter, init_state, jit_train_step, make_frozen, make_mesh
from pisa_jax.adapters import injection, registry
from pisa_jax.adapters.adapter_tree import Adapters, summary
from pisa_jax.adapters.files import load_adapters, save_adapters
from pisa_jax.config import AdapterSpec
from pisa_jax.metrics.validation import upscale_image
from pisa_jax.model import predict
from pisa_jax.train_step import Batch, draw

RATE = 0.3
NAMES = ["lora", "rslora", "tucker", "dora", "vera", "hira"]
LAYERS = {"dense": (nn.Dense(6), (4, 5, 8)), "conv": (nn.Conv(6, (3, 3), (2, 2), padding=1), (4, 7, 6, 8))}


def moved(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32), tree)


def run(layer, weights, tree, spec, x, keys=None):
    with nn.intercept_methods(
        injection.interceptor({"one": {"": tree}}, {"one": spec}, {"one": jnp.float32(0.7)}, keys)
    ):
        return layer.apply({"params": weights}, x)


def test_the_decompositions_with_dropout():
    known = [name for name, factory in registry.DECOMPOSITIONS.items() if factory(1.0).dropout]
    assert known == NAMES


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_adds_the_output_of_dw_for_the_dropped_input(name, kind):
    """y = W x + b + scale dW (m x / (1 - p)), with a mask m of its own for each sample; also in DoRA, as in PEFT."""
    layer, shape = LAYERS[kind]
    x = jax.random.normal(jax.random.key(0), shape)
    weights = moved(layer.init(jax.random.key(1), x)["params"])
    spec = AdapterSpec(name, rank=3, alpha=5.0, targets="", dropout=RATE)
    factors = registry.get_decomposition(spec).init(jax.random.key(2), weights["kernel"], 3)
    keys = jax.random.split(jax.random.key(3), len(x))
    factors = moved(factors)

    layer_keys = [jax.random.fold_in(key, zlib.crc32(b"one/")) for key in keys]
    kept = np.stack([jax.random.bernoulli(key, 1 - RATE, shape[1:]) for key in layer_keys])
    assert 0.6 < kept.mean() < 0.8
    delta = registry.get_decomposition(spec).delta(factors, weights["kernel"])
    difference = layer.apply({"params": {"kernel": delta, "bias": jnp.zeros(6)}}, x * kept / (1 - RATE))
    plain = layer.apply({"params": weights}, x)
    close(run(layer, weights, factors, spec, x, keys), plain + 0.7 * difference, 2e-5)
    without = dataclasses.replace(spec, dropout=0.0)
    np.testing.assert_array_equal(run(layer, weights, factors, spec, x), run(layer, weights, factors, without, x))
    np.testing.assert_array_equal(
        run(layer, weights, factors, without, x, keys), run(layer, weights, factors, without, x)
    )


def test_the_expectation_is_the_output_without_dropout():
    """Of one input under 20 000 keys: mean x dW, and variance p / (1 - p) sum_i (x_i dW_i)^2."""
    layer, count, spec = nn.Dense(3), 20_000, AdapterSpec(rank=2, targets="", dropout=RATE)
    x = jax.random.normal(jax.random.key(0), (1, 8))
    weights = moved(layer.init(jax.random.key(1), x)["params"])
    factors = moved(registry.get_decomposition(spec).init(jax.random.key(2), weights["kernel"], 2))
    keys = jax.random.split(jax.random.key(3), count)
    found = np.asarray(run(layer, weights, factors, spec, jnp.repeat(x, count, 0), keys), np.float64)
    expected = np.asarray(run(layer, weights, factors, spec, x), np.float64)[0]
    terms = 0.7 * np.asarray(x).T * (factors["a"] @ factors["b"]) * (spec.alpha / 2)
    variance = RATE / (1 - RATE) * np.sum(terms**2, axis=0)
    assert (np.abs(found.mean(0) - expected) < 4 * np.sqrt(variance / count)).all()
    np.testing.assert_allclose(found.var(0), variance, rtol=0.05)


def test_other_layers_adapters_and_samples_have_other_masks():
    keys, masks = jax.random.split(jax.random.key(0), 2), []
    layer, x = nn.Dense(8, use_bias=False), jnp.ones((2, 8))
    for name in ("one", "two"):
        spec, tree = AdapterSpec("hira", targets="", dropout=0.5), {"a": jnp.ones((8, 1)), "b": jnp.ones((1, 8)) / 8}
        with nn.intercept_methods(injection.interceptor({name: {"": tree}}, {name: spec}, {name: jnp.ones(())}, keys)):
            masks += [*layer.apply({"params": {"kernel": jnp.eye(8)}}, x)]
    assert len({tuple(np.asarray(mask).tolist()) for mask in masks}) == 4


def test_inputs_that_all_samples_share_have_one_mask():
    layer, keys = nn.Dense(8), jax.random.split(jax.random.key(0), 4)
    weights, spec = layer.init(jax.random.key(1), jnp.ones((1, 8)))["params"], AdapterSpec(dropout=0.5)
    factors = moved(registry.get_decomposition(spec).init(jax.random.key(2), weights["kernel"], 2))
    shared = run(layer, weights, factors, spec, jnp.ones((1, 8)), keys)
    np.testing.assert_array_equal(shared, run(layer, weights, factors, spec, jnp.ones((1, 8)), keys[:1]))


@functools.cache
def trained(dropout=RATE, data=1, fsdp=1, seed=3, **options):
    """The adapter of the toy model after two steps, by plain gradient descent."""
    model, mesh = toy_model(), make_mesh(data, fsdp)
    spec = AdapterSpec(rank=3, targets="conv", dropout=dropout)
    optimizer, frozen = optax.sgd(0.1), make_frozen(model, mesh)
    tree = jax.tree.map(jnp.array, moved(init_adapter(jax.random.key(1), model.params["unet"], spec)))
    step = jit_train_step(model.base, Objective(spec, **options), optimizer, frozen, mesh)
    images = jnp.tanh(jax.random.normal(jax.random.key(2), (4, 16, 16, 3))) / 2
    batch = Batch(images, images[::-1], jnp.zeros((4, 1), jnp.int32), jnp.zeros(4, bool))
    state = init_state(tree, optimizer, ema=False)
    for _ in range(2):
        state, _ = step(frozen, state, batch, jax.random.key(seed))
    return jax.device_get(state.adapter)


@pytest.mark.parametrize("options", [{"accumulate": 2}, {"remat": True}, {"data": 2}, {"fsdp": 2}], ids=str)
def test_accumulation_rematerialization_and_sharding_keep_the_masks(options):
    jax.tree.map(lambda found, expected: close(found, expected, 1e-6), trained(**options), trained())


def test_the_masks_follow_the_key_of_the_run():
    def change(one, other):
        return max(jax.tree.leaves(jax.tree.map(lambda a, b: float(np.abs(a - b).max()), one, other)))

    again = trained.__wrapped__()
    jax.tree.map(np.testing.assert_array_equal, again, trained())
    assert change(trained(), trained(seed=4)) > 1e-3
    assert change(trained(), trained(dropout=0.0)) > 1e-3


def test_the_other_random_numbers_of_a_step_do_not_change():
    base, key = toy_model().base, jax.random.key(0)
    without, found = (draw(key, base, (20, 499), (2, 8, 8, 3), dropout=dropout) for dropout in (False, True))
    assert without.dropout is None
    assert found.dropout.shape == (2,)
    jax.tree.map(np.testing.assert_array_equal, found[:3], without[:3])


def test_validation_and_inference_have_no_dropout():
    model, image = toy_model(), jnp.full((1, 8, 8, 3), 0.3)
    spec = AdapterSpec(rank=3, targets="conv", dropout=0.9)
    unet, without = jax.tree.map(jnp.asarray, model.params["unet"]), dataclasses.replace(spec, dropout=0.0)
    tree, prompt = moved(init_adapter(jax.random.key(1), unet, spec)), jnp.zeros((1, 1, 3))

    def upscaled(spec):
        return upscale_image(unet, {}, tree, prompt, (), image, base=model.base, spec=spec)

    np.testing.assert_array_equal(upscaled(spec), upscaled(without))
    latents = jax.random.normal(jax.random.key(0), (1, 4, 4, 12))
    one, other = (predict(model.base, unet, tree, each, latents, prompt) for each in (spec, without))
    np.testing.assert_array_equal(one, other)
    dropped = predict(
        model.base, unet, tree, spec, latents, prompt, dropout_keys=jax.random.split(jax.random.key(0), 1)
    )
    assert float(jnp.abs(dropped - one).max()) > 0.01


@pytest.mark.parametrize("name", ["pissa", "olora", "loha", "lokr", "oft", "hra", "full"])
def test_decompositions_without_dropout_are_refused(name):
    params = toy_model().params["unet"]
    spec = AdapterSpec(name, rank=2, targets="conv", dropout=0.1)
    with pytest.raises(ValueError, match=rf"'{name}' has no dropout, and dropout is 0\.1; set it to 0 \(.*: lora, rs"):
        injection.check_spec(params, spec)
    injection.check_spec(params, dataclasses.replace(spec, dropout=0.0))


@pytest.mark.parametrize("rate", [1.0, -0.1, float("nan")])
def test_rates_that_are_none(rate):
    with pytest.raises(ValueError, match=r"dropout is .*; it must be a finite number of at least 0 and less than 1"):
        AdapterSpec(dropout=rate)


def test_files_record_dropout(tmp_path):
    spec = AdapterSpec(rank=2, dropout=0.25)
    save_adapters(tmp_path / "x", Adapters({"pix": {}}, {"pix": spec}))
    loaded = load_adapters(tmp_path / "x")
    assert loaded.specs == {"pix": spec}
    assert "alpha 8, dropout 0.25, 0 layers" in summary(loaded)
