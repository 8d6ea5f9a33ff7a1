"""The Dockerfile and the files of docs/pods.md: linted, parsed, and compared with what they name in this project."""

import configparser
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT

DOCKERFILE = ROOT / "Dockerfile"
PODS = (ROOT / "docs/pods.md").read_text(encoding="utf-8")


def blocks(language):
    """Return the fenced blocks of a language in docs/pods.md."""
    return re.findall(rf"^```{language}\n(.*?)^```", PODS, re.MULTILINE | re.DOTALL)


def installed(accelerator, tmp_path):
    """Run the RUN instruction of the Dockerfile with a pip that prints its arguments; returns code, output, errors."""
    script = re.search(r"^RUN (.*?[^\\])$", DOCKERFILE.read_text(), re.MULTILINE | re.DOTALL)[1]
    pip = tmp_path / "pip"
    pip.write_text('#!/bin/sh\necho "$@"\n')
    pip.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "ACCELERATOR": accelerator}
    return subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=False)


def test_dockerfile_has_no_findings():
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, "--no-color", DOCKERFILE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("accelerator", ["cpu", "cuda", "tpu"])
def test_image_installs_extras_that_exist(accelerator, tmp_path):
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    done = installed(accelerator, tmp_path)
    assert done.returncode == 0, done.stderr
    extras = set(re.search(r"\.\[(.*)\]", done.stdout)[1].split(","))
    assert extras <= set(setup["options.extras_require"])
    assert accelerator == "cpu" or accelerator in extras


def test_unknown_accelerator_is_refused(tmp_path):
    done = installed("gpu", tmp_path)
    assert done.returncode == 1
    assert "'gpu'; allowed are cpu, cuda and tpu" in done.stderr
    assert not done.stdout


def test_image_contains_what_the_installation_reads(tmp_path):
    """A wheel can be built from the files that .dockerignore lets through."""
    kept = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for name in kept:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        tmp_path,
        tmp_path,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("pisa_jax-*.whl"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("docker") is None, reason="needs docker")
def test_image_builds_and_runs():
    subprocess.run(["docker", "build", "-q", "-t", "pisa_jax_test", ROOT], check=True)
    done = subprocess.run(["docker", "run", "--rm", "pisa_jax_test"], capture_output=True, text=True, check=True)
    assert "infer" in done.stdout


def test_shell_blocks_have_no_syntax_errors():
    assert len(blocks("bash")) >= 6
    for block in blocks("bash"):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_jobset_starts_one_process_per_host_and_stops_at_errors():
    jobset, task = map(yaml.safe_load, blocks("yaml"))
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    rows, columns = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
    assert (
        job["parallelism"] == job["completions"] == rows * columns // container["resources"]["limits"]["google.com/tpu"]
    )
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [1, 2]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert task["resources"]["job_recovery"]["recover_on_exit_codes"] == [75, 134, 137, 143]


def training_commands():
    """Return the arguments of every `pisa-sr train` command of the page."""
    text = PODS.replace("\\\n", " ")
    shell = re.findall(r"pisa(?:-sr|_jax) train ([^\"`;|\n]+)", text)
    args = yaml.safe_load(blocks("yaml")[0])["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    return [line.split() for line in shell] + [args["containers"][0]["args"][1:]]


def test_training_commands_can_be_repeated_and_are_accepted(monkeypatch):
    from pisa_jax.cli import train

    monkeypatch.chdir(ROOT)
    commands = training_commands()
    assert len(commands) >= 6
    for arguments in commands:
        assert arguments[arguments.index("--resume") + 1] == "auto"
        train.read(arguments)
