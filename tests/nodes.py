"""A Ray of a test's own, whose workers are forked from one process that has imported what they need."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ray.cluster_utils import Cluster

ADDRESS = "VITSCALE_FORK_SERVER"
"""In the environment of a node: the Unix socket at which its workers are forked."""

# A node that is killed is missed after three seconds rather than fifteen.
HEALTH_CHECKS = {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_failure_threshold": 3,
}

_HERE = Path(__file__).resolve().parent


class Nodes(Cluster):
    """Nodes on this machine, which start `fork_worker.py` for each worker."""

    def add_node(self, wait: bool = True, **settings: Any) -> Any:
        """Start a node."""
        return super().add_node(wait, setup_worker_path=str(_HERE / "fork_worker.py"), **settings)


def start_ray(*, num_cpus: int = 0) -> Nodes:
    """Start a Ray whose head has `num_cpus` CPUs; the environment names a server (`serving`)."""
    head = {"num_cpus": num_cpus, "include_dashboard": False, "_system_config": HEALTH_CHECKS}
    return Nodes(initialize_head=True, head_node_args=head)


@contextmanager
def serving() -> Iterator[None]:
    """Run a server that forks workers, and name it in the environment."""
    with TemporaryDirectory(prefix="vitscale-") as folder:
        os.environ[ADDRESS] = f"{folder}/socket"
        server = subprocess.Popen([sys.executable, "-m", "tests.fork_server", os.environ[ADDRESS]], cwd=_HERE.parent)
        try:
            while not Path(os.environ[ADDRESS]).exists():
                assert server.poll() is None, "the server has ended"
                time.sleep(0.05)
            yield
        finally:
            server.kill()
            server.wait()
            del os.environ[ADDRESS]
