"""A whole run that would be late: two speeds in one output, each row with its own, and a rerun that goes on."""

import json
import shutil
import time
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import ScoreConfig, UsageError, finish_by, open_output, run, score
from pipeline.choice import thresholds_version
from pipeline.finish_by import FinishBy
from pipeline.job import make_job
from pipeline.ray_start import RayStart
from pipeline.run import RunContext, run_job
from pipeline.storage import Storage
from pipeline.stream import Patience
from pipeline.verify import VerifyConfig, verify
from tests.integration.test_score import accounted_rows, put_table, shard_table
from tests.pipeline.test_choice import point
from trbert_model.calibration.table import Calibration, calibration_key, with_table
from trbert_model.checkpoints.files import model_digest
from trbert_model.engine import Engine, EngineOptions

pytestmark = pytest.mark.usefixtures("ray_cluster")

ROWS = {"a.parquet": 400, "b.parquet": 200}
SPEEDS = tuple(point(speed, drop, (value, value)) for speed, drop, value in ((2, 0, 0.1), (3, 0.5, 0.6), (4, 5, 0.95)))
SLOW, FAST, _ = map(thresholds_version, SPEEDS)


@pytest.fixture(scope="module")
def model(model_directory, tmp_path_factory):
    """The tiny model with a table of three speeds."""
    directory = tmp_path_factory.mktemp("with-a-table") / "model"
    shutil.copytree(model_directory, directory)
    key = calibration_key(model_digest(directory), "float32", 32)
    table = Calibration(key, "dev.parquet", 1000, "accuracy", 90.0, SPEEDS[0], SPEEDS)
    (directory / "calibration.json").write_bytes(with_table(directory, table))
    return directory


class LateFromTheThirdSplitOn(FinishBy):
    def add(self, *split):
        super().add(*split)
        if self.control.choices[-1].splits == 0 and sum(self._published.values()) == 3:
            self.control.deadline = time.time()


@pytest.fixture(scope="module")
def late(s3, ray_cluster, model):
    """A run's options, and the report of it."""
    corpus = s3.bucket("late")
    for name, rows in ROWS.items():
        put_table(f"{corpus}/in", name, shard_table(name, rows))
    config = ScoreConfig(
        input=f"{corpus}/in",
        output=f"{corpus}/out",
        model=str(model),
        id_column="id",
        finish_by="1h",
        max_drop=1.0,
        max_drop_confidence=0.0,
        split_bytes=600,
        num_actors=1,
        threads_per_actor=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "FinishBy", LateFromTheThirdSplitOn)
        patch.setattr(finish_by, "_BUSY", 0.0)  # the actor mostly waits for splits of ten rows
        report = run_job(make_job(config), RunContext(patience=Patience(look_seconds=0.0)), RayStart())
    return config, report


def test_a_run_that_would_be_late_scores_its_next_splits_faster(late, model):
    config, report = late
    assert (report["status"], report["exit_code"]) == ("complete", 0)
    rows = open_output(config.output).to_table().to_pandas()
    bad = sum(1 for count in ROWS.values() for i in range(count) if i % 20 == 7)
    assert len(rows) == sum(ROWS.values()) - bad
    assert accounted_rows(config.output) == {name: list(range(count)) for name, count in ROWS.items()}
    assert verify(VerifyConfig(config.output)).holds

    # Every split is of one version, both are there, and none is beyond max_drop.
    output = Storage(config.output)
    markers = [json.loads(output.read(file.path)) for file in output.files("_shards")]
    by_version = Counter()
    for split in (split for marker in markers for split in marker["splits"]):
        values = pq.read_table(pa.BufferReader(output.read(split["object"])))["thresholds_version"].to_pylist()
        assert values == [split["thresholds_version"]] * split["results"]
        by_version[split["thresholds_version"]] += split["results"]
    assert set(by_version) == {SLOW, FAST}
    assert by_version == Counter(rows["thresholds_version"])

    # Each row is what its version's thresholds say.
    for speed in SPEEDS[:2]:
        some = rows[rows["thresholds_version"] == thresholds_version(speed)]
        engine = Engine.from_pretrained(model, EngineOptions(device="cpu", thresholds=speed.thresholds))
        texts = {name: shard_table(name, count)["text"].to_pylist() for name, count in ROWS.items()}
        expected = engine.score_columns([texts[row.shard][row.row] for row in some.itertuples()])
        assert some["kept_tokens"].map(list).tolist() == expected.kept_tokens.tolist()
        assert some["label"].tolist() == [engine.task.labels[i] for i in expected.outputs.argmax(1)]

    # The report and the page say so.
    finish = report["finish_by"]
    assert [each["thresholds_version"] for each in finish["choices"]] == [SLOW, FAST]
    assert finish["late_seconds"] > 0
    assert {each["thresholds_version"]: each["documents"] for each in finish["points"]} == by_version
    assert any("later than finish_by 1h" in warning for warning in report["warnings"])
    assert FAST in output.read(report["page"]).decode()
    identity = json.loads(output.read("_output.json"))
    assert identity["finish_by_thresholds"] == [list(speed.thresholds) for speed in SPEEDS[:2]]


def test_the_next_run_goes_on_whatever_its_time_is(late):
    config, _ = late
    output = Storage(config.output)
    (marker, *_) = [file.path for file in output.files("_shards")]
    lost = [split["object"] for split in json.loads(output.read(marker))["splits"]][-5:]
    kept = {file.path: output.read(file.path) for file in output.files() if file.path.endswith(".parquet")}
    output.delete([marker, *lost])
    again = ScoreConfig(**{**vars(config), "finish_by": "2h"})
    report = score(again)
    assert (report["exit_code"], report["splits"]["committed"]) == (0, 5)
    assert report["finish_by"]["in_time"]
    assert accounted_rows(config.output) == {name: list(range(count)) for name, count in ROWS.items()}
    assert verify(VerifyConfig(config.output)).holds
    for path, data in kept.items():
        assert path in lost or output.read(path) == data
    assert score(again)["finish_by"] is None, "nothing to do"
    for other in ({"finish_by": None}, {"max_drop": 9.0}):
        with pytest.raises(UsageError, match="finish_by_thresholds"):
            score(ScoreConfig(**{**vars(config), **other}))
