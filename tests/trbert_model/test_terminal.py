"""No control character of other people's names reaches a terminal."""

import io
import logging
import sys

import pytest

from jobs.command import run_command
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


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-8"])
def test_a_command_prints_names_in_any_script_on_any_terminal(encoding, monkeypatch):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)

    def main():
        print("Größe 日本語")
        raise ConfigurationError("здраво")

    assert run_command(main) == 2
    for stream, text in zip(streams.values(), ("Größe 日本語\n", "error: здраво\n")):
        stream.flush()
        assert stream.buffer.getvalue() == text.encode(encoding, "backslashreplace")
