"""Iceberg tables for the tests, written by pyiceberg without a catalog's database."""

from pathlib import Path
from typing import Any

import pyarrow as pa
from pyiceberg.catalog import Catalog
from pyiceberg.catalog.noop import NoopCatalog
from pyiceberg.io.pyarrow import PyArrowFileIO
from pyiceberg.manifest import (
    DataFile,
    DataFileContent,
    FileFormat,
    ManifestContent,
    ManifestEntry,
    ManifestEntryStatus,
    ManifestWriterV2,
    write_manifest_list,
)
from pyiceberg.partitioning import UNPARTITIONED_PARTITION_SPEC, PartitionSpec
from pyiceberg.schema import assign_fresh_schema_ids
from pyiceberg.serializers import ToOutputFile
from pyiceberg.table import CommitTableResponse, Table
from pyiceberg.table.metadata import new_table_metadata
from pyiceberg.table.snapshots import Operation, Snapshot, Summary
from pyiceberg.table.sorting import UNSORTED_SORT_ORDER
from pyiceberg.table.update import AddSnapshotUpdate, SetSnapshotRefUpdate, update_table_metadata
from pyiceberg.typedef import Record


class FolderCatalog(NoopCatalog):
    """Keeps only a table's metadata files, as the names of real catalogs' have it: 00000-….metadata.json."""

    def store(self, where: str, number: int, metadata: Any) -> Table:
        io, location = PyArrowFileIO(), f"{where}/metadata/{number:05d}-of.metadata.json"
        ToOutputFile.table_metadata(metadata, io.new_output(location))
        return Table(("table",), metadata, location, io, self)

    def commit_table(self, table: Table, requirements: Any, updates: Any) -> CommitTableResponse:
        metadata = update_table_metadata(table.metadata, updates, metadata_location=table.metadata_location)
        stored = self.store(table.metadata.location, int(Path(table.metadata_location).name[:5]) + 1, metadata)
        return CommitTableResponse(metadata=metadata, metadata_location=stored.metadata_location)


def iceberg_table(where: Path, data: pa.Table, spec: PartitionSpec = UNPARTITIONED_PARTITION_SPEC) -> Table:
    """A new table that holds these rows."""
    schema = assign_fresh_schema_ids(Catalog._convert_schema_if_needed(data.schema))
    metadata = new_table_metadata(schema, spec, UNSORTED_SORT_ORDER, str(where), {})
    table = FolderCatalog("folder").store(str(where), 0, metadata)
    table.append(data)
    return table


def add_delete_file(table: Table, content: DataFileContent) -> None:
    """Commit a delete file that may concern every data file."""

    class DeletesWriter(ManifestWriterV2):
        def content(self) -> ManifestContent:
            return ManifestContent.DELETES

        @property
        def _meta(self) -> dict[str, str]:
            return {**super()._meta, "content": "deletes"}

    before, number = table.current_snapshot(), 4711
    deletes = DataFile.from_args(
        content=content,
        file_path=f"{table.location()}/data/deletes.parquet",
        file_format=FileFormat.PARQUET,
        partition=Record(),
        record_count=1,
        file_size_in_bytes=1,
    )
    manifests, listing = (table.io.new_output(f"{table.location()}/metadata/{name}.avro") for name in ("m", "l"))
    with DeletesWriter(table.spec(), table.schema(), manifests, number, "null") as writer:
        entry = ManifestEntry.from_args(status=ManifestEntryStatus.ADDED, snapshot_id=number, data_file=deletes)
        writer.add_entry(entry)
    sequence = table.metadata.next_sequence_number()
    with write_manifest_list(2, listing, number, before.snapshot_id, sequence, "null") as written:
        written.add_manifests([*before.manifests(table.io), writer.to_manifest_file()])
    snapshot = Snapshot(
        snapshot_id=number,
        parent_snapshot_id=before.snapshot_id,
        sequence_number=sequence,
        timestamp_ms=before.timestamp_ms + 1,
        manifest_list=listing.location,
        summary=Summary(operation=Operation.DELETE),
        schema_id=table.schema().schema_id,
    )
    update = SetSnapshotRefUpdate(ref_name="main", type="branch", snapshot_id=number)
    table._do_commit((AddSnapshotUpdate(snapshot=snapshot), update), ())
