"""Properties of every decomposition.

Factors are not zero, alpha / r and the scales are not 1, ranks are odd where the method allows it, and images are
larger than the window.
"""

import dataclasses
import functools

import closed_forms
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import close

from pisa_jax.adapters import fit, injection, registry
from pisa_jax.adapters.adapter_tree import Adapters
from pisa_jax.adapters.files import load_adapters, save_adapters
from pisa_jax.config import AdapterSpec
from pisa_jax.runtime.trees import flatten

SPECS = [AdapterSpec(name, rank=4 if name == "hra" else 3, alpha=5.0) for name in registry.DECOMPOSITIONS]
SPECS += [
    AdapterSpec("lokr", rank=1, alpha=5.0),
    AdapterSpec("lokr", rank=1, alpha=5.0, options=(("factor", 2),)),
    AdapterSpec("lora", rank=3, alpha=5.0, rank_by_target=(("conv", 2),)),
]


def label(spec):
    extra = [f"{key}={value}" for key, value in (*spec.options, *spec.rank_by_target)]
    return "-".join([spec.decomposition, str(spec.rank), *extra])


@pytest.fixture(params=SPECS, ids=label)
def spec(request):
    return request.param


class Net(nn.Module):
    """A network with one layer of each kind of a UNet: plain and strided 3x3, 1x1, linear; some have equal shapes."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (3, 3), padding=((1, 1), (1, 1)), dtype=x.dtype, name="conv1")(x)
        x = nn.Conv(12, (3, 3), (2, 2), padding=((1, 1), (1, 1)), dtype=x.dtype, name="conv2")(jnp.tanh(x))
        x = nn.Conv(12, (3, 3), padding=((1, 1), (1, 1)), dtype=x.dtype, name="conv3")(jnp.tanh(x))
        x = nn.Conv(8, (1, 1), dtype=x.dtype, name="conv_shortcut")(jnp.tanh(x))
        x = nn.GroupNorm(4, name="norm")(x).astype(x.dtype)
        return nn.Dense(6, dtype=x.dtype, name="to_q")(nn.Dense(8, dtype=x.dtype, name="to_k")(jnp.tanh(x)))


X = np.random.default_rng(1).normal(size=(2, 9, 7, 8)).astype(np.float32)
NAMES = ["conv1", "conv2", "conv3", "conv_shortcut", "to_k", "to_q"]


@functools.cache
def params():
    given = Net().init(jax.random.key(0), X)["params"]
    return jax.tree.map(lambda leaf: leaf + 0.1 if leaf.ndim == 1 else leaf, given)


@functools.cache
def trained(spec):
    """Two adapters whose factors are not those of the start."""

    def moved(seed):
        tree = injection.init_adapter(jax.random.key(seed), params(), spec)
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), tree)

    return {"one": moved(2), "two": moved(3)}


def both(spec):
    return dict.fromkeys(("one", "two"), spec)


@functools.partial(jax.jit, static_argnums=2)
def run(weights, adapters, specs, scales, x=X):
    with nn.intercept_methods(injection.interceptor(adapters, dict(specs), scales)):
        return Net().apply({"params": weights}, x)


def adapted(adapters, specs, scales, x=X, weights=None):
    return run(params() if weights is None else weights, adapters, tuple(specs.items()), scales, x)


def plain(x=X, weights=None):
    return adapted({}, {}, {}, x, weights)


def kernel(name, weights=None):
    return (params() if weights is None else weights)[name]["kernel"]


def test_the_closed_forms_are_those_of_the_table():
    assert set(closed_forms.WEIGHTS) == set(registry.DECOMPOSITIONS)


def test_identity_at_init(spec):
    tree = injection.init_adapter(jax.random.key(0), params(), spec)
    assert sorted(tree) == NAMES
    functions = registry.get_decomposition(spec)
    for name in NAMES:
        for delta in (functions.delta, jax.jit(functions.delta)):
            change, largest = jnp.abs(delta(tree[name], kernel(name))).max(), jnp.abs(kernel(name)).max()
            assert change <= (0 if functions.needs_kernel == "never" else 1e-6 * largest), name
    out = adapted({"one": tree}, {"one": spec}, {"one": jnp.float32(0.7)})
    close(out, plain(), 0 if functions.needs_kernel == "never" else 1e-5)


def test_the_weights_are_those_of_the_formula(spec):
    merged = injection.merge(params(), {"one": trained(spec)["one"]}, {"one": spec}, {"one": 1.0})
    for name in NAMES:
        factors = jax.tree.map(np.float64, trained(spec)["one"][name])
        expected = closed_forms.WEIGHTS[spec.decomposition](factors, np.float64(kernel(name)), spec.alpha)
        assert np.abs(expected - kernel(name)).max() > 0.01
        np.testing.assert_allclose(kernel(name, merged), expected, rtol=0, atol=3e-6 * np.abs(expected).max())


def test_merge_and_interceptor_agree(spec):
    scales = {"one": jnp.float32(0.7), "two": jnp.float32(-1.3)}
    merged = injection.merge(params(), trained(spec), both(spec), scales)
    expected = plain(weights=merged)
    assert jnp.abs(expected - plain()).max() > 0.1
    close(adapted(trained(spec), both(spec), scales), expected, 2e-5 * float(jnp.abs(expected).max()))


def test_adapters_of_one_call_receive_the_given_kernel(spec):
    scales = {"one": 0.7, "two": -1.3}
    merged = injection.merge(params(), trained(spec), both(spec), scales)
    for name in NAMES:
        deltas = {
            key: injection.merge(params(), {key: tree}, {key: spec}, {key: 1.0})[name]["kernel"] - kernel(name)
            for key, tree in trained(spec).items()
        }
        expected = kernel(name) + sum(scales[key] * delta for key, delta in deltas.items())
        close(kernel(name, merged), expected, 1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize("spec", [s for s in SPECS if registry.get_decomposition(s).apply], ids=label)
@pytest.mark.parametrize("name", NAMES)
def test_the_cheap_path_equals_the_weight_difference(name, spec):
    functions = registry.get_decomposition(spec)
    through_delta = functions._replace(apply=None)
    x = jnp.asarray(X if name == "conv1" else np.random.default_rng(0).normal(size=(2, 9, 7, kernel(name).shape[-2])))
    layer = {"conv2": nn.Conv(12, (3, 3), (2, 2), padding=((1, 1), (1, 1)), parent=None)}.get(
        name, nn.Dense(kernel(name).shape[-1]) if name.startswith("to") else nn.Conv(*reversed_shape(name))
    )
    call = injection._layer_call(layer.bind({"params": params()[name]}), x, layer.apply({"params": params()[name]}, x))
    factors = trained(spec)["one"][name]
    found, expected = (
        jax.jit(lambda x, f=each: injection._difference(f, factors, call._replace(x=x), False))(x)
        for each in (functions, through_delta)
    )
    close(found, expected, 2e-5 * float(jnp.abs(expected).max()))


def reversed_shape(name):
    *window, _, c_out = kernel(name).shape
    return c_out, tuple(window)


def test_scale_0_is_the_base_model_exactly(spec):
    zero = {"one": jnp.float32(0), "two": jnp.float32(0)}
    assert jnp.array_equal(adapted(trained(spec), both(spec), zero), plain())
    merged = injection.merge(params(), trained(spec), both(spec), {"one": 0.0, "two": 0.0})
    assert all(jnp.array_equal(kernel(name, merged), kernel(name)) for name in NAMES)


def test_every_layer_is_affine_in_the_scale(spec):
    tree, specs = {"one": trained(spec)["one"]}, {"one": spec}
    half, one, two = (injection.merge(params(), tree, specs, {"one": scale}) for scale in (0.5, 1.0, 2.0))
    for name in NAMES:
        change = kernel(name, one) - kernel(name)
        close(kernel(name, half), kernel(name) + 0.5 * change, 2e-6 * float(1 + jnp.abs(change).max()))
        close(kernel(name, two), kernel(name) + 2 * change, 4e-6 * float(1 + jnp.abs(change).max()))


def test_scales_per_sample(spec):
    found = adapted(trained(spec), both(spec), {"one": jnp.array([0.0, 1.3]), "two": jnp.array([0.0, 0.4])})
    close(found[:1], plain()[:1], 1e-6)
    expected = adapted(trained(spec), both(spec), {"one": jnp.float32(1.3), "two": jnp.float32(0.4)})
    close(found[1:], expected[1:], 1e-5 * float(1 + jnp.abs(expected).max()))


def test_the_gradient_reaches_every_factor_within_two_steps(spec):
    functions = registry.get_decomposition(spec)
    target = plain() + np.random.default_rng(5).normal(size=plain().shape)
    tree = injection.init_adapter(jax.random.key(0), params(), spec)

    @jax.jit
    @jax.grad
    def gradient(tree):
        with nn.intercept_methods(injection.interceptor({"": tree}, {"": spec}, {"": jnp.ones(())})):
            return jnp.mean((Net().apply({"params": params()}, X) - target) ** 2)

    first = gradient(tree)
    second = gradient(jax.tree.map(lambda leaf, grad: leaf - 0.1 * grad, tree, first))
    for path, grad in flatten(second).items():
        assert jnp.isfinite(grad).all(), path
        if path.split("/")[-1] not in functions.constants:
            assert jnp.abs(grad).max() > 0, path


def test_merging_with_negated_scales_restores_the_weights(spec):
    if registry.get_decomposition(spec).needs_kernel == "delta":
        return  # dW of the merged kernel is another one
    there = injection.merge(params(), trained(spec), both(spec), {"one": 0.7, "two": 0.4})
    back = flatten(injection.merge(there, trained(spec), both(spec), {"one": -0.7, "two": -0.4}))
    for path, leaf in flatten(params()).items():
        np.testing.assert_allclose(back[path], leaf, atol=1e-5)
        assert path.startswith("norm") or path.endswith("bias") or not jnp.array_equal(flatten(there)[path], leaf)


def test_new_scales_do_not_retrace_and_the_dtype_is_kept(spec):
    traces = []

    @jax.jit
    def run(x, scales):
        traces.append(1)
        with nn.intercept_methods(injection.interceptor(trained(spec), both(spec), scales)):
            return Net().apply({"params": params()}, x)

    run(X, {"one": 0.3, "two": 1.0})
    run(X, {"one": 1.7, "two": -1.0})
    assert len(traces) == 1
    assert jax.eval_shape(run, X.astype(jnp.bfloat16), {"one": 0.3, "two": 1.0}).dtype == jnp.bfloat16


def test_layers_of_equal_shape_get_different_factors(spec):
    tree = injection.init_adapter(jax.random.key(0), params(), spec)
    for factor, value in tree["conv2"].items():
        assert value.shape == tree["conv3"][factor].shape
        constant = bool(jnp.all(value == value.ravel()[0]))
        assert constant or not jnp.array_equal(value, tree["conv3"][factor]), factor


def test_the_factors_of_a_layer_do_not_depend_on_other_targets(spec):
    few = dataclasses.replace(spec, targets="to_q", rank_by_target=())
    a, b = (injection.init_adapter(jax.random.key(0), params(), s)["to_q"] for s in (spec, few))
    assert all(jnp.array_equal(a[name], b[name]) for name in a)


def test_weights_in_bfloat16(spec):
    """W' is within the rounding of W' of the same kernel in float32, and the start is the base model."""
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params())
    high = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), low)
    tree, specs = {"one": trained(spec)["one"]}, {"one": spec}
    found, expected = (injection.merge(weights, tree, specs, {"one": 0.7}) for weights in (low, high))
    start = injection.init_adapter(jax.random.key(0), low, spec)
    unchanged = injection.merge(low, {"one": start}, specs, {"one": 1.0})
    for name in NAMES:
        assert kernel(name, found).dtype == jnp.bfloat16
        np.testing.assert_array_equal(kernel(name, found), kernel(name, expected).astype(jnp.bfloat16))
        np.testing.assert_allclose(
            np.float32(kernel(name, unchanged)), np.float32(kernel(name, low)), atol=1e-6, rtol=2**-7
        )
    out = adapted(tree, specs, {"one": jnp.float32(0.7)}, X.astype(jnp.bfloat16), low)
    assert out.dtype == jnp.bfloat16
    close(np.float32(out), plain(weights=expected), 0.15 * float(jnp.abs(plain(weights=expected)).max()))


def test_saved_adapters_give_the_same_weights(spec, tmp_path):
    save_adapters(tmp_path / "x", Adapters(jax.device_get(trained(spec)), both(spec), None))
    found = load_adapters(tmp_path / "x")
    assert found.specs == both(spec)
    scales = {"one": 0.7, "two": 0.2}
    expected, loaded = (
        injection.merge(params(), trees, specs, scales)
        for trees, specs in ((trained(spec), both(spec)), (found.trees, found.specs))
    )
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def test_only_the_adapted_kernels_are_donated(spec):
    scales = {"one": 0.7, "two": 0.4}
    given = jax.tree.map(jnp.copy, params())
    donated = injection.merge(given, trained(spec), both(spec), scales, donate=True)
    jax.tree.map(np.testing.assert_array_equal, donated, injection.merge(params(), trained(spec), both(spec), scales))
    deleted = {path for path, leaf in flatten(given).items() if leaf.is_deleted()}
    assert deleted == {f"{name}/kernel" for name in NAMES}


def test_an_output_without_weights_stays_finite(spec):
    weights = jax.tree.map(lambda leaf: leaf.at[..., 0].set(0) if leaf.ndim > 1 else leaf, params())
    tree = injection.init_adapter(jax.random.key(0), weights, spec)

    @jax.value_and_grad
    def loss(tree):
        return jnp.sum(injection.merge(weights, {"": tree}, {"": spec}, {"": 1.0})["conv2"]["kernel"] ** 2)

    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.jit(loss)(tree)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_dtype_of_a_layer_is_kept_for_inputs_of_another_dtype(spec, dtype):
    """A UNet in bfloat16 receives a prompt in float32."""
    weights = {"to_q": params()["to_q"]}
    tree = {"": trained(spec)["one"]["to_q"]}
    with nn.intercept_methods(injection.interceptor({"a": tree}, {"a": spec}, {"a": jnp.ones(())})):
        y = nn.Dense(6, dtype=dtype).apply({"params": weights["to_q"]}, jnp.ones((2, 8)))
    assert y.dtype == dtype


# Trainable and constant parameters of the 258 layers of Stable Diffusion 2.1 (192 linear ones for vera) at rank 4.
COUNTS = {
    "lora": (4_055_712, 0),
    "rslora": (4_055_712, 0),
    "pissa": (4_055_712, 4_055_712),
    "olora": (4_055_712, 4_055_712),
    "tucker": (2_281_312, 0),
    "dora": (4_351_396, 0),
    "loha": (8_111_424, 0),
    "lokr": (325_152, 0),
    "hra": (2_872_976, 0),
    "hira": (4_055_712, 0),
    "full": (837_614_080, 0),
}


@functools.cache
def sd21_kernels():
    from pisa_jax.sd import backbone, random_model

    shapes = backbone.param_shapes(backbone.build_modules(*random_model.model_configs("sd21")))["unet"]
    return injection.target_shapes(shapes, AdapterSpec().targets)


@pytest.mark.parametrize("name", COUNTS)
def test_the_number_of_parameters(name):
    spec = AdapterSpec(name, rank=4)
    constants = registry.get_decomposition(spec).constants
    found = [0, 0]
    for shapes in fit.expected_factors(spec, sd21_kernels()).values():
        for factor, shape in shapes.items():
            found[factor in constants] += shape.size
    assert tuple(found) == COUNTS[name]
