"""The training loader: content and order of batches, resume, unreadable files, prompts, worker processes."""

import itertools
import json
import logging
import signal
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
from conftest import DATA, ROOT
from PIL import Image

from pisa_jax.data.degradation import degrade
from pisa_jax.data.loader import make_loader, read_prompts
from pisa_jax.data.samples import MAX_FAILURES, crop_pair
from pisa_jax.data.sources import SourceImage, fake_source, folder_source
from pisa_jax.imaging.ranges import uint8_to_signed


def noisy(gt, rng):
    """A stand-in for the degradation: random, with the same shape."""
    return np.clip(gt + rng.normal(0, 0.1, gt.shape).astype(np.float32), 0, 1)


@dataclass(frozen=True)
class Coordinates:
    """A source whose pixels contain their origin: the channels are row, column and index of the image."""

    count: int
    height: int = 40
    width: int = 60
    broken: tuple[int, ...] = ()
    paired: bool = False

    @property
    def names(self):
        return tuple(f"{index}.png" for index in range(self.count))

    @property
    def identity(self):
        return f"coordinates-{self.count}"

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError(f"{index}.png: broken")
        rows, columns = np.mgrid[: self.height, : self.width]
        image = np.stack([rows, columns, np.full_like(rows, index)], axis=-1).astype(np.uint8)
        return SourceImage(image, f"{index}.png", 255 - image if self.paired else None)


def loader(source, **options):
    return make_loader(source, **{"batch_size": 4, "crop": 16, "seed": 3, "degrade": noisy} | options)


def take(iterator, count):
    return [next(iterator) for _ in range(count)]


def concatenated(batches):
    return {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}


def assert_same(first, second):
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            np.testing.assert_array_equal(one[key], other[key], err_msg=key)


def to_bytes(images):
    return np.rint((images + 1) * 127.5).astype(np.uint8)


def test_shapes_types_and_range_of_a_batch():
    batch = next(loader(fake_source(6, 24)))
    assert {key: (value.shape, value.dtype.kind) for key, value in batch.items()} == {
        "lq": ((4, 16, 16, 3), "f"),
        "gt": ((4, 16, 16, 3), "f"),
        "prompt": ((4,), "U"),
        "use_prompt": ((4,), "b"),
        "path": ((4,), "U"),
    }
    for key in ("lq", "gt"):
        assert batch[key].dtype == np.float32
        assert np.abs(batch[key]).max() <= 1
        np.testing.assert_allclose(uint8_to_signed(to_bytes(batch[key])), batch[key], atol=1e-7)  # multiples of 1 / 255


def test_pixels_map_to_plus_minus_one_exactly():
    levels = np.arange(256, dtype=np.uint8)
    expected = levels.astype(np.float64) / 255 * 2 - 1
    np.testing.assert_allclose(uint8_to_signed(levels), expected, atol=1e-7)
    assert uint8_to_signed(levels)[[0, 255]].tolist() == [-1, 1]


def test_crops_are_random_windows_and_half_of_them_mirrored():
    crops = to_bytes(concatenated(take(loader(Coordinates(5), flip=True), 100))["gt"])
    top, left, right = crops[:, 0, 0, 0], crops[:, 0, 0, 1], crops[:, 0, -1, 1]
    mirrored = left > right
    for crop, start, column, mirror in zip(crops, top, np.minimum(left, right), mirrored, strict=True):
        rows, columns = np.mgrid[start : start + 16, column : column + 16]
        np.testing.assert_array_equal(crop[..., 0], rows)
        np.testing.assert_array_equal(crop[..., 1], columns[:, ::-1] if mirror else columns)
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(400)
    assert set(top.tolist()) == set(range(40 - 16 + 1))
    assert set(np.minimum(left, right).tolist()) == set(range(60 - 16 + 1))
    unmirrored = to_bytes(concatenated(take(loader(Coordinates(5), flip=False), 10))["gt"])
    assert np.all(unmirrored[:, 0, 0, 1] < unmirrored[:, 0, -1, 1])


def test_a_pair_is_cropped_and_mirrored_together_and_not_degraded():
    batch = concatenated(take(loader(Coordinates(5, paired=True), degrade=None), 10))
    np.testing.assert_array_equal(to_bytes(batch["lq"]), 255 - to_bytes(batch["gt"]))


@pytest.mark.parametrize("shape", [(10, 31), (31, 10), (10, 10), (15, 16)])
def test_small_images_are_upscaled_to_the_crop(shape):
    image = np.full((*shape, 3), 77, np.uint8)
    image[0] = 200
    gt, lq = crop_pair(SourceImage(image, "small", image), 16, False, np.random.default_rng(0))
    assert gt.shape == lq.shape == (16, 16, 3)
    short = 16 / min(shape)
    size = (max(16, round(shape[1] * short)), max(16, round(shape[0] * short)))
    upscaled = np.asarray(Image.fromarray(image).resize(size, Image.BICUBIC))
    windows = np.lib.stride_tricks.sliding_window_view(upscaled, (16, 16, 3)).reshape(-1, 16, 16, 3)
    assert any(np.array_equal(gt, window) for window in windows)


def test_degradation_receives_the_crop_in_0_1_and_its_result_is_rounded_to_8_bit():
    def halve(gt, rng):
        assert gt.dtype == np.float32
        return gt / 2 + np.float32(0.001)

    batch = next(loader(Coordinates(5), degrade=halve))
    gt, lq = to_bytes(batch["gt"]), to_bytes(batch["lq"])
    np.testing.assert_array_equal(lq, np.rint(255 * (gt.astype(np.float32) / 255 / 2 + 0.001)))


def test_a_degradation_that_changes_the_size_is_refused():
    with pytest.raises(ValueError, match="degrade returned shape"):
        next(loader(Coordinates(5), degrade=lambda gt, rng: gt[::4, ::4]))


def test_batches_depend_on_the_seed():
    source = fake_source(6, 24)
    first = take(loader(source), 5)
    assert_same(first, take(loader(source), 5))
    other = take(loader(source, seed=4), 5)
    assert any(np.any(one["path"] != two["path"]) for one, two in zip(first, other, strict=True))
    assert np.any(first[0]["lq"] != other[0]["lq"])


def test_every_epoch_has_each_image_once_in_a_new_order_with_new_crops():
    batches = concatenated(take(loader(Coordinates(8)), 6))
    epochs = batches["path"].reshape(3, 8)
    for epoch in epochs:
        assert sorted(epoch) == sorted(Coordinates(8).names)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    windows = {tuple(to_bytes(gt)[0, 0]) for gt in batches["gt"]}
    assert len(windows) > 20  # 24 draws from 25 * 45 positions per image


def test_concatenated_batches_of_all_processes_equal_the_batch_of_a_single_process():
    source = Coordinates(12)
    whole = take(loader(source, batch_size=4), 6)
    left, right = (take(loader(source, rows=rows), 6) for rows in ([0, 1], [2, 3]))
    ones = [take(loader(source, rows=[row]), 1)[0] for row in range(4)]
    np.testing.assert_array_equal(np.concatenate([one["gt"] for one in ones]), whole[0]["gt"])
    assert_same(whole, [concatenated(pair) for pair in zip(left, right, strict=True)])
    shards = [set(concatenated(shard[:3])["path"]) for shard in (left, right)]
    assert not shards[0] & shards[1]
    assert shards[0] | shards[1] == set(source.names)
    pixels = [{to_bytes(gt).tobytes() for gt in concatenated(shard)["gt"]} for shard in (left, right)]
    assert not pixels[0] & pixels[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_processes_may_read_rows_that_are_no_neighbors(workers):
    source = Coordinates(5)  # an epoch ends inside a batch
    whole = take(loader(source, batch_size=4), 4)
    odd, even = (loader(source, rows=rows, workers=workers) for rows in ([1, 3], [0, 2]))
    odd.set_state(json.loads(json.dumps(even.get_state() | {"batches": 1})))
    assert_same(take(odd, 3), [{key: values[1::2] for key, values in batch.items()} for batch in whole[1:]])
    assert_same(take(even, 4), [{key: values[::2] for key, values in batch.items()} for batch in whole])


def test_resume_continues_at_the_next_batch_across_epochs():
    source = fake_source(5, 24)  # an epoch ends in the middle of batches
    expected = take(loader(source), 6)
    first = loader(source)
    assert_same(expected[:3], take(first, 3))
    state = json.loads(json.dumps(first.get_state()))
    resumed = loader(source)
    resumed.set_state(state)
    assert_same(expected[3:], take(resumed, 3))
    resumed.set_state(state)  # also backwards, and on a loader in use
    assert_same(expected[3:], take(resumed, 3))
    halves = [loader(source, rows=rows) for rows in ([0, 1], [2, 3])]
    for half in halves:
        half.set_state(state)
    assert_same(expected[3:4], [concatenated([next(half) for half in halves])])


def test_resume_with_other_data_names_the_differing_fields():
    state = loader(fake_source(5, 24)).get_state()
    with pytest.raises(ValueError, match="seed was 3 and is 4") as error:
        loader(fake_source(6, 24), seed=4, batch_size=2).set_state(state)
    for field in ("source", "records", "global_batch"):
        assert field in str(error.value)
    assert "crop" not in str(error.value)


def test_an_unreadable_file_is_replaced_logged_once_and_counted(caplog):
    source = Coordinates(10, broken=(4,))
    with caplog.at_level(logging.WARNING):
        reader = loader(source, max_bad_share=0.1)
        batches = take(reader, 10)
    assert [record.getMessage() for record in caplog.records] == ["skipped unreadable image 1: 4.png: broken"]
    assert reader.bad_files == {"4.png": "4.png: broken"}
    assert "4.png" not in concatenated(batches)["path"]
    assert_same(batches, take(loader(source, max_bad_share=0.1), 10))
    whole, replaced = concatenated(take(loader(Coordinates(10)), 10)), concatenated(batches)
    others = whole["path"] != "4.png"
    for key in whole:
        np.testing.assert_array_equal(replaced[key][others], whole[key][others])


def test_too_many_unreadable_files_raise_an_error_with_their_list(caplog):
    reader = loader(Coordinates(20, broken=(4, 11)), max_bad_share=0.05)
    with pytest.raises(OSError, match=r"2 images cannot be read, at most 1 are allowed(.|\n)*11\.png(.|\n)*4\.png"):
        take(reader, 6)


def test_a_source_without_readable_files_raises_an_error_at_the_first_batch():
    with pytest.raises(OSError, match=f"{MAX_FAILURES} images in a row"):
        next(loader(Coordinates(30, broken=tuple(range(30))), max_bad_share=1.0))


def test_prompts_match_their_images_and_are_dropped_per_sample():
    prompts = {"0.png": "a dog, grass", "1.png": "a cat"}
    batch = concatenated(take(loader(Coordinates(4), prompts=prompts, null_prompt_probability=0.25), 100))
    assert batch["prompt"].tolist() == [prompts.get(path, "") for path in batch["path"]]
    assert abs(batch["use_prompt"].mean() - 0.75) < 4 * np.sqrt(0.25 * 0.75 / 400)
    per_batch = batch["use_prompt"].reshape(100, 4).mean(axis=1)
    assert np.any((per_batch > 0) & (per_batch < 1))
    assert next(loader(Coordinates(4), null_prompt_probability=0.0))["use_prompt"].all()
    assert not next(loader(Coordinates(4), null_prompt_probability=1.0))["use_prompt"].any()


def test_prompts_of_another_folder_raise_an_error():
    with pytest.raises(ValueError, match=r"none of the 1 prompts.*'photos/0.png'.*'0.png'"):
        loader(Coordinates(4), prompts={"photos/0.png": "a dog"})


def test_malformed_lines_of_a_prompt_file_are_reported_with_their_number(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"path": "a.png", "prompt": "größe"}\n\n{"path": "b/c.png", "prompt": ""}\n', encoding="utf-8")
    assert read_prompts(path) == {"a.png": "größe", "b/c.png": ""}
    for bad in ("not json", '{"path": "a.png"}', '{"path": "a.png", "prompt": 3}', '["a.png", "x"]'):
        path.write_text('{"path": "a.png", "prompt": "x"}\n' + bad + "\n")
        with pytest.raises(ValueError, match=r"prompts\.jsonl, line 2"):
            read_prompts(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"degrade": None}, "degrade is None"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"rows": [3, 4]}, r"rows has 4, and a batch has the rows 0\.\.3"),
        ({"rows": []}, "rows is empty"),
        ({"null_prompt_probability": 1.5}, "null_prompt_probability is 1.5"),
    ],
)
def test_invalid_arguments_raise_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        loader(Coordinates(4), **options)


def test_worker_processes_give_the_same_batches_and_resume(tmp_path, caplog):
    """Photographs, one of them truncated, with the published degradation: 0 and 2 workers agree, also after resume."""
    photos = sorted((DATA / "demo").iterdir())
    for index, path in zip(range(9), itertools.cycle(photos), strict=False):
        (tmp_path / f"{index}.jpg").write_bytes(path.read_bytes()[: 5000 if index == 4 else None])
    source = folder_source(tmp_path)
    options = {"batch_size": 3, "crop": 64, "degrade": degrade, "max_bad_share": 0.2}
    expected = take(loader(source, **options), 6)
    reader = loader(source, workers=2, **options)
    assert_same(expected[:3], take(reader, 3))
    state = reader.get_state()
    reader.close()
    resumed = loader(source, workers=2, **options)
    resumed.set_state(state)
    assert_same(expected[3:], take(resumed, 3))
    resumed.close()
    assert "4.jpg" in resumed.bad_files | reader.bad_files


TRAINER = """
from pisa_jax.data.loader import make_loader
from pisa_jax.data.sources import fake_source


def unchanged(gt, rng):
    return gt


if __name__ == "__main__":
    reader = make_loader(fake_source(4, 24), batch_size=2, crop=16, seed=0, degrade=unchanged, workers=2)
    for _ in range(4):
        next(reader)
    print("reading", flush=True)
    while True:
        next(reader)
"""


def test_workers_end_when_the_training_process_is_killed(tmp_path):
    (tmp_path / "trainer.py").write_text(TRAINER)
    trainer = subprocess.Popen(
        [sys.executable, str(tmp_path / "trainer.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        text=True,
    )
    assert trainer.stdout.readline() == "reading\n"
    trainer.send_signal(signal.SIGKILL)
    # The pipe reaches its end when the last worker has closed it. The limit only keeps a failing test from hanging.
    trainer.communicate(timeout=300)
