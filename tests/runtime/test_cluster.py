"""Detection of the processes of a run: JAX's own, in the environments of launchers; nothing is connected."""

import http.server
import os
import sys
import threading
import types

import jax
import pytest
from jax._src import clusters

from pisa_jax.runtime import cluster

SLURM = {
    "SLURM_JOB_ID": "4096",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
SRUN = SLURM | {
    "SLURM_STEP_NODELIST": "node[7-8]",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
BY_HAND = {"JAX_COORDINATOR_ADDRESS": "10.0.0.1:1234", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
KUBERNETES = {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
PREFIXES = ("SLURM", "OMPI", "PMI", "JAX_COORD", "JAX_NUM", "JAX_PROC", "JAX_LOCAL", "TPU", "KUBE", "JOB_", "SKYPILOT")


@pytest.fixture
def detected(monkeypatch):
    """Return a function that connects in an environment; its result is what `jax.distributed` would connect to."""
    for name in list(os.environ):
        if name.startswith(PREFIXES) or "CUDA_VISIBLE" in name or name in ("GCE_METADATA_IP", "MEGASCALE_NUM_SLICES"):
            monkeypatch.delenv(name)
    monkeypatch.setattr("socket.gethostbyname", lambda name: "10.0.0.9")
    found = []

    def initialize(num_processes=None, process_id=None, local_device_ids=None, heartbeat_timeout_seconds=100):
        """As `jax.distributed.initialize`, up to the connection."""
        assert heartbeat_timeout_seconds == 20
        if local_device_ids is None and "JAX_LOCAL_DEVICE_IDS" in os.environ:
            local_device_ids = [int(name) for name in os.environ["JAX_LOCAL_DEVICE_IDS"].split(",")]
        resolved = clusters.ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), num_processes, process_id, local_device_ids, None, 300
        )
        for name, value in zip(("coordinator_address", "Number of processes", "process id"), resolved, strict=False):
            if value is None:
                raise ValueError(f"{name} should be defined.")
        found.append(resolved)

    monkeypatch.setattr(jax.distributed, "initialize", initialize)

    def connect(environment, tpu=False):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for module in (clusters.cluster, clusters.cloud_tpu_cluster):
            monkeypatch.setattr(module, "running_in_cloud_tpu_vm", tpu)
        if not tpu:  # JAX sets it where there are no chips
            monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
        cluster.connect()
        assert {name: os.environ.get(name) for name in environment} == environment
        return found.pop() if found else None

    return connect


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (BY_HAND, ("10.0.0.1:1234", 2, 1, None)),
        ({"JAX_NUM_PROCESSES": "1"} | OPEN_MPI, None),
        # sbatch or salloc without srun: variables of the job, and of its first task.
        ({"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_ID": "4096"}, None),
        (SLURM | {"SLURM_PROCID": "0"}, None),
        # The shell of salloc is a step of one task; it has the number of tasks of the job.
        (SRUN | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NUM_NODES": "1"}, None),
        # srun with one task per node: all devices of the node; with two tasks, one for each.
        (SRUN, ("node7:61440", 2, 1, [])),
        (SRUN | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4"}, ("node7:61440", 4, 1, [0])),
        (SRUN | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, ("node7:61440", 2, 1, [0, 1])),
        (OPEN_MPI, ("10.96.0.1:62624", 4, 3, [1])),
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, ("10.96.0.1:62624", 4, 3, [])),
        (OPEN_MPI | SLURM, ("10.96.0.1:62624", 4, 3, [1])),
        # Launchers that do not tell the address.
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "PMI_SIZE": "4", "PMI_RANK": "2"}, ("a:1", 4, 2, None)),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "0"}, ("a:1", 2, 0, None)),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, None),
        # A pod that belongs to no indexed job, with or without the package kubernetes.
        (KUBERNETES, None),
    ],
)
def test_the_environments_of_launchers(detected, environment, expected):
    assert detected(environment) == expected


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES=2: the number of processes and of this one are not both given"),
        ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES=two, JAX_PROCESS_ID=0: the number"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}, r"cannot be found \(coordinator_address should be defined"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, r"cannot be found \(Number of processes should be defined"),
        (
            {"PMI_SIZE": "4", "PMI_RANK": "2"},
            "PMI_SIZE=4, and JAX does not find the first process; set JAX_COORDINATOR",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE=2, and JAX does not find"),
        (KUBERNETES | {"JOB_COMPLETION_INDEX": "0"}, "pip install kubernetes, or set JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_several_processes_that_cannot_be_connected_are_refused(detected, monkeypatch, environment, message):
    """Each would believe that it is the first one, and write into the same run directory."""
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(ValueError, match=message) as refused:
        detected(environment)
    assert "JAX_NUM_PROCESSES=1 for one process" in str(refused.value)


def test_nodes_that_are_not_used_are_reported(detected, caplog):
    detected(SLURM)
    assert "2 nodes are allocated, and this process uses one of them; start the program with srun" in caplog.text


def test_a_job_of_gpus_in_kubernetes(detected, monkeypatch):
    labels = {"job-name": "train", "jobset.sigs.k8s.io/jobset-name": "set"}
    owner = types.SimpleNamespace(controller=True, kind="Job")
    metadata = types.SimpleNamespace(name="train", labels=labels, owner_references=[owner])
    pod = types.SimpleNamespace(metadata=metadata, spec=types.SimpleNamespace(subdomain="set"))
    job = types.SimpleNamespace(metadata=metadata, spec=types.SimpleNamespace(parallelism=3))
    monkeypatch.setattr(
        clusters.K8sCluster, "is_env_present", classmethod(lambda cls: "KUBERNETES_SERVICE_HOST" in os.environ)
    )
    monkeypatch.setattr(clusters.K8sCluster, "_pod", classmethod(lambda cls: pod))
    monkeypatch.setattr(clusters.K8sCluster, "_job", classmethod(lambda cls: job))
    monkeypatch.setattr(clusters.K8sCluster, "_controller", classmethod(lambda cls: owner))
    environment = KUBERNETES | {"JOB_COMPLETION_INDEX": "2", "JAX_COORDINATOR_PORT": "1234"}
    assert detected(environment) == ("train-0.set:1234", 3, 2, None)


@pytest.fixture
def metadata_server():
    """A metadata server of a TPU slice with two hosts; returns its address."""
    values = {
        "agent-worker-number": "1",
        "worker-network-endpoints": "unknown:unknown:10.1.0.1,unknown:unknown:10.1.0.2",
        "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\n",
    }

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            found = values.get(self.path.rsplit("/", 1)[1])
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write((found or "").encode())

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("name", ["TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES"])
def test_tpus_in_kubernetes(detected, metadata_server, name):
    environment = {name: "host-a,host-b", "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "1"}
    environment |= {"GCE_METADATA_IP": metadata_server}
    assert detected(environment, tpu=True) == ("host-a:8482", 2, 1, None)


def test_a_cloud_tpu_vm_is_found_through_its_metadata_server(detected, metadata_server):
    assert detected({"GCE_METADATA_IP": metadata_server}, tpu=True) == ("10.1.0.1:8482", 2, 1, None)


def test_a_tpu_without_metadata_server_is_refused(detected):
    """It may be one host of many."""
    with pytest.raises(ValueError, match=r"the processes of the run cannot be found .*JAX_NUM_PROCESSES=1"):
        detected({"GCE_METADATA_IP": "127.0.0.1:1"}, tpu=True)


def test_no_metadata_server_is_asked_on_other_machines(detected):
    assert detected({"GCE_METADATA_IP": "127.0.0.1:1"}) is None


def test_the_report_of_one_process(capsys, caplog):
    cluster.report_devices()
    assert capsys.readouterr().out == "1 process on 1 host, 8 local and 8 global devices (cpu)\n"
    assert not caplog.records


@pytest.mark.parametrize(
    ("found", "hidden"),
    [
        ([["a", 1, 8], ["b", 1, 8]], "7 of the 8 GPUs of"),  # one process per node, one GPU each
        ([["a", 8, 8], ["b", 8, 8]], None),
        ([["a", 1, 2], ["a", 1, 2]], None),  # one process per GPU
        ([["a", 1, 1], ["a", 1, 1]], None),  # each is bound to its GPU
        ([["a", 4, 4], ["b", 1, 4]], "3 of the 4 GPUs of b"),
    ],
)
def test_hidden_gpus_are_reported(monkeypatch, capsys, caplog, found, hidden):
    monkeypatch.setattr(cluster, "gather", lambda name, value: found)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    cluster.report_devices()
    hosts = len({host for host, _, _ in found})
    assert capsys.readouterr().out.startswith(f"2 processes on {hosts} host{'s' * (hosts > 1)}, ")
    assert (hidden in caplog.text) if hidden else not caplog.records


@pytest.mark.parametrize(
    ("environment", "count"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,2"}, 3),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"SLURM_GPUS_ON_NODE": "4"}, 4),
        ({"SLURM_GPUS_ON_NODE": "4", "CUDA_VISIBLE_DEVICES": "3"}, 1),
    ],
)
def test_visible_gpus(monkeypatch, environment, count):
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cluster.visible_gpus() == count
