"""The source of latents that were encoded in advance, and the batches that the loader makes of it."""

import pickle

import numpy as np
import pytest
from latent_files import write_latents

from pisa_jax.data import latents
from pisa_jax.data.loader import make_loader
from pisa_jax.data.sources import StoredSource


def batches_of(source, crop=4, **options):
    return make_loader(source, batch_size=4, crop=crop, seed=0, degrade=None, **options)


def test_a_sample_is_the_same_window_of_both_arrays(tmp_path):
    source = latents.latent_source(write_latents(tmp_path))
    loader = batches_of(source)
    batch = next(loader)
    loader.close()
    assert batch["lq"].shape == batch["gt"].shape == (4, 4, 4, 8)
    assert batch["lq"].dtype == np.float32
    for lq, gt, path in zip(batch["lq"], batch["gt"], batch["path"], strict=True):
        pair = source[source.names.index(path)]
        windows = [np.s_[y : y + 4, x : x + 4] for y in range(5) for x in range(5)]
        (found,) = [window for window in windows if np.array_equal(pair.lq[window], lq)]
        np.testing.assert_array_equal(pair.image[found], gt)


def test_workers_map_the_files_themselves(tmp_path):
    source = latents.latent_source(write_latents(tmp_path, count=100))
    first = source[0]
    assert len(pickle.dumps(source)) < first.image.nbytes * len(source) / 10
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source))[0].lq, first.lq)


def test_prompts_belong_to_names(tmp_path):
    source = latents.latent_source(write_latents(tmp_path))
    batch = next(batches_of(source, prompts={"1.png": "dog"}))
    assert list(batch["prompt"]) == ["dog" if path == "1.png" else "" for path in batch["path"]]


def test_the_fingerprint_notices_other_latents_under_the_same_names(tmp_path):
    source = latents.latent_source(write_latents(tmp_path))
    assert isinstance(source, StoredSource)
    assert list(source.paths()) == list(source.names)
    state = batches_of(source).get_state()
    batches_of(latents.latent_source(write_latents(tmp_path))).set_state(state)
    changed = latents.latent_source(write_latents(tmp_path, seed=1))
    assert changed.identity == source.identity
    with pytest.raises(ValueError, match="contents was"):
        batches_of(changed).set_state(state)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gt.npy", np.zeros((3, 8, 8, 4), np.float16), "same shape and dtype"),
        ("gt.npy", np.zeros((3, 8, 8, 8), np.uint8), "uint8"),
        ("names.txt", b"a.png\n", "1 names for 3 pairs"),
        ("lq.npy", b"\x93NUMPY", "lq.npy is not a complete .npy file"),
        ("lq.npy", b"not an array", "lq.npy is not a complete .npy file"),
    ],
)
def test_files_that_do_not_match_are_refused(tmp_path, name, content, message):
    file = write_latents(tmp_path) / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        np.save(file, content)
    with pytest.raises(ValueError, match=message):
        latents.latent_source(tmp_path)


def test_a_truncated_file_is_refused(tmp_path):
    file = write_latents(tmp_path) / "lq.npy"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a complete"):
        latents.latent_source(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    (write_latents(tmp_path) / "gt.npy").unlink()
    with pytest.raises(FileNotFoundError, match=r"gt\.npy"):
        latents.latent_source(tmp_path)


def test_a_crop_that_is_larger_than_the_latents_is_refused(tmp_path):
    source = latents.latent_source(write_latents(tmp_path))
    with pytest.raises(ValueError, match="crop is 9 latents"):
        batches_of(source, crop=9)
