"""Paths in buckets: reading, writing, copies and checksums on an emulated bucket, and what is refused."""

import base64

import pytest
from etils import epath

from pisa_jax.config import Config, Data, Stage, Validation, check_path
from pisa_jax.runtime import remote_paths

STAGES = (Stage("pix", steps=4),)


def test_a_path_in_a_bucket_is_no_local_folder(bucket, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = remote_paths.open_path(f"{bucket}/run") / "config.json"
    remote_paths.write_text(file, "{}")
    assert file.read_text() == "{}"
    assert epath.Path(f"{bucket}/run/config.json").exists()
    assert not list(tmp_path.iterdir())


def test_listings_are_not_cached(bucket, emulator):
    folder = remote_paths.open_path(bucket)
    (folder / "a").write_text("a")
    assert [path.name for path in folder.iterdir()] == ["a"]
    name = f"{bucket.removeprefix('gs://tests/')}/b"  # written by another machine
    entry = {"name": name, "bucket": "tests", "size": "1", "kind": "storage#object"}
    emulator.create_file("tests", name, b"b", entry)
    assert sorted(path.name for path in folder.iterdir()) == ["a", "b"]


def test_folders_are_copied_renamed_and_deleted(bucket, tmp_path):
    for name in ("a.txt", "below/b.txt"):
        (tmp_path / "one" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "one" / name).write_text(name)
    folder = remote_paths.open_path(bucket)
    remote_paths.copy_folder(tmp_path / "one", folder / "one")
    remote_paths.copy_folder(tmp_path / "one", folder / "two")
    remote_paths.rename(folder / "one", folder / "two")
    assert [path.name for path in folder.iterdir()] == ["two"]
    remote_paths.copy_folder(folder / "two", tmp_path / "two")
    assert (tmp_path / "two" / "below" / "b.txt").read_text() == "below/b.txt"
    remote_paths.delete(folder / "two")
    assert not (folder / "two").exists()
    remote_paths.rename(tmp_path / "one", tmp_path / "two")
    remote_paths.delete(tmp_path / "two" / "a.txt")
    remote_paths.delete(tmp_path / "two")
    assert not list(tmp_path.iterdir())


def test_an_upload_happens_only_if_the_block_succeeds(bucket, tmp_path):
    for target in (remote_paths.open_path(bucket) / "file", tmp_path / "file"):
        with remote_paths.uploaded(target) as local:
            local.write_text("one")
        assert target.read_text() == "one"
    with pytest.raises(ValueError, match="two"), remote_paths.uploaded(remote_paths.open_path(bucket) / "other"):
        raise ValueError("two")
    assert not (remote_paths.open_path(bucket) / "other").exists()


def refuse(path):
    with remote_paths.local_copy(path) as file:
        raise ValueError(f"{file} is damaged")


def test_errors_name_the_file_in_the_bucket(bucket):
    with (
        pytest.raises(FileNotFoundError, match=f"{bucket}/no.txt does not exist"),
        remote_paths.local_copy(f"{bucket}/no.txt"),
    ):
        pass
    (remote_paths.open_path(bucket) / "a.txt").write_text("text")
    with remote_paths.local_copy(f"{bucket}/a.txt") as file:
        assert file.read_text() == "text"
    with pytest.raises(ValueError, match=f"^{bucket}/a.txt is damaged$"):
        refuse(f"{bucket}/a.txt")
    with pytest.raises(OSError, match=f"{bucket} cannot be used: KeyError"), remote_paths.bucket_errors(bucket):
        raise KeyError


def test_checksums_are_those_of_the_bucket(bucket):
    folder = remote_paths.open_path(bucket)
    (folder / "below" / "file").write_bytes(b"content")
    crc32c = base64.b64encode(0x61AF7533.to_bytes(4, "big")).decode()  # of the Castagnoli polynomial
    assert remote_paths.object_checksums(folder) == {"below/file": [7, crc32c]}


def test_without_gcsfs_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(OSError, match=r"gs://a/b is in a bucket, which needs gcsfs: pip install 'pisa_jax\[gcp\]'"):
        remote_paths.open_path("gs://a/b")


@pytest.mark.parametrize("path", ["runs/a", "/gs/a", "sd2-community/sd", "./s3:/a", "demo", "div2k/x:1.0.0", "C:/x"])
def test_local_paths_are_unchanged(path):
    assert check_path("out", path) == path


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "s3://bucket/run",
            "out is 's3://bucket/run', and paths with s3:// are not supported; give a local path, or gs",
        ),
        ("file:///run", "paths with file:// are not supported"),
        ("gs:/bucket/run", "a path in a bucket has the form gs://BUCKET/FOLDER"),
        ("gs://bucket", "a path in a bucket has the form gs://BUCKET/FOLDER"),
        ("gs://bucket/", "a path in a bucket has the form gs://BUCKET/FOLDER"),
    ],
)
def test_unknown_schemes_are_refused(path, message):
    with pytest.raises(ValueError, match=message):
        Config(out=path, stages=STAGES)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda path: Config(out="run", stages=STAGES, model=path), "model"),
        (lambda path: Config(out="run", stages=STAGES, perceptual_weights=path), "perceptual_weights"),
        (lambda path: Data(source="folder", path=path), "data.path"),
        (lambda path: Data(source="list", path="a", hq_path=path), "data.hq_path"),
        (lambda path: Data(prompts=path, source="fake"), "data.prompts"),
        (lambda path: Validation(path), "validation.path"),
    ],
)
def test_what_cannot_be_in_a_bucket_is_refused_with_gcsfuse(make, name):
    with pytest.raises(ValueError, match=f"^{name} is 'gs://a/b'.* mount the bucket with gcsfuse"):
        make("gs://a/b")
    with pytest.raises(ValueError, match=f"^{name} is 's3://a/b', and paths with s3:// are not supported"):
        make("s3://a/b")


def test_the_run_directory_and_the_start_can_be_in_a_bucket():
    config = Config(out="gs://a/b/", stages=STAGES, start="gs://a/b/adapters.safetensors")
    assert (config.out, config.start) == ("gs://a/b", "gs://a/b/adapters.safetensors")
