"""A run on a Ray cluster: Ray Train starts its processes, and starts them again when one dies.

Processes that have to go, since their machine does, since there is room for more of them, or since whoever started the
run wants so, stop together after a step: they save, and what they have in hand is not lost. Then they are started
again, as many as there is room for, unless the run was to stop.
"""

import logging
import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from errno import EACCES, EDQUOT, ENOSPC, EROFS
from typing import TYPE_CHECKING, Any, Protocol

import ray
import ray.train
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.cloudpickle import dumps  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # type: ignore[attr-defined]
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train._internal.utils import get_address_and_port
from ray.train.backend import Backend, BackendConfig
from ray.train.v2._internal.execution.callback import WorkerCallback
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy, NoopDecision, ResizeDecision
from ray.train.v2._internal.util import TrainingFramework
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.config import Config
from pipeline.train.board import DEMANDED, LEAVING, MORE, REASONS, TERMINATED, Board
from pipeline.train.folder import Job, finished
from pipeline.train.hang import Watch
from pipeline.world import World
from shards.storage import Folder

# torch takes seconds to import, and neither whoever starts a run nor Ray's controller of it needs any.
if TYPE_CHECKING:
    import torch

    from pipeline.train.run import Steps

POLL_SECONDS = 0.5
COLLECTIVE_SECONDS = 600
PART_SECONDS = 30
LOOK_SECONDS = 0.5
ANSWER_SECONDS = 2.0
GRACE_SECONDS = 110.0
MICRO_BATCH = "micro_batch"

# Ray looks every two seconds whether a process has died, and every five whether a node is about to go.
PACE = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"}


class Work(Protocol):
    """What each process does, as `pipeline.train.run.work` says."""

    def __call__(
        self,
        job: Job,
        world: World,
        device: "torch.device",
        say: Callable[[str], None],
        *,
        stop: Callable[[int], bool],
        hang: "Steps",
    ) -> bool: ...


def launch(
    job: Job,
    processes: Sequence[int],
    *,
    gpus: bool,
    cpus_each: int,
    max_failures: int,
    resize_seconds: float = 600.0,
    work: Work | None = None,
    ended: Callable[[], bool] | None = None,
) -> None:
    """Run the job to its end on the largest of these numbers of processes for which there is room, now and later.

    RuntimeError where more than `max_failures` starts have failed. KeyboardInterrupt after SIGTERM or SIGINT: the run
    has saved before, unless a second signal came or `GRACE_SECONDS` have passed. What the run holds decides where it
    goes on, so that a start needs nothing from the one before. Every `resize_seconds` it is looked for more room.
    `work` is what each process does, `pipeline.train.run.work` if None, and `ended` whether that is done.
    """

    for name, value in PACE.items():
        os.environ.setdefault(name, value)
    with _signals() as told, _board(told) as board:
        while not (ended() if ended else finished(Folder(job.folder))):
            if told.is_set():
                raise KeyboardInterrupt
            _fit(job, board, processes, gpus, cpus_each, max_failures, resize_seconds, work)
            if why := ray.get(board.why_given_up.remote()):
                raise RuntimeError(f"{job.name} failed: {why}")


def _fit(
    job: Job,
    board: Any,
    processes: Sequence[int],
    gpus: bool,
    cpus_each: int,
    max_failures: int,
    resize: float,
    work: Work | None,
) -> None:
    """Until the processes have ended well: at the end of the run, or since they were asked to stop."""
    least, most = min(processes), max(processes)
    trainer = _Trainer(
        _work,
        # Pickled, so that only the processes of the run import what it takes.
        train_loop_config={"run": dumps((job, work)), "board": board, "elastic": least < most},
        backend_config=_Gang(gpus),
        scaling_config=ScalingConfig(
            num_workers=most if least == most else (least, most),
            use_gpu=gpus,
            resources_per_worker={"CPU": cpus_each, **({"GPU": 1} if gpus else {})},
            elastic_resize_monitor_interval_s=resize,
        ),
        run_config=RunConfig(
            name="ray", **storage_of(job.folder), failure_config=FailureConfig(max_failures=max_failures)
        ),
    )
    trainer.allowed, trainer.board = processes, board
    try:
        trainer.fit()
    except Exception as error:
        raise RuntimeError(f"{job.name} failed: {_cause(error)}") from error


@dataclass
class _Gang(BackendConfig):
    """The processes of a run are one group of torch.distributed, with NCCL on GPUs and gloo without.

    Ray's own TorchConfig does the same, and has to import torch where the run is started and where it is controlled.
    """

    gpus: bool

    @property
    def backend_cls(self) -> type[Backend]:
        return _Meeting

    @property
    def framework(self) -> Any:
        return TrainingFramework.TORCH


class _Meeting(Backend):
    """How the processes come together, and part."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        address, port = worker_group.execute_single(0, get_address_and_port)
        worker_group.execute(_join, address, port, backend_config.gpus)

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        parted = worker_group.execute_async(_part)
        ray.wait(parted, num_returns=len(parted), timeout=PART_SECONDS)  # one that has died does not matter


def _join(address: str, port: int, gpus: bool) -> None:
    """Make this process one of the group, which meets there."""
    from ray.train.torch import config

    os.environ |= {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    config._set_torch_distributed_env_vars()
    context, backend = ray.train.get_context(), "nccl" if gpus else "gloo"
    rank, size = context.get_world_rank(), context.get_world_size()
    config._setup_torch_process_group(backend, rank, size, "env://", COLLECTIVE_SECONDS)


def _part() -> None:
    """Leave the group."""
    from ray.train.torch import config

    config._shutdown_torch(destroy_process_group=True)


class _Trainer(DataParallelTrainer):
    """Ray's trainer, as this project needs it: numbers of processes that fit, signals that save, no idle waiting."""

    allowed: Sequence[int]
    board: Any

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        if self.scaling_config.elasticity_enabled:
            settings["scaling_policy"] = _Room(self.scaling_config, self.allowed, self.board)
        return super()._initialize_and_run_controller(**settings)

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ray's would kill the processes; `_signals` lets them save."""

    def _create_default_callbacks(self) -> list[Any]:
        # Ray's data sets, of which a run has none, would have a process of their own.
        needless = {"DatasetsCallback"}
        # A watcher asks the dashboard whether the run is alive, to give its resources back if not. A Ray of our own
        # has no dashboard and ends with the run, and stopping the watcher there takes twelve seconds each time.
        if "RAY_ADDRESS" not in os.environ:
            needless.add("PlacementGroupCleanerCallback")
        found = [*super()._create_default_callbacks(), _Sigterm()]
        return [callback for callback in found if type(callback).__name__ not in needless]


class _Room(ElasticScalingPolicy):
    """As many processes as there is room for, of the numbers that are allowed; looked for at a start and now and then.

    Ray's own takes any number, counts nodes that have just died or are about to go, and, where there is room for more
    processes, kills those there are; here they are asked to stop, and the next start has the other number.
    """

    def __init__(self, scaling_config: Any, numbers: Sequence[int], board: Any) -> None:
        super().__init__(scaling_config)
        self._numbers, self._board = sorted(numbers), board

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        going = ray._private.state.state.get_draining_nodes()  # type: ignore[attr-defined]
        staying = {node["NodeID"] for node in ray.nodes() if node["Alive"] and _answers(node)} - going.keys()
        room = {node: resources for node, resources in reserved_resources.items() if node in staying}
        return largest(self._numbers, super()._count_possible_workers(room))

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any:
        decision = super().make_decision_for_running_worker_group(worker_group_state, worker_group_status)
        if isinstance(decision, ResizeDecision) and decision.num_workers > worker_group_state.num_workers:
            self._board.ask_to_stop.remote(MORE)
        return NoopDecision()


def _answers(node: dict[str, Any]) -> bool:
    """Whether anybody listens at the node. Ray takes seconds to miss one that died, and then would wait a minute."""
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), ANSWER_SECONDS).close()
    except OSError:
        return False
    return True


def largest(numbers: Sequence[int], room: int) -> int:
    """The largest of the numbers that is at most `room`; 0 where all are more."""
    return max((number for number in numbers if number <= room), default=0)


_terminated = threading.Event()
"""Whether this process of a run was told to end."""


class _Sigterm(WorkerCallback):
    """Has a process of the run take a first SIGTERM as a request to save and stop."""

    def after_init_train_context(self) -> None:
        # Called in the main thread, where alone Python lets signals be handled; the work is another thread's.
        before = signal.getsignal(signal.SIGTERM)

        def told(number: int, frame: Any) -> None:
            _terminated.set()
            signal.signal(signal.SIGTERM, before)

        signal.signal(signal.SIGTERM, told)


class _Stop:
    """Whether there is a reason for this process to stop after a step. All stop where one of them has a reason."""

    def __init__(self, board: Any, first: bool) -> None:
        self._board, self._reason, self._next = board, 0, 0.0
        # One of the processes asks for all, and is not kept waiting for the answer.
        self._answers = [board.stop_asked.remote()] if first else []

    def __call__(self, done: int) -> bool:
        """Asked after each step; looks about once in `LOOK_SECONDS`."""
        now = time.monotonic()
        if not self._reason and now >= self._next:
            self._next, self._reason = now + LOOK_SECONDS, self._look()
            if self._reason:
                self._board.ask_to_stop.remote(self._reason)
        return self._reason > 0

    def _look(self) -> int:
        found = 0
        if self._answers and ray.wait(self._answers, timeout=0)[0]:
            found, self._answers = int(ray.get(self._answers[0])), [self._board.stop_asked.remote()]
        if leaving():
            found = max(found, LEAVING)
        return max(found, TERMINATED) if _terminated.is_set() else found


def leaving() -> bool:
    """Whether Ray has told this process of a run that a machine of the run is about to go."""
    # Ray's own question for this makes all processes wait for each other.
    return get_train_context().preemption_context.preemption_info is not None


def _work(settings: dict[str, Any]) -> None:
    """What Ray runs in each process."""
    import torch
    from ray.train.torch import get_device

    from pipeline.train import run
    from pipeline.train.checkpoint import TakenOver

    board, (job, work) = settings["board"], pickle.loads(settings["run"])
    context = ray.train.get_context()
    if not (start := ray.get(board.begin.remote(context.get_world_rank() == 0))):
        return
    world = World(context.get_world_rank(), context.get_world_size(), context.get_local_world_size())
    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)

    def say(line: str) -> None:
        board.say.remote(line)

    if world.first and settings["elastic"]:
        say(f"{job.name}: on {world.size} {'processes' if world.size > 1 else 'process'}")
    config = micro_batch_of(Folder(job.folder), job.config)
    if world.first and config != job.config:
        say(f"{job.name}: micro-batches of at most {config.micro_batch}, as larger ones did not fit into the memory")
    word = ray.get_runtime_context().get_actor_id() or ""
    watch = Watch(Folder(job.folder), word[:8], world.rank, config.health.hang_seconds)
    try:
        with halving(Folder(job.folder), config, world.size):
            stop = _Stop(board, world.first)
            ended = (work or run.work)(replace(job, config=config), world, device, say, stop=stop, hang=watch)
    except (ValueError, OSError) as error:
        # Ray starts whatever raises again. What is wrong with the data, the configuration or the disk will be wrong
        # then, too: the next start ends at once, and whoever waits for the run is told why.
        if isinstance(error, ValueError) or error.errno in (ENOSPC, EDQUOT, EROFS, EACCES):
            ray.get(board.give_up.remote(str(error)))
        raise
    except TakenOver as error:
        # The next start would take it back. But where that has been done here, an old process is none of its business.
        if world.first:
            ray.get(board.give_up.remote(str(error), start))
        raise
    finally:
        watch.close()
    if world.first:
        if not ended:
            reason: Any = ray.get(board.stop_asked.remote())
            say(f"{job.name}: has saved and stopped: {REASONS[reason]}")
        ray.get(board.leave.remote())


def micro_batch_of(folder: Folder, config: Config) -> Config:
    """The run with micro-batches that fit: at most as large as `halving` has left word of in the run's folder."""
    try:
        return replace(config, micro_batch=min(config.micro_batch, int(folder.read(MICRO_BATCH))))
    except FileNotFoundError:
        return config


@contextmanager
def halving(folder: Folder, config: Config, processes: int) -> Iterator[None]:
    """Where the memory of a GPU is not enough, leave word for the next start that micro-batches be half as large.

    ValueError, with what torch says of the memory, where they cannot be smaller. How large they are decides no more
    of a run than rounding.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        used, least = config.micro(processes), 2 if config.pairs else 1
        if used // 2 < least:
            said = str(error).splitlines()[0]
            raise ValueError(
                f"not even a micro-batch of {used} fits into the memory of the GPU: {said} Use --recompute, a higher "
                f"stage of --zero, more processes, or --offload"
            ) from error
        half = min(used // 2, micro_batch_of(folder, config).micro_batch)
        folder.write(MICRO_BATCH, str(half).encode())
        raise


@contextmanager
def _signals() -> Iterator[threading.Event]:
    """Set by a first SIGTERM or SIGINT to this process; another is KeyboardInterrupt at once."""
    told, numbers = threading.Event(), (signal.SIGTERM, signal.SIGINT)

    def tell(number: int, frame: Any) -> None:
        if told.is_set():
            raise KeyboardInterrupt
        told.set()

    if threading.current_thread() is not threading.main_thread():
        yield told  # only the main thread is given signals
        return
    before = {number: signal.signal(number, tell) for number in numbers}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _board(told: threading.Event) -> Iterator[Any]:
    """A board whose lines are printed here as they come, and from which the processes hear when this one is `told`."""
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    # On the node of this process: any other may go while the run goes on.
    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board: Any = ray.remote(num_cpus=0, scheduling_strategy=here)(Board).remote()
    stop = threading.Event()

    def follow() -> None:
        limit = 0.0
        while not stop.wait(POLL_SECONDS):
            for line in ray.get(board.take.remote()):
                print(line, flush=True)
            if told.is_set():
                if not limit:
                    print("the run saves and stops; a second signal stops it at once", flush=True)
                    limit = time.monotonic() + GRACE_SECONDS
                if not ray.get(board.ask_to_stop.remote(DEMANDED)) or time.monotonic() > limit:
                    os.kill(os.getpid(), signal.SIGINT)  # Ray may wait for machines for ever
                    return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield board
    finally:
        stop.set()
        thread.join(10)
        for line in ray.get(board.take.remote()):
            print(line, flush=True)
        ray.kill(board)


def storage_of(url: str) -> dict[str, Any]:
    """Where Ray keeps its own notes: in this folder, by the same door to buckets as everything else."""
    folder = Folder(url)
    if folder.local:
        return {"storage_path": str(folder.local)}
    import pyarrow.fs

    files, path = folder.place
    return {"storage_path": path, "storage_filesystem": pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(files))}


def _cause(error: BaseException) -> str:
    """The last line of what went wrong in a process, without the frames around it."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


def has_gpus() -> bool:
    """Whether the cluster has any."""
    return ray.cluster_resources().get("GPU", 0) > 0


def spare_nodes(cpus: int) -> list[str]:
    """Nodes of the cluster any one of which can go: the others have room for so many processes of one CPU each.

    Neither the head, without which there is no cluster, nor the node of this process, from which runs are started.
    """
    alive = [node for node in ray.nodes() if node["Alive"]]
    kept = {node["NodeID"] for node in alive if "node:__internal_head__" in node["Resources"]} | {this_node()}
    room = {node["NodeID"]: int(node["Resources"].get("CPU", 0)) for node in alive}
    return [node for node in room if node not in kept and sum(room.values()) - room[node] >= cpus]


def this_node() -> str:
    """The node on which this process is."""
    return ray.get_runtime_context().get_node_id()


def drain(node: str, why: str, seconds: float) -> None:
    """Tell Ray that a node will be gone in so many seconds; RuntimeError where Ray does not accept that."""
    cluster = GcsClient(address=ray.get_runtime_context().gcs_address)
    end = int(1000 * (time.time() + seconds))
    accepted, rejection = cluster.drain_node(node, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, why, end)
    if not accepted:
        raise RuntimeError(f"Ray does not give up node {node}: {rejection}")
