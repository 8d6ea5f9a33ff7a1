"""Any number of adapters, in order: predictions, scales, files; training on top of others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_base_model import toy_model
from tiny import close

from pisa_jax import Objective, Settings, Upscaler, init_adapter, init_state, jit_train_step, make_frozen, make_mesh
from pisa_jax.adapters import injection, registry
from pisa_jax.adapters.adapter_tree import Adapters, join_adapters, summary
from pisa_jax.adapters.files import load_adapters, load_all_adapters, save_adapters
from pisa_jax.adapters.fit import check_order
from pisa_jax.cli import adapter_scales
from pisa_jax.config import AdapterSpec
from pisa_jax.inference import make_weights
from pisa_jax.runtime.weights_digest import weights_digest
from pisa_jax.train_step import Batch

IMAGE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)


def random_adapters(decompositions, trained_on=()):
    """Adapters pix, sem and face with random factors for the toy model."""
    specs = {
        name: AdapterSpec(kind, rank=3, targets="conv")
        for name, kind in zip(("pix", "sem", "face"), decompositions, strict=False)
    }
    params, trees = toy_model().params["unet"], {}
    for index, (name, spec) in enumerate(specs.items()):
        rng, tree = np.random.default_rng(index), init_adapter(jax.random.key(index), params, spec)
        moved = jax.tree.map(lambda leaf, rng=rng: leaf + 0.2 * rng.normal(size=leaf.shape).astype(np.float32), tree)
        trees[name] = jax.device_get(moved)
    return Adapters(trees, specs, None, dict(trained_on))


def open_session(adapters, **options):
    model = toy_model()
    weights = make_weights(model, adapters)
    upscaler = Upscaler(model.base, weights, adapters.specs, Settings(min_size=8, color_fix="none"))
    return upscaler.open(IMAGE, scale=3, **options)


@pytest.mark.parametrize(
    "decompositions", [("lora", "loha", "lora"), ("lora", "dora", "lora"), ("lora", "lora", "dora")]
)
def test_predictions_are_those_of_the_nested_merges(decompositions):
    """An adapter sees the weights with those before it, whether or not the UNet runs once for all."""
    adapters, model = random_adapters(decompositions), toy_model()
    session, unet = open_session(adapters), model.params["unet"]
    assert len(session.eps) == 3
    for (name, tree), eps in zip(adapters.trees.items(), session.eps, strict=True):
        unet = injection.merge(unet, {name: tree}, adapters.specs, {name: 1.0})
        prompt = jnp.zeros((1, 1, 3))
        close(eps, model.base.predict_noise(unet, session.latents, 1, prompt), 2e-5)
    alone = open_session(adapters, adjustable=False)
    close(alone.eps_full, session.eps[-1], 2e-5)
    assert alone.render().shape == (15, 21, 3)


@pytest.mark.parametrize("decompositions", [("lora",) * 3, ("lora", "lora", "dora")])
def test_scales_of_1_cost_one_pass_of_the_unet(decompositions, monkeypatch):
    """Other scales cost n, in one batch where the adapters are additive."""
    adapters, passes = random_adapters(decompositions), []

    def count_samples(params, latents, *rest):
        passes.append(len(latents))
        return predict_noise(params, latents, *rest)

    model = toy_model()
    predict_noise = model.base.predict_noise
    base = dataclasses.replace(model.base, predict_noise=count_samples)
    upscaler = Upscaler(base, make_weights(model, adapters), adapters.specs, Settings(min_size=8))
    session = upscaler.open(IMAGE, scale=3, adjustable=False)
    assert passes == [1]
    session.render(1, 1, 1)
    with pytest.raises(ValueError, match="open it with adjustable=True"):
        session.render(1, 1, 0.5)
    passes.clear()
    upscaler.open(IMAGE, scale=3)
    assert passes == ([3] if "dora" not in decompositions else [1, 1, 1])


def test_scales_are_given_in_order_or_by_name():
    session = open_session(random_adapters(["lora"] * 3))
    l_pix, l_sem, l_face = 0.5, 0.7, -0.3
    first, second, third = session.eps
    z = session.latents - l_pix * first - l_sem * (second - first) - l_face * (third - second)
    expected = np.clip((np.asarray(toy_model().base.decode({}, z))[0, :15, :21] + 1) * 127.5, 0, 255)
    np.testing.assert_allclose(session.render(l_pix, l_sem, l_face), expected, atol=0.51)
    np.testing.assert_array_equal(session.render(0.5, face=-0.3, sem=0.7), session.render(0.5, 0.7, -0.3))
    for scales, named, message in (
        ((), {"fcae": 1}, "no adapter 'fcae'; the adapters are pix, sem, face, in this order"),
        ((1, 1, 1, 1), {}, "4 scales for 3 adapters"),
        ((1,), {"pix": 1}, "two scales for 'pix'"),
        ((1, float("nan")), {}, "all must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            session.render(*scales, **named)


def test_files_keep_the_order_and_what_was_trained_on_what(tmp_path):
    adapters = random_adapters(["lora", "dora", "lora"], {"sem": ("pix",), "face": ("pix", "sem")})
    ordered = {name: adapters.specs[name] for name in ("pix", "sem", "face")}
    save_adapters(tmp_path / "x", adapters._replace(specs=ordered))
    found = load_adapters(tmp_path / "x")
    assert list(found.specs) == ["pix", "sem", "face"]
    assert found.trained_on == adapters.trained_on
    check_order(found)
    without = found._replace(specs={name: spec for name, spec in found.specs.items() if name != "pix"})
    with pytest.raises(ValueError, match="'sem' was trained on top of pix; the adapters are sem, face, in this order"):
        check_order(without)
    swapped = found._replace(
        specs={name: found.specs[name] for name in ("face", "pix", "sem")}, trained_on={"sem": ("pix",)}
    )
    with pytest.raises(
        ValueError, match=r"'sem' \(dora\) depends on the weights that it was trained with, those with pix"
    ):
        check_order(swapped)


def test_several_files_are_joined_in_order(tmp_path):
    adapters = random_adapters(["lora"] * 3)
    for name in ("sem", "pix"):
        one = Adapters({name: adapters.trees[name]}, {name: adapters.specs[name]}, "owner/base")
        save_adapters(tmp_path / name, one)
    joined = load_all_adapters([tmp_path / "pix", tmp_path / "sem"])
    assert list(joined.specs) == ["pix", "sem"]
    assert joined.base_model == "owner/base"
    assert adapter_scales.adapter_names([str(tmp_path / "pix"), str(tmp_path / "sem")]) == ["pix", "sem"]
    with pytest.raises(ValueError, match="a and b both have an adapter 'pix'"):
        join_adapters({"a": joined, "b": joined})
    with pytest.raises(ValueError, match="a is for the base model owner/base, b for other"):
        join_adapters({"a": joined, "b": Adapters({"x": {}}, {"x": AdapterSpec()}, "other")})


def test_files_for_other_weights_are_refused(tmp_path):
    """The digest decides, where both files have one: folders move, and another model may take the place of one."""
    spec, one = AdapterSpec(), {}
    for name, source, digest in (("a", "sd21", "1111"), ("b", "moved/sd21", "1111"), ("c", "sd21", "2222")):
        save_adapters(tmp_path / name, Adapters({name: {}}, {name: spec}, source, {}, digest))
        one[name] = load_adapters(tmp_path / name)
    assert "base model: moved/sd21, weights 1111" in summary(one["b"])
    joined = load_all_adapters([tmp_path / "a", tmp_path / "b"])
    assert joined.base_digest == "1111"
    with pytest.raises(
        ValueError, match=r"a was trained on the weights 1111 \(sd21\), \S+c on the weights 2222 \(sd21\)"
    ):
        load_all_adapters([tmp_path / name for name in "abc"])
    old = Adapters({"d": {}}, {"d": spec}, "sd21")
    assert join_adapters({"d": old, "a": one["a"]}).base_digest == "1111"
    with pytest.raises(ValueError, match="d is for the base model sd21, b for moved/sd21"):
        join_adapters({"d": old, "b": one["b"]})


def test_adapters_of_another_model_are_reported():
    model, lines = toy_model(), []
    unet = model.params["unet"]
    half = model._replace(params=model.params | {"unet": jax.tree.map(np.float16, unet)})
    other = model._replace(params=model.params | {"unet": jax.tree.map(lambda leaf: -leaf, unet)})
    adapters = random_adapters(["lora"])
    recorded = adapters._replace(base_model="toy", base_digest=weights_digest(unet))
    for loaded, given in ((model, recorded), (half, recorded), (other, adapters), (other, recorded)):
        assert not lines
        make_weights(loaded, given, notice=lines.append)
    assert lines == [
        f"the adapters were trained on another base model, toy with the weights {weights_digest(unet)}; the UNet of "
        f"this model has the weights {weights_digest(other.params['unet'])}, and results may be worse"
    ]


def test_one_number_holds_for_all_adapters():
    names = ["pix", "sem", "face"]
    assert adapter_scales.complete_scales(None, names) == [(1.0, 1.0, 1.0)]
    assert adapter_scales.complete_scales([(0.5,), (1.0, 0.5, 0.0)], names) == [(0.5, 0.5, 0.5), (1.0, 0.5, 0.0)]
    with pytest.raises(ValueError, match=r"expected 3 numbers \(pix, sem, face\)"):
        adapter_scales.complete_scales([(1.0, 0.5)], names)


def trained_state(spec, steps=2, optimizer=None):
    """Train an adapter of the toy model, on top of `pix`."""
    model, mesh, pix = toy_model(), make_mesh(data=1), random_adapters(["lora"])
    optimizer = optimizer or optax.adam(1e-2)
    frozen = make_frozen(model, mesh, pix.trees, pix.specs)
    start = jax.device_get(init_adapter(jax.random.key(1), frozen.unet, spec))
    state = init_state(jax.tree.map(jnp.array, start), optimizer, ema=True, spec=spec)
    step = jit_train_step(model.base, Objective(spec, ema=0.5), optimizer, frozen, mesh)
    images = jnp.tanh(jax.random.normal(jax.random.key(2), (2, 16, 16, 3))) / 2
    batch = Batch(images, images, jnp.zeros((2, 1), jnp.int32), jnp.zeros(2, bool))
    for _ in range(steps):
        state, measured = step(frozen, state, batch, jax.random.key(3))
    return start, state, measured


def test_constant_factors_are_neither_trained_nor_in_the_optimizer():
    spec = AdapterSpec("pissa", rank=3, targets="conv")
    start, state, _ = trained_state(spec)
    constants = registry.get_decomposition(spec).constants
    assert constants == ("a0", "b0")
    for path, factors in start.items():
        for name, value in factors.items():
            for tree in (state.adapter, state.ema):
                assert np.array_equal(tree[path][name], value) == (name in constants), (path, name)
    moments = jax.tree.leaves(state.optimizer[0].mu)
    assert sum(leaf.size for leaf in moments) == sum(
        value.size for factors in start.values() for name, value in factors.items() if name not in constants
    )


def test_a_penalty_is_added_to_the_loss():
    spec = AdapterSpec("hra", rank=4, targets="conv", options=(("orthogonality", 0.1),))
    _, _, measured = trained_state(spec, steps=1)
    # At the start the columns are equal in pairs: two pairs in each of two layers, at least 2 each.
    assert float(measured["penalty"]) > 0.1 * 2 * 2 * 2 * 0.99
    assert float(measured["total"]) == pytest.approx(float(measured["l2"]) + float(measured["penalty"]), rel=1e-5)


def test_dora_learns_and_its_magnitudes_do_not_decay():
    from pisa_jax import training
    from pisa_jax.config import Config, Stage

    spec = AdapterSpec("dora", rank=3, targets="conv")
    stage = Stage("sem", steps=1, learning_rate=1e-2, spec=spec)
    config = Config(out="", stages=(stage,), weight_decay=0.5)
    optimizer = training.make_optimizer(config, stage)
    tree = {"conv": {"a": jnp.ones(3), "b": jnp.ones(3), "m": jnp.ones(3)}}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, tree), optimizer.init(tree), tree)
    assert float(jnp.abs(updates["conv"]["m"]).max()) == 0
    assert float(updates["conv"]["a"].max()) < 0
    plain = training.make_optimizer(config, dataclasses.replace(stage, spec=AdapterSpec()))
    assert jax.tree.structure(plain.init(tree)) != jax.tree.structure(optimizer.init(tree))
    start, state, measured = trained_state(spec)
    assert np.isfinite(float(measured["total"]))
    assert not np.array_equal(state.adapter["conv_in"]["m"], start["conv_in"]["m"])
