"""TLS by a certificate that is made here: over HTTP and gRPC, and what is no certificate is refused."""

import asyncio
import json
import ssl
import subprocess
from pathlib import Path

import grpc
import httpx2
import pytest

from maxstack.config import UserError
from maxstack.serve.http.front import Front
from maxstack.serve.http.settings import Settings
from maxstack.serve.operate.listen import checked_tls
from maxstack.serve.operate.operation import Operation
from maxstack.serve.rpc import maxstack_pb2 as pb
from maxstack.serve.rpc import maxstack_pb2_grpc
from maxstack.serve.rpc.server import grpc_served
from tests.serve.operate.pretend import engine
from tests.serve.operate.test_running import ASKED, run, server


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, Path]:
    """A certificate for this machine that nobody has signed but itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    command = [
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
        "-keyout", str(key), "-out", str(cert), "-days", "2", "-subj", "/CN=localhost",
        "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1",
    ]  # fmt: skip
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("there is no openssl command")
    return cert, key


def test_who_trusts_the_certificate_is_answered_and_nothing_is_plain(files):
    trusting = ssl.create_default_context(cafile=files[0])

    async def work() -> None:
        async with server(settings=Settings(model_name="tiny", tls=files), verify=trusting) as here:
            assert (await here.ask()).json()["choices"][0]["text"] == "a" * 8
            async with here.client.stream("POST", "/v1/completions", json=ASKED | {"stream": True}) as answer:
                lines = [line async for line in answer.aiter_lines() if line]
            *events, last = (line.removeprefix("data: ") for line in lines)
            assert "".join(json.loads(event)["choices"][0]["text"] for event in events) == "a" * 8
            assert last == "[DONE]"
            url = str(here.client.base_url)
            async with httpx2.AsyncClient(timeout=10) as stranger:
                for place in (url, url.replace("https", "http")):
                    with pytest.raises(httpx2.TransportError):
                        await stranger.get(f"{place}/health")

    run(work)


def test_grpc_has_the_same_certificate(files):
    settings = Settings(model_name="tiny", tls=files)

    async def work() -> None:
        with engine() as (made, _):
            operation = Operation("tiny")
            operation.attach(made)
            operation.phases.finish("")
            front = Front(made, settings, operation)
            async with grpc_served(front, settings, operation, "127.0.0.1:0") as port:
                trusted = grpc.ssl_channel_credentials(files[0].read_bytes())
                async with grpc.aio.secure_channel(f"localhost:{port}", trusted) as channel:
                    stub = maxstack_pb2_grpc.MaxstackStub(channel)
                    assert (await stub.ModelInfo(pb.ModelInfoRequest(), timeout=20)).model == "tiny"
                async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
                    stub = maxstack_pb2_grpc.MaxstackStub(channel)
                    with pytest.raises(grpc.aio.AioRpcError):
                        await stub.ModelInfo(pb.ModelInfoRequest(), timeout=20)

    asyncio.run(work())


def test_what_is_no_certificate_with_its_key_is_refused(files, tmp_path):
    cert, key = files
    assert checked_tls(None, None) is None
    assert checked_tls(cert, key) == (cert, key)
    (tmp_path / "text.pem").write_text("nothing")
    for one, other in (
        (cert, None),
        (None, key),
        (key, cert),
        (cert, tmp_path / "text.pem"),
        (cert, tmp_path / "x"),
    ):
        with pytest.raises(UserError, match="--tls-key"):
            checked_tls(one, other)
