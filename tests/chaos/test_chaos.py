"""The short form of the chaos suite: two episodes, every kind of fault. The long one: python -m tests.chaos."""

import io
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.chaos.episodes import (
    BUCKET,
    KINDS,
    POLL_SECONDS,
    REFERENCE,
    Episode,
    EpisodeRun,
    Fault,
    World,
    as_json,
    kill_group,
    tail,
)
from tests.chaos.fault_proxy import KINDS as REQUEST_KINDS
from tests.chaos.verification import QUARANTINE, SUCCESS, Findings, result_keys, verify
from tests.integration.s3_server import S3Server

pytestmark = pytest.mark.timeout(550)

# Windows of one kind are for the long form: `mix` holds all.
EPISODES = (
    Episode(
        1,
        (
            Fault("kill_reader", 0.0, delay=2.0),
            Fault("mix", 0.1, seconds=10, share=0.2),
            Fault("kill_actor", 0.3, delay=0.2),
            Fault("kill_driver", 0.5, delay=0.3),
            Fault("kill_raylet", 0.7),
        ),
        "short 1",
    ),
    Episode(2, (Fault("s3_outage", 0.2, delay=0.4, seconds=10), Fault("kill_cluster", 0.6)), "short 2"),
)


@pytest.fixture(scope="module")
def world(chaos_s3: S3Server, tmp_path_factory):
    # One CPU a node: Ray starts fewer workers, and starting one is four seconds of imports.
    world = World(chaos_s3, tmp_path_factory.mktemp("chaos"), splits=40, cpus=1)
    try:
        assert not (found := world.make_reference()), found
        yield world
    finally:
        world.close()


@pytest.mark.parametrize("episode", EPISODES, ids=lambda episode: f"episode {episode.number}")
def test_every_row_ends_once_whatever_dies(world, episode):
    outcome = EpisodeRun(world, episode, hung_seconds=200).execute()
    print(as_json(outcome))
    logs = sorted(world.directory.glob(f"episode-{episode.number:04d}-run-*.log"))
    assert outcome.is_clean, f"{as_json(outcome)}\n{outcome.findings}\n{tail(logs[-1])}"
    # On a busy machine a run can be over before its last fault is due; most must have struck.
    assert len(outcome.missed) <= 1, outcome.missed
    assert sorted([*outcome.missed, *(s.kind for s in outcome.strikes)]) == sorted(f.kind for f in episode.faults)


def test_credentials_that_expire_end_the_run_in_one_line_and_the_next_run_finishes_it(world):
    """The store refuses everything from the middle of a run on; with good credentials nothing is missing or twice."""
    prefix, log = "expired", world.directory / "expired.log"
    driver = world.start_driver(prefix, log)
    try:
        deadline = time.monotonic() + 120
        while len(result_keys(world.server, BUCKET, prefix)) < 5:
            assert driver.poll() is None, tail(log)
            assert time.monotonic() < deadline
            time.sleep(POLL_SECONDS)
        world.proxy.hit(1.0, ["expired"])
        assert driver.wait(120) == 1, tail(log)
    finally:
        world.proxy.hit(0.0)
        kill_group(driver)
    assert "cannot write: the credentials have expired (ExpiredToken); renew them and run again" in log.read_text()
    assert "Traceback" not in log.read_text()
    again = world.start_driver(prefix, log)
    try:
        assert again.wait(180) == 0, tail(log)
    finally:
        kill_group(again)
    assert not verify(world.server, BUCKET, prefix, world.rows, world.reference)


def test_the_short_form_holds_every_kind_of_fault():
    kinds = {fault.kind for episode in EPISODES for fault in episode.faults}
    assert kinds == set(KINDS) - set(REQUEST_KINDS)


class TestVerification:
    """It finds what it is there to find: copies of the reference with one thing wrong each."""

    @pytest.fixture
    def copy(self, world, request):
        """The reference's objects under another prefix; returns what changes one."""
        prefix = f"tampered-{abs(hash(request.node.name)) % 10**8}"
        client = world.server.client
        for key in world.server.keys(BUCKET):
            if key.startswith(f"{REFERENCE}/"):
                source = {"Bucket": BUCKET, "Key": key}
                client.copy_object(Bucket=BUCKET, Key=prefix + key.removeprefix(REFERENCE), CopySource=source)
        return Copy(world, prefix)

    def test_nothing(self, copy):
        assert copy.findings().counts() == {"lost": 0, "doubled": 0, "wrong": 0, "partial": 0}

    def test_a_lost_split(self, copy):
        rows = copy.table(copy.results[1]).num_rows
        copy.delete(copy.results[1])
        found = copy.findings()
        assert len([place for place in found.lost if "by prefix" in place]) == rows
        assert any("by markers" in place for place in found.lost)
        assert any("is missing" in place for place in found.wrong)

    def test_a_lost_row(self, copy):
        table = copy.table(copy.results[2])
        copy.put(copy.results[2], table.slice(1))
        assert copy.findings().lost == [copy.place(table, 0, way) for way in ("prefix", "markers")]

    def test_a_doubled_split(self, copy):
        table = copy.table(copy.results[0])
        copy.put("again.parquet", table)
        found = copy.findings()
        assert found.doubled == [f"{copy.place(table, row, 'prefix')}: 2 times" for row in range(table.num_rows)]
        assert found.lost == []

    def test_a_row_among_results_and_quarantined(self, copy):
        table = copy.table(copy.results[0]).slice(0, 1)
        bad = {"shard": table["shard"], "row": table["row"], "id": [None], "reason": ["null"], "detail": [""]}
        copy.put(f"{QUARANTINE}/again.parquet", pa.table(bad))
        assert len(copy.findings().doubled) == 1

    def test_wrong_values(self, copy):
        table = copy.table(copy.results[0])
        for name, value in [
            ("label", "x"),
            ("num_tokens", 0),
            ("kept_tokens", [1]),
            ("id", "x"),
            ("score", table["score"][0].as_py() + 2e-4),
        ]:
            column = pa.array([value, *table[name].to_pylist()[1:]], table.schema.field(name).type)
            copy.put(copy.results[0], table.set_column(table.column_names.index(name), name, column))
            found = copy.findings()
            assert [place for place in found.wrong if f" {name} " in place], name
            assert any("is not what the marker" in place for place in found.wrong)

    def test_a_row_that_is_not_in_the_input(self, copy):
        table = copy.table(copy.results[0]).slice(0, 1)
        row = table.column_names.index("row")
        copy.put("more.parquet", table.set_column(row, "row", pa.array([10**6])))
        assert any("not in the input" in place for place in copy.findings().wrong)

    def test_another_reason(self, copy):
        name = next(name for name in copy.names if name.startswith(QUARANTINE))
        table = copy.table(name)
        reason = table.column_names.index("reason")
        copy.put(name, table.set_column(reason, "reason", pa.array(["other"] * table.num_rows)))
        assert len(copy.findings().wrong) == 2 * table.num_rows  # by prefix and by markers

    def test_no_sign_of_completeness(self, copy):
        copy.delete(SUCCESS)
        assert [place for place in copy.findings().wrong if SUCCESS in place]
        copy.write(SUCCESS, b'{"shards": []}')
        assert [place for place in copy.findings().wrong if SUCCESS in place]

    def test_half_an_object(self, copy):
        for name in (copy.results[3], SUCCESS):
            data = copy.read(name)
            copy.write(name, data[: len(data) // 2])
        found = copy.findings()
        assert len(found.partial) == 2
        assert found.lost


class Copy:
    """A copy of the reference's output, to tamper with."""

    def __init__(self, world: World, prefix: str):
        self.world, self.prefix = world, prefix
        self.names = sorted(world.reference.objects)
        self.results = [name for name in self.names if "/" not in name and self.table(name).num_rows > 1]

    def read(self, name: str) -> bytes:
        return self.world.server.client.get_object(Bucket=BUCKET, Key=f"{self.prefix}/{name}")["Body"].read()

    def table(self, name: str) -> pa.Table:
        return pq.read_table(io.BytesIO(self.read(name)))

    def write(self, name: str, data: bytes) -> None:
        self.world.server.client.put_object(Bucket=BUCKET, Key=f"{self.prefix}/{name}", Body=data)

    def put(self, name: str, table: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        self.write(name, sink.getvalue().to_pybytes())

    def delete(self, name: str) -> None:
        self.world.server.client.delete_object(Bucket=BUCKET, Key=f"{self.prefix}/{name}")

    @staticmethod
    def place(table: pa.Table, row: int, way: str) -> str:
        return f"{table['shard'][row]} row {table['row'][row]}, by {way}"

    def findings(self) -> Findings:
        return verify(self.world.server, BUCKET, self.prefix, self.world.rows, self.world.reference)
