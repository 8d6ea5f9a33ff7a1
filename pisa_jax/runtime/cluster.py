"""Connection of the processes of a run in every environment that JAX detects, and a report of what was found."""

import contextlib
import logging
import os
import socket
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from pisa_jax.runtime.agreement import gather
from pisa_jax.runtime.console import say
from pisa_jax.runtime.messages import error_text

logger = logging.getLogger(__name__)

# Seconds without a sign of life after which a process is given up and the others end. JAX's default is 100.
HEARTBEAT_TIMEOUT = 20
# Number of processes and of this one, from launchers that do not tell the address of the first one: Open MPI 5,
# MPICH and Intel MPI, SkyPilot.
NUMBERS = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("SKYPILOT_NUM_NODES", "SKYPILOT_NODE_RANK"),
)
BY_HAND = (
    "set JAX_COORDINATOR_ADDRESS (HOST:PORT of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID, or only "
    "JAX_NUM_PROCESSES=1 for one process"
)


def connect() -> None:
    """Connect this process to the others of its run if the environment describes any; otherwise it is alone.

    JAX detects Cloud TPU VMs, GKE, SLURM, Open MPI and indexed Kubernetes jobs. JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID describe processes that are started by hand.

    Raises:
        ValueError: the environment describes several processes, but not how they are connected.
        ConnectionError: it failed. JAX ends the program with SIGABRT if the others are missing for five minutes.
    """
    count, index = _numbers()
    if count == 1:
        return
    # The preemption service of jax.distributed would handle SIGTERM, and ignore a second one; see stop_step.py.
    jax.config.update("jax_enable_preemption_service", False)
    # An empty list hides no devices. By default, JAX gives each process of SLURM or MPI one GPU.
    devices: dict[str, Any] = {"local_device_ids": []} if _alone_on_its_host() else {}
    try:
        with _without(_misleading()), warnings.catch_warnings():
            # _require_alone has an error in its place.
            warnings.filterwarnings("ignore", "Kubernetes environment detected", UserWarning)
            jax.distributed.initialize(
                num_processes=count, process_id=index, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT, **devices
            )
    except jax.errors.JaxRuntimeError as error:
        raise ConnectionError(f"the processes of the run did not connect: {error_text(error)[:300]}") from error
    except Exception as error:  # the detection raises errors of many types: no metadata server, no rights in a cluster
        # Nothing was detected, or nothing was looked for: this process has used JAX before, as a notebook does.
        alone = "coordinator_address should be defined", "before any JAX calls"
        if count is not None or not any(text in str(error) for text in alone):
            raise ValueError(
                f"the processes of the run cannot be found ({error_text(error)[:300]}); {BY_HAND}"
            ) from error
        _require_alone()


def _numbers() -> tuple[int | None, int | None]:
    """Return the number of processes and of this one where the environment has them, beside an address."""
    names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if os.environ.get(names[0]) == "1":
        return 1, 0
    if "JAX_COORDINATOR_ADDRESS" in os.environ and not any(name in os.environ for name in names):
        names = next((numbers for numbers in NUMBERS if all(name in os.environ for name in numbers)), names)
    texts = [os.environ.get(name) for name in names]
    if texts == [None, None]:
        return None, None
    try:
        count, index = (int(text or "") for text in texts)
    except ValueError:
        given = ", ".join(f"{name}={text}" for name, text in zip(names, texts, strict=True) if text is not None)
        raise ValueError(f"{given}: the number of processes and of this one are not both given; {BY_HAND}") from None
    return count, index


def _alone_on_its_host() -> bool:
    """Return True if SLURM or Open MPI started one process per host, which then uses all devices of its host."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS")
    per_node = tasks is not None and tasks == os.environ.get("SLURM_STEP_NUM_NODES")
    return "JAX_LOCAL_DEVICE_IDS" not in os.environ and (
        per_node or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"
    )


def _misleading() -> list[str]:
    """Return the variables from which JAX would infer processes that do not exist."""
    found = []
    if os.environ.get("SLURM_STEP_NUM_TASKS") == "1":  # also the shell of salloc, in which SLURM_NTASKS is the job's
        found.append("SLURM_STEP_NODELIST")
    if "JOB_COMPLETION_INDEX" not in os.environ:  # in a pod of no indexed job, JAX raises
        found.append("KUBERNETES_SERVICE_HOST")
    return found


@contextlib.contextmanager
def _without(names: list[str]) -> Iterator[None]:
    removed = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(removed)


def _require_alone() -> None:
    """Raise ValueError if there are other processes, each of which would believe to be the first; report idle nodes."""
    for size in ("SLURM_STEP_NUM_TASKS", *(size for size, _ in NUMBERS)):
        if os.environ.get(size, "1") not in ("", "1"):
            raise ValueError(f"{size}={os.environ[size]}, and JAX does not find the first process; {BY_HAND}")
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ:
        raise ValueError(
            "the processes of an indexed Kubernetes job are found with the package kubernetes, which is not installed: "
            f"pip install kubernetes, or {BY_HAND}"
        )
    if os.environ.get("SLURM_JOB_NUM_NODES", "1") != "1":
        logger.warning(
            "%s nodes are allocated, and this process uses one of them; start the program with srun to use all",
            os.environ["SLURM_JOB_NUM_NODES"],
        )


def report_devices() -> None:
    """Print processes, hosts and devices in one line, from the first process, and warn of GPUs that no process uses."""
    found = gather("devices", [socket.gethostname(), jax.local_device_count(), visible_gpus()])
    if jax.process_index() > 0:
        return
    hosts = {host: 0 for host, _, _ in found}
    for host, devices, _ in found:
        hosts[host] += devices
    local, count, kind = jax.local_device_count(), jax.device_count(), jax.devices()[0].device_kind
    say(
        f"{_number(len(found), 'process', 'processes')} on {_number(len(hosts), 'host', 'hosts')}, {local} local and "
        f"{_number(count, 'global device', 'global devices')} ({kind})",
        sys.stdout,
    )
    gpus = max((count - hosts[host], host, count) for host, _, count in found)
    if jax.default_backend() == "gpu" and gpus[0] > 0:
        logger.warning(
            "%d of the %d GPUs of %s are hidden from the run; start one process for each GPU or one for each host, or "
            "set JAX_LOCAL_DEVICE_IDS (such as 0,1) in each process",
            gpus[0],
            gpus[2],
            gpus[1],
        )


def visible_gpus() -> int:
    """Return the number of NVIDIA GPUs of this host that its processes may use."""
    if (visible := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return len([name for name in visible.split(",") if name.strip()])
    if (allocated := os.environ.get("SLURM_GPUS_ON_NODE", "")).isdecimal():
        return int(allocated)
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _number(count: int, singular: str, plural: str) -> str:
    return f"{count} {singular if count == 1 else plural}"
