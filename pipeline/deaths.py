"""What is known of work that has killed its process, kept in the output until it is complete (see `ledger.py`)."""

import json
from typing import Any

from trbert_model.terminal import get_logger

from .storage import Storage

logger = get_logger(__name__)

DEATHS = "_deaths.json"


def read_deaths(output: Storage) -> dict[str, Any]:
    """What earlier runs have left, as `Ledger` takes it; nothing if it is damaged: then it is learnt again."""
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
    """Keep what is known now; nothing of it is left where nothing is known."""
    if known:
        output.write(DEATHS, json.dumps(known).encode())
    else:
        output.delete([DEATHS])
