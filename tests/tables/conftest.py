import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from svbatch.tables.schemas import arrow_schema
from svbatch.tables.store import Store


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "out")
    with store.lock():
        store.prepare({"asr": arrow_schema("asr")})
        yield store


@pytest.fixture(scope="session")
def object_store(tmp_path_factory):
    """The environment for an object store of moto's on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (tmp_path_factory.mktemp("moto") / "log").open("wb")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    wait_for("127.0.0.1", port)
    yield {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ALLOW_HTTP": "true",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
    }
    server.kill()
    server.wait()
    log.close()


@pytest.fixture
def bucket(object_store, monkeypatch, request):
    """The address of a bucket of this test's own."""
    for name, value in object_store.items():
        monkeypatch.setenv(name, value)
    name = f"test-{abs(hash(request.node.name))}"
    made = urllib.request.Request(f"{os.environ['AWS_ENDPOINT_URL']}/{name}", method="PUT")
    urllib.request.urlopen(made).close()
    return f"s3://{name}"


def wait_for(host, port):
    for _ in range(300):
        try:
            socket.create_connection((host, port)).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.1)
    raise TimeoutError(f"no server on port {port}")
