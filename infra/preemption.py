"""Tells Ray that this machine is about to be taken away: runs on it save, and go on elsewhere.

    python infra/preemption.py          on a spot instance of EC2, beside Ray: waits for the notice, then tells Ray
    python infra/preemption.py --now    in the preStop of a Kubernetes pod: tells Ray, returns when Ray has left

Nothing in Ray listens to a cloud. Once told, Ray starts nothing more on the node, tells the runs that are there, and
leaves the node as soon as nothing runs on it. SIGTERM is a notice like any other. What EC2 only recommends
(`rebalance`) is no reason to move.
"""

import argparse
import json
import signal
import threading
import time
import urllib.error
import urllib.request
from datetime import datetime

from ray._private.services import canonicalize_bootstrap_address_or_die, get_node_ip_address
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import DrainNodeReason
from ray.core.generated.gcs_pb2 import GcsNodeInfo

METADATA = "http://169.254.169.254"
TOKEN_SECONDS = 21_600
ANSWER_SECONDS = 5.0


class Metadata:
    """What EC2 tells an instance about itself (instance metadata service, version 2), at `url`."""

    def __init__(self, url: str) -> None:
        self._url, self._token = url, ""
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is never behind a proxy

    def end(self) -> float | None:
        """When this instance will be taken away, in seconds since 1970; None where nothing of that is known.

        OSError where the service does not answer.
        """
        try:
            return self._ask()
        except urllib.error.HTTPError as error:
            if error.code != 401:
                raise
            self._token = ""  # it has run out
            return self._ask()

    def _ask(self) -> float | None:
        if not self._token:
            wanted = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)}
            self._token = self._get("PUT", "/latest/api/token", wanted).decode()
        try:
            answer = self._get(
                "GET", "/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": self._token}
            )
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise
        return datetime.fromisoformat(json.loads(answer)["time"]).timestamp()

    def _get(self, method: str, path: str, headers: dict[str, str]) -> bytes:
        request = urllib.request.Request(self._url + path, method=method, headers=headers)
        with self._opener.open(request, timeout=ANSWER_SECONDS) as answer:
            return answer.read()


def nodes(ray: GcsClient) -> dict[str, GcsNodeInfo]:
    """The nodes that are alive, by their id."""
    found = ((id_.hex(), node) for id_, node in ray.get_all_node_info().items())
    return {id_: node for id_, node in found if node.state == GcsNodeInfo.GcsNodeState.ALIVE}


def this_node(ray: GcsClient) -> str:
    """The id of the node on this machine; ValueError unless there is just one."""
    address = get_node_ip_address()
    here = [id_ for id_, node in nodes(ray).items() if node.node_manager_address == address]
    if len(here) != 1:
        raise ValueError(f"{len(here)} nodes of this Ray are at {address}: give the id of one with --node")
    return here[0]


def drain(ray: GcsClient, node: str, why: str, end: float) -> None:
    """Tell Ray that the node is gone at `end`, in seconds since 1970; RuntimeError where it does not accept that."""
    print(f"node {node}: {why}, {max(0.0, end - time.time()):.0f} s left", flush=True)
    reason = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION
    accepted, rejection = ray.drain_node(node, reason, why, int(end * 1000))
    if not accepted:
        raise RuntimeError(f"Ray does not give up node {node}: {rejection}")


def wait_until_gone(ray: GcsClient, node: str, end: float) -> None:
    """Return when Ray has left the node, or at `end`."""
    while node in nodes(ray) and time.time() < end:
        time.sleep(0.5)
    print(f"node {node}: {'still there' if node in nodes(ray) else 'empty'}", flush=True)


def watch(metadata: Metadata, every: float, told: threading.Event, seconds: float) -> tuple[str, float]:
    """Why and when this machine will be gone, as soon as that is known; `told` of it otherwise, it has `seconds`."""
    silent = False
    while not told.wait(every):
        try:
            if end := metadata.end():
                return "EC2 takes the instance back", end
            silent = False
        except (OSError, ValueError, KeyError) as error:
            if not silent:
                print(f"no word from the metadata service: {error}", flush=True)
            silent = True
    return "SIGTERM", time.time() + seconds


def main() -> None:
    """Wait for a notice, pass it on, and see the node go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--now", action="store_true", help="the machine is being taken away")
    parser.add_argument("--seconds", type=float, default=100.0, help="what is left after --now or SIGTERM")
    parser.add_argument("--every", type=float, default=5.0, help="seconds from one question to the next")
    parser.add_argument("--metadata", default=METADATA, help="where the instance metadata service is")
    parser.add_argument("--address", default="auto", help="the Ray; that of this machine if not given")
    parser.add_argument("--node", help="the node's id; the one on this machine if not given")
    given = parser.parse_args()
    told = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: told.set())
    if given.now:
        why, end = "the pod is stopped", time.time() + given.seconds
    else:
        why, end = watch(Metadata(given.metadata), given.every, told, given.seconds)
    ray = GcsClient(address=canonicalize_bootstrap_address_or_die(given.address))
    node = given.node or this_node(ray)
    drain(ray, node, why, end)
    wait_until_gone(ray, node, end)


if __name__ == "__main__":
    main()
