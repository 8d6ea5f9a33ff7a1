"""benchmarks/fuzz.py and soak.py: they see every kind of fault, and the readers and the program have none."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from pisa_jax.imaging.image_files import IMAGE_SUFFIXES

BENCHMARKS = ROOT / "benchmarks"
# A reader with one fault, which the content of the file chooses.
FAULTY = """
import os, sys, time
sys.path.insert(0, {benchmarks!r})
from fuzz_reader import serve

def read(path, sound):
    match path.read_text():
        case "crash": os.abort()
        case "hang": time.sleep(1000)
        case "traceback": raise KeyError("x")
        case "warning":
            import warnings
            warnings.warn("x")
        case "unclear": raise ValueError("it is damaged")
        case "lines": raise ValueError(f"{{path}} is\\ndamaged")
        case "refused": raise ValueError(f"{{path}} is damaged")
        case "memory": b"x" * (100 * 2**20)
        case "more memory": bytes(4 * 2**30)
        case "left": open("partial", "w").close()
        case "beside": open(f"{{path}}.part", "w").close()
        case "code": os.system("touch code_was_run")
    return lambda: None

serve({{"adapters": read}})
"""
EXPECTED = {
    "read": "read",
    "refused": "refused",
    "traceback": "traceback",
    "warning": "traceback",
    "unclear": "unclear",
    "lines": "unclear",
    "memory": "memory",
    "more memory": "memory",
    "left": "left",
    "beside": "left",
    "code": "code",
    "crash": "crash",
    "hang": "hang",
}


@pytest.fixture
def fuzz(monkeypatch):
    """The modules of the benchmark import each other as `python benchmarks/fuzz.py` does."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("fuzz")


def run(name, *arguments, code=0):
    """Run a benchmark; returns what it prints."""
    command = [sys.executable, BENCHMARKS / name, *arguments]
    # conftest.py's flags make programs that compile quickly and run slowly.
    named = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run([str(part) for part in command], env=named, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout


def test_every_kind_of_fault_is_seen(fuzz, tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SLEEP", 2)
    script = tmp_path / "faulty.py"
    script.write_text(FAULTY.format(benchmarks=str(BENCHMARKS)))
    (tmp_path / "keep").mkdir()
    reader = fuzz.Reader([sys.executable, str(script), "--memory", "1"], tmp_path)
    campaign = fuzz.Campaign(reader, tmp_path / "keep")
    for index, content in enumerate(EXPECTED):
        campaign.read(fuzz.Job("adapters", index, f".{content}", b"", [content], content.encode()))
    campaign.read(fuzz.Job("adapters", len(EXPECTED), ".last", b"", [], b"read"))
    reader.close()
    found = {name: {key for key, count in counts.items() if count} for name, counts in campaign.counts.items()}
    for content, outcome in EXPECTED.items():
        assert outcome in found[f"adapters .{content}"], content
    assert found["adapters .last"] == {"tried", "read"}  # a new child, and nothing left of the one before
    faults = {content: fault for content, fault in EXPECTED.items() if fault not in ("read", "refused")}
    assert [(f.mutations[0], f.fault) for f in campaign.findings] == list(faults.items())
    for finding in json.loads((tmp_path / "keep" / "faults.json").read_text()):
        assert (tmp_path / "keep" / finding["file"]).read_text() == finding["mutations"][0]


def test_a_seed_gives_the_same_files(fuzz):
    one, other = (list(fuzz.jobs(40, 40, 7)) for _ in range(2))
    assert one == other
    assert one != list(fuzz.jobs(40, 40, 8))
    assert sum(job.kind == "image" for job in one) == 40
    assert len({job.suffix for job in one}) > 15
    changed = [job for job in one if job.data != job.sound]
    assert len(changed) > 70
    assert all(job.mutations for job in changed)


def test_the_sound_files_are_read(fuzz, tmp_path):
    """Else the mutations would test refusals alone."""
    reader = fuzz.Reader(fuzz.READER, tmp_path)
    campaign = fuzz.Campaign(reader)
    images = [("image", suffix, data) for suffix, data in fuzz.image_seeds() if suffix in IMAGE_SUFFIXES]
    files = images + fuzz.adapter_seeds()
    for index, (kind, suffix, data) in enumerate(files):
        campaign.read(fuzz.Job(kind, index, suffix, data, [], data))
    reader.close()
    assert campaign.findings == []
    assert all(counts["read"] for name, counts in campaign.counts.items() if name != "image .pfm")
    assert sum(counts["refused"] for counts in campaign.counts.values()) <= 12


def test_a_few_mutated_files():
    assert "\n0 faults" in run("fuzz.py", "--images", 100, "--adapters", 100, "--seed", 1)


@pytest.mark.slow
def test_mutated_files_for_a_minute(tmp_path):
    arguments = ("--seed", 2, "--minutes", 1, "--keep", tmp_path / "keep", "--json", tmp_path / "figures.json")
    run("fuzz.py", *arguments)
    figures = json.loads(Path(tmp_path / "figures.json").read_text())
    assert figures["faults"] == []
    assert sum(counts["tried"] for counts in figures["counts"].values()) > 100


def test_growth_after_the_warm_up_is_seen(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    soak = importlib.import_module("soak")
    watch = soak.Watch()
    watch.records = [(10.0 * index, 9, 4) for index in range(50)] + [(500.0, 9, 4)] * 350
    assert [passed for *_, passed in watch.checks("x")] == [True, True, True]
    watch.records[390] = (533.0, 10, 5)
    assert [passed for *_, passed in watch.checks("x")] == [False, False, False]
    watch()
    memory, files, threads = watch.records[-1]
    assert memory > 50
    assert files >= 3
    assert threads >= 1


@pytest.mark.slow
def test_endurance_and_difficult_surroundings():
    assert "\n0 checks failed" in run("soak.py", "--files", 120, "--calls", 120)
