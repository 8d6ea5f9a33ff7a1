"""`infer.py` with a tiny random model, in this process: another one spends seconds on imports."""

import contextlib
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from pisa_jax.cli import infer as infer_program
from pisa_jax.sd import random_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    random_model.write_random_model(folder, "nano")
    return folder


def in_this_process(command):
    """Run infer.py as `subprocess.run` does."""
    out, error = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
        try:
            code = infer_program.main(command)
        except SystemExit as stopped:
            code = stopped.code
    return subprocess.CompletedProcess(command, code, out.getvalue(), error.getvalue())


def in_its_own_process(command):
    return subprocess.run([sys.executable, ROOT / "infer.py", *command], capture_output=True, text=True, check=False)


@pytest.fixture
def infer(model):
    def run(*arguments, code=0, given=("--model", "--adapters"), cache="off", start=in_this_process):
        command = [*arguments, "--min-size", "32", "--compile-cache", cache]
        for name, value in (("--model", model), ("--adapters", model / "adapters.safetensors")):
            command += [name, value] if name in given else []
        done = start([str(part) for part in command])
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr
        return done

    return run


def save(path, height=8, width=10, seed=0, **options):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def size(path):
    with Image.open(path) as image:
        return image.size


def test_help_imports_neither_jax_nor_numpy():
    code = (
        "import sys; from pisa_jax.cli import infer; print(infer.parser().format_help());"
        "sys.exit('jax' in sys.modules or 'numpy' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    for flag in ("--input", "--scales", "--color-fix", "--min-size", "--tile", "--skip-existing", "--compile-cache"):
        assert flag in done.stdout


def test_a_bad_file_does_not_stop_the_others(infer, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    save(source / "a.png")
    save(source / "b.jpg", seed=1)
    complete = (source / "b.jpg").read_bytes()
    (source / "cut.jpg").write_bytes(complete[: len(complete) // 3])
    (source / "text.png").write_text("not an image")
    done = infer("-i", source, source / "missing.png", "-o", out, "--scales", "1,1", "0.5", "--grid", "--json",
                 tmp_path / "reports.json", "--batch-size", 2, code=1)  # fmt: skip
    assert sorted(path.name for path in out.iterdir()) == [
        "a_grid.png", "a_p0.5_s0.5.png", "a_p1_s1.png", "b_grid.png", "b_p0.5_s0.5.jpg", "b_p1_s1.jpg",
    ]  # fmt: skip
    assert size(out / "a_p1_s1.png") == (40, 32)
    assert "2 ok, 3 failed of 5" in done.stdout
    assert "compiled encode" in done.stderr
    reports = {
        report["input"].rsplit("/", 1)[-1]: report for report in json.loads((tmp_path / "reports.json").read_text())
    }
    assert [reports[name]["outcome"] for name in ("a.png", "b.jpg", "cut.jpg", "text.png", "missing.png")] == [
        "ok", "ok", "failed", "failed", "failed",
    ]  # fmt: skip
    ok = reports["a.png"]
    assert (ok["input_size"], ok["output_size"], ok["scales"]) == ([10, 8], [40, 32], [[1.0, 1.0], [0.5, 0.5]])
    assert ok["seconds"] > 0
    assert ok["outputs"] == [str(out / name) for name in ("a_p1_s1.png", "a_p0.5_s0.5.png", "a_grid.png")]
    for name in ("cut.jpg", "text.png", "missing.png"):
        assert f"{name}: FAILED: {reports[name]['error']}" in done.stderr


def test_flags_of_the_original_program_and_skip_existing(infer, tmp_path):
    source, out = save(tmp_path / "a.png"), tmp_path / "out"
    original = ("--input_image", source, "--output_dir", out, "--upscale", 2, "--lambda_pix", 0.5, "--lambda_sem", 0.7)
    more = ("--align_method", "nofix", "--process_size", 32, "--latent_tiled_size", 16, "--latent_tiled_overlap", 4)
    infer(*original, *more, "--suffix", "_x2")
    written = out / "a_x2.png"
    assert size(written) == (20, 16)
    before = written.stat().st_mtime_ns
    done = infer(*original, *more, "--suffix", "_x2", "--skip-existing")
    assert "1 skipped of 1" in done.stdout
    assert written.stat().st_mtime_ns == before


def test_results_are_deterministic_and_use_the_compilation_cache(infer, tmp_path):
    source, cache = save(tmp_path / "a.png"), tmp_path / "cache"
    for name in ("one", "two"):
        infer("-i", source, "-o", tmp_path / name, "--scales", "0.8,0.3", cache=cache, start=in_its_own_process)
    assert (tmp_path / "one" / "a.png").read_bytes() == (tmp_path / "two" / "a.png").read_bytes()
    assert any(cache.iterdir())
    infer("-i", source, "-o", tmp_path / "seed", "--scales", "0.8,0.3", "--seed", 1)
    assert (tmp_path / "seed" / "a.png").read_bytes() != (tmp_path / "one" / "a.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--scales", "1,a"], "'1,a' is not PIX,SEM"),
        (["--scale", "0.5"], "'0.5' is not a number of at least 1"),
        (["--tile", "32", "--overlap", "32"], "--overlap 32 must be less than --tile 32"),
        (["--vae-tile-mode", "exakt"], "invalid choice: 'exakt'"),
        (["--vae-tile", "big"], "'big' is not an integer of at least 0"),
        (["--batch-size", "0"], "'0' is not an integer of at least 1"),
        (["--color-fix", "adian"], "invalid choice: 'adian'"),
        (["--sacles", "1"], "unrecognized arguments: --sacles"),
    ],
)
def test_wrong_usage(infer, tmp_path, arguments, message):
    assert message in infer("-i", "a.png", "-o", tmp_path / "out", *arguments, code=2).stderr
    assert not (tmp_path / "out").exists()


def test_load_errors_are_reported_in_one_line(infer, model, tmp_path):
    source, out = save(tmp_path / "a.png"), tmp_path / "out"
    assert "no adapters" in infer("-i", source, "-o", out, code=1, given=("--model",)).stderr
    error = infer("-i", source, "-o", out, "--model", tmp_path / "nowhere", code=1, given=("--adapters",)).stderr
    assert "nowhere' is neither a folder nor a hub id" in error
    (tmp_path / "empty").mkdir()
    done = infer("-i", tmp_path / "empty", "-o", out, code=1)
    assert "no images in" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "tile"),
    [
        ([], "auto"),
        (["--vae-tile", "0"], 0),
        (["--vae-tile", "512"], 512),
        (["--vae_encoder_tiled_size", "1024", "--vae_decoder_tiled_size", "224"], 1024),
        (["--vae_encoder_tiled_size", "1024", "--vae_decoder_tiled_size", "96"], 768),
        (["--vae_decoder_tiled_size", "96", "--vae-tile", "auto"], "auto"),
    ],
)
def test_vae_tile_flags_of_the_original_program(arguments, tile):
    args = infer_program.parser().parse_args(["-i", "a.png", "-o", "out", *arguments])
    assert infer_program.choose_vae_tile(args) == tile


def test_without_a_folder_for_the_compilation_cache(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for home, reason in ((lambda: tmp_path / "file", "Not a directory"), (no_home, "home directory")):
        monkeypatch.setattr(infer_program.Path, "home", home)
        infer_program.enable_compilation_cache(None)
        error = capsys.readouterr().err
        assert "compiled functions are not kept" in error
        assert reason in error
