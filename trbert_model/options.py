"""Options as dataclasses whose fields carry their help texts, set by a call, a YAML file or the command line."""

import argparse
import dataclasses
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import ConfigurationError

Options = TypeVar("Options")

QUESTIONS = "question"  # the default name of the column with the questions


def option(default: Any, text: str, **metadata: Any) -> Any:
    """A dataclass field with a default and the help text for its command-line option.

    With `positional=True` in the metadata, the command line gives it without a flag.
    With `path=True`, `parse_options` replaces a leading ~ by the home directory, since no shell does it in YAML files.
    """
    return dataclasses.field(default=default, metadata={"help": text, **metadata})


@dataclasses.dataclass(frozen=True)
class LabelledColumns:
    """Column names of a labelled corpus; options of every command that reads one."""

    text_column: str = option("text", "column with the documents")
    label_column: str = option("label", "column with the labels")
    question_column: str | None = option(
        None,
        "column with the questions (default: question). For question answering, `answers` stand beside it and, unless "
        "they hold it, `answer_start`. For classification, naming it makes pairs: a question and its text",
    )
    context_column: str = option("context", "for question answering, column with the texts that questions are about")
    tokens_column: str = option("tokens", "column with lists of words; if their `starts` are beside it, in the text")
    tags_column: str = option("tags", "column with the words' tags; if there is none, `ner_tags`")
    spans_column: str = option(
        "spans", "column with the texts' entities, if words have no tags; if there is none, `entities`"
    )

    @property
    def questions(self) -> str:
        """Name of the column with the questions."""
        return self.question_column or QUESTIONS


def parse_options(cls: type[Options], arguments: Sequence[str] | None, description: str) -> Options:
    """Parse a command line, and the YAML file that its --config names, into an options class.

    Raises:
        ConfigurationError: an unreadable file, unknown keys, or values of the wrong type in the YAML file.
        SystemExit: code 2, from argparse, if the command line is invalid.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", metavar="FILE.yaml", help="options from a YAML file; the command line goes first")
    hints = typing.get_type_hints(cls)
    # A command's own options come before those that it shares with other commands.
    for field in sorted(dataclasses.fields(cls), key=lambda field: field.name not in cls.__annotations__):  # type: ignore[arg-type]
        flag, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
        if field.default not in (None, "", ()) and not isinstance(field.default, bool):
            text += f" (default: {field.default})"
        kind = _kind(hints[field.name])
        if field.metadata.get("positional"):
            parser.add_argument(field.name, metavar=field.name.upper(), nargs="?", help=text)
        elif kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        elif kind is tuple:
            item = typing.get_args(_concrete(hints[field.name]))[0]
            metavar = f"{field.name.upper()}[,…]"
            parser.add_argument(flag, type=_comma_separated(item), default=None, metavar=metavar, help=text)
        else:
            parser.add_argument(flag, type=kind, default=None, help=text)
    parsed = vars(parser.parse_args(arguments))
    file = parsed.pop("config")
    values = _from_yaml(file, hints) if file else {}
    values |= {name: value for name, value in parsed.items() if value is not None}
    paths = [field.name for field in dataclasses.fields(cls) if field.metadata.get("path")]  # type: ignore[arg-type]
    return cls(**values | {name: os.path.expanduser(values[name]) for name in paths if values.get(name)})


def _from_yaml(path: str, hints: dict[str, Any]) -> dict[str, Any]:
    try:
        values = yaml.safe_load(Path(path).expanduser().read_bytes())  # its encoding is YAML's, not the terminal's
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ConfigurationError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigurationError(f"{path}: must be a mapping of option names to values")
    if unknown := sorted(str(key) for key in set(values) - set(hints)):
        raise ConfigurationError(f"{path}: unknown options {unknown}; known are {sorted(hints)}")
    return {name: _checked(path, name, value, hints[name]) for name, value in values.items()}


def _checked(path: str, name: str, value: Any, hint: Any) -> Any:
    """Convert a YAML value to the option's type."""
    if value is None and type(None) in typing.get_args(hint):
        return None
    kind = _kind(hint)
    if kind is tuple and isinstance(value, list):
        item = typing.get_args(_concrete(hint))[0]
        return tuple(_checked(path, f"{name}[{i}]", each, item) for i, each in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        # YAML reads 22:00 as a number, and dates as dates.
        hint = "; put it in quotes" if kind is str else ""
        raise ConfigurationError(
            f"{path}: {name} must be a {'list' if kind is tuple else kind.__name__}, not {value!r}{hint}"
        )
    return value


def _concrete(hint: Any) -> Any:
    """`int | None` → int; other hints are unchanged."""
    if isinstance(hint, types.UnionType):
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _kind(hint: Any) -> type:
    """The class of a hint: `tuple[str, ...] | None` → tuple."""
    concrete = _concrete(hint)
    return typing.get_origin(concrete) or concrete


def _comma_separated(item: type) -> Any:
    def parse(text: str) -> tuple:
        return tuple(item(part.strip()) for part in text.split(",") if part.strip())

    parse.__name__ = f"comma-separated {item.__name__}"  # argparse uses it in its error message
    return parse
