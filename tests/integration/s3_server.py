"""A real S3 server for the tests: SeaweedFS, from PyPI, on loopback with credentials of its own."""

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import botocore.session
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

ACCESS_KEY, SECRET_KEY = "test-access-key", "test-secret-key"
# Somebody who may list and read but not write.
READER = {"AWS_ACCESS_KEY_ID": "reader-access-key", "AWS_SECRET_ACCESS_KEY": "reader-secret-key"}


class S3Server:
    """Start on construction, `stop` by pid; `start` again serves the same data on the same ports. `environment` is what
    its clients need."""

    def __init__(self, directory: Path, seconds: float = 60):
        self.directory = directory
        self.log = directory / "weed.log"
        identities = [
            _identity("test", ACCESS_KEY, SECRET_KEY, ["Admin", "Read", "Write", "List", "Tagging"]),
            _identity("reader", READER["AWS_ACCESS_KEY_ID"], READER["AWS_SECRET_ACCESS_KEY"], ["Read", "List"]),
        ]
        (directory / "s3.json").write_text(json.dumps({"identities": identities}))
        (directory / "data").mkdir()
        services = ("s3", "master", "volume", "filer")
        names = [f"{service}.{port}" for service in services for port in ("port", "port.grpc")]
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        self.endpoint = f"http://127.0.0.1:{ports['s3.port']}"
        self.command = [
            str(Path(sys.executable).with_name("weed")),
            "-logtostderr",
            "server",
            f"-dir={directory / 'data'}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            "-s3",
            f"-s3.config={directory / 's3.json'}",
            "-s3.iam=false",
            "-s3.autoCreateBucket=false",
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-master.telemetry=false",
            "-volume.preStopSeconds=0",
            "-master.volumeSizeLimitMB=64",
            "-volume.max=1000",
            *(f"-{name}={port}" for name, port in ports.items()),
        ]
        self.environment = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": ACCESS_KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        self.client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
            config=Config(retries={"max_attempts": 1}, connect_timeout=2, read_timeout=10),
        )
        self.start(seconds)

    def start(self, seconds: float = 60) -> None:
        """Start the server, also again after `stop` (which takes 20 s), and wait until it serves."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
        self._wait_until_ready(seconds)

    def _wait_until_ready(self, seconds: float) -> None:
        """An open port is not readiness; an object that was put and comes back is."""
        deadline, there = time.monotonic() + seconds, self.client.exceptions
        while True:
            try:
                with contextlib.suppress(there.BucketAlreadyExists, there.BucketAlreadyOwnedByYou):  # a restart
                    self.client.create_bucket(Bucket="ready")
                self.client.put_object(Bucket="ready", Key="probe", Body=b"probe")
                assert self.client.get_object(Bucket="ready", Key="probe")["Body"].read() == b"probe"
                return
            except (BotoCoreError, ClientError) as error:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    self.stop()
                    raise RuntimeError(f"SeaweedFS did not start:\n{self.log.read_text()[-3000:]}") from error
                time.sleep(0.3)

    def bucket(self, name: str) -> str:
        """Make an empty bucket; its s3:// URI."""
        self.client.create_bucket(Bucket=name)
        return f"s3://{name}"

    def keys(self, bucket: str) -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        return sorted(item["Key"] for page in pages for item in page.get("Contents", []))

    def stop(self) -> None:
        """SIGKILL: it answers SIGTERM only after 15 seconds."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()


def _identity(name: str, access_key: str, secret_key: str, actions: list[str]) -> dict:
    return {"name": name, "credentials": [{"accessKey": access_key, "secretKey": secret_key}], "actions": actions}


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listened on a moment ago.

    None that the system gives to outgoing connections (32768 and up): one could take a port while its server is down.
    """
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        while len(ports) < count:
            candidate = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                candidate.bind(("127.0.0.1", random.SystemRandom().randrange(20_000, 32_000)))
                ports.append(candidate.getsockname()[1])
        return ports
