"""Checks of a config: every number, name and path, before anything is loaded."""

import ast
import dataclasses
import math
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from pisa_jax.config import AdapterSpec, Config, Data, Stage

STAGE = Stage("pix", 10)
CONFIG = Config(out="run", stages=(STAGE,))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": math.nan}, "stage pix: learning_rate is nan; it must be a finite number of at least 0"),
        ({"learning_rate": -1e-4}, "stage pix: learning_rate is -0.0001"),
        ({"learning_rate": 0.0}, "stage pix: learning_rate is 0; it must be positive"),
        ({"l2": math.nan}, "stage pix: loss weight l2 is nan"),
        ({"perceptual": -1.0}, "stage pix: loss weight perceptual is -1.0"),
        ({"csd": math.inf}, "stage pix: loss weight csd is inf"),
        ({"l2": 0.0}, "stage pix: all loss weights are 0"),
        ({"steps": 0}, "stage pix: steps is a positive integer, not 0"),
        ({"warmup": 10}, "stage pix: warmup 10 of 10 steps"),
        ({"adapter": "faces/pix"}, "adapter name 'faces/pix': use letters, digits"),
        ({"adapter": ""}, "adapter name ''"),
    ],
)
def test_wrong_stages_are_refused(changes, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace("'", ".")):
        dataclasses.replace(STAGE, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip": -1.0}, "clip is -1.0; it must be a finite number of at least 0"),
        ({"clip": 0.0}, "clip is 0, which would make every update 0"),
        ({"betas": (0.9, 2.0)}, "betas is 2.0; it must be a finite number of at least 0 and less than 1"),
        ({"betas": (math.nan, 0.999)}, "betas is nan"),
        ({"weight_decay": -5.0}, "weight_decay is -5.0"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"guidance": math.nan}, "guidance is nan"),
        ({"seed": 2**63}, "seed is 9223372036854775808; it must be in 0..2147483647"),
        ({"seed": -1}, "seed is -1"),
        ({"csd_timesteps": (500, 20)}, "csd_timesteps are within 0..999, not 500..20"),
        ({"stages": ()}, "a run needs at least one stage"),
    ],
)
def test_wrong_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alpha": math.nan}, "alpha is nan; it must be a finite number"),
        ({"rank": 0}, "positive integer, not 0"),
        ({"targets": "conv("}, r"targets 'conv\(' is not a regular expression: missing \)"),
    ],
)
def test_wrong_adapter_specs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(AdapterSpec(), **changes)


@pytest.mark.parametrize("name", ["hq_probability", "null_prompt_probability", "max_bad_share", "min_size_share"])
@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_shares_are_between_0_and_1(name, value):
    with pytest.raises(ValueError, match=f"data.{name} is between 0 and 1"):
        Data(source="fake", **{name: value})


def test_paths_are_strings_with_the_home_folder():
    """In a process of its own: the type checks of the tests refuse `Path`, which a config file may use."""
    code = """
from pathlib import Path
from pisa_jax.config import Config, Data, Stage, Validation
data = Data(path=Path("images"), prompts="~/prompts.jsonl")
config = Config(out=Path("~/run"), stages=(Stage("pix", 1),), data=data, validation=Validation(path=Path("~/val")))
print(repr([config.out, config.data.path, config.data.prompts, config.validation.path]))
"""
    environment = os.environ | {"HOME": "/home/somebody"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    home = "/home/somebody"
    assert ast.literal_eval(done.stdout.decode()) == [f"{home}/run", "images", f"{home}/prompts.jsonl", f"{home}/val"]
