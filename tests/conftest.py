"""What several tests share."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fsspec
import pytest

from tests.rings import SOAK

if TYPE_CHECKING:
    from ray.cluster_utils import Cluster

    from tests.faults import Faults

PORTS = ("s3.port", "s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc")
FILER = ("filer.port", "filer.port.grpc")

# A Ray started by one test asks for its token in all that follow: every test has the same one, whichever goes first
# and whatever home its processes have.
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

# No test uses a Ray that it was not given.
os.environ.pop("RAY_ADDRESS", None)

# What opens the S3 server of a test, for the nodes of a Ray that was started before.
S3_KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret"}
os.environ |= S3_KEYS

# A shell lets what runs in its background ignore Ctrl-C, and that would be handed on to the processes of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Several workers share the processors: threads of one that wait for those of another would do nothing but wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def home() -> Iterator[None]:
    """A home of this session's own: nothing of the user's is read or written, and no two workers share one."""
    with tempfile.TemporaryDirectory(prefix="vitscale-home-", ignore_cleanup_errors=True) as folder:
        os.environ["HOME"] = folder
        yield


# --- the order in which several workers take the tests --------------------------------------------------------------

SEPARABLE = {"test_survival.py", "test_drain.py", "test_elastic.py", "test_families.py", "test_demo.py"}
"""Files whose tests share little beside the session's fixtures, so that several workers may run them at once."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Have a worker run a file as a whole, for its fixtures' sake, but for those that are SEPARABLE."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return nodeid if Path(file).name in SEPARABLE else file

    config.option.loadscopereorder = False
    return ByFile(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest, so that no worker is left with one of them at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)
    for item in items if SOAK else ():
        item.add_marker(pytest.mark.timeout(3600), append=False)


@pytest.fixture(scope="session")
def fork_server() -> Iterator[None]:
    """What the workers of `start_ray` are forked from."""
    from tests.nodes import serving

    with serving():
        yield


@pytest.fixture(scope="session")
def address(fork_server: None) -> Iterator[str]:
    """Where a Ray of this session's own is, with more CPUs than this machine has processors."""
    from tests.nodes import start_ray

    made = start_ray(num_cpus=4)
    yield str(made.address)
    made.shutdown()


@pytest.fixture(scope="session")
def local_ray(address: str) -> Iterator[None]:
    """That Ray, which this process has joined."""
    import ray

    root = str(Path(__file__).resolve().parents[1])
    ray.init(address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": root}})
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def ray_of_nodes(fork_server: None) -> Iterator["Cluster"]:
    """A Ray of this session's own with a head that has no CPUs, so that all work is on the nodes that tests add."""
    from tests.nodes import start_ray

    made = start_ray()
    yield made
    made.shutdown()


@pytest.fixture
def cluster(ray_of_nodes: "Cluster") -> Iterator["Cluster"]:
    """That Ray, whose nodes, and the jobs on them, are gone after the test."""
    from tests.gang import kill_jobs

    yield ray_of_nodes
    kill_jobs()
    for node in list(ray_of_nodes.worker_nodes):
        ray_of_nodes.remove_node(node, allow_graceful=False)


@pytest.fixture
def slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs on nodes that are added from now on do ten steps in a second at most."""
    monkeypatch.setenv("VITSCALE_PAUSE", "0.1")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A SeaweedFS of this session's own, on loopback; the environment by which it is found."""
    folder = tmp_path_factory.mktemp("s3")
    keys = dict(zip(("accessKey", "secretKey"), S3_KEYS.values(), strict=True))
    user = {"name": "test", "credentials": [keys], "actions": ["Admin"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [user]}))
    ports = dict(zip([*PORTS, *FILER], _free_ports(len(PORTS) + len(FILER)), strict=True))
    weed = [
        str(Path(sys.executable).parent / "weed"),
        "server",
        "-s3",
        f"-dir={folder}",
        f"-s3.config={folder}/s3.json",
    ]
    fixed = ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3.port.iceberg=0", "-s3.port.lance=0"]
    small = ["-volume.max=20", "-master.volumeSizeLimitMB=64"]
    with (folder / "log").open("wb") as log:
        command = [*weed, *fixed, *small, *(f"-{name}={port}" for name, port in ports.items())]
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3.port']}",
            **S3_KEYS,
            "AWS_REGION": "us-east-1",
        }
        _make_bucket(environment, folder / "log")
        yield environment
    finally:
        process.kill()  # what it holds is thrown away, and a farewell takes it ten seconds
        process.wait()


@pytest.fixture
def s3(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The URL of an empty prefix in a bucket of a real S3 server, which this process's environment points to."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{request.node.name.replace('[', '-').replace(']', '')}"


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        with closing(each):
            pass
    return ports


def _make_bucket(environment: dict[str, str], log: Path) -> None:
    """Wait until the server takes a file."""
    keys = {"key": environment["AWS_ACCESS_KEY_ID"], "secret": environment["AWS_SECRET_ACCESS_KEY"]}
    files = fsspec.filesystem("s3", **keys, endpoint_url=environment["AWS_ENDPOINT_URL"], use_listings_cache=False)
    limit = time.monotonic() + 60
    while True:
        try:
            if not files.exists("bucket"):
                files.mkdir("bucket")
            files.pipe_file("bucket/ready", b"yes")
            return
        except Exception as error:  # whatever a server says while it starts
            if time.monotonic() > limit:
                raise AssertionError(f"no S3 server after a minute; {log} ends: {log.read_text()[-1000:]}") from error
            time.sleep(0.3)


@pytest.fixture(scope="session")
def s3_proxy(s3_server: dict[str, str]) -> Iterator[tuple[str, "Faults"]]:
    """The address of a proxy before the S3 server, and the faults that it injects."""
    from tests.faults import proxy

    with proxy(s3_server["AWS_ENDPOINT_URL"]) as (url, faults):
        yield url, faults


@pytest.fixture
def faulty(
    s3_server: dict[str, str],
    s3_proxy: tuple[str, "Faults"],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[tuple[str, "Faults"]]:
    """The URL of an empty prefix in a bucket behind the proxy, and its faults: none before they are chosen.

    Stores are waited for a short while only.
    """
    from shards import retry

    for name, value in {**s3_server, "AWS_ENDPOINT_URL": s3_proxy[0]}.items():
        monkeypatch.setenv(name, value)
    short = retry.Patience(seconds=20, first=0.01, longest=0.1, connect=0.2, silence=0.4, requests=1, pace=1e7)
    monkeypatch.setattr(retry, "PATIENCE", short)
    s3_proxy[1].calm()
    yield f"s3://bucket/faulty/{tmp_path.name}", s3_proxy[1]
    s3_proxy[1].calm()
