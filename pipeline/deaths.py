"""The record of work that killed its process, kept in the output until the output is complete (see `ledger.py`)."""

import json
from typing import Any

from trbert_model.terminal import get_logger

from .storage import Storage

logger = get_logger(__name__)

DEATHS = "_deaths.json"


def read_deaths(output: Storage) -> dict[str, Any]:
    """Read what earlier runs recorded, as `Ledger` takes it. A damaged record is ignored: a run can learn it again."""
    data = output.read_if_there(DEATHS)
    try:
        known = json.loads(data) if data is not None else {}
        return {
            name: {"deaths": int(work["deaths"]), "at": {int(document): int(n) for document, n in work["at"].items()}}
            for name, work in known.items()
        }
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        logger.warning("%s/%s is damaged: %s", output.uri, DEATHS, error)
        return {}


def write_deaths(output: Storage, known: dict[str, Any]) -> None:
    """Replace the record, or delete it if `known` is empty."""
    if known:
        output.write(DEATHS, json.dumps(known).encode())
    else:
        output.delete([DEATHS])
