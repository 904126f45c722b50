"""No control character of other people's names reaches a terminal."""

import logging

from pipeline.errors import StorageError
from trbert_model.errors import ConfigurationError
from trbert_model.terminal import get_logger, printable

EVIL = "a\x1b]0;owned\x07\u202eb\r\x9bc\udcff"


def test_what_does_things_is_written_as_python_does():
    assert printable("Größe 中 🙂 100 %\nnext") == "Größe 中 🙂 100 %\nnext"
    assert printable(EVIL) == "a\\x1b]0;owned\\x07\\u202eb\\r\\x9bc\\udcff"


def test_errors_are_printable():
    assert str(StorageError(f"{EVIL}\nx")) == printable(EVIL).replace("\\r", " ") + " x"
    assert str(ConfigurationError(EVIL)) == printable(EVIL)


def test_logs_are_printable_tracebacks_too(caplog):
    logger = get_logger("pipeline.anything")
    try:
        raise ValueError(EVIL)
    except ValueError:
        logger.exception("shard %s", EVIL)
    (record,) = caplog.records
    text = logging.Formatter().format(record)
    assert text.startswith(f"shard {printable(EVIL)}\nTraceback")
    assert printable(text) == text
