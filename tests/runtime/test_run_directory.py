"""Run directories: which are refused, which changes of a config a resumed run accepts, and the lock."""

import contextlib
import dataclasses
import json
import logging
import subprocess
import sys

import pytest

from pisa_jax.config import AdapterSpec, Config, Data, Stage
from pisa_jax.runtime.run_directory import CONFIG_FILE, LOCK_FILE, check_run_directory, claim_run_directory


def config(out, **fields):
    stages = (Stage("pix", steps=4), Stage("sem", steps=4, frozen=("pix",)))
    return Config(**({"out": str(out), "stages": stages} | fields))


@pytest.fixture
def run(tmp_path):
    return claim_run_directory(config(tmp_path / "run"), False, False)


def resume(run, **fields):
    return claim_run_directory(config(run, **fields), True, False)


def edit(run, change):
    saved = json.loads((run / CONFIG_FILE).read_text())
    change(saved)
    (run / CONFIG_FILE).write_text(json.dumps(saved))


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"out": 1}', "\udcff"])
def test_a_damaged_config_is_named(run, content):
    (run / CONFIG_FILE).write_bytes(content.encode(errors="surrogateescape"))
    for function in (check_run_directory, claim_run_directory):
        with pytest.raises(ValueError, match=r"run/config\.json is .*restore it from a copy, or start a new run"):
            function(config(run), True, False)
    with pytest.raises(FileExistsError, match="is not a run directory"):
        claim_run_directory(config(run), False, True)  # never deleted


@pytest.mark.parametrize("name", ["sd21 [rank 4]", "what?", "all*"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused(tmp_path, name):
    for out in (tmp_path / name, tmp_path / name / "run"):
        with pytest.raises(ValueError, match=r"orbax takes for a pattern; give another with --out"):
            claim_run_directory(config(out), False, False)
    assert not list(tmp_path.iterdir())


def test_fields_that_a_later_version_added_have_their_defaults(run):
    def as_an_older_version_wrote_it(saved):
        del saved["remat"], saved["data"]["split"], saved["validation"]
        for stage in saved["stages"]:
            del stage["latent"], stage["latent_window"], stage["spec"]["decomposition"]

    edit(run, as_an_older_version_wrote_it)
    resume(run)
    edit(run, as_an_older_version_wrote_it)
    other = Stage("pix", steps=4, latent=1.0), Stage("sem", steps=4, frozen=("pix",), spec=AdapterSpec("loha"))
    with pytest.raises(ValueError, match=r"stages/0/latent was 0.0 and is 1.0; stages/1/spec/decomposition was 'lora'"):
        resume(run, stages=other)


def stages(steps=(4, 4), rates=(5e-5, 5e-5)):
    first, last = ({"steps": number, "learning_rate": rate} for number, rate in zip(steps, rates, strict=True))
    return Stage("pix", **first), Stage("sem", frozen=("pix",), **last)


@pytest.mark.parametrize(
    "fields",
    [
        {"accumulate": 4, "remat": True},
        {"data": Data(source="fake", max_bad_share=0.1, workers=0)},
        {"log_every": 1, "save_every": 1, "max_bad_steps": 20, "mesh_data": 1},
    ],
)
def test_changes_without_effect_are_accepted(run, fields, caplog):
    resume(run, **fields)
    assert not caplog.records


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "mounted/elsewhere"},
        {"perceptual_weights": "vgg16.safetensors"},
        {"data": Data(source="fake", path="elsewhere")},
        {"data": Data(source="fake", prompts="elsewhere")},
        {"stages": stages(steps=(4, 8))},
        {"stages": stages(rates=(5e-5, 1e-5))},
    ],
)
def test_other_places_and_what_messages_recommend_are_accepted_and_reported(run, fields, caplog):
    with caplog.at_level(logging.WARNING):
        check_run_directory(config(run, **fields), True, False)
        resume(run, **fields)
    (record,) = caplog.records
    assert record.getMessage().startswith("the resumed run continues with another config: ")
    assert json.loads((run / CONFIG_FILE).read_text()) == json.loads(
        json.dumps(dataclasses.asdict(config(run, **fields)))
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": 7}, "seed was 0 and is 7"),
        ({"dtype": "bfloat16"}, "dtype was 'float32' and is 'bfloat16'"),
        ({"stages": stages(steps=(8, 4))}, "stages/0/steps was 4 and is 8"),
        ({"stages": stages(steps=(4, 2))}, "stages/1/steps was 4 and is 2"),
        ({"stages": stages(rates=(5e-5, 1e-4))}, "stages/1/learning_rate was 5e-05 and is 0.0001"),
        ({"stages": stages()[:1]}, "stages/1/adapter was 'sem' and is None"),
    ],
)
def test_changes_of_the_result_are_refused(run, fields, message):
    before = (run / CONFIG_FILE).read_text()
    with pytest.raises(ValueError, match=message):
        resume(run, **fields)
    assert (run / CONFIG_FILE).read_text() == before


HOLD = """
import contextlib, sys
from pisa_jax.config import Config, Stage
from pisa_jax.runtime.run_directory import claim_run_directory
config = Config(out=sys.argv[1], stages=(Stage("pix", steps=4), Stage("sem", steps=4, frozen=("pix",))))
with contextlib.ExitStack() as lifetime:
    claim_run_directory(config, False, False, lifetime)
    print("claimed", flush=True)
    sys.stdin.read()
"""


def test_a_directory_in_use_is_refused_and_a_killed_program_leaves_no_lock(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "claimed\n"
        (run / "checkpoints").mkdir()
        for again, overwrite in ((True, False), (False, True)):
            for function in (check_run_directory, claim_run_directory):
                with pytest.raises(OSError, match=rf"run is in use by process {first.pid} on .*; wait until it ends"):
                    function(config(run), again, overwrite)
        assert {path.name for path in run.iterdir()} == {CONFIG_FILE, LOCK_FILE, "checkpoints"}
        assert first.poll() is None
        first.kill()
    resume(run)


def test_the_lock_ends_with_the_run(run):
    with contextlib.ExitStack() as lifetime:
        claim_run_directory(config(run), True, False, lifetime)
        with pytest.raises(OSError, match="is in use"):
            resume(run)
    resume(run)


def test_overwrite_deletes_the_old_run_only_when_it_is_allowed_to(run):
    for name in ("checkpoints/4/file", "model/unet", "adapters.safetensors"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).touch()
    with pytest.raises(FileExistsError, match="give --resume to continue the run, or --overwrite"):
        claim_run_directory(config(run), False, False)
    with pytest.raises(ValueError, match="give only one of them"):
        claim_run_directory(config(run), True, True)
    assert (run / "adapters.safetensors").exists()
    claim_run_directory(config(run), False, True)
    assert {path.name for path in run.iterdir()} == {CONFIG_FILE, LOCK_FILE}


def test_hidden_files_of_a_folder_that_is_not_a_run_are_kept(tmp_path):
    (tmp_path / ".git").mkdir()
    claim_run_directory(config(tmp_path), False, True)
    assert (tmp_path / ".git").is_dir()
