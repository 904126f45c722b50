"""What the chaos tests share: a real S3 server of their own, which they may kill."""

import pytest

from tests.integration.s3_server import S3Server


@pytest.fixture(scope="package")
def chaos_s3(tmp_path_factory):
    server = S3Server(tmp_path_factory.mktemp("chaos-s3"))
    yield server
    server.stop()
