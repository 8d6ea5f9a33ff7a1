"""The wheel contains what its commands need: it is built, installed outside the checkout, and used there."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest
from conftest import DATA, ROOT
from event_files import events
from PIL import Image

NOT_SOURCES = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "build", "out", "runs", "site")


def run(folder, *command):
    """The output of a command that must succeed and must not find the checkout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the checkout: setuptools writes beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(ROOT, folder / "source", ignore=NOT_SOURCES)
    run(folder, sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source)
    shutil.rmtree(source)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def program(wheel):
    """`pisa-sr` of a fresh environment with the wheel, which reads the dependencies of the running one: no network."""
    folder = wheel.parent / "environment"
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    run(folder, sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel)
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"])
    where = run(folder, python, "-c", "import pisa_jax; print(pisa_jax.__file__)")
    assert where.startswith(str(packages)), where
    return folder / "bin" / "pisa-sr"


def test_it_holds_the_package_and_its_data_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    package = ROOT / "pisa_jax"
    sources = [
        *package.rglob("*.py"),
        *package.glob("*.pyi"),
        *(path for path in (package / "assets").rglob("*") if path.is_file()),
    ]
    expected = {path.relative_to(ROOT).as_posix() for path in sources}
    expected |= {f"pisa_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert names == expected


def test_help_lists_the_commands(program, tmp_path):
    output = run(tmp_path, program, "--help")
    for command in ("infer", "train", "evaluate", "degrade", "prepare", "convert", "inspect"):
        assert f"\n  {command} " in output


def test_infer_upscales_with_the_demo_model(program, tmp_path):
    image = DATA / "formats" / "gray16_interlaced.png"
    run(tmp_path, program, "infer", "-i", image, "-o", "out", "-s", "2", "--min-size", "64", "--compile-cache", "off")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["gray16_interlaced.png"]


def test_the_debug_run_and_its_result(program, tmp_path):
    """Train the config that the wheel contains, with validation, then upscale an image with the result.

    The semantic adapter has a decomposition whose file is beside the run and no part of the package.
    """
    (tmp_path / "watched").mkdir()
    shutil.copy(ROOT / "examples" / "output_gain.py", tmp_path)
    for name, size in (("photo.png", (20, 12)), ("watched/a.png", (80, 64))):
        Image.linear_gradient("L").resize(size).convert("RGB").save(tmp_path / name)
    watched = ("--validation.path", "watched", "--validation.every", "4")
    gains = ("--stages.1.spec.decomposition", "output_gain:output_gain")
    printed = run(tmp_path, program, "train", "--config", "debug", "--out", "run", *watched, *gains)
    assert printed.count(" images/s, ends ") == 8
    found = events(tmp_path / "run" / "tensorboard")
    assert list(found["pix/l2"]) == [1, 2, 3, 4]
    assert list(found["sem/csd"]) == list(found["sem/perceptual"]) == [5, 6, 7, 8]
    assert list(found["time/images_per_second"]) == list(range(1, 9))
    for name in ("validation", *(f"validation/{metric}" for metric in ("l2", "psnr", "ssim", "perceptual"))):
        assert list(found[name]) == [0, 4, 8], name

    trained = ("--model", "run/model", "--adapters", "run/adapters.safetensors", "--scales", "1,0.5")
    trained += ("--decomposition", "output_gain:output_gain")
    run(tmp_path, program, "infer", "-i", "photo.png", *trained, "--min-size", "32", "--compile-cache", "off")
    with Image.open(tmp_path / "out" / "photo.png") as result:
        assert result.size == (80, 48)
