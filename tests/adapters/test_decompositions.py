"""Properties of every decomposition.

Factors are not zero, alpha / r and the scales are not 1, ranks are odd where the method allows it, and images are
larger than the window.
"""

import dataclasses
import functools
import sys

import closed_forms
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from tiny import close

from pisa_jax.adapters import fit, injection, registry
from pisa_jax.adapters.adapter_tree import Adapters
from pisa_jax.adapters.files import load_adapters, save_adapters
from pisa_jax.config import AdapterSpec
from pisa_jax.runtime.trees import flatten

# The worked example of docs/decompositions.md.
EXAMPLE = "output_gain:output_gain"
sys.path.append(str(ROOT / "examples"))
registry.import_decomposition(EXAMPLE)

NAMES_OF_ALL = [*registry.DECOMPOSITIONS, EXAMPLE]
SPECS = [AdapterSpec(name, rank=4 if name == "hra" else 3, alpha=5.0) for name in NAMES_OF_ALL]
SPECS += [
    AdapterSpec("lokr", rank=1, alpha=5.0),
    AdapterSpec("lokr", rank=1, alpha=5.0, options=(("factor", 2),)),
    AdapterSpec("lora", rank=3, alpha=5.0, rank_by_target=(("conv", 2),)),
]
# They share their functions with others: most properties of these are tested with -m slow only.
VARIANTS = [
    spec for spec in SPECS if spec.decomposition in ("rslora", "olora") or spec.rank == 1 or spec.rank_by_target
]


def label(spec):
    extra = [f"{key}={value}" for key, value in (*spec.options, *spec.rank_by_target)]
    return "-".join([spec.decomposition, str(spec.rank), *extra])


every_spec = pytest.mark.parametrize("spec", SPECS, ids=label)


@pytest.fixture(
    params=[pytest.param(spec, marks=[pytest.mark.slow] * (spec in VARIANTS), id=label(spec)) for spec in SPECS]
)
def spec(request):
    return request.param


class Net(nn.Module):
    """A network with one layer of each kind of a UNet: strided 3x3, 1x1 and linear ones, two of them of equal shape."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (3, 3), (2, 2), padding=((1, 1), (1, 1)), dtype=x.dtype, name="conv1")(x)
        x = nn.Conv(6, (1, 1), dtype=x.dtype, name="conv_shortcut")(jnp.tanh(x))
        x = nn.GroupNorm(3, name="norm")(x).astype(x.dtype)
        x = nn.Dense(6, dtype=x.dtype, name="to_q")(nn.Dense(6, dtype=x.dtype, name="to_k")(jnp.tanh(x)))
        return nn.Dense(10, dtype=x.dtype, name="proj_out")(jnp.tanh(x))


X = np.random.default_rng(1).normal(size=(2, 9, 7, 8)).astype(np.float32)
NAMES = ["conv1", "conv_shortcut", "proj_out", "to_k", "to_q"]


@functools.cache
def params():
    given = jax.jit(Net().init)(jax.random.key(0), X)["params"]
    return jax.tree.map(lambda leaf: np.asarray(leaf) + np.float32(0.1) * (leaf.ndim == 1), given)


@functools.cache
def start(spec):
    """A new adapter."""
    make = jax.jit(lambda key, params: injection.init_adapter(key, params, spec))
    return jax.device_get(make(jax.random.key(2), params()))


@functools.cache
def trained(spec):
    """Two adapters whose factors are not those of the start."""

    def moved(seed):
        rng = np.random.default_rng(seed)
        return jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), start(spec))

    return {"one": moved(2), "two": moved(3)}


def both(spec):
    return dict.fromkeys(("one", "two"), spec)


@functools.partial(jax.jit, static_argnums=2)
def run(weights, adapters, specs, scales, x):
    with nn.intercept_methods(injection.interceptor(adapters, dict(specs), scales)):
        return Net().apply({"params": weights}, x)


def adapted(adapters, specs, scales, x=X, weights=None):
    scales = {name: np.float32(scale) for name, scale in scales.items()}
    return np.asarray(run(params() if weights is None else weights, adapters, tuple(specs.items()), scales, x))


def plain(x=X, weights=None):
    return adapted({}, {}, {}, x, weights)


@functools.partial(jax.jit, static_argnums=2)
def run_merge(weights, adapters, specs, scales):
    return injection.merge(weights, adapters, dict(specs), scales)


def merged(adapters, specs, scales, weights=None):
    scales = {name: np.float32(scale) for name, scale in scales.items()}
    weights = params() if weights is None else weights
    return jax.device_get(run_merge(weights, adapters, tuple(specs.items()), scales))


def one(spec, scale, weights=None):
    """Merge the first of the two adapters."""
    return merged({"one": trained(spec)["one"]}, {"one": spec}, {"one": scale}, weights)


def kernel(name, weights=None):
    return (params() if weights is None else weights)[name]["kernel"]


def largest(array):
    return float(np.abs(array).max())


def test_the_closed_forms_are_those_of_the_table():
    assert set(closed_forms.WEIGHTS) == set(NAMES_OF_ALL)


@every_spec
def test_identity_at_init(spec):
    """Jitted, and for one convolution and one linear layer also without jit."""
    tree, exact = {"one": start(spec)}, registry.get_decomposition(spec).needs_kernel == "never"
    assert sorted(tree["one"]) == NAMES
    weights = merged(tree, {"one": spec}, {"one": 0.7})
    for name in NAMES:
        close(kernel(name, weights), kernel(name), 0 if exact else 1e-6 * largest(kernel(name)))
    for name in ("conv1", "to_q"):
        close(eagerly_merged(spec, name), kernel(name), 0 if exact else 1e-6 * largest(kernel(name)))
    close(adapted(tree, {"one": spec}, {"one": 0.7}), plain(), 0 if exact else 1e-5)


def eagerly_merged(spec, name):
    with jax.disable_jit():
        return kernel(name) + registry.get_decomposition(spec).delta(start(spec)[name], jnp.asarray(kernel(name)))


@every_spec
def test_the_weights_are_those_of_the_formula(spec):
    weights = one(spec, 1)
    for name in NAMES:
        factors = jax.tree.map(np.float64, trained(spec)["one"][name])
        expected = closed_forms.WEIGHTS[spec.decomposition](factors, np.float64(kernel(name)), spec.alpha)
        assert largest(expected - kernel(name)) > 0.01
        close(kernel(name, weights), expected, 3e-6 * largest(expected))


def test_merge_and_interceptor_agree(spec):
    """With a low-rank path, the interceptor does not compute dW; merging always does."""
    scales = {"one": 0.7, "two": -1.3}
    expected = plain(weights=merged(trained(spec), both(spec), scales))
    assert largest(expected - plain()) > 0.1
    close(adapted(trained(spec), both(spec), scales), expected, 2e-5 * largest(expected))


def test_adapters_of_one_call_receive_the_given_kernel(spec):
    found = merged(trained(spec), both(spec), {"one": 0.7, "two": -1.3})
    second = merged({"one": trained(spec)["two"]}, {"one": spec}, {"one": 1})
    for name in NAMES:
        first, other = kernel(name, one(spec, 1)) - kernel(name), kernel(name, second) - kernel(name)
        expected = kernel(name) + 0.7 * first - 1.3 * other
        close(kernel(name, found), expected, 1e-5 * largest(expected))


def test_scale_0_is_the_base_model_exactly(spec):
    zero = {"one": 0, "two": 0}
    np.testing.assert_array_equal(adapted(trained(spec), both(spec), zero), plain())
    found = merged(trained(spec), both(spec), zero)
    jax.tree.map(np.testing.assert_array_equal, found, params())


def test_every_layer_is_affine_in_the_scale(spec):
    half, whole, double = (one(spec, scale) for scale in (0.5, 1, 2))
    for name in NAMES:
        change = kernel(name, whole) - kernel(name)
        close(kernel(name, half), kernel(name) + 0.5 * change, 2e-6 * (1 + largest(change)))
        close(kernel(name, double), kernel(name) + 2 * change, 4e-6 * (1 + largest(change)))


@pytest.mark.parametrize("name", ["conv1", "to_q"])
def test_the_output_of_a_layer_is_affine_in_the_scale(spec, name):
    """Without merging, with one scale for each sample of a batch of equal samples."""
    scales, layer = jnp.array([0, 0.5, 1, -2]), jax.tree.map(jnp.asarray, params()[name])
    module = nn.Conv(12, (3, 3), (2, 2), padding=((1, 1), (1, 1))) if name == "conv1" else nn.Dense(6)
    x = jnp.repeat(X[:1] if name == "conv1" else X[:1, ..., :6], len(scales), axis=0)

    @jax.jit
    def outputs(factors, scales, spec=spec):
        with nn.intercept_methods(injection.interceptor({"": {"": factors}}, {"": spec}, {"": scales})):
            return module.apply({"params": layer}, x)

    found = np.asarray(outputs(trained(spec)["one"][name], scales))
    change = found[2] - found[0]
    assert largest(change) > 0.01
    for sample, scale in enumerate(scales):
        close(found[sample], found[0] + scale * change, 4e-6 * (1 + largest(change)))


def test_scales_per_sample(spec):
    found = adapted(trained(spec), both(spec), {"one": [0.0, 1.3], "two": [0.0, 0.4]})
    close(found[:1], plain()[:1], 1e-6)
    expected = adapted(trained(spec), both(spec), {"one": 1.3, "two": 0.4})
    close(found[1:], expected[1:], 1e-5 * (1 + largest(expected)))


def test_the_gradient_reaches_every_factor_within_two_steps(spec):
    constants = registry.get_decomposition(spec).constants
    target = plain() + np.random.default_rng(5).normal(size=plain().shape)

    @jax.jit
    @jax.grad
    def gradient(tree):
        return jnp.mean((run(params(), {"": tree}, (("", spec),), {"": np.float32(1)}, X) - target) ** 2)

    first = gradient(start(spec))
    second = gradient(jax.tree.map(lambda leaf, grad: leaf - 0.1 * np.asarray(grad), start(spec), first))
    for path, grad in flatten(second).items():
        assert np.isfinite(grad).all(), path
        assert path.split("/")[-1] in constants or largest(grad) > 0, path


def test_merging_with_negated_scales_restores_the_weights(spec):
    if registry.get_decomposition(spec).needs_kernel == "delta":
        return  # dW of the merged kernel is another one
    there = merged(trained(spec), both(spec), {"one": 0.7, "two": 0.4})
    back = merged(trained(spec), both(spec), {"one": -0.7, "two": -0.4}, there)
    for name in NAMES:
        close(kernel(name, back), kernel(name), 2e-6 * largest(kernel(name, there)))
        assert largest(kernel(name, there) - kernel(name)) > 0.01


def test_new_scales_do_not_retrace(spec):
    adapted(trained(spec), both(spec), {"one": 0.3, "two": 1.0})
    compiled = run._cache_size()
    adapted(trained(spec), both(spec), {"one": 1.7, "two": -1.0})
    assert run._cache_size() == compiled


def test_layers_of_equal_shape_get_different_factors(spec):
    for factor, value in start(spec)["to_k"].items():
        other = start(spec)["to_q"][factor]
        assert value.shape == other.shape
        assert not np.ptp(value) or not np.array_equal(value, other), factor


def test_the_factors_of_a_layer_do_not_depend_on_other_targets(spec):
    few = dataclasses.replace(spec, targets="to_q", rank_by_target=())
    jax.tree.map(np.testing.assert_array_equal, start(few), {"to_q": start(spec)["to_q"]})


def test_weights_in_bfloat16(spec):
    """W' is W' of the same kernel in float32, rounded."""
    low = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params())
    high = jax.tree.map(lambda leaf: leaf.astype(np.float32), low)
    found, expected = one(spec, 0.7, low), one(spec, 0.7, high)
    for name in NAMES:
        assert kernel(name, found).dtype == jnp.bfloat16
        scale = largest(kernel(name, expected))
        close(np.float32(kernel(name, found)), kernel(name, expected), 2**-8 * scale)
    out = adapted({"one": trained(spec)["one"]}, {"one": spec}, {"one": 0.7}, X.astype(jnp.bfloat16), low)
    assert out.dtype == jnp.bfloat16
    exact = plain(weights=expected)
    close(np.float32(out), exact, 0.2 * largest(exact))


@every_spec
def test_saved_adapters_give_the_same_weights(spec, tmp_path):
    save_adapters(tmp_path / "x", Adapters(trained(spec), both(spec), None))
    found = load_adapters(tmp_path / "x")
    assert found.specs == both(spec)
    jax.tree.map(np.testing.assert_array_equal, found.trees, trained(spec))
    scales = {"one": 0.7, "two": 0.2}
    expected, loaded = merged(trained(spec), both(spec), scales), merged(found.trees, found.specs, scales)
    jax.tree.map(np.testing.assert_array_equal, loaded, expected)


def test_an_output_without_weights_stays_finite(spec):
    weights = jax.tree.map(lambda leaf: leaf * (np.arange(leaf.shape[-1]) > 0).astype(np.float32), params())

    @jax.jit
    @jax.value_and_grad
    def loss(tree, spec=spec):
        changed = run_merge(weights, {"": tree}, (("", spec),), {"": np.float32(1)})
        return sum(jnp.sum(layer["kernel"] ** 2) for name, layer in changed.items() if name != "norm")

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(loss(trained(spec)["one"])))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_of_a_layer_is_kept_for_inputs_of_another_dtype(spec, dtype):
    """A UNet in bfloat16 receives a prompt in float32."""

    def dense(x):
        with nn.intercept_methods(injection.interceptor({"": {"": factors}}, {"": spec}, {"": jnp.ones(())})):
            return nn.Dense(6, dtype=dtype).apply({"params": layer}, x)

    layer, factors = jax.tree.map(jnp.asarray, (params()["to_q"], trained(spec)["one"]["to_q"]))
    assert jax.eval_shape(dense, jnp.ones((2, 6))).dtype == dtype


def test_only_the_adapted_kernels_are_donated():
    spec, scales = SPECS[0], {"one": 0.7, "two": 0.4}
    given = jax.tree.map(jnp.array, params())
    donated = injection.merge(given, trained(spec), both(spec), scales, donate=True)
    kept = injection.merge(params(), trained(spec), both(spec), scales)
    jax.tree.map(np.testing.assert_array_equal, donated, kept)
    deleted = {path for path, leaf in flatten(given).items() if leaf.is_deleted()}
    assert deleted == {f"{name}/kernel" for name in NAMES}


# Trainable and constant parameters of the 258 layers of Stable Diffusion 2.1 at rank 4, as in docs/decompositions.md.
COUNTS = {
    "lora": (4_055_712, 0),
    "rslora": (4_055_712, 0),
    "pissa": (4_055_712, 4_055_712),
    "olora": (4_055_712, 4_055_712),
    "tucker": (2_281_312, 0),
    "dora": (4_351_396, 0),
    "loha": (8_111_424, 0),
    "lokr": (325_152, 0),
    "vera": (296_716, 4_055_712),
    "oft": (1_182_736, 0),
    "hra": (2_872_976, 0),
    "hira": (4_055_712, 0),
    "full": (837_614_080, 0),
}


@functools.cache
def sd21_kernels():
    from pisa_jax.sd import backbone, random_model

    shapes = backbone.param_shapes(backbone.build_modules(*random_model.model_configs("sd21")))["unet"]
    return injection.target_shapes(shapes, AdapterSpec().targets)


def test_every_decomposition_is_counted():
    assert set(COUNTS) == set(registry.DECOMPOSITIONS)


@pytest.mark.parametrize("name", COUNTS)
def test_the_number_of_parameters(name):
    spec = AdapterSpec(name, rank=4)
    constants = registry.get_decomposition(spec).constants
    found = [0, 0]
    for shapes in fit.expected_factors(spec, sd21_kernels()).values():
        for factor, shape in shapes.items():
            found[factor in constants] += shape.size
    assert tuple(found) == COUNTS[name]
