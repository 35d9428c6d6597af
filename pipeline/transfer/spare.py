"""Work on what a Ray cluster has to spare: it gives way to others, and to training above all.

Ray has no priorities. But its control store knows what is waited for: placement groups, which is how Ray Train asks for
the processes of a run, at once, and tasks and actors within a second. So who works on spare resources looks there every
now and then, ends its own actors when somebody else waits for what they hold, and goes on when nobody does. A run of
Ray Train that could be larger asks for its larger placement group whatever others hold, and so is given way to, too.

Actors of spare work are made with the labels `MARK`, by which their own waiting is told from that of others: they wait
for no more than room, and nobody gives way to them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import ray
from ray._private.state import state as ray_state
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import GetClusterResourceStateReply, NodeStatus  # type: ignore[attr-defined]

Amounts = Mapping[str, float]

MARK = {"vitscale/spare": "!no"}
"""A label selector that every node satisfies, as none has this label; Ray shows it with what is waited for."""

PATIENCE_SECONDS = 1.5
CALM_SECONDS = 10.0


@dataclass(frozen=True)
class Cluster:
    """What is waited for, and what there is to have."""

    waiting: tuple[tuple[Amounts, ...], ...]
    """By others: each a placement group's bundles, or what one task or actor needs."""
    free: Mapping[str, Amounts]
    """By node, what nobody uses."""


def look() -> Cluster:
    """The cluster that this process is connected to."""
    reply = GetClusterResourceStateReply()
    reply.ParseFromString(_store(ray.get_runtime_context().gcs_address).get_cluster_resource_state())
    state = reply.cluster_resource_state
    groups = [
        tuple(dict(request.resources_bundle) for request in group.requests)
        for group in state.pending_gang_resource_requests
    ]
    single = [(dict(row.request.resources_bundle),) for row in state.pending_resource_requests if not _marked(row)]
    alive = [node for node in state.node_states if node.status in (NodeStatus.RUNNING, NodeStatus.IDLE)]
    return Cluster((*groups, *single), {node.node_id.hex(): dict(node.available_resources) for node in alive})


@lru_cache(maxsize=1)
def _store(address: str) -> GcsClient:
    return GcsClient(address=address)


def _marked(row: Any) -> bool:
    keys = {rule.label_key for one in row.request.label_selectors for rule in one.label_constraints}
    return keys >= MARK.keys()


def held(each: Amounts) -> dict[str, list[Amounts]]:
    """By node, what this driver's actors hold, where each holds `each`."""
    found: dict[str, list[Amounts]] = {}
    job = ray.get_runtime_context().get_job_id()
    for actor in ray_state.actor_table(None, actor_state_name="ALIVE").values():
        if actor["JobID"] == job and not actor["IsDetached"]:  # as Ray Train leaves one, which holds nothing
            found.setdefault(actor["Address"]["NodeID"], []).append(each)
    return found


def room(each: Amounts, free: Mapping[str, Amounts]) -> int:
    """How many times `each` fits into what is free."""
    # Counted in ten-thousandths, as Ray does: three times 0.1 is no more than 0.3.
    parts = {name: round(1e4 * amount) for name, amount in each.items() if amount}
    assert parts, "an actor that needs nothing is not spare work"
    return sum(min(round(1e4 * node.get(name, 0)) // part for name, part in parts.items()) for node in free.values())


def fits(bundles: Sequence[Amounts], free: Mapping[str, Amounts]) -> bool:
    """Whether there is a node for each of the bundles, placed largest first, whatever else they ask of nodes."""
    left = [dict(node) for node in free.values()]
    for bundle in sorted(bundles, key=lambda bundle: sorted(bundle.values()), reverse=True):
        place = next((node for node in left if all(node.get(name, 0) >= bundle[name] for name in bundle)), None)
        if place is None:
            return False
        for name, amount in bundle.items():
            place[name] = round(place[name] - amount, 4)
    return True


def needed(cluster: Cluster, own: Mapping[str, Sequence[Amounts]]) -> bool:
    """Whether somebody waits for what would be there if `own`, by node, were given up.

    Who waits for more than that is not helped by it, and nothing is given up in vain.
    """
    after = {node: _sum([amounts, *own.get(node, ())]) for node, amounts in cluster.free.items()}
    return any(fits(bundles, after) for bundles in cluster.waiting)


def _sum(several: Sequence[Amounts]) -> dict[str, float]:
    return {name: sum(amounts.get(name, 0) for amounts in several) for name in {n for a in several for n in a}}


@dataclass
class Watch:
    """Asked again and again, says whether this driver's actors, each of which holds `each`, have to make room.

    Somebody has to wait for `patience` seconds, as what is about to start is for a moment waited for, too. After that
    there is no room again before nobody has waited for `calm` seconds, in which a run that is started anew asks for
    all its processes.
    """

    each: Amounts
    patience: float = PATIENCE_SECONDS
    calm: float = CALM_SECONDS
    now: Callable[[], float] = time.monotonic
    waits: Callable[[], bool] | None = None
    """Whether somebody waits now; asks Ray if None."""
    _since: float | None = field(init=False, default=None)
    _last: float | None = field(init=False, default=None)
    """When somebody was last waiting, since room was made."""

    def __call__(self) -> bool:
        """Whether to make room, or to leave it to others still."""
        now = self.now()
        if not (self.waits() if self.waits else needed(look(), held(self.each))):
            self._since = None
            if self._last is not None and now - self._last >= self.calm:
                self._last = None
        else:
            self._since = now if self._since is None else self._since
            if self._last is not None or now - self._since >= self.patience:
                self._last = now
        return self._last is not None

    def room(self) -> int:
        """How many more actors what is free has room for: not so many that Ray would ask a cloud for machines."""
        return room(self.each, look().free)
