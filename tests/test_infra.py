"""What machines read, read as those machines read it."""

import json
import re
import shlex
import tomllib
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

ROOT = Path(__file__).resolve().parents[1]
CLUSTER = ROOT / "ray_cluster.yaml"
JOB = ROOT / "infra/kuberay/pretrain-rayjob.yaml"
CRON_JOB = ROOT / "infra/kuberay/finetune-raycronjob.yaml"
DOCKERFILE = ROOT / "infra/Dockerfile"

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def cluster() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER.read_text())


@pytest.fixture
def job() -> dict[str, Any]:
    return yaml.safe_load(JOB.read_text())


@pytest.fixture
def cron_job() -> dict[str, Any]:
    return yaml.safe_load(CRON_JOB.read_text())


def nightly(cron_job: dict[str, Any]) -> dict[str, Any]:
    """The RayJob that is made of it each time."""
    return {**cron_job, "kind": "RayJob", "spec": cron_job["spec"]["jobTemplate"]}


def ray_accepts(cluster: dict[str, Any]) -> dict[str, Any]:
    """What `ray up` makes of it, by its own check; raises as `ray up` would."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(deepcopy(cluster))
    validate_config(prepared)
    return prepared


def test_ray_up_accepts_the_cluster_as_it_stands(cluster: dict[str, Any]) -> None:
    prepared = ray_accepts(cluster)
    assert prepared["available_node_types"].keys() == cluster["available_node_types"].keys()
    assert prepared["setup_commands"] == [] and prepared["head_setup_commands"] == []


def test_every_misspelt_field_of_the_cluster_would_be_refused(cluster: dict[str, Any]) -> None:
    from jsonschema import ValidationError

    for place in (cluster, cluster["docker"], cluster["available_node_types"]["gpu_spot"]):
        place["misspelt"] = 1
        with pytest.raises(ValidationError, match="misspelt"):
            ray_accepts(cluster)
        del place["misspelt"]


def test_the_head_is_kept_and_takes_no_work(cluster: dict[str, Any]) -> None:
    head = cluster["available_node_types"][cluster["head_node_type"]]
    assert "InstanceMarketOptions" not in head["node_config"]
    assert head["resources"] == {"CPU": 0, "GPU": 0}
    assert any("--num-cpus=0" in command for command in cluster["head_start_ray_commands"])


def test_workers_are_spot_first_and_on_demand_where_there_is_none(cluster: dict[str, Any]) -> None:
    workers = {
        name: node for name, node in cluster["available_node_types"].items() if name != cluster["head_node_type"]
    }
    spot = {name for name, node in workers.items() if "InstanceMarketOptions" in node["node_config"]}
    kept = workers.keys() - spot
    assert spot and kept
    assert min(workers[n]["priority"] for n in spot) > max(workers[n]["priority"] for n in kept)
    assert all(node["node_config"]["InstanceType"] for node in workers.values())


def test_whoever_has_no_token_cannot_reach_the_cluster(
    cluster: dict[str, Any], job: dict[str, Any], cron_job: dict[str, Any]
) -> None:
    assert "--env RAY_AUTH_MODE=token" in cluster["docker"]["run_options"]
    assert cluster["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    start = " ".join(cluster["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start and "0.0.0.0" not in start
    for one in (job, nightly(cron_job)):
        assert one["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_kubernetes_accepts_the_job_as_it_stands(job: dict[str, Any]) -> None:
    assert [error.message for error in validator().iter_errors(job)] == []


@pytest.mark.slow
def test_every_misspelt_or_mistyped_field_of_the_job_would_be_refused(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    worker = cluster["workerGroupSpecs"][0]
    container = worker["template"]["spec"]["containers"][0]
    for place in (job["spec"], cluster, cluster["authOptions"], worker, container, container["volumeMounts"][0]):
        place["misspelt"] = 1
        assert any("misspelt" in error.message for error in validator().iter_errors(job)), sorted(place)
        del place["misspelt"]
    for place, field, wrong in ((job["spec"], "backoffLimit", "20"), (cluster["authOptions"], "mode", "open")):
        place[field], kept = wrong, place[field]
        assert not validator().is_valid(job)
        place[field] = kept
    del container["name"]
    assert not validator().is_valid(job)


def test_kubernetes_accepts_the_job_of_every_night_as_it_stands(cron_job: dict[str, Any]) -> None:
    assert [error.message for error in cron_validator().iter_errors(cron_job)] == []


def test_every_misspelt_field_of_the_job_of_every_night_would_be_refused(cron_job: dict[str, Any]) -> None:
    template = cron_job["spec"]["jobTemplate"]
    worker = template["rayClusterSpec"]["workerGroupSpecs"][0]
    for place in (cron_job["spec"], template, worker, worker["template"]["spec"]["containers"][0]):
        place["misspelt"] = 1
        assert any("misspelt" in error.message for error in cron_validator().iter_errors(cron_job)), sorted(place)
        del place["misspelt"]
    del cron_job["spec"]["schedule"]
    assert not cron_validator().is_valid(cron_job)


def cron_validator() -> Draft202012Validator:
    """KubeRay's definition of a RayCronJob: what stands in its jobTemplate is what stands in a RayJob's spec."""
    schema = json.loads((ROOT / "tests/schemas/rayjob.json").read_text())
    schema["properties"]["kind"]["enum"] = ["RayCronJob"]
    schema["properties"]["spec"] = {
        "type": "object",
        "properties": {
            "jobTemplate": schema["properties"]["spec"],
            "schedule": {"type": "string"},
            "suspend": {"type": "boolean"},
            "timeZone": {"type": "string", "minLength": 1},
        },
        "required": ["jobTemplate", "schedule"],
        "additionalProperties": False,
    }
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_every_night_comes_and_does_what_is_missing_and_ends(cron_job: dict[str, Any]) -> None:
    from jobs.schedule import Arguments
    from pipeline.cli import parse
    from pipeline.transfer import protocols, tasks
    from pipeline.transfer.schedule import Cron

    Cron(cron_job["spec"]["schedule"], cron_job["spec"]["timeZone"])
    python, script, *words = shlex.split(cron_job["spec"]["jobTemplate"]["entrypoint"])
    assert (python, script) == ("python", "/home/ray/vitscale/jobs/schedule.py")
    said = parse(Arguments, words)
    assert not said.cron and not said.on_milestone and not said.spare
    tasks.named(said.tasks), protocols.named(said.protocol)
    (worker,) = cron_job["spec"]["jobTemplate"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = worker["template"]["spec"]["containers"]
    assert 0 < said.gpus_each <= int(container["resources"]["limits"]["nvidia.com/gpu"])


def validator() -> Draft202012Validator:
    schema = json.loads((ROOT / "tests/schemas/rayjob.json").read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def test_a_job_that_fails_goes_on_and_one_that_is_stopped_may_save(
    job: dict[str, Any], cron_job: dict[str, Any]
) -> None:
    for one in (job, nightly(cron_job)):
        spec = one["spec"]
        env = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
        assert spec["backoffLimit"] > 0 and spec["shutdownAfterJobFinishes"]
        assert all(isinstance(value, str) for value in env.values()), "Ray refuses numbers here"
        assert env["RAY_JOB_STOP_SIGNAL"] == "SIGINT" and "MLFLOW_TRACKING_URI" in env
        for pod in pods(one):
            assert pod["terminationGracePeriodSeconds"] >= int(env["RAY_JOB_STOP_WAIT_TIME_S"])


def test_every_worker_that_goes_says_so_in_time(cluster: dict[str, Any], job: dict[str, Any]) -> None:
    script = ROOT / "infra/preemption.py"
    home = re.search(r"^WORKDIR (\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert home and script.exists()
    for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        for container in pod["containers"]:
            python, path, now, seconds, limit = container["lifecycle"]["preStop"]["exec"]["command"]
            assert (python, path, now) == ("python", f"{home[1]}/infra/preemption.py", "--now")
            assert seconds == "--seconds" and 0 < float(limit) < pod["terminationGracePeriodSeconds"]
    *_, start, beside = cluster["worker_start_ray_commands"]
    assert start.startswith("ray start ") and f"python {home[1]}/infra/preemption.py" in beside and beside.endswith("&")


def test_the_job_asks_for_as_many_processes_as_its_workers_have_gpus(job: dict[str, Any]) -> None:
    words = shlex.split(job["spec"]["entrypoint"])
    gpus = sum(
        group["replicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])
        for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
        for container in group["template"]["spec"]["containers"]
    )
    assert int(words[words.index("--processes") + 1]) == gpus


def test_the_entrypoint_is_a_command_of_this_tree_in_the_image(job: dict[str, Any]) -> None:
    python, script, experiment, *_ = shlex.split(job["spec"]["entrypoint"])
    home = re.search(r"^WORKDIR (\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert python == "python" and home and script.startswith(home[1] + "/")
    assert (ROOT / script.removeprefix(home[1] + "/")).exists()
    assert (ROOT / f"pipeline/experiments/{experiment}.py").exists()


def test_no_container_runs_as_root(job: dict[str, Any], cron_job: dict[str, Any]) -> None:
    assert all(pod["securityContext"]["runAsNonRoot"] for pod in (*pods(job), *pods(nightly(cron_job))))
    users = re.findall(r"^USER (\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert users and users[-1] not in ("root", "0")


def pods(job: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = job["spec"]["rayClusterSpec"]
    return [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]


def test_every_place_names_the_same_image_and_the_same_ray(
    cluster: dict[str, Any], job: dict[str, Any], cron_job: dict[str, Any]
) -> None:
    every_pod = [*pods(job), *pods(nightly(cron_job))]
    images = {container["image"] for pod in every_pod for container in pod["containers"]} | {cluster["docker"]["image"]}
    template = cron_job["spec"]["jobTemplate"]
    assert template["rayClusterSpec"]["rayVersion"] == job["spec"]["rayClusterSpec"]["rayVersion"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert images == {f"registry.example.com/vitscale:{project['version']}"}
    assert next(iter(images)) in DOCKERFILE.read_text()
    wanted = next(line for line in project["dependencies"] if line.startswith("ray["))
    assert f">={job['spec']['rayClusterSpec']['rayVersion'].rsplit('.', 1)[0]}," in wanted


def test_whatever_the_image_copies_is_there_and_not_ignored() -> None:
    copied = [
        source
        for line in re.findall(r"^COPY (.+)$", DOCKERFILE.read_text(), re.MULTILINE)
        for source in line.split()[:-1]
        if not source.startswith("--")
    ]
    assert {"pyproject.toml", "constraints.txt", "pipeline", "shards", "jobs"} <= set(copied)
    admitted = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert {name.partition("/")[0] for name in copied} == admitted
    assert all((ROOT / source).exists() for source in copied)


def test_the_base_of_the_image_is_one_version_and_its_python_one_that_the_project_takes() -> None:
    text = DOCKERFILE.read_text()
    assert re.search(r"^FROM nvidia/cuda:\d+\.\d+\.\d+-\S+$", text, re.MULTILINE)
    python = {tuple(map(int, version.split("."))) for version in re.findall(r"python(3\.\d+)", text)}
    assert len(python) == 1 and (3, 11) <= python.pop() < (3, 13)
