"""Nothing knows whether it is on a laptop or in a bucket: a run with all of it on a real S3 server."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load

from pipeline.config import from_dict
from pipeline.train.checkpoint import complete
from pipeline.train.folder import CONFIG
from shards.storage import Folder
from tests import tiny
from tests.gang import run_job
from tests.process import repeat_undisturbed

ROOT = Path(__file__).resolve().parents[1]
SMALL = {
    "--model.width": 16, "--model.depth": 1, "--model.heads": 2, "--model.hidden": 32, "--model.patch": 4,
    "--model.image-size": 12, "--classes": 3, "--batch": 16, "--data.lanes": 8, "--duration": 5, "--optim.warmup": 2,
    "--save-every": 4, "--log-every": 1,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_in_a_bucket_ends_as_if_it_had_been_in_a_folder(s3: str, address: str, tmp_path: Path) -> None:
    shards = tiny.shard_set(tmp_path / "set")
    local = Path(shards.folder.absolute)
    for name in sorted(path.name for path in local.iterdir()):
        Folder(f"{s3}/set").put(local / name, name)

    def pretrain(data: str, to: str) -> str:
        ended = run_job(
            "pretrain.py",
            *("demo", "--data.shards", data, "--data.validation", data, "--data.cache", tmp_path / "cache"),
            *("--to", to, "--tracking-uri", f"sqlite:///{tmp_path}/ml.db"),
            *(word for option in SMALL.items() for word in option),
            env={**os.environ, "RAY_ADDRESS": address},
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
        return ended.stdout

    pretrain(f"{s3}/set", f"{s3}/runs")
    assert "demo is finished" in pretrain(f"{s3}/set", f"{s3}/runs")
    there, uri = Folder(f"{s3}/runs/demo"), f"sqlite:///{tmp_path}/ml.db"
    data = from_dict(json.loads(there.read(CONFIG))).data
    data = replace(data, shards=str(local), validation=str(local))
    here = repeat_undisturbed(there, tmp_path / "runs/demo", uri, processes=1, data=data)
    assert complete(there) == complete(here) == [8, 10]
    about = [json.loads(folder.read("export/model.json")) for folder in (there, here)]
    assert about[0]["digest"] == about[1]["digest"] and about[0]["metrics"] == about[1]["metrics"]
    assert load(there.read("export/model.safetensors")).keys() == load(here.read("export/model.safetensors")).keys()
    assert len(list((tmp_path / "cache").glob("*.tar"))) == 4
