"""Perceptual distances against recordings of the original LPIPS package and of PyTorch."""

import hashlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import DATA, golden
from PIL import Image
from safetensors.numpy import load_file, save_file

from pisa_jax.metrics import lpips


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """The random VGG16 of the recordings, from a file with torchvision's names that also has a classifier."""
    recipe = json.loads(golden("train/vgg_recipe.json").read_text())
    draw = np.random.RandomState(recipe["seed"])
    state = {"classifier.0.weight": np.zeros((2, 2), np.float32)}
    for name in recipe["order"]:
        shape = recipe["shapes"][name]
        scale = np.sqrt(6 / (9 * shape[1])) if name.endswith("weight") else 0.1
        state[name] = ((draw.random_sample(shape) * 2 - 1) * scale).astype(np.float16).astype(np.float32)
        assert hashlib.sha256(state[name].tobytes()).hexdigest() == recipe["sha256"][name]
    path = tmp_path_factory.mktemp("vgg") / "vgg16.safetensors"
    save_file(state, path)
    return lpips.load_weights(path, "vgg")


@pytest.fixture(scope="module")
def alex(tmp_path_factory):
    """A random AlexNet: RandomState(7), weights uniform in +-sqrt(6 / fan in), biases uniform in +-0.1."""
    draw = np.random.RandomState(7)
    state = {}
    for name, (height, width, c_in, c_out) in lpips.FEATURE_NETWORKS["alex"].kernels.items():
        shape = (c_out, c_in, height, width)
        state[f"{name}.weight"] = ((draw.random_sample(shape) * 2 - 1) * np.sqrt(6 / np.prod(shape[1:]))).astype("f4")
        state[f"{name}.bias"] = ((draw.random_sample(c_out) * 2 - 1) * 0.1).astype(np.float32)
    path = tmp_path_factory.mktemp("alex") / "alexnet.safetensors"
    save_file(state, path)
    return lpips.load_weights(path, "alex")


@pytest.fixture(scope="module")
def squeeze():
    return lpips.load_weights(None, "squeeze")


@pytest.fixture
def weights(request):
    return request.getfixturevalue(request.param)


distance = jax.jit(lpips.distance)
layer_terms = jax.jit(lpips.layer_terms)
every_network = pytest.mark.parametrize("weights", ["vgg", "alex", "squeeze"], indirect=True)


def recipe_pair():
    """Two images of odd size in [-1, 1] and noisy copies of them, as in the recorded PyTorch run."""
    draw = np.random.RandomState(1)
    a = (draw.random_sample((2, 67, 80, 3)) * 2 - 1).astype(np.float32)
    return jnp.asarray(a), jnp.asarray(np.clip(a + draw.normal(size=a.shape) * 0.3, -1, 1), jnp.float32)


@jax.jit
def value_and_gradient(weights, a, b):
    return jax.value_and_grad(lambda a: lpips.distance(weights, a, b).sum())(a)


def relative_l2(x, y):
    return np.linalg.norm(x - y) / np.linalg.norm(y)


@pytest.mark.parametrize("i", range(4))
def test_vgg_distance_terms_and_gradient_equal_the_original(vgg, i):
    with np.load(golden("train/lpips.npz")) as recorded:
        a, b, gradient = (jnp.asarray(recorded[f"{k}{i}"].transpose(0, 2, 3, 1)) for k in ("a", "b", "grad"))
        terms, value = recorded[f"layers{i}"], recorded[f"dist{i}"].item()
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(jnp.stack(layer_terms(vgg, a, b)), terms, rtol=2e-5)
        ours, ours_gradient = value_and_gradient(vgg, a, b)
    np.testing.assert_allclose(ours, value, rtol=1e-5)
    assert relative_l2(np.asarray(ours_gradient), gradient) < 1e-2


# Recorded with PyTorch 2.13 (nn.Conv2d, nn.MaxPool2d, ceil_mode for SqueezeNet) and the same weights and images.
TORCH = {
    "alex": (
        [
            [0.007522836327552795, 0.007213969714939594],
            [0.004344035405665636, 0.0043770489282906055],
            [0.0028530743438750505, 0.002738973358646035],
            [0.0028532985597848892, 0.002689864719286561],
            [0.001807945198379457, 0.0015763449482619762],
        ],
        0.0071336496621370316,
    ),
    "squeeze": (
        [
            [0.19727347791194916, 0.1934989094734192],
            [0.05748964101076126, 0.05733158811926842],
            [0.07464751601219177, 0.06991799920797348],
            [0.053030431270599365, 0.04411889240145683],
            [0.08344724774360657, 0.05461305007338524],
            [0.05061136931180954, 0.037123508751392365],
            [0.12438753247261047, 0.08839616179466248],
        ],
        0.6258150339126587,
    ),
}


@pytest.mark.parametrize("weights", ["alex", "squeeze"], indirect=True)
def test_alexnet_and_squeezenet_equal_pytorch(weights):
    a, b = recipe_pair()
    ((name, _),) = weights.items()
    terms, gradient_norm = TORCH[name]
    with jax.default_matmul_precision("highest"):
        np.testing.assert_allclose(jnp.stack(layer_terms(weights, a, b)), terms, rtol=1e-4)
        _, gradient = value_and_gradient(weights, a, b)
    np.testing.assert_allclose(np.linalg.norm(gradient), gradient_norm, rtol=1e-3)


def test_squeezenet_distances_of_the_example_of_the_lpips_authors(squeeze):
    reference, p0, p1 = (
        jnp.asarray(Image.open(DATA / "lpips_example" / f"{name}.png").convert("RGB"))[None] / 127.5 - 1
        for name in ("ex_ref", "ex_p0", "ex_p1")
    )
    np.testing.assert_allclose(distance(squeeze, reference, p0), 6.33, atol=0.01)
    np.testing.assert_allclose(distance(squeeze, reference, p1), 3.16, atol=0.01)


def test_packaged_squeezenet_is_the_archive_rounded_to_float16(squeeze):
    """The digest is that of `squeezenet_v1_1_caffe_features.npz` of keras-squeezenet, loaded and rounded."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(squeeze):
        rounded = leaf.astype(np.float16)
        assert np.array_equal(leaf, rounded)
        digest.update(rounded.tobytes())
    assert sum(x.size for x in jax.tree.leaves(squeeze)) == 722_496
    assert digest.hexdigest() == "b3281640e3ede73eb289d60476820353a28537f5776c4510051231be7bdf37dc"


def test_packaged_heads_are_those_of_lpips_0_1(vgg):
    heads = load_file(lpips.ASSETS / "heads.safetensors")
    with np.load(golden("train/lpips_lin.npz")) as recorded:
        for k in range(5):
            np.testing.assert_array_equal(heads[f"vgg.lin{k}"], recorded[f"lin{k}"].ravel())
            np.testing.assert_array_equal(vgg["vgg"]["heads"][f"lin{k}"], heads[f"vgg.lin{k}"])
    assert sum(x.size for name, x in heads.items() if name.startswith("vgg.")) == 1472
    assert sum(x.size for name, x in heads.items() if name.startswith("alex.")) == 1152


@every_network
def test_properties_of_a_distance(weights):
    a, b = (x[:, :48, :40] for x in recipe_pair())
    np.testing.assert_allclose(distance(weights, a, a), 0, atol=1e-12)
    forward, backward = distance(weights, a, b), distance(weights, b, a)
    np.testing.assert_allclose(forward, backward, rtol=1e-5)
    assert (forward > 0).all()
    assert (distance(weights, a, (a + b) / 2) < forward).all()
    alone = jnp.concatenate([distance(weights, a[k : k + 1], b[k : k + 1]) for k in range(2)])
    np.testing.assert_allclose(alone, forward, rtol=1e-5)


def test_gradient_is_finite_where_all_channels_are_zero(alex):
    """Negative biases make all channels 0: the gradient of the original implementation is NaN, this one is 0."""
    (tree,) = alex.values()
    layers = {name: {**layer, "bias": layer["bias"] - 10} for name, layer in tree["layers"].items()}
    silent = {"alex": {**tree, "layers": layers}}
    a, b = recipe_pair()
    assert not lpips.features(silent, a)[0].any()
    value, gradient = value_and_gradient(silent, a, b)
    assert value == 0
    assert not gradient.any()
    flat = jax.grad(lambda x: lpips._unit(x).sum())(jnp.zeros((1, 1, 1, 3)))
    np.testing.assert_array_equal(flat, 0)


def test_bfloat16_images_have_a_float32_distance_and_a_bfloat16_gradient(squeeze):
    a, b = (x[:1, :40, :40].astype(jnp.bfloat16) for x in recipe_pair())
    value, gradient = value_and_gradient(squeeze, a, b)
    assert (value.dtype, gradient.dtype) == (jnp.float32, jnp.bfloat16)
    assert jnp.isfinite(gradient).all()


def test_distance_names(vgg, alex, squeeze):
    assert lpips.distance_name(vgg) == "LPIPS 0.1 (VGG16)"
    assert lpips.distance_name(alex) == "LPIPS 0.1 (AlexNet)"
    assert lpips.distance_name(squeeze) == "SqueezeNet 1.1 feature distance, no heads"


def test_too_small_images_raise_an_error(vgg):
    tiny = jnp.zeros((1, 12, 40, 3))
    with pytest.raises(ValueError, match=r"12x40 are too small.*32x32"):
        lpips.distance(vgg, tiny, tiny)


def test_errors_of_wrong_weights_name_the_expected_layers(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({"features.0.weight": np.zeros((8, 3, 3, 3), "f4"), "features.0.bias": np.zeros(8, "f4")}, path)
    with pytest.raises(ValueError, match=r"features\.0 has kernel and bias.*expected \(3, 3, 3, 64\)") as caught:
        lpips.load_weights(path, "vgg")
    assert "features.2 is missing" in str(caught.value)
    assert "expected 13 layers" in str(caught.value)
    with pytest.raises(ValueError, match="conv1 is missing"):
        lpips.load_weights(path, "squeeze")
    with pytest.raises(ValueError, match=r"unknown perceptual network 'resnet': use one of vgg, alex, squeeze"):
        lpips.load_weights(path, "resnet")
    with pytest.raises(ValueError, match=r"hub id timm/vgg16\.tv_in1k"):
        lpips.load_weights(None, "vgg")
    with pytest.raises(FileNotFoundError, match="no perceptual weights at"):
        lpips.load_weights(tmp_path / "nowhere.safetensors", "vgg")
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04 not an archive")
    with pytest.raises(OSError, match=r"not a readable \.npz"):
        lpips.load_weights(broken, "squeeze")


def test_weights_of_a_hub_id_are_downloaded_and_failures_explained(monkeypatch, tmp_path, alex):
    """A stand-in for the download: a file for one id, no network for the other."""
    (tree,) = alex.values()
    path = tmp_path / "model.safetensors"
    state = {}
    for name, layer in tree["layers"].items():
        state |= {
            f"{name}.weight": np.ascontiguousarray(layer["kernel"].transpose(3, 2, 0, 1)),
            f"{name}.bias": layer["bias"],
        }
    save_file(state, path)
    asked = []

    def download(repository, filename):
        asked.append((repository, filename))
        if repository == "owner/offline":
            raise OSError("no network")
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    fetched = lpips.load_weights("owner/alexnet", "alex")
    assert asked == [("owner/alexnet", "model.safetensors")]
    assert jax.tree.all(jax.tree.map(np.array_equal, fetched, alex))
    with pytest.raises(OSError, match=r"hub id 'owner/offline' .*\(no network\).*give the file"):
        lpips.load_weights("owner/offline", "alex")


def test_assets_contain_their_licenses():
    folder = Path(lpips.ASSETS)
    assert "Richard Zhang" in (folder / "LICENSE.lpips").read_text()
    assert "MIT License" in (folder / "LICENSE.squeezenet").read_text()
