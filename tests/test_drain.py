"""The notice that a machine is about to go reaches the run on it, which saves and goes on elsewhere."""

import json
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from infra.preemption import Metadata
from tests import tiny
from tests.test_elastic import Elastic, losses

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.timeout(600)


class Cloud:
    """EC2's metadata service, version 2, on loopback: what it answers, and what it was asked."""

    def __init__(self) -> None:
        self.token, self.end, self.asked, self.broken = "first", 0.0, 0, False
        cloud = self

        class Handler(BaseHTTPRequestHandler):
            def do_PUT(self) -> None:
                known = self.path == "/latest/api/token" and "X-aws-ec2-metadata-token-ttl-seconds" in self.headers
                self.answer(200 if known else 400, cloud.token)

            def do_GET(self) -> None:
                cloud.asked += 1
                if cloud.broken:
                    self.answer(503, "")
                elif self.headers.get("X-aws-ec2-metadata-token") != cloud.token:
                    self.answer(401, "")
                elif self.path == "/latest/meta-data/spot/instance-action" and cloud.end:
                    when = datetime.fromtimestamp(cloud.end, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
                    self.answer(200, json.dumps({"action": "terminate", "time": when}))
                else:
                    self.answer(404, "")

            def answer(self, code: int, text: str) -> None:
                self.send_response(code)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def cloud() -> Iterator[Cloud]:
    made = Cloud()
    yield made
    made.server.shutdown()
    made.server.server_close()


def daemon(*options: str) -> subprocess.Popen[str]:
    """`python infra/preemption.py`, as it runs beside Ray."""
    command = [sys.executable, str(ROOT / "infra/preemption.py"), "--every", "0.1", *options]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def end_of(process: subprocess.Popen[str]) -> str:
    """What it said, after it has ended well."""
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    return said


def node_of(cluster: Cluster, **resources: int) -> str:
    """The id of a new node."""
    return cluster.add_node(**resources).node_id


def alive(cluster: Cluster) -> set[str]:
    from ray._raylet import GcsClient

    from infra.preemption import nodes

    return set(nodes(GcsClient(address=cluster.address)))


def test_an_instance_is_told_its_end_and_nothing_before_whatever_becomes_of_its_token(cloud: Cloud) -> None:
    metadata = Metadata(cloud.url)
    assert metadata.end() is None
    cloud.token = "second"  # as if hours had passed
    assert metadata.end() is None
    cloud.end = 2_000_000_000.0
    assert metadata.end() == cloud.end


def test_a_service_that_does_not_answer_is_an_error_and_no_notice(cloud: Cloud) -> None:
    cloud.broken = True
    with pytest.raises(OSError, match="503"):
        Metadata(cloud.url).end()
    with pytest.raises(OSError):
        Metadata("http://127.0.0.1:9").end()


@pytest.mark.slow
def test_every_kind_of_notice_empties_its_own_node_and_no_other(cluster: Cluster, cloud: Cloud) -> None:
    kept, *going = (node_of(cluster, num_cpus=1) for _ in range(4))
    at = ["--address", cluster.address]
    told = daemon(*at, "--node", going[0], "--metadata", cloud.url)
    stopped = daemon(*at, "--node", going[1], "--metadata", "http://127.0.0.1:9")  # which is no EC2
    out = stopped.stdout
    assert out and "no word from the metadata service" in out.readline()
    while not cloud.asked:
        time.sleep(0.05)
    assert {kept, *going} <= alive(cluster)
    assert "the pod is stopped, 60 s left" in end_of(daemon(*at, "--node", going[2], "--now", "--seconds", "60"))
    stopped.send_signal(signal.SIGTERM)
    assert "SIGTERM, 100 s left" in end_of(stopped)
    cloud.end = time.time() + 60
    said = end_of(told)
    assert "EC2 takes the instance back" in said and f"node {going[0]}: empty" in said
    assert kept in alive(cluster) and not alive(cluster) & set(going)


@pytest.mark.slow
def test_a_machine_with_several_nodes_needs_to_be_told_which(cluster: Cluster) -> None:
    from ray._raylet import GcsClient

    from infra.preemption import this_node

    cluster.add_node(num_cpus=1)
    with pytest.raises(ValueError, match=r"\d+ nodes of this Ray are at .*--node"):
        this_node(GcsClient(address=cluster.address))


@pytest.mark.slow
def test_a_run_whose_machine_is_taken_away_saves_and_goes_on_with_those_left_as_if_nothing_had_happened(
    tmp_path: Path, cluster: Cluster, cloud: Cloud, slow_steps: None
) -> None:
    tiny.shard_set(tmp_path / "set")
    cluster.add_node(num_cpus=1)
    going = node_of(cluster, num_cpus=1)
    notice = daemon("--address", cluster.address, "--node", going, "--metadata", cloud.url)
    # No failure is forgiven: being told in time is none. No checkpoint is due but the one made for the notice.
    driver = Elastic(tmp_path, "spot", cluster, processes="1:2", max_failures=0, save_every=10**6)
    driver.wait_for("spot: on 2 processes")
    driver.wait_for(lambda: any((driver.folder / "ray").rglob("*")) and len(driver_losses(tmp_path)) > 20)
    cloud.end = time.time() + 120
    driver.wait_for("spot: has saved and stopped: a machine is about to go")
    assert "empty" in end_of(notice)
    driver.wait_for(r"stopped: a machine is about to go\n(.|\n)*spot: on 1 process\n(.|\n)*goes on after step")
    after = driver.said.split("a machine is about to go\n")[1]
    (saved,) = re.findall(r"goes on after step ([\d,]+)", after)
    driver.wait_for(lambda: max(driver_losses(tmp_path)) > int(saved.replace(",", "")) + 5)
    driver.stop()
    found = losses(tmp_path, "spot")
    assert sorted(found) == list(range(1, max(found) + 1))


def driver_losses(place: Path) -> dict[int, float]:
    """What there is so far: nothing before MLflow has the run."""
    try:
        return losses(place, "spot")
    except (AssertionError, ValueError):
        return {}
