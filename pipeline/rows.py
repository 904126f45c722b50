"""The rows that carry splits through the Ray Data pipeline: one fixed schema, from the first stage to the last.

A row is one split: plain columns, and documents or results as Arrow IPC bytes. A stage that fails fills `error` and
passes the row on, so no split vanishes. Nothing here needs the model, so that the processes that write results start
without it.
"""

from enum import StrEnum
from typing import Any

import pyarrow as pa

SPLIT_SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("version", pa.string()),
        ("size", pa.int64()),
        ("shard_rows", pa.int64()),
        ("index", pa.int32()),  # -1: no split, the row only says how many the shard has
        ("num_splits", pa.int32()),  # on the shard's last row; null before it
        ("rows", pa.int64()),
        ("skipped_rows", pa.int64()),  # rows of splits that were there already, since the row before
        ("payload", pa.large_binary()),
        ("rejected", pa.large_binary()),
        ("stats", pa.string()),
        ("actor", pa.string()),  # who predicted it and when, `predict.ActorSplit` as JSON
        ("committed", pa.string()),  # what was published, `commit.Committed` as JSON
        ("error", pa.string()),  # why there is nothing else, for people
        ("error_kind", pa.string()),  # the same for the driver, an `ErrorKind`
    ]
)


class ErrorKind(StrEnum):
    """Why a row has an error."""

    WORK = "work"  # the shard or the split is at fault, or what it was read from
    OUTPUT = "output"  # its results could not be written
    STOPPED = "stopped"  # the run was asked to stop


def split_table(row: dict[str, Any]) -> pa.Table:
    """One row in the pipeline's schema."""
    return pa.Table.from_pylist([row], schema=SPLIT_SCHEMA)


def error_table(row: dict[str, Any], error: Exception, kind: ErrorKind = ErrorKind.WORK) -> pa.Table:
    """A row whose stage failed, without its payload."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return _failed_table(row, reason, kind)


def stopped_table(row: dict[str, Any]) -> pa.Table:
    """A row of work that was left undone because the run stops."""
    return _failed_table(row, "stopped", ErrorKind.STOPPED)


def _failed_table(row: dict[str, Any], reason: str, kind: ErrorKind) -> pa.Table:
    return split_table({**row, "payload": None, "rejected": None, "error": reason, "error_kind": kind})


def to_ipc(table: pa.Table) -> bytes:
    """A table as Arrow IPC stream bytes."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def from_ipc(data: Any) -> pa.Table:
    """Arrow IPC stream bytes (or a binary scalar) as a table, without a copy."""
    buffer = data.as_buffer() if isinstance(data, pa.Scalar) else pa.py_buffer(data)
    return pa.ipc.open_stream(buffer).read_all()
