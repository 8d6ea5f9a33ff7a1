"""The command prepare: tfds data sets written and read without TensorFlow."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import cloudpickle
import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import ROOT
from PIL import Image

from pisa_jax.cli import prepare
from pisa_jax.data.loader import make_loader
from pisa_jax.data.sources import fake_source, folder_source
from pisa_jax.data.tfds import tfds_source, write_tfds


@pytest.fixture
def photos(tmp_path):
    """A folder of six JPEG files and a palette PNG, which the decoder of tfds does not convert to RGB."""
    folder = tmp_path / "My Photos"
    (folder / "sub").mkdir(parents=True)
    for index in range(6):
        Image.fromarray(fake_source(6, 40)[index].image).save(folder / f"{index}.jpg")
    Image.fromarray(fake_source(1, 40, 1)[0].image).quantize(16).save(folder / "sub" / "palette.png")
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A set of one image, to be copied."""
    folder = tmp_path_factory.mktemp("packed")
    Image.fromarray(fake_source(1, 40)[0].image).save(folder / "0.png")
    example = {"image": (folder / "0.png").read_bytes(), "path": "0.png"}
    return write_tfds(folder, "set", "train", [example], paired=False).parent


def run(*arguments):
    return prepare.main([str(argument) for argument in arguments])


def by_path(source):
    return {item.path: item for item in source}


def test_a_packed_folder_has_the_images_of_the_folder(photos, tmp_path, capsys):
    assert run(photos, "--out", tmp_path / "sets") == 0
    assert "7 images, 0 skipped" in capsys.readouterr().out
    packed, original = by_path(tfds_source(tmp_path / "sets" / "my_photos")), by_path(folder_source(photos))
    assert packed.keys() == original.keys()
    for path, item in original.items():
        np.testing.assert_array_equal(packed[path].image, item.image)
        assert packed[path].lq is None
    assert [entry.name for entry in (tmp_path / "sets").iterdir()] == ["my_photos"]


def test_files_are_stored_unchanged(photos, tmp_path):
    run(photos, "--out", tmp_path / "sets", "--name", "set")
    folder = tmp_path / "sets" / "set" / "1.0.0"
    raw = tfds.builder_from_directory(folder).as_data_source("train", decoders={"image": tfds.decode.SkipDecoding()})
    assert {example["path"].decode(): example["image"] for example in raw} == {
        name: (photos / name).read_bytes() for name in folder_source(photos).names
    }


def test_packed_pairs_are_pairs(tmp_path):
    rng = np.random.default_rng(0)
    expected = {}
    for side, size in (("gt", 32), ("lq", 8)):
        (tmp_path / "pairs" / side).mkdir(parents=True)
        for index in range(3):
            expected[side, index] = rng.integers(0, 256, (size, size, 3), np.uint8)
            Image.fromarray(expected[side, index]).save(tmp_path / "pairs" / side / f"{index}.png")
    assert run(tmp_path / "pairs", "--out", tmp_path, "--name", "packed", "--split", "validation", "--paired") == 0
    source = tfds_source(tmp_path / "packed", "validation")
    assert source.paired
    assert len(source) == 3
    for index in range(3):
        pair = by_path(source)[f"gt/{index}.png"]
        np.testing.assert_array_equal(pair.image, expected["gt", index])
        upscaled = Image.fromarray(expected["lq", index]).resize((32, 32), Image.BICUBIC)
        np.testing.assert_array_equal(pair.lq, np.asarray(upscaled))


def test_the_loader_reads_a_packed_set_also_in_another_process(photos, tmp_path):
    run(photos, "--out", tmp_path / "sets", "--name", "set")
    source = tfds_source(tmp_path / "sets")
    source[0]  # opens the reader, which must not prevent pickling
    np.testing.assert_array_equal(cloudpickle.loads(cloudpickle.dumps(source))[3].image, source[3].image)
    loader = make_loader(source, batch_size=7, crop=16, seed=0, degrade=lambda gt, rng: gt, prompts={"0.jpg": "a ball"})
    batch = next(loader)
    assert sorted(batch["path"]) == sorted(folder_source(photos).names)
    assert batch["prompt"][batch["path"].tolist().index("0.jpg")] == "a ball"


def test_unreadable_images_are_reported_and_skipped(photos, tmp_path, capsys):
    (photos / "3.jpg").write_bytes((photos / "3.jpg").read_bytes()[:400])
    assert run(photos, "--out", tmp_path, "--name", "set") == 1
    captured = capsys.readouterr()
    assert "6 images, 1 skipped" in captured.out
    assert [line for line in captured.err.splitlines() if "skipped" in line and "3.jpg" in line]
    assert len(tfds_source(tmp_path / "set")) == 6


def test_a_folder_without_readable_images_writes_nothing(tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(b"nothing")
    assert run(tmp_path / "in", "--out", tmp_path / "out") == 1
    assert "none of the 1 images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_set_is_replaced_only_with_overwrite(photos, tmp_path, capsys):
    options = ("--out", tmp_path / "sets", "--name", "set")
    assert run(photos, *options) == 0
    (photos / "0.jpg").unlink()
    assert run(photos, *options) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert len(tfds_source(tmp_path / "sets")) == 7
    assert run(photos, *options, "--overwrite") == 0
    assert len(tfds_source(tmp_path / "sets")) == 6
    assert [entry.name for entry in (tmp_path / "sets").iterdir()] == ["set"]


def test_a_write_failure_leaves_the_old_set_and_no_temporary_files(photos, tmp_path, monkeypatch, capsys):
    options = ("--out", tmp_path / "sets", "--name", "set")
    run(photos, *options)

    def full_disk(source, indices):
        yield from list(original(source, indices))[:2]
        raise OSError(28, "No space left on device")

    original = prepare.read_examples
    monkeypatch.setattr(prepare, "read_examples", full_disk)
    assert run(photos, *options, "--overwrite") == 1
    assert "No space left on device" in capsys.readouterr().err
    assert len(tfds_source(tmp_path / "sets")) == 7
    assert [entry.name for entry in (tmp_path / "sets").iterdir()] == ["set"]


def test_a_full_disk_ends_with_a_line(photos, tmp_path, capsys):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))  # of bytes per file
    try:
        assert run(photos, "--out", tmp_path / "sets", "--name", "set") == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "prepare: Failed to finalize writing" in capsys.readouterr().err
    assert list((tmp_path / "sets").iterdir()) == []


@pytest.mark.parametrize("option", ["--name=2nd", "--name=a-b", "--split=a/b"])
def test_names_that_tfds_does_not_allow_are_errors(photos, tmp_path, option, capsys):
    with pytest.raises(SystemExit):
        run(photos, "--out", tmp_path, option)
    assert "use letters, digits and _" in capsys.readouterr().err


def test_errors_of_wrong_folders_and_splits(photos, tmp_path):
    for name in ("one", "two"):
        run(photos, "--out", tmp_path / "sets", "--name", name)
    with pytest.raises(ValueError, match="has 2 data sets"):
        tfds_source(tmp_path / "sets")
    with pytest.raises(ValueError, match=r"no split 'test', only \['train'\]"):
        tfds_source(tmp_path / "sets" / "one", "test")
    with pytest.raises(ValueError, match=r"no dataset_info\.json"):
        tfds_source(photos)
    with pytest.raises(ValueError, match="neither a folder nor"):
        tfds_source("no_such_set")


def test_neither_packing_nor_reading_imports_tensorflow(photos, tmp_path):
    program = f"""
import sys
from pisa_jax.cli.prepare import main
assert "tensorflow_datasets" not in sys.modules and "grain" not in sys.modules  # `--help` stays fast
assert main([{str(photos)!r}, "--out", {str(tmp_path / "sets")!r}]) == 0
from pisa_jax.data.tfds import tfds_source
tfds_source({str(tmp_path / "sets")!r})[0]
print([name for name in sys.modules if name.split(".")[0] in ("tensorflow", "torch")])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_prompts_of_which_none_belongs_to_a_packed_image_are_refused(photos, tmp_path, caplog):
    run(photos, "--out", tmp_path / "sets", "--name", "set")
    source = tfds_source(tmp_path / "sets")
    options = {"batch_size": 1, "crop": 16, "seed": 0, "degrade": lambda gt, rng: gt}
    with pytest.raises(ValueError, match=r"none of the 1 prompts.*'photos/0.jpg'"):
        make_loader(source, prompts={"photos/0.jpg": "a ball"}, **options)
    make_loader(source, prompts={"0.jpg": "a ball", "1.jpg": "a box"}, **options)
    assert "2 of 7 images have one (28.6 %)" in caplog.text


def test_a_bad_record_is_counted_once(photos, tmp_path):
    examples = [{"image": (photos / f"{index}.jpg").read_bytes(), "path": f"{index}.jpg"} for index in range(6)]
    write_tfds(tmp_path / "sets", "set", "train", [*examples, {"image": b"<html>404</html>", "path": "bad"}], False)
    options = {"batch_size": 7, "crop": 16, "seed": 0, "degrade": lambda gt, rng: gt, "max_bad_share": 0.2}
    loader = make_loader(tfds_source(tmp_path / "sets"), **options)
    for _ in range(5):
        next(loader)
    assert len(loader.bad_files) == 1


def test_a_set_that_was_packed_again_is_noticed_at_a_resume(photos, tmp_path):
    options = {"batch_size": 1, "crop": 16, "seed": 0, "degrade": lambda gt, rng: gt}
    run(photos, "--out", tmp_path / "sets", "--name", "set")
    state = make_loader(tfds_source(tmp_path / "sets"), **options).get_state()
    make_loader(tfds_source(tmp_path / "sets"), **options).set_state(state)
    Image.fromarray(fake_source(1, 40, 9)[0].image).save(photos / "0.jpg")
    run(photos, "--out", tmp_path / "sets", "--name", "set", "--overwrite")
    with pytest.raises(ValueError, match="the data differs from that of the saved run: contents was"):
        make_loader(tfds_source(tmp_path / "sets"), **options).set_state(state)


def test_other_formats_than_array_record_are_refused(photos, tmp_path):
    run(photos, "--out", tmp_path / "sets", "--name", "set")
    info = tmp_path / "sets" / "set" / "1.0.0" / "dataset_info.json"
    info.write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    with pytest.raises(ValueError, match="has the format tfrecord; array_record is needed"):
        tfds_source(tmp_path / "sets")


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", ["", "[]", "{}", '{"name": "se', "\udcff"])
def test_damaged_metadata_is_refused_with_its_folder(packed, tmp_path, name, content):
    folder = shutil.copytree(packed, tmp_path / "set") / "1.0.0"
    (folder / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=rf"in {folder} cannot be used \(.*\); restore them, or create"):
        tfds_source(tmp_path / "set")


def test_an_empty_split_is_refused(packed, tmp_path):
    info = shutil.copytree(packed, tmp_path / "set") / "1.0.0" / "dataset_info.json"
    content = json.loads(info.read_text())
    content["splits"][0]["shardLengths"] = ["0"]
    info.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"the split 'train' of .* has no images"):
        tfds_source(tmp_path / "set")


def test_a_missing_file_of_a_set_is_found_at_the_start(packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "set") / "1.0.0"
    (file,) = folder.glob("*.array_record*")
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"1 of 1 files of a data set are missing, e.g. {file}"):
        tfds_source(tmp_path / "set")


def test_a_damaged_file_of_a_set_is_an_oserror(photos, tmp_path):
    run(photos, "--out", tmp_path / "sets", "--name", "set")
    source = tfds_source(tmp_path / "sets")
    with open(source.files[0], "r+b") as file:
        file.truncate(100)
    with pytest.raises(OSError, match="record 0 of train cannot be read"):
        source[0]


def test_the_replaced_set_returns_after_a_kill_between_both_renames(photos, tmp_path, capsys):
    sets = tmp_path / "sets"
    run(photos, "--out", sets, "--name", "set")
    (sets / "set").rename(sets / ".set.replaced")  # what a kill at this moment leaves
    (sets / ".set.incomplete").mkdir()
    assert run(photos, "--out", sets, "--name", "set") == 2
    assert "exists; add --overwrite" in capsys.readouterr().err
    assert [entry.name for entry in sets.iterdir()] == ["set"]
    assert len(tfds_source(sets)) == 7


KILLED = """
import os, signal, sys
from pisa_jax.cli import prepare

read_examples = prepare.read_examples


def killed(source, indices):
    yield from list(read_examples(source, indices))[:3]
    os.kill(os.getpid(), signal.SIGKILL)


prepare.read_examples = killed
prepare.main(sys.argv[1:])
"""


def test_a_set_is_complete_after_a_kill_and_a_second_run(photos, tmp_path):
    sets = tmp_path / "sets"
    run(photos, "--out", sets, "--name", "set")
    command = [sys.executable, "-c", KILLED, str(photos), "--out", str(sets), "--name", "set", "--overwrite"]
    done = subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (sets / ".set.incomplete").is_dir()
    assert len(tfds_source(sets)) == 7  # the old one, in spite of what is next to it
    (photos / "0.jpg").unlink()
    assert run(photos, "--out", sets, "--name", "set", "--overwrite") == 0
    assert [entry.name for entry in sets.iterdir()] == ["set"]
    assert len(tfds_source(sets)) == 6


def test_an_interrupt_ends_with_a_line(photos, tmp_path, monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepare, "read_examples", interrupted)
    assert run(photos, "--out", tmp_path / "sets", "--name", "set") == 130
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert list((tmp_path / "sets").iterdir()) == []


def test_a_name_that_is_not_utf8_is_reported_and_skipped(photos, tmp_path, capsys):
    os.rename(photos / "3.jpg", os.fsencode(photos) + b"/caf\xe9.jpg")
    assert run(photos, "--out", tmp_path, "--name", "set") == 1
    assert r"skipped: 'caf\udce9.jpg': the name is not valid UTF-8" in capsys.readouterr().err
    assert len(tfds_source(tmp_path / "set")) == 6
