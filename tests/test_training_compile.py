"""Compiled steps: errors about memory, reports, and the precision that losses ask for."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT
from tiny import random_base

from pisa_jax import train_step, training_report
from pisa_jax.adapters.adapter_tree import Adapters
from pisa_jax.cli import compile_only, train
from pisa_jax.config import AdapterSpec, Config, Data, Stage
from pisa_jax.metrics import lpips
from pisa_jax.model import BaseModel
from pisa_jax.runtime import distributed
from pisa_jax.runtime.operations import count_operations
from pisa_jax.train_step import Batch, Draws, Frozen, Objective
from pisa_jax.training_compile import Shapes, explain_out_of_memory, frozen_shapes, stage_shapes, trace_step
from pisa_jax.training_model import expected_shapes, perceptual_shapes

DEBUG = str(ROOT / "configs" / "debug.py")
STAGES = (
    Stage("pix", steps=10, spec=AdapterSpec(rank=2)),
    Stage("sem", steps=20, frozen=("pix",), perceptual=2.0, csd=1.0, spec=AdapterSpec(rank=2)),
)
NO_ADAPTERS = Adapters({}, {})
NANO = Config("", STAGES, "random", data=Data("fake", crop=32), batch_size=4, perceptual="squeeze")


def shapes(config):
    return Shapes(*expected_shapes(config), perceptual_shapes(config))


def hbm_error():
    return jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 20.12G of "
        "15.75G hbm. Exceeded hbm capacity by 4.37G."
    )


def test_an_error_about_memory_names_what_to_lower():
    mesh = distributed.make_mesh(data=2)
    with pytest.raises(ValueError, match="stage sem does not fit into the memory of a device") as error:  # noqa: SIM117
        with explain_out_of_memory(NANO, mesh, "stage sem"):
            raise hbm_error()
    message = str(error.value)
    assert "it needs 20.12G of 15.75G" in message
    for remedy in (
        "raise accumulate (now 1; 2 images per device at once)",
        "set remat",
        "set dtype bfloat16",
        "set vae_dtype bfloat16",
        "shard the weights with mesh_fsdp (now 1, at most 2)",
        "lower batch_size (now 4)",
        "lower data.crop (now 32)",
    ):
        assert remedy in message
    assert "\n" not in message
    lowest = dataclasses.replace(NANO, batch_size=1, remat=True, dtype="bfloat16", vae_dtype="bfloat16")
    with pytest.raises(ValueError, match=r"device; or lower data.crop \(now 32\)$"):  # noqa: SIM117
        with explain_out_of_memory(lowest, distributed.make_mesh(data=1), "stage sem"):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8589934592 bytes.")
    with pytest.raises(jax.errors.JaxRuntimeError):  # noqa: SIM117
        with explain_out_of_memory(NANO, mesh, "stage sem"):
            raise jax.errors.JaxRuntimeError("INTERNAL: another one")


def test_a_step_that_does_not_fit_ends_the_program_with_one_line(monkeypatch, capfd):
    def compile_step(_):
        raise hbm_error()

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_step)
    assert train.main([DEBUG, "--compile-only"]) == 1
    (line,) = capfd.readouterr().err.strip().splitlines()
    assert line.startswith("train.py: stage pix does not fit into the memory of a device (it needs 20.12G of 15.75G);")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology"], "--topology needs a TPU slice, such as v5e:4x4"),
        (["--topology", "--compile-only"], "--topology needs a TPU slice"),
        (["--topology", "v5e:4x4"], "--topology is for --compile-only, which is not given"),
        (["--compile-only", "--peak-share", "40"], "--peak-share 40: give a number above 0, at most 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(capsys, arguments, message):
    assert train.main([DEBUG, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_options_are_separated_from_fields():
    rest, options = compile_only.take_options(["debug", "--compile-only", "--topology=v5p:2x2x4", "--seed", "3"])
    assert rest == ["debug", "--seed", "3"]
    assert options == compile_only.CompileOnly("v5p:2x2x4", 0.4)
    assert compile_only.take_options(["debug", "--resume"]) == (["debug", "--resume"], None)


def test_collectives_are_counted_with_their_bytes():
    text = """
  %all-reduce.1 = f32[256,512]{1,0:T(8,128)} all-reduce(f32[256,512] %x), replica_groups={}
  %ar = (bf16[1024]{0}, bf16[1024]{0}) all-reduce-start(%a, %b)
  %done = bf16[1024]{0} all-reduce-done(%ar)
  %all-gather.3 = bf16[8,128]{1,0} all-gather(bf16[4,128] %y), dimensions={0}
  %fusion = f32[4]{0} fusion(%all-reduce.1), calls=%all-reduce-scatter.1
"""
    expected = f"2 all-reduce ({(256 * 512 * 4 + 2 * 1024 * 2) / 2**20:.1f} MiB), 1 all-gather (0.0 MiB)"
    assert training_report.format_collectives(text) == expected
    assert training_report.format_collectives("ROOT %t = f32[] add(%a, %b)") == "none"


@pytest.mark.slow
def test_a_report_of_the_local_devices(capsys):
    """The pixel step, compiled for two devices: half of the operations on each, and one or more all-reduces."""
    config = dataclasses.replace(NANO, stages=STAGES[:1], mesh_data=2, remat=True)
    training_report.report_compiled(config, None, 0.4)
    report = capsys.readouterr().out
    assert report.startswith("stage pix on 2 x cpu (data 2 x fsdp 1), batch 4, crops of 32, UNet float32, VAE float32,")
    tflop = float(re.search(r"operations per chip: (\S+) TFLOP", report)[1])
    found, mesh = shapes(config), distributed.make_mesh(data=1)
    alone = trace_step(config, 0, found.base, mesh, NO_ADAPTERS, stage_shapes(config, 0, found, mesh, NO_ADAPTERS))
    assert tflop == pytest.approx(count_operations(alone.jaxpr) / 2e12, rel=1e-2)
    assert re.search(r"memory per chip: 0\.\d\d GiB, 0\.\d\d held", report)
    assert re.search(r"collectives: \d+ all-reduce", report)


def test_shapes_are_those_of_the_arguments():
    config = dataclasses.replace(NANO, data=dataclasses.replace(NANO.data, prompts="prompts.jsonl"))
    mesh = distributed.make_mesh(data=2, fsdp=2)
    frozen, state, batch, _ = stage_shapes(config, 1, shapes(config), mesh, NO_ADAPTERS)
    assert frozen.teacher is frozen.unet
    assert frozen.null_prompt.shape == (1, 77, 32)
    assert batch.token_ids.shape == (4, 77)
    assert batch.lq.sharding.shard_shape(batch.lq.shape) == (1, 32, 32, 3)
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((state, frozen.perceptual)))
    assert not all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(frozen.unet))
    first = frozen_shapes(config, 0, shapes(config), mesh, NO_ADAPTERS)
    assert first.teacher is None
    assert first.perceptual is None
    latents = dataclasses.replace(config, data=Data("latents", "folder", crop=32))
    assert stage_shapes(latents, 0, shapes(latents), mesh, NO_ADAPTERS)[2].lq.shape == (4, 8, 8, 8)


def test_the_perceptual_loss_asks_for_float32_products():
    """On TPUs, the default precision of float32 products is one pass of bfloat16."""
    same = BaseModel(
        encode=lambda vae, images, noise: images,
        decode=lambda vae, latents: latents,
        predict_noise=lambda unet, latents, timestep, prompt: 0.1 * latents,
        encode_text=lambda text, ids: ids,
        vae_scale_factor=1,
        latent_channels=3,
    )
    prompt = jnp.zeros((1, 1, 1))
    weights = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), lpips.weight_shapes("squeeze"))
    frozen = Frozen({}, None, {}, None, prompt, prompt, weights, jnp.ones(1000))
    objective = Objective(AdapterSpec(), perceptual=1.0)

    def loss(images):
        batch = Batch(images, images, jnp.zeros((1, 1), jnp.int32), jnp.ones(1, bool))
        return train_step.loss({}, frozen, batch, Draws(images, images, jnp.zeros(1, jnp.int32)), same, objective)[0]

    with jax.default_matmul_precision("default"):  # tiny.py sets another one
        text = jax.jit(jax.grad(loss)).lower(jnp.zeros((1, 32, 32, 3))).as_text()
    asked = re.findall(r"precision_config = \[(.*?)\]", text)
    assert len(asked) == text.count("stablehlo.convolution") > 50
    assert set(asked) == {"#stablehlo<precision HIGH>, #stablehlo<precision HIGH>"}


def test_merged_adapters_are_products_of_float32():
    from pisa_jax.adapters import injection, registry

    spec = AdapterSpec(rank=2)
    add = injection._adder((registry.get_decomposition(spec),), False)
    kernel = jnp.zeros((8, 8), jnp.bfloat16)
    factors = registry.get_decomposition(spec).init(jax.random.key(0), kernel, 2)
    with jax.default_matmul_precision("default"):
        text = add.lower(kernel, [factors], [1.0]).as_text()
    assert re.findall(r"precision = \[(\w+)", text) == ["HIGHEST"]


def test_random_base_is_the_expected_model():
    """The shapes that are checked before loading are those of the model that is made."""
    _, params = random_base("nano")
    expected = jax.tree.map(lambda leaf: leaf.shape, expected_shapes(NANO)[1])
    assert jax.tree.map(lambda leaf: leaf.shape, params) == expected


@pytest.mark.slow
def test_a_report_of_a_slice_that_is_not_there(capsys):
    pytest.importorskip("libtpu", reason="needs pip install libtpu")
    config = dataclasses.replace(NANO, stages=STAGES[:1], dtype="bfloat16", vae_dtype="bfloat16")
    training_report.report_compiled(config, "v5e:2x2", 0.4)
    report = capsys.readouterr().out
    assert report.startswith("stage pix on 4 x TPU v5e (data 4 x fsdp 1), batch 4")
    assert re.search(r"expected at 40% of the peak of 197 TFLOP/s: \S+ s per step", report)
    with pytest.raises(ValueError, match="--topology 'v9:1x1': expected a TPU and its chips"):
        training_report.topology_devices("v9:1x1")
