"""TRBertPredictor in `Dataset.map_batches`, as in a notebook."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from pipeline import TRBertPredictor
from tests.pipeline.stages import write_shard

TYPES = {
    "id": pa.int64(),
    "text": pa.string(),
    "label": pa.string(),
    "score": pa.float32(),
    "num_tokens": pa.int64(),
    "num_windows": pa.int32(),
    "kept_tokens": pa.list_(pa.int32()),
    "error": pa.string(),
}


@pytest.mark.usefixtures("ray_cluster")
def test_numpy_batches_of_bad_rows_fit_the_others(tmp_path, model_directory):
    """The first file and some batches have bad rows only. tests/pipeline/test_predict.py has the other formats."""
    write_shard(tmp_path / "in/a.parquet", {"id": [0, 1], "text": ["  ", ""]})
    write_shard(tmp_path / "in/b.parquet", {"id": [2, 3, 4, 5], "text": ["good news", None, "bad", "the good"]})
    dataset = ray.data.read_parquet(str(tmp_path / "in")).map_batches(
        TRBertPredictor,
        fn_constructor_kwargs={"model": str(model_directory), "device": "cpu", "threads": 1},
        batch_size=2,
        compute=ray.data.ActorPoolStrategy(size=1),
    )
    dataset.write_parquet(str(tmp_path / "out"))
    tables = [pq.read_table(file) for file in sorted((tmp_path / "out").iterdir())]
    for table in tables:
        assert dict(zip(table.schema.names, table.schema.types, strict=True)) == TYPES
    rows = sorted(pa.concat_tables(tables).to_pylist(), key=lambda row: row["id"])
    assert [row["error"] for row in rows] == ["empty", "empty", None, "null", None, None]
    assert [row["kept_tokens"] is None for row in rows] == [row["error"] is not None for row in rows]
