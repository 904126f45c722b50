"""Lineage events of a run: what it read, what it wrote, and how it ended (https://openlineage.io)."""

import contextlib
import logging
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

from trbert_model.errors import TRBertError
from trbert_model.terminal import get_logger

from .errors import PipelineError, UsageError, exit_code_of
from .storage import Storage

logger = get_logger(__name__)

_EXTRA = "pip install 'trbert-pipeline[lineage]'"
_PRODUCER = "https://pypi.org/project/trbert-pipeline"
_PROTOCOLS = {"s3a": "s3", "gcs": "gs"}  # other names of these file systems
_RETRIES = {"total": 2, "connect": 2, "read": 2}  # of five seconds each


class Lineage:
    """Sends a run's events: one when it starts, and one when it ends, if it has started.

    If the server does not take an event, one warning says so and the run goes on. An API key and what else the server
    wants come from the environment (`OPENLINEAGE_API_KEY`, and `OPENLINEAGE__TRANSPORT__…` of the client library).

    Args:
        target: URL of an OpenLineage server, or a file to append the events to; None for no events.

    Raises:
        UsageError: the client library is not installed, or the target is neither.
    """

    def __init__(self, target: str | None = None):
        self._client: Any = None
        self._start: dict[str, Any] | None = None  # what all events of the run have
        self._warned = False
        if target is None:
            return
        try:
            from openlineage.client import OpenLineageClient
            from openlineage.client.event_v2 import set_producer
        except ImportError as error:
            raise UsageError(f"openlineage needs the extra: {_EXTRA}") from error
        if target.startswith(("http://", "https://")):
            transport: dict[str, Any] = {"type": "http", "url": target, "retry": _RETRIES}
            if key := os.environ.get("OPENLINEAGE_API_KEY"):
                transport["auth"] = {"type": "api_key", "apiKey": key}
            self._place = urlsplit(target).hostname or "the server"  # a URL may contain credentials
        elif "://" in target:
            raise UsageError("openlineage must be the http(s):// URL of a server or a local file")
        else:
            transport = {"type": "file", "log_file_path": os.path.abspath(target), "append": True}
            self._place = target
        try:
            set_producer(_PRODUCER)
            self._client = OpenLineageClient(config={"transport": transport})
        except Exception as error:
            raise UsageError(f"openlineage: the client library refuses its settings: {type(error).__name__}") from error

    def start(self, run_id: str, started: float, source: str, output: str) -> None:
        """Say that a run has started.

        Args:
            run_id: the run's name in its report.
            started: when, in seconds since the epoch.
            source: URI of the corpus.
            output: URI of the output.
        """
        if self._client is None:
            return
        from openlineage.client.event_v2 import InputDataset, Job, OutputDataset, Run
        from openlineage.client.facet_v2 import job_type_job, processing_engine_run, tags_run
        from openlineage.client.uuid import generate_static_uuid

        facets = {
            "processing_engine": processing_engine_run.ProcessingEngineRunFacet(
                name="trbert-pipeline", version=version("trbert-pipeline")
            ),
            "tags": tags_run.TagsRunFacet(tags=[tags_run.TagsRunFacetFields(key="run", value=run_id)]),
        }
        kind = job_type_job.JobTypeJobFacet(processingType="BATCH", integration="TRBERT", jobType="JOB")
        instant = datetime.fromtimestamp(started, UTC)
        namespace = os.environ.get("OPENLINEAGE_NAMESPACE") or "trbert"
        self._start = {
            "run": Run(str(generate_static_uuid(instant, run_id.encode())), facets),
            "job": Job(namespace, f"score {'/'.join(dataset_name(output))}", {"jobType": kind}),
            "inputs": [InputDataset(*dataset_name(source))],
            "outputs": [OutputDataset(*dataset_name(output))],
        }
        self._emit("START", self._start)

    def end(self, report: dict[str, Any] | None, error: BaseException | None = None) -> None:
        """Say how the run ended, if it had started.

        Args:
            report: the run report; None if the run raised an error.
            error: what it raised.
        """
        if self._start is None:
            return
        import attr
        from openlineage.client.facet_v2 import (
            error_message_run,
            input_statistics_input_dataset,
            output_statistics_output_dataset,
        )

        event = dict(self._start)
        if report is not None and "documents" in report:
            rejected = sum(report["bad_rows"].values())
            read = input_statistics_input_dataset.InputStatisticsInputDatasetFacet(
                rowCount=report["documents"] + rejected, size=report["text_bytes"]
            )
            written = output_statistics_output_dataset.OutputStatisticsOutputDatasetFacet(
                rowCount=report["documents"], size=report["result_bytes"], fileCount=report["splits"]["committed"]
            )
            (source,), (output,) = event["inputs"], event["outputs"]
            event["inputs"] = [attr.evolve(source, inputFacets={"inputStatistics": read})]
            event["outputs"] = [attr.evolve(output, outputFacets={"outputStatistics": written})]
        state = _state(report, error)
        if state != "COMPLETE":
            message = report["status"] if report is not None else _message(error)
            facet = error_message_run.ErrorMessageRunFacet(message=message, programmingLanguage="PYTHON")
            run = event["run"]
            event["run"] = attr.evolve(run, facets={**run.facets, "errorMessage": facet})
        self._emit(state, event)

    def _emit(self, state: str, event: dict[str, Any]) -> None:
        from openlineage.client.event_v2 import RunEvent, RunState

        now = datetime.now(UTC).isoformat()
        try:
            with _quiet_retries():
                self._client.emit(RunEvent(eventTime=now, eventType=RunState[state], **event))
        except Exception as error:  # noqa: BLE001 - the run counts, and not who hears of it
            if not self._warned:
                logger.warning("%s takes no lineage events: %s", self._place, type(error).__name__)
            self._warned = True


def dataset_name(uri: str) -> tuple[str, str]:
    """The namespace and the name of a dataset by OpenLineage's naming specification.

    s3://bucket/corpus is `s3://bucket` and `corpus`, and a local path is `file` and the absolute path.
    """
    storage = Storage(uri)  # refuses credentials
    if storage.is_local:
        return "file", storage.uri
    url = urlsplit(storage.uri)
    path = url.path.lstrip("/") if url.scheme != "hdfs" else url.path
    return f"{_PROTOCOLS.get(url.scheme, url.scheme)}://{url.netloc}", path or "/"


def _state(report: dict[str, Any] | None, error: BaseException | None) -> str:
    """COMPLETE for the exit codes 0 and 3, ABORT for a run that was stopped from outside, else FAIL."""
    code = report["exit_code"] if report is not None else exit_code_of(error)
    return {0: "COMPLETE", 3: "COMPLETE", 4: "ABORT", 130: "ABORT"}.get(code, "FAIL")


def _message(error: BaseException | None) -> str:
    """An error's message. Those of other packages may contain secrets."""
    return str(error) if isinstance(error, PipelineError | TRBertError) else type(error).__name__


@contextlib.contextmanager
def _quiet_retries() -> Iterator[None]:
    """urllib3 warns of each attempt that failed."""
    urllib3 = logging.getLogger("urllib3.connectionpool")
    before = urllib3.level
    urllib3.setLevel(logging.ERROR)
    try:
        yield
    finally:
        urllib3.setLevel(before)
