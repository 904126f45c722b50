"""The short form of the chaos suite: an episode with every kind of fault. The long one: python -m tests.chaos."""

import time

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
from tests.chaos.verification import SUCCESS, result_keys, verify
from tests.integration.s3_server import S3Server

pytestmark = pytest.mark.timeout(600)

HUNG_SECONDS, MOST_SECONDS = 120, 360

PUT_DELAY = 0.5  # two actors write, so a few splits a second at most
# Windows of one kind are for the long form: `mix` holds all.
EPISODE = Episode(
    1,
    (
        Fault("kill_reader", 0.0, delay=0.5),
        Fault("mix", 0.25, seconds=10, share=0.2),
        Fault("kill_actor", 0.35, delay=0.2),
        # The server is away for longer than these seconds: it takes its time to start again.
        Fault("s3_outage", 0.4, delay=0.4, seconds=2),
        Fault("kill_driver", 0.55, delay=0.3),
        Fault("kill_raylet", 0.7),
        Fault("kill_cluster", 0.8),
    ),
    "short",
)

# The run that takes over from a paused one ends the episode: it is not struck any more.
PROTOCOL_EPISODE = Episode(
    2,
    (
        Fault("foreign_lock", 0.0),
        Fault("replace_model", 0.05),
        Fault("hang_actor", 0.1),
        Fault("torn_split", 0.15),
        Fault("kill_deleting", 0.2),
        Fault("pause_driver", 0.25),
    ),
    "short",
)


@pytest.fixture(scope="module")
def world(chaos_s3: S3Server, tmp_path_factory):
    # One CPU a node: Ray starts fewer workers, and starting one is four seconds of imports.
    world = World(
        chaos_s3, tmp_path_factory.mktemp("chaos"), splits=30, cpus=1, command=("-m", "tests.chaos.quick_lease")
    )
    try:
        assert not (found := world.make_reference()), found
        yield world
    finally:
        world.close()


def test_every_row_ends_once_whatever_dies(world):
    """Credentials that expire end a first run in one line; then everything dies on the way to the end of its output."""
    run = EpisodeRun(world, EPISODE, hung_seconds=HUNG_SECONDS, put_delay=PUT_DELAY, most_seconds=MOST_SECONDS)
    _score_until_credentials_expire(world, run.prefix)
    outcome = run.execute()
    print(as_json(outcome))
    logs = sorted(world.directory.glob(f"{run.prefix}-run-*.log"))
    assert outcome.is_clean, f"{as_json(outcome)}\n{outcome.findings}\n{tail(logs[-1])}"
    # A window may find no request to hit, a victim may be gone; most must have struck.
    assert len(outcome.missed) <= 1, outcome.missed
    assert sorted([*outcome.missed, *(s.kind for s in outcome.strikes)]) == sorted(f.kind for f in EPISODE.faults)


def _score_until_credentials_expire(world: World, prefix: str) -> None:
    """The store refuses everything from the middle of a run on."""
    log = world.directory / "expired.log"
    driver = world.start_driver(prefix, log)
    try:
        deadline = time.monotonic() + 120
        while len(result_keys(world.server, BUCKET, prefix)) < 3:
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


def test_every_row_ends_once_whoever_else_is_at_work(world):
    """Pauses, take-overs, another model, deaths in the middle of a split and of a deletion."""
    run = EpisodeRun(world, PROTOCOL_EPISODE, hung_seconds=HUNG_SECONDS, most_seconds=MOST_SECONDS)
    outcome = run.execute()
    print(as_json(outcome))
    logs = sorted(world.directory.glob(f"{run.prefix}-run-*.log"))
    assert outcome.is_clean, f"{as_json(outcome)}\n{outcome.findings}\n{tail(logs[-1])}"
    assert len(outcome.missed) <= 2, outcome.missed
    for strike in outcome.strikes:
        if strike.kind == "pause_driver" and strike.results < world.num_splits:  # it had something left to do
            assert outcome.exits.count(5) == 2, outcome.exits  # as the run beside `foreign_lock`
            assert any("another run has taken the output over" in log.read_text() for log in logs)


def test_the_short_form_holds_every_kind_of_fault():
    kinds = {fault.kind for episode in (EPISODE, PROTOCOL_EPISODE) for fault in episode.faults}
    assert kinds == set(KINDS) - set(REQUEST_KINDS)


def test_the_verification_reads_what_is_there(world):
    """A copy of the reference is found whole, by its objects and by its markers; then three objects are tampered."""
    client, prefix = world.server.client, "tampered"
    for key in world.server.keys(BUCKET):
        if key.startswith(f"{REFERENCE}/"):
            copy = key.replace(REFERENCE, prefix, 1)
            client.copy_object(Bucket=BUCKET, Key=copy, CopySource={"Bucket": BUCKET, "Key": key})
    assert not verify(world.server, BUCKET, prefix, world.rows, world.reference)

    lost, half = sorted(name for name in world.reference.objects if name.startswith("large-"))[:2]
    client.delete_object(Bucket=BUCKET, Key=f"{prefix}/{lost}")
    for name in (half, SUCCESS):
        data = client.get_object(Bucket=BUCKET, Key=f"{prefix}/{name}")["Body"].read()
        client.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=data[: len(data) // 2])
    found = verify(world.server, BUCKET, prefix, world.rows, world.reference)
    assert sorted(place.split(",")[0] for place in found.partial) == sorted([half, SUCCESS])
    assert found.lost[0].startswith("large.parquet row 0, by prefix")
    assert found.lost[-1].startswith("everything, by markers")
    assert f"{lost} is missing" in found.wrong
