"""Properties of every decomposition, with non-zero factors and scales other than 1; parity of adapted UNets."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import golden
from tiny import close, nhwc, random_backbone, read_json, recorded_adapters, recorded_backbone, recorded_model

from pisa_jax.adapters import injection, registry
from pisa_jax.config import AdapterSpec
from pisa_jax.runtime.trees import flatten
from pisa_jax.sd import backbone, random_model


@pytest.fixture(params=sorted(registry.DECOMPOSITIONS))
def spec(request):
    return AdapterSpec(decomposition=request.param, rank=3, alpha=5.0)


class Net(nn.Module):
    """A network with one layer of each kind of a UNet: plain and strided 3x3, 1x1, linear; two have equal shapes."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(8, (3, 3), padding=((1, 1), (1, 1)), dtype=x.dtype, name="conv1")(x)
        x = nn.Conv(8, (3, 3), (2, 2), padding=((1, 1), (1, 1)), dtype=x.dtype, name="conv2")(jnp.tanh(x))
        x = nn.Conv(8, (1, 1), dtype=x.dtype, name="conv_shortcut")(jnp.tanh(x))
        x = nn.GroupNorm(4, name="norm")(x).astype(x.dtype)
        return nn.Dense(8, dtype=x.dtype, name="to_q")(nn.Dense(8, dtype=x.dtype, name="to_k")(jnp.tanh(x)))


@pytest.fixture
def net(spec):
    x = jax.random.normal(jax.random.key(1), (2, 6, 5, 8))
    params = Net().init(jax.random.key(0), x)["params"]
    trained = {}
    for index, name in enumerate(("one", "two")):
        tree = injection.init_adapter(jax.random.key(2 + index), params, spec)
        leaves, structure = jax.tree.flatten(tree)
        keys = jax.random.split(jax.random.key(9 + index), len(leaves))
        moved = [leaf + 0.3 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
        trained[name] = jax.tree.unflatten(structure, moved)
    return x, params, trained, dict.fromkeys(trained, spec)


def adapted(x, params, adapters, specs, scales):
    with nn.intercept_methods(injection.interceptor(adapters, specs, scales)):
        return Net().apply({"params": params}, x)


def test_identity_at_init(net, spec):
    x, params, *_ = net
    tree = injection.init_adapter(jax.random.key(0), params, spec)
    assert sorted(tree) == ["conv1", "conv2", "conv_shortcut", "to_k", "to_q"]
    plain = Net().apply({"params": params}, x)
    assert jnp.array_equal(adapted(x, params, {"one": tree}, {"one": spec}, {"one": jnp.float32(0.7)}), plain)


def test_layers_of_equal_shape_get_different_factors(net, spec):
    tree = injection.init_adapter(jax.random.key(0), net[1], spec)
    first = sorted(tree["to_q"])[0]
    assert tree["to_q"][first].shape == tree["to_k"][first].shape
    assert not jnp.array_equal(tree["to_q"][first], tree["to_k"][first])


def test_the_factors_of_a_layer_do_not_depend_on_other_targets(net, spec):
    few = AdapterSpec(spec.decomposition, spec.rank, spec.alpha, targets="to_q")
    a, b = (injection.init_adapter(jax.random.key(0), net[1], s)["to_q"] for s in (spec, few))
    assert all(jnp.array_equal(a[name], b[name]) for name in a)


def test_merge_and_interceptor_agree(net):
    x, params, adapters, specs = net
    scales = {"one": jnp.float32(0.7), "two": jnp.float32(-1.3)}
    plain = Net().apply({"params": params}, x)
    merged = Net().apply({"params": injection.merge(params, adapters, specs, scales)}, x)
    assert jnp.abs(merged - plain).max() > 0.1
    close(adapted(x, params, adapters, specs, scales), merged, 2e-5)


def test_the_dtype_of_a_layer_is_kept_for_inputs_of_another_dtype(net, spec):
    """A UNet in bfloat16 receives a prompt in float32."""
    kernel, x = jnp.ones((6, 5)), jnp.ones((2, 6), jnp.float32)
    tree = {
        "": jax.tree.map(jnp.ones_like, registry.get_decomposition(spec).init(jax.random.key(0), (6, 5), spec.rank))
    }
    with nn.intercept_methods(injection.interceptor({"a": tree}, {"a": spec}, {"a": jnp.ones(())})):
        y = nn.Dense(5, use_bias=False, dtype=jnp.bfloat16).apply({"params": {"kernel": kernel}}, x)
    assert y.dtype == jnp.bfloat16
    assert float(y[0, 0]) > 6.0


def test_only_the_adapted_kernels_are_donated(net):
    _, params, adapters, specs = net
    scales = {"one": 0.7, "two": 0.4}
    given = jax.tree.map(jnp.copy, params)
    donated, kept = (
        injection.merge(given, adapters, specs, scales, donate=True),
        injection.merge(params, adapters, specs, scales),
    )
    jax.tree.map(np.testing.assert_array_equal, donated, kept)
    adapted = {f"{path}/kernel" for tree in adapters.values() for path in tree}
    assert {path for path, leaf in flatten(given).items() if leaf.is_deleted()} == adapted


def test_merging_with_negated_scales_restores_the_weights(net):
    _, params, adapters, specs = net
    there = injection.merge(params, adapters, specs, {"one": 0.7, "two": 0.4})
    back = flatten(injection.merge(there, adapters, specs, {"one": -0.7, "two": -0.4}))
    for path, leaf in flatten(params).items():
        np.testing.assert_allclose(back[path], leaf, atol=1e-6)
        assert path.startswith("norm") or path.endswith("bias") or not jnp.array_equal(flatten(there)[path], leaf)


def test_scales_per_sample(net):
    x, params, adapters, specs = net
    both = adapted(x, params, adapters, specs, {"one": jnp.array([0.0, 1.3]), "two": jnp.array([0.0, 0.4])})
    close(both[:1], Net().apply({"params": params}, x)[:1], 1e-6)
    close(both[1:], adapted(x, params, adapters, specs, {"one": jnp.float32(1.3), "two": jnp.float32(0.4)})[1:], 1e-5)


def test_the_difference_is_linear_in_the_scale(net, spec):
    functions = registry.get_decomposition(spec)
    factors = net[2]["one"]["conv1"]
    x = net[0]
    difference = injection.merge(net[1], {"one": {"conv1": factors}}, {"one": spec}, {"one": 2.0})["conv1"]["kernel"]
    close(difference, net[1]["conv1"]["kernel"] + 2 * functions.delta(factors), 1e-6)
    layer = nn.Conv(8, (3, 3), padding=((1, 1), (1, 1)), use_bias=False)
    if functions.apply:
        direct = layer.apply({"params": {"kernel": functions.delta(factors)}}, x)

        def linear(x, kernel):
            return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

        close(functions.apply(factors, x, linear), direct, 1e-5)


def test_new_scales_do_not_retrace_and_the_dtype_is_kept(net):
    x, params, adapters, specs = net
    traces = []

    @jax.jit
    def run(x, scales):
        traces.append(1)
        return adapted(x, params, adapters, specs, scales)

    run(x, {"one": 0.3, "two": 1.0})
    run(x, {"one": 1.7, "two": -1.0})
    assert len(traces) == 1
    assert run(x.astype(jnp.bfloat16), {"one": 0.3, "two": 1.0}).dtype == jnp.bfloat16


def test_an_unknown_decomposition_is_reported_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'lorra', known: lora, loha; did you mean 'lora'\?"):
        registry.get_decomposition(AdapterSpec(decomposition="lorra"))


def test_targets_of_sd21_equal_those_of_the_published_adapters():
    golden_lists = read_json(golden("sd21_lora_modules.json"))

    shapes = backbone.param_shapes(backbone.build_modules(*random_model.model_configs("sd21")))["unet"]
    found = injection.target_shapes(shapes, AdapterSpec().targets)
    assert len(found) == golden_lists["counts"]["total"] == 258
    kinds = [sum(1 for shape in found.values() if test(shape)) for test in (
        lambda s: len(s) == 2, lambda s: s[:2] == (3, 3), lambda s: s[:2] == (1, 1))]  # fmt: skip
    assert kinds == [192, 52, 14]
    tree = jax.eval_shape(lambda: injection.init_adapter(jax.random.key(0), shapes, AdapterSpec(rank=4)))
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == golden_lists["lora_params_rank4"] == 4_055_712
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == golden_lists["unet_params"]


@functools.partial(jax.jit, static_argnums=0)
def eps(modules, params, trees, x, timestep, prompt):
    """Run the UNet with some of the recorded adapters as additive paths."""
    scales = dict.fromkeys(trees, jnp.ones(()))
    with nn.intercept_methods(injection.interceptor(trees, recorded_adapters().specs, scales)):
        return backbone.predict_noise(modules, params, x, timestep, prompt)


@pytest.mark.parametrize("timestep", [1, 500])
@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("names", [("pix",), ("pix", "sem")], ids="+".join)
def test_unet_with_adapters_equals_the_original(names, index, timestep):
    model, adapters = recorded_model(), recorded_adapters()
    arrays = np.load(golden("comp/unet.npz"))
    x, prompt = nhwc(arrays[f"x{index}"]), jnp.asarray(arrays[f"emb{index}"])
    expected = nhwc(arrays[f"{''.join(names)}{index}_t{timestep}"])
    trees = {name: adapters.trees[name] for name in names}
    scales = dict.fromkeys(names, jnp.ones(()))
    merged = injection.merge(model.params["unet"], trees, adapters.specs, scales)
    close(eps(recorded_backbone(), merged, {}, x, timestep, prompt), expected)
    close(eps(recorded_backbone(), model.params["unet"], trees, x, timestep, prompt), expected)


def test_unet_targets_exclude_the_time_embedding():
    _, params = random_backbone()
    found = injection.target_shapes(params["unet"], AdapterSpec().targets)
    assert not [path for path in found if "time" in path or "norm" in path]
    assert "conv_in" in found
