"""The proxy by itself: transparent when it is told to be, and every kind of fault is what it says."""

import http.client
import socket
import time

import botocore.session
import pytest
from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import ClientError

from tests.chaos.fault_proxy import KINDS, SLOW_DOWN, FaultProxy
from tests.integration.s3_server import ACCESS_KEY, SECRET_KEY, S3Server

BUCKET = "fault-proxy"
KEYS = ("plain", "with space", "#1", "100%", "a%20b", "é/中", "plus+and=&?", "dots/..%2e/x", "~tilde'(!)*")


@pytest.fixture(scope="module")
def bucket(chaos_s3: S3Server) -> str:
    chaos_s3.bucket(BUCKET)
    return BUCKET


@pytest.fixture
def proxy(chaos_s3: S3Server):
    proxy = FaultProxy(chaos_s3.endpoint, seed=1, hang_seconds=1.0)
    yield proxy
    proxy.stop()


def client(endpoint: str):
    return botocore.session.get_session().create_client(
        "s3",
        endpoint_url=endpoint,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        region_name="us-east-1",
        config=Config(retries={"max_attempts": 0}, connect_timeout=2, read_timeout=5),
    )


def raw(endpoint: str, method: str, path: str, body: bytes = b"") -> tuple[int, dict[str, str], bytes]:
    """One signed request on a connection of its own, without any client library's retries or leniency."""
    host = endpoint.removeprefix("http://")
    signed = AWSRequest(method, f"{endpoint}{path}", headers={"Host": host}, data=body)
    S3SigV4Auth(Credentials(ACCESS_KEY, SECRET_KEY), "s3", "us-east-1").add_auth(signed)
    connection = http.client.HTTPConnection(host, timeout=5)
    try:
        connection.request(method, path, body, dict(signed.headers.items()))
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def exists(server: S3Server, key: str) -> bool:
    return key in server.keys(BUCKET)


def test_a_share_of_zero_is_transparent(chaos_s3, bucket, proxy):
    through, direct = client(proxy.endpoint), chaos_s3.client
    body = bytes(range(256)) * 1000
    for key in KEYS:
        through.put_object(Bucket=bucket, Key=key, Body=body + key.encode())
        assert direct.get_object(Bucket=bucket, Key=key)["Body"].read() == body + key.encode()
        assert through.get_object(Bucket=bucket, Key=key)["Body"].read() == body + key.encode()
        assert through.head_object(Bucket=bucket, Key=key)["ContentLength"] == len(body) + len(key.encode())
        part = through.get_object(Bucket=bucket, Key=key, Range="bytes=1000-1255")
        assert part["Body"].read() == body[1000:1256]
        assert part["ResponseMetadata"]["HTTPStatusCode"] == 206
    listed = through.list_objects_v2(Bucket=bucket)["Contents"]
    assert sorted(item["Key"] for item in listed) == sorted(KEYS)
    with pytest.raises(ClientError) as refused:
        through.put_object(Bucket=bucket, Key="plain", Body=b"other", IfNoneMatch="*")
    assert refused.value.response["Error"]["Code"] == "PreconditionFailed"
    through.put_object(Bucket=bucket, Key="encoded", Body=b"\x1f\x8b not gzip", ContentEncoding="gzip")
    assert direct.get_object(Bucket=bucket, Key="encoded")["Body"].read() == b"\x1f\x8b not gzip"
    assert through.get_object(Bucket=bucket, Key="encoded")["ContentEncoding"] == "gzip"
    through.delete_objects(Bucket=bucket, Delete={"Objects": [{"Key": key} for key in (*KEYS, "encoded")]})
    assert chaos_s3.keys(bucket) == []
    assert set(proxy.counts) == {"passed"}


def test_answers_are_the_servers_own(chaos_s3, bucket, proxy):
    """Status, body and all headers but those of the connection and of the moment."""
    chaos_s3.client.put_object(Bucket=bucket, Key="same", Body=b"body", ContentType="x/y", Metadata={"a": "b c"})
    of_the_moment = {"date", "x-amz-request-id", "connection", "x-amz-id-2", "server"}
    for method, path in [("GET", "same"), ("HEAD", "same"), ("GET", "none"), ("GET", "?list-type=2&prefix=sa%6De")]:
        path = f"/{bucket}{path}" if path.startswith("?") else f"/{bucket}/{path}"
        answers = [raw(endpoint, method, path) for endpoint in (chaos_s3.endpoint, proxy.endpoint)]
        (status, headers, body), (its_status, its_headers, its_body) = answers
        assert its_status == status
        assert {n: v for n, v in its_headers.items() if n not in of_the_moment} == {
            n: v for n, v in headers.items() if n not in of_the_moment
        }
        if path.endswith("same"):  # errors name the request, and the order in listings' elements changes
            assert its_body == body
        assert len(its_body) == len(body)


def test_slow_down(chaos_s3, bucket, proxy):
    proxy.hit(1.0, ["slow_down"])
    assert raw(proxy.endpoint, "PUT", f"/{bucket}/slow", b"data")[::2] == (503, SLOW_DOWN)
    with pytest.raises(ClientError, match="SlowDown"):
        client(proxy.endpoint).get_object(Bucket=bucket, Key="slow")
    assert not exists(chaos_s3, "slow")
    assert proxy.counts == {"slow_down": 2}


def test_reset_before_the_server_saw_it(chaos_s3, bucket, proxy):
    proxy.hit(1.0, ["reset_before"])
    with pytest.raises(ConnectionError):
        raw(proxy.endpoint, "PUT", f"/{bucket}/before", b"data")
    assert not exists(chaos_s3, "before")
    assert proxy.counts == {"reset_before": 1}


def test_reset_after_the_server_executed_it(chaos_s3, bucket, proxy):
    proxy.hit(1.0, ["reset_after"])
    with pytest.raises(ConnectionError):
        raw(proxy.endpoint, "PUT", f"/{bucket}/after", b"data")
    assert chaos_s3.client.get_object(Bucket=bucket, Key="after")["Body"].read() == b"data"
    assert proxy.counts == {"reset_after": 1}


def test_hang(chaos_s3, bucket, proxy):
    proxy.hit(1.0, ["hang"])
    started = time.monotonic()
    with pytest.raises(ConnectionError):
        raw(proxy.endpoint, "PUT", f"/{bucket}/hang", b"data")
    assert 0.9 < time.monotonic() - started < 4
    assert not exists(chaos_s3, "hang")
    # A client that gives up first is not waited for.
    proxy.hang_seconds = 60
    host, port = proxy.endpoint.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as impatient:
        impatient.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    deadline = time.monotonic() + 5
    while proxy.counts["hang"] < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert proxy.counts == {"hang": 2}


def test_truncated_response(chaos_s3, bucket, proxy):
    chaos_s3.client.put_object(Bucket=bucket, Key="long", Body=b"x" * 100_000)
    proxy.hit(1.0, ["truncate_response"])
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        raw(proxy.endpoint, "GET", f"/{bucket}/long")
    assert proxy.counts == {"truncate_response": 1}
    # Without a body there is nothing to cut off.
    assert raw(proxy.endpoint, "HEAD", f"/{bucket}/long")[0] == 200
    assert proxy.counts == {"truncate_response": 1, "passed": 1}


def test_truncated_request(chaos_s3, bucket, proxy):
    chaos_s3.client.put_object(Bucket=bucket, Key="old", Body=b"old")
    proxy.hit(1.0, ["truncate_request"])
    for key in ("cut", "old"):
        with pytest.raises(ConnectionError):
            raw(proxy.endpoint, "PUT", f"/{bucket}/{key}", b"y" * 100_000)
    time.sleep(0.3)
    assert not exists(chaos_s3, "cut"), "half an object must not appear"
    assert chaos_s3.client.get_object(Bucket=bucket, Key="old")["Body"].read() == b"old"
    assert proxy.counts == {"truncate_request": 2}


def test_the_share_holds_and_the_seed_decides(chaos_s3, bucket):
    def outcomes(seed: int) -> tuple[list[bool], dict[str, int]]:
        proxy = FaultProxy(chaos_s3.endpoint, seed=seed)
        proxy.hit(0.2, ["slow_down", "reset_before"])
        hit = []
        for _ in range(200):
            try:
                hit.append(raw(proxy.endpoint, "HEAD", f"/{bucket}")[0] == 503)
            except ConnectionError:
                hit.append(True)
        proxy.stop()
        return hit, dict(proxy.counts)

    first, counts = outcomes(3)
    assert outcomes(3) == (first, counts)
    assert outcomes(4)[0] != first
    assert 20 <= sum(first) <= 60
    assert counts["slow_down"] > 5
    assert counts["reset_before"] > 5
    assert sum(counts.values()) == 200


def test_a_server_that_is_down_is_a_reset(proxy):
    proxy.upstream = "http://127.0.0.1:9"
    with pytest.raises(ConnectionError):
        raw(proxy.endpoint, "GET", "/anything")
    assert proxy.counts == {"down": 1}


def test_unknown_kinds_are_refused(proxy):
    with pytest.raises(ValueError, match="unknown kinds"):
        proxy.hit(0.1, ["flood"])
    assert len(set(KINDS)) == 6
