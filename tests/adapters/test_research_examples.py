"""Research variants in `examples/`: a mixture of LoRA experts, and gradients orthogonal to `pix`."""

import dataclasses
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_base_model import toy_model
from test_several_adapters import IMAGE, open_session, random_adapters
from tiny import close

from pisa_jax import Config, Data, Settings, Stage, Upscaler, Validation, train
from pisa_jax.adapters import injection
from pisa_jax.adapters.adapter_tree import Adapters
from pisa_jax.adapters.files import load_adapters, save_adapters
from pisa_jax.adapters.fit import check_order
from pisa_jax.adapters.foreign_files import save_foreign
from pisa_jax.adapters.registry import get_decomposition, import_decomposition
from pisa_jax.config import AdapterSpec
from pisa_jax.inference import make_weights
from pisa_jax.model import predict

EXPERTS, ORTHOGONAL = "lora_experts:lora_experts", "orthogonal_gradients:orthogonal_gradients"


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "examples")
    yield
    for name in ("lora_experts", "orthogonal_gradients"):
        sys.modules.pop(name, None)


@pytest.fixture
def experts():
    """Specification, kernels and random factors of a mixture for a convolution and a linear layer."""
    import_decomposition(EXPERTS)
    spec = AdapterSpec(EXPERTS, rank=3, alpha=5.0, targets="", options=(("experts", 2),))
    rng = np.random.default_rng(0)
    params = {
        name: {"kernel": rng.normal(size=shape).astype(np.float32), "bias": rng.normal(size=6).astype(np.float32)}
        for name, shape in (("conv", (3, 3, 5, 6)), ("dense", (5, 6)))
    }
    tree = injection.init_adapter(jax.random.key(0), params, spec)
    moved = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32), tree)
    return spec, params, tree, jax.device_get(moved)


def run(layer, params, tree, spec, scale, x):
    """Run one adapted layer."""

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Conv(6, (3, 3), name="conv")(x) if layer == "conv" else nn.Dense(6, name="dense")(x)

    tree = jax.tree.map(jnp.asarray, tree)
    with nn.intercept_methods(injection.interceptor({"": tree}, {"": spec}, {"": jnp.asarray(scale)})):
        return np.asarray(Net().apply(jax.tree.map(jnp.asarray, {"params": {layer: params[layer]}}), jnp.asarray(x)))


INPUTS = {
    "conv": np.random.default_rng(1).normal(size=(2, 7, 9, 5)).astype(np.float32),
    "dense": np.random.default_rng(2).normal(size=(2, 11, 5)).astype(np.float32),
}


@pytest.mark.parametrize("layer", INPUTS)
def test_experts_are_weighed_by_the_mean_of_the_input(experts, layer):
    spec, params, start, tree = experts
    x, factors = INPUTS[layer], tree[layer]
    base = run(layer, params, {}, spec, 0.0, x)
    np.testing.assert_array_equal(run(layer, params, start, spec, 0.7, x), base)  # at the start
    np.testing.assert_array_equal(run(layer, params, tree, spec, 0.0, x), base)
    found = run(layer, params, tree, spec, [0.7, -1.3], x)
    for sample, scale in enumerate((0.7, -1.3)):
        # Both experts as plain weights of the layer, mixed by hand.
        logits = x[sample].reshape(-1, 5).mean(0) @ factors["router"]
        gates = np.exp(logits) / np.exp(logits).sum()
        mixed = sum(
            gate * 5.0 / 3 * factors["a"][..., 3 * j : 3 * j + 3] @ factors["b"][3 * j : 3 * j + 3]
            for j, gate in enumerate(gates)
        )
        changed = {layer: {**params[layer], "kernel": params[layer]["kernel"] + scale * mixed}}
        expected = run(layer, changed, {}, spec, 0.0, x[sample : sample + 1])
        assert np.abs(expected - base[sample]).max() > 0.1
        close(found[sample : sample + 1], expected, 2e-5)


def test_the_gradient_reaches_router_and_experts_within_two_steps(experts):
    spec, params, start, _ = experts
    x, functions = jnp.asarray(INPUTS["dense"]), get_decomposition(spec)

    def loss(tree):
        with nn.intercept_methods(injection.interceptor({"": tree}, {"": spec}, {"": jnp.ones(())})):
            y = nn.Dense(6).apply({"params": jax.tree.map(jnp.asarray, params["dense"])}, x)
        return jnp.sum((y - 1) ** 2)

    tree = {"": start["dense"]}
    first = jax.grad(loss)(tree)
    second = jax.grad(loss)(jax.tree.map(lambda leaf, grad: leaf - 0.01 * grad, tree, first))
    assert all(np.abs(grad).max() > 0 for grad in jax.tree.leaves(second))
    with pytest.raises(ValueError, match="no weight difference: what it adds depends on the input"):
        functions.delta(tree[""], jnp.asarray(params["dense"]["kernel"]))


def test_what_needs_a_weight_refuses_a_mixture(experts, tmp_path):
    spec, params, _, tree = experts
    with pytest.raises(ValueError, match=r"'pix' \(lora_experts:lora_experts\) has no merged weight"):
        injection.merge(params, {"pix": tree}, {"pix": spec}, {"pix": 1.0})
    with pytest.raises(ValueError, match="the format peft has only lora"):
        save_foreign(tmp_path, Adapters({"pix": tree}, {"pix": spec}), "pix", {}, "peft")
    specs = {"pix": spec, "sem": AdapterSpec("dora")}
    with pytest.raises(ValueError, match="has no merged weight"):
        check_order(Adapters({"pix": {}, "sem": {}}, specs, None, {"sem": ("pix",)}))
    stages = (Stage("pix", steps=1, spec=spec), Stage("sem", steps=1, frozen=("pix",), spec=AdapterSpec("dora")))
    with pytest.raises(ValueError, match=r"stage sem: .* has no merged weight"):
        train(Config(out=str(tmp_path / "run"), stages=stages, model="random", data=Data(source="fake", crop=64)))


def additive_eps(adapters, names, latents):
    """The prediction of the toy model with some of the adapters as additive paths."""
    unet, trees = jax.tree.map(
        jnp.asarray, (toy_model().params["unet"], {name: adapters.trees[name] for name in names})
    )
    with nn.intercept_methods(injection.interceptor(trees, adapters.specs, dict.fromkeys(trees, jnp.ones(())))):
        return toy_model().base.predict_noise(unet, latents, 1, jnp.zeros((len(latents), 1, 3)))


@pytest.mark.parametrize("position", [0, 1])
def test_a_mixture_in_any_place_is_scaled_at_inference(experts, position, tmp_path):
    """eps_i is the prediction with the first i adapters, wherever the mixture is; files keep it."""
    names = ["lora", "lora"]
    names[position] = EXPERTS
    save_adapters(tmp_path / "x", random_adapters(names))
    adapters = load_adapters(tmp_path / "x")
    session = open_session(adapters)
    for count, eps in enumerate(session.eps, 1):
        close(eps, additive_eps(adapters, list(adapters.trees)[:count], session.latents), 2e-5)
    assert not np.array_equal(*session.eps)
    close(open_session(adapters, adjustable=False).eps_full, session.eps[-1], 2e-5)
    assert session.render(1.0, 0.5).shape == (15, 21, 3)


def test_a_stage_trains_on_top_of_a_frozen_mixture(tmp_path):
    """As in FreqOrtho-SR, whose pixel stage is a mixture: the frozen adapter stays, and the run resumes exactly."""
    images = tmp_path / "images"
    images.mkdir()
    Image.fromarray(IMAGE.repeat(8, 0).repeat(8, 1)).save(images / "a.png")
    spec = AdapterSpec(EXPERTS, rank=2, targets="conv")
    sem = Stage("sem", steps=4, frozen=("pix",), learning_rate=1e-2, spec=AdapterSpec(rank=3, targets="conv"))

    def config(name, steps):
        stages = (Stage("pix", steps=2, learning_rate=1e-2, spec=spec), dataclasses.replace(sem, steps=steps))
        return dataclasses.replace(
            toy_config(tmp_path / name, 4), stages=stages, validation=Validation(str(images), every=2)
        )

    whole = load_adapters(train(config("whole", 4), model=toy_model()))
    train(config("parts", 2), model=toy_model())
    parts = load_adapters(train(config("parts", 4), resume=True, model=toy_model()))
    jax.tree.map(np.testing.assert_array_equal, parts.trees, whole.trees)
    assert np.abs(whole.trees["pix"]["conv_out"]["b"]).max() > 0
    session = open_session(whole)
    model = toy_model()
    base = model.base.predict_noise(model.params["unet"], session.latents, 1, jnp.zeros((1, 1, 3)))
    assert np.abs(session.eps_pix - base).max() > 1e-4
    assert np.abs(session.eps_full - session.eps_pix).max() > 1e-4


def test_the_loss_sees_the_mixture_below(experts):
    model, rng = toy_model(), np.random.default_rng(3)
    trees = random_adapters([EXPERTS, "lora"])
    latents, prompt = jnp.asarray(rng.normal(size=(2, 5, 6, 12)), jnp.float32), jnp.zeros((1, 1, 3))
    unet, factors = jax.tree.map(jnp.asarray, (model.params["unet"], trees.trees))
    below = ((factors["pix"], trees.specs["pix"]),)
    args = (model.base, unet, factors["sem"], trees.specs["sem"], latents, prompt)
    without, found = predict(*args, (0.0, 1.0), below=below)
    for names, eps in ((["pix"], without), (["pix", "sem"], found)):
        close(eps, additive_eps(trees, names, latents), 2e-5)


# --- gradients orthogonal to pix --------------------------------------------------------------------------------------


def test_gradients_have_no_part_in_the_outputs_that_pix_changes():
    from orthogonal_gradients import ENERGY, project

    rng = np.random.default_rng(0)
    a = rng.normal(size=(3, 3, 5, 4)).astype(np.float32)
    b = (rng.normal(size=(1, 1, 4, 9)) * [[1], [0.7], [0.4], [0.01]]).astype(np.float32)
    pix = {"conv": {"a": a, "b": b}, "zero": {"a": a, "b": 0 * b}}
    grads = {path: {"a": rng.normal(size=a.shape), "b": rng.normal(size=b.shape)} for path in (*pix, "other")}
    transformation = project(pix)
    found, _ = transformation.update(grads, transformation.init(grads))
    # The independent way: singular vectors of the whole dW (out, inputs), in float64.
    left, values, _ = np.linalg.svd(np.float64(b[0, 0]).T @ np.float64(a).reshape(-1, 4).T)
    kept = int(np.searchsorted(np.cumsum(values**2) / np.sum(values**2), ENERGY)) + 1
    assert 1 < kept < 4
    u = left[:, :kept]
    close(found["conv"]["b"][0, 0], grads["conv"]["b"][0, 0] - grads["conv"]["b"][0, 0] @ u @ u.T, 1e-5)
    close(found["conv"]["b"][0, 0] @ u, np.zeros((4, kept)), 1e-5)
    for path, name in (("conv", "a"), ("zero", "b"), ("other", "b")):
        np.testing.assert_allclose(found[path][name], grads[path][name], rtol=1e-6)


def test_pix_must_be_lora():
    from orthogonal_gradients import project

    with pytest.raises(ValueError, match="orthogonal to LoRA only"):
        project({"conv": {"w": np.ones(3)}})


def toy_config(folder, steps, optimizer=ORTHOGONAL):
    spec = AdapterSpec(rank=3, targets="conv")
    sem = Stage("sem", steps=steps, frozen=("pix",), learning_rate=1e-2, spec=spec, optimizer=optimizer)
    return Config(
        out=str(folder),
        stages=(Stage("pix", steps=2, learning_rate=1e-2, spec=spec), sem),
        data=Data(source="fake", crop=16, workers=0),
        batch_size=2,
        mesh_data=1,
        save_every=2,
    )


def test_a_run_with_its_own_optimizer_trains_resumes_and_upscales(tmp_path):
    whole = load_adapters(train(toy_config(tmp_path / "whole", 4), model=toy_model()))
    train(toy_config(tmp_path / "parts", 2), model=toy_model())
    parts = load_adapters(train(toy_config(tmp_path / "parts", 4), resume=True, model=toy_model()))
    jax.tree.map(np.testing.assert_array_equal, parts.trees, whole.trees)
    plain = load_adapters(train(toy_config(tmp_path / "plain", 4, None), model=toy_model()))
    jax.tree.map(np.testing.assert_array_equal, plain.trees["pix"], whole.trees["pix"])
    assert not np.array_equal(plain.trees["sem"]["conv_out"]["b"], whole.trees["sem"]["conv_out"]["b"])
    model = toy_model()
    upscaler = Upscaler(model.base, make_weights(model, whole), whole.specs, Settings(min_size=8))
    assert upscaler(IMAGE, scale=3, scales=(1.0, 0.5)).shape == (15, 21, 3)


def test_an_optimizer_that_is_not_there_is_refused_before_training(tmp_path):
    for name, message in (
        ("orthogonal_gradients:orthogonal", "module orthogonal_gradients has no function 'orthogonal'"),
        ("my_waves:waves", "'my_waves:waves': No module named 'my_waves'; put the file of the module into"),
    ):
        with pytest.raises(ValueError, match=f"stage sem: .*{message}"):
            train(toy_config(tmp_path / "run", 2, name), model=toy_model())
    with pytest.raises(ValueError, match="stage sem: optimizer is 'adam'; it must be module:function"):
        toy_config(tmp_path, 2, "adam")
    assert not (tmp_path / "run").exists()
