"""benchmarks/accelerator.py: its schedule, its rows and its document; a slow test runs it with the smallest model."""

import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import step_case
from accelerator_parts import random_sd, report, schedule, trace, training
from accelerator_parts.rows import STATUSES, Rows

PART_STATUSES = ("complete", "cut short", "failed", "skipped")


def collected(until=float("inf")):
    """Return rows, and the list of what they write."""
    records = []
    return Rows(records.append, until, {"parts": []}), records


def test_rows_report_values_failures_and_what_does_not_fit():
    rows, records = collected(time.time() + 30)

    def fail(message):
        raise RuntimeError(message)

    assert rows.attempt("a", lambda: {"ms": 1.5, "ratio": float("nan")})["ms"] == 1.5
    rows.attempt("b", lambda: {"status": "wrong", "error": 1.0})
    assert rows.attempt("c", lambda: fail("no\nkernel")) is None
    rows.attempt("d", lambda: fail("RESOURCE_EXHAUSTED: 80 GiB"))
    rows.attempt("e", lambda: {}, expected=40)
    found = [record["row"] for record in records if "row" in record]
    assert [row["status"] for row in found] == ["ok", "wrong", "failed", "out of memory", "skipped"]
    assert [record["start"] for record in records if "start" in record] == ["a", "b", "c", "d"]
    assert found[0]["values"] == {"ms": 1.5, "ratio": None}
    assert (found[1]["values"], found[2]["message"]) == ({"error": 1.0}, "no kernel")
    assert found[4]["message"].startswith("takes about 40 s, and ")


def test_deadlines_divide_the_time_among_the_parts_that_can_run():
    parts = [
        schedule.Part("a", "", 0.5),
        schedule.Part("b", "", 0.3, ("no_such_package",)),
        schedule.Part("c", "", 0.5),
    ]
    assert schedule.deadlines(parts, 100.0, 60.0 + schedule.GRACE) == {"a": 130.0, "c": 160.0}
    assert schedule.deadlines([parts[0]._replace(least=70.0), parts[2]], 0.0, 60.0 + schedule.GRACE) == {
        "a": 60.0,
        "c": 60.0,
    }
    assert sum(part.share for part in schedule.PARTS) == pytest.approx(1)


@pytest.mark.parametrize(
    ("script", "seconds", "outcome"),
    [("", 30, "complete"), ("exit 3", 30, "failed"), ("sleep 60", 0.5, "out of time")],
)
def test_parts_end_in_time(script, seconds, outcome, tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(f"""#!/bin/sh\necho '{{"start": "x"}}'\n{script}\n""")
    python.chmod(0o755)
    monkeypatch.setattr(schedule, "GRACE", 0.1)
    monkeypatch.setattr(sys, "executable", str(python))
    records, start = [], time.time()
    assert schedule.run_part("x", [], start + seconds, {}, tmp_path / "log", records.append) == outcome
    assert records == [{"start": "x"}]
    assert time.time() - start < 20


def test_the_document_is_complete_after_every_row(tmp_path, capsys):
    path = tmp_path / "results.json"
    written = report.Report(path, size="nano")
    written.start_part("inference", "Inference", 3.0)
    for name, times_floor in (("512x512, batch 1, VAE bfloat16, default", 2.0), ("other", 1.0)):
        row = {"name": name, "status": "ok", "message": "", "values": {"ms": 10.0, "times_floor": times_floor}}
        written.add_row(row)
        assert json.loads(path.read_text())["parts"][0]["rows"][-1] == row
    written.end_part("complete", 1.0)
    written.start_part("torch_inference", "PyTorch", 3.0)
    name = "512x512, batch 1, VAE bfloat16, default, compiled"
    written.add_row({"name": name, "status": "ok", "message": "", "values": {"ms": 15.0}})
    written.end_part("complete", 1.0)
    summary = report.summarize(written.document)
    written.finish(summary)
    assert json.loads(path.read_text())["finished"]
    ratios = {row["name"]: row["values"] for row in summary}
    assert ratios["PyTorch / pisa_jax, 512x512, batch 1, VAE bfloat16, default, compiled"] == {"ratio": 1.5}
    assert ratios["target, 512x512, batch 1, VAE bfloat16, default"]["met"] == "yes"
    assert capsys.readouterr().out.endswith("\n3 ok\n")


def test_a_step_that_does_not_compile_is_a_row_and_the_others_are_measured(monkeypatch):
    def compile_step(size, case):
        if case.batch_size == 4:
            raise RuntimeError("RESOURCE_EXHAUSTED: 80 GiB")
        return random_sd.Program(None, 1.0)

    monkeypatch.setattr(training, "compile_step", compile_step)
    monkeypatch.setattr(training, "measure", lambda *arguments: {"ms": 1.0})
    monkeypatch.setattr(training, "operations", lambda *arguments: {})
    rows, records = collected()
    training.run(rows, "nano")
    found = {record["row"]["name"]: record["row"]["status"] for record in records if "row" in record}
    steps = {name: status for name, status in found.items() if not name.startswith("compile")}
    assert len(steps) == len(training.ORDER)
    assert {name for name, status in steps.items() if status == "out of memory"} == {n for n in steps if "batch 4" in n}


def test_the_time_of_an_operation_excludes_the_operations_inside_it():
    events = [("loop", 0.0, 10.0), ("a", 1.0, 4.0), ("b", 2.0, 3.0), ("a", 5.0, 6.0), ("c", 10.0, 11.0)]
    assert sorted(trace.without_children(events)) == [("a", 1.0), ("a", 2.0), ("b", 1.0), ("c", 1.0), ("loop", 6.0)]


def test_random_weights_have_the_structure_and_the_spread_of_a_model():
    of = jax.ShapeDtypeStruct((3, 3, 16, 32), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((32,), jnp.float32)
    shapes = {"conv": {"kernel": of, "bias": bias}, "norm": {"scale": bias, "bias": bias}}
    weights = step_case.random_weights(shapes, 0)
    assert jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), weights) == shapes
    assert float(jnp.std(weights["conv"]["kernel"].astype(jnp.float32))) == pytest.approx(1 / 12, rel=0.05)
    assert (float(weights["norm"]["scale"].min()), float(jnp.abs(weights["norm"]["bias"]).max())) == (1.0, 0.0)
    adapter = {"down_blocks_0/conv": {"a": bias, "b": of}}
    found = step_case.random_adapter(adapter, 0)
    assert jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), found) == adapter


@pytest.mark.slow
def test_the_script_keeps_its_time_and_writes_what_it_measured(tmp_path):
    path, start = tmp_path / "results.json", time.time()
    command = [sys.executable, ROOT / "benchmarks/accelerator.py", "--size", "nano", "--minutes", "1", "--json", path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert time.time() - start < 90
    document = json.loads(path.read_text())
    assert (document["schema"], document["finished"], document["size"]) == (report.SCHEMA, True, "nano")
    assert [part["name"] for part in document["parts"]] == [part.name for part in schedule.PARTS]
    assert {part["status"] for part in document["parts"]} <= set(PART_STATUSES)
    for part in document["parts"]:
        assert part["rows"], part
        for row in part["rows"]:
            assert set(row) == {"name", "status", "message", "values"}
            assert row["status"] in STATUSES
            assert row["name"] in done.stdout or row["status"] == "skipped"
    device = document["parts"][0]
    assert {"device", "platform", "jax", "python"} <= set(device["rows"][0]["values"])
    assert device["rows"][0]["status"] == "ok"
