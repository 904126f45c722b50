"""An S3 server for tests whose keys are what requests say, byte for byte, as AWS's are; SeaweedFS leaves empty parts of
keys out and refuses dots. It serves what `objects` holds and asks for no credentials. It may also take requests' keys
for paths, as a proxy in front of it would."""

import contextlib
import hashlib
import os
import posixpath
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from unittest import mock
from urllib.parse import parse_qs, unquote
from xml.sax.saxutils import escape

from s3fs import S3FileSystem

BUCKET = "bucket"


def etag(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # or each answer, sent in two parts, takes 40 ms
    objects: dict[str, bytes] = {}
    normalizes = False

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        bucket, _, key = (posixpath.normpath(path) if self.normalizes else path)[1:].partition("/")
        if unquote(bucket) != BUCKET:
            self.answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
        elif not key:
            self.answer(200, self.listing({name: values[0] for name, values in parse_qs(query).items()}))
        elif unquote(key) not in self.objects:
            self.answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        else:
            data = self.objects[unquote(key)]
            version = {"ETag": etag(data), "Last-Modified": "Thu, 26 Nov 2026 00:00:00 GMT"}
            if part := re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
                self.answer(206, data[int(part[1]) : int(part[2]) + 1], version)
            else:
                self.answer(200, data, version)

    def listing(self, query: dict[str, str]) -> bytes:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        answer, common = "", set()
        for key, data in sorted(self.objects.items()):
            rest = key.removeprefix(prefix)
            if not key.startswith(prefix):
                continue
            if delimiter and delimiter in rest:
                common.add(prefix + rest.split(delimiter)[0] + delimiter)
                continue
            answer += f"<Contents><Key>{escape(key)}</Key><Size>{len(data)}</Size><ETag>{escape(etag(data))}</ETag>"
            answer += "<LastModified>2026-11-26T00:00:00.000Z</LastModified></Contents>"
        answer += "".join(f"<CommonPrefixes><Prefix>{escape(each)}</Prefix></CommonPrefixes>" for each in common)
        return f"<ListBucketResult><IsTruncated>false</IsTruncated>{answer}</ListBucketResult>".encode()

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments) -> None:
        pass


@contextlib.contextmanager
def verbatim_s3(objects: dict[str, bytes], normalizes: bool = False) -> Iterator[str]:
    """Serve these objects, by their keys, as long as the block runs; the URI of their bucket."""
    handler = type("Serving", (Handler,), {"objects": objects, "normalizes": normalizes})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    S3FileSystem.clear_instance_cache()  # they keep the endpoint of the environment that they were made in
    try:
        with mock.patch.dict(os.environ, environment):
            yield f"s3://{BUCKET}"
    finally:
        S3FileSystem.clear_instance_cache()
        server.shutdown()
        server.server_close()
        thread.join()
