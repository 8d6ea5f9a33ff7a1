"""`pisa-sr warmup`: afterwards, runs compile nothing."""

import contextlib
import io
import os
import subprocess
import sys

import pytest
from asset_paths import ROOT
from PIL import Image

from pisa_jax.cli import warmup
from pisa_jax.sd import random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    random_model.write_random_model(folder, "nano")
    return folder


def program(command, model, cache, *arguments):
    """Run a command in a process of its own: in this one, jax may hold what it has compiled before."""
    options = ["--model", model, "--adapters", model / "adapters.safetensors", "--min-size", "32"]
    words = [command, *arguments, *options, "--compile-cache", cache]
    done = subprocess.run(
        [sys.executable, "-m", "pisa_jax", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 0, done.stderr
    return done


def compiled(cache):
    return {file.name for file in cache.iterdir() if file.name.endswith("-cache")}


def save(path, size):
    path.parent.mkdir(exist_ok=True)
    Image.effect_noise(size, 50).convert("RGB").save(path)


def test_after_a_warmup_for_sizes_nothing_is_compiled(model, tmp_path):
    cache = tmp_path / "cache"
    done = program("warmup", model, cache, "--sizes", "40x32", "48x64")
    assert "ready in" in done.stdout
    before = compiled(cache)
    for index, size in enumerate([(10, 8), (9, 8), (12, 16), (12, 15)]):  # two of them in larger buckets
        save(tmp_path / "in" / f"{index}.png", size)
    for scales in ("1,1", "0.5,0.8"):
        program("infer", model, cache, "-i", tmp_path / "in", "-o", tmp_path / "out", "--scales", scales)
        assert compiled(cache) == before


def test_a_second_run_on_the_same_files_compiles_nothing(model, tmp_path):
    cache = tmp_path / "cache"
    for index, size in enumerate([(8, 8), (9, 10), (11, 14), (16, 9), (20, 22)]):
        save(tmp_path / "in" / f"{index}.png", size)
    arguments = ("-i", tmp_path / "in", "-o", tmp_path / "out", "--scales", "1,0.5")
    program("infer", model, cache, *arguments)
    assert (cache / "buckets.json").is_file()
    before = compiled(cache)
    (cache / "buckets.json").write_text("{")  # a damaged record is as none
    program("infer", model, cache, *arguments)
    assert compiled(cache) == before


def failed(*arguments):
    error = io.StringIO()
    with contextlib.redirect_stderr(error):
        try:
            code = warmup.main([*map(str, arguments)])
        except SystemExit as stopped:
            code = stopped.code
    assert "Traceback" not in error.getvalue()
    return code, error.getvalue()


def test_wrong_usage(tmp_path):
    code, error = failed("--compile-cache", "off")
    assert (code, "off leaves nothing to fill" in error) == (2, True)
    code, error = failed("--sizes", "640")
    assert (code, "'640' is not a width and a height in pixels, such as 640x512" in error) == (2, True)
    code, error = failed("--sizes", "0x512")
    assert (code, "'0x512' is not a width" in error) == (2, True)
    empty = tmp_path / "empty"
    empty.mkdir()
    code, error = failed("-i", empty, "--compile-cache", tmp_path / "cache")
    assert (code, "no images in" in error) == (1, True)
    (tmp_path / "cache").write_text("a file")
    code, error = failed("--compile-cache", tmp_path / "cache")
    assert (code, "compiled functions are not kept" in error) == (1, True)


def test_default_sizes():
    assert warmup.default_sizes(512) == [
        (512, 512),
        (640, 512),
        (512, 640),
        (683, 512),
        (512, 683),
        (768, 512),
        (512, 768),
        (910, 512),
        (512, 910),
    ]
