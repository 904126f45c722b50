"""What users feed it: bad and odd shards, columns, ids, texts, names, models and options, each with what it ends in.

Either one line that names the shard, row or option, or every row once, as a result or quarantined with its reason.
"""

import contextlib
import dataclasses
import datetime
import functools
import gzip
import json
import os
import pickle
import re
import shutil
import typing
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyarrow.parquet.encryption as pe
import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import PipelineError, ScoreConfig, UsageError, open_output, score
from pipeline.commit import Committed, write_marker
from pipeline.corpus import MARKERS, OBJECT_NAME, QUARANTINE, Shard, input_root, list_shards
from pipeline.predict import SplitPredictor
from pipeline.storage import Storage
from tests.conftest import SPECIAL, WORDS, tiny_classifier, tiny_tokenizer
from tests.pipeline.stages import ON_CPU, encode_options, only_shard, run_stages, texts, write_shard
from trbert_model import ConfigurationError
from trbert_model.engine import EngineOptions
from trbert_model.options import parse_options

Write = Callable[[Path], object]

NAN = float("nan")
NULL = "null: the text is null"
EMPTY = "empty: the text is empty or white space"
NO_TOKENS = "no_tokens: the tokenizer finds no token in the text"
SCORED = ""


@functools.cache
def loaded(passed: tuple[str, ...], id_column: str | None, model: str, engine: EngineOptions) -> SplitPredictor:
    return SplitPredictor(list(passed), id_column, model=model, **dataclasses.asdict(engine))


def score_shards(
    shards: Iterable[Shard],
    directory: Path,
    model: Path,
    output: Storage,
    engine: EngineOptions = ON_CPU,
    **options,
) -> dict[str, dict]:
    """Every shard through the stages, with its marker as a run writes it; the last rows of those with an error."""
    settings = encode_options(directory, model, engine, **options)
    predictor = loaded(tuple(settings.passed_columns), settings.id_column, str(model), engine)
    failed = {}
    for shard in shards:
        rows = run_stages(shard, settings, predictor, output)
        if errors := [row for row in rows if row["error"] is not None]:
            failed[shard.path] = errors[-1]
        else:
            committed = [Committed(**json.loads(row["committed"])) for row in rows if row["committed"]]
            write_marker(output, shard, committed, "run")
    return failed


def ends_of(output: Storage) -> dict[tuple[str, int], str]:
    """What an output says of each (shard, row): SCORED, or the reason and detail of its quarantine."""
    results = open_output(output.uri).to_table(columns=["shard", "row"]).to_pylist()
    quarantined = open_output(output.uri, quarantine=True).to_table().to_pylist()
    ends = [((row["shard"], row["row"]), SCORED) for row in results]
    ends += [((row["shard"], row["row"]), f"{row['reason']}: {row['detail']}") for row in quarantined]
    assert len(dict(ends)) == len(ends), "a row has two ends"
    return dict(ends)


def assert_one_line(message: str, pattern: str) -> None:
    assert "\n" not in message
    assert re.search(pattern, message), message


# ---- shards whose rows all have an end ----


def of_text(text: Any, ids: Any = None, *, name: str = "text", **columns) -> Write:
    """A shard with this text column."""
    ids = range(len(text)) if ids is None else ids
    return lambda path: pq.write_table(pa.table({"id": ids, name: text, **columns}), path)


def sixty_rows(**options) -> Write:
    """A shard of 60 rows without fault, written with these options."""
    return lambda path: pq.write_table(pa.table({"id": range(60), "text": texts(60)}), path, **options)


def case(
    name: str, write: Write, ends: list[str], *, results: dict | None = None, bad_ids: list | None = None, **options
):
    """A case: rows' ends in their order; columns of the results and ids of the quarantined rows, where they matter."""
    return pytest.param(write, ends, results or {}, bad_ids, options, id=name)


def unchecked(values: list[bytes], kind: pa.DataType) -> pa.Array:
    """A column of strings that nobody has checked to be UTF-8."""
    views = {pa.string_view(): pa.binary_view(), pa.large_string(): pa.large_binary()}
    raw = pa.array(values, views.get(kind, pa.binary()))
    return pa.Array.from_buffers(kind, len(values), raw.buffers())


def like(kind: pa.DataType) -> pa.Array:
    strings = pa.array(["the good news", None, "bad", "the good news"])
    return (strings.cast(pa.binary()) if "binary" in str(kind) else strings).cast(kind)


def without_rows(groups: int) -> Write:
    def write(path: Path) -> None:
        schema = pa.schema([("id", pa.int64()), ("text", pa.string())])
        with pq.ParquetWriter(path, schema) as writer:
            for _ in range(groups):
                writer.write_table(schema.empty_table())

    return write


def twice(*names: str) -> Write:
    """A shard of two rows whose column names are these."""
    values = {"id": [1, 2], "text": ["good", "bad"]}
    arrays = [pa.array(values.get(name, ["x", "y"])) for name in names]
    return lambda path: pq.write_table(pa.Table.from_arrays(arrays, names=names), path)


COMPRESSIONS = "none snappy gzip brotli lz4 zstd".split()
TEXT_KINDS = [
    *(pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view()),
    *(pa.dictionary(pa.int32(), pa.string()), pa.dictionary(pa.int32(), pa.binary())),
]
OTHER_KINDS = {
    "int64": pa.array([1, None]),
    "double": pa.array([NAN, None]),
    "bool": pa.array([True, None]),
    "timestamp[us]": pa.array([datetime.datetime(2026, 1, 1), None]),
    "list<element: string>": pa.array([["good"], None]),
    "struct<a: string>": pa.array([{"a": "good"}, None]),
    "fixed_size_binary[4]": pa.array([b"good", None], pa.binary(4)),
}
NAMES_OF_COLUMNS = ["te xt", "a.b", ".", "a[0]", "*", "`x`", "it's", 'te"xt', "текст", "😀", "a\nb", "text\0", "TEXT"]

# Each lies between two good rows, which it must not touch.
TEXTS: dict[str, tuple[Any, str]] = {
    "null": (None, NULL),
    "empty": (b"", EMPTY),
    "white space": (" \t\r\n\u00a0\u2003\u3000\u2028".encode(), EMPTY),
    "separators": (b"\x1c\x1d\x1e\x1f", EMPTY),
    "NUL alone": (b"\0\0", NO_TOKENS),
    "NUL within": (b"good\0news", SCORED),
    "zero-width alone": ("\u200b\u200c\u200d\u2060".encode(), NO_TOKENS),
    "combining marks alone": ("\u0301\u0302".encode(), NO_TOKENS),
    "variation selector alone": ("\ufe0f".encode(), NO_TOKENS),
    "soft hyphen alone": ("\u00ad".encode(), NO_TOKENS),
    "replacement character alone": ("\ufffd".encode(), NO_TOKENS),
    "private use alone": ("\ue000".encode(), NO_TOKENS),
    "byte order mark alone": (b"\xef\xbb\xbf", NO_TOKENS),
    "byte order mark before": (b"\xef\xbb\xbfgood", SCORED),
    "control characters": (b"\x01\x02\x1b[31m\x7f", SCORED),
    "right to left": ("مرحبا שלום".encode(), SCORED),
    "right-to-left override": ("\u202egood\u202c".encode(), SCORED),
    "emoji": ("👩‍👩‍👧 😀".encode(), SCORED),
    "unknown words alone": (b"xyzzy plugh", SCORED),
    "special tokens": (b"[CLS] [SEP] [PAD] [MASK]", SCORED),
    "noncharacter": ("\uffff".encode(), SCORED),
    "lone surrogate": (b"a \xed\xa0\x80", "undecodable: byte 2 of the text is not UTF-8: invalid continuation byte"),
    "CESU-8": (b"\xed\xa0\xbd\xed\xb8\x80", "undecodable: byte 0 of the text is not UTF-8: invalid continuation byte"),
    "overlong": (b"good \xc0\xaf", "undecodable: byte 5 of the text is not UTF-8: invalid start byte"),
    "cut character": (b"good \xc3", "undecodable: byte 5 of the text is not UTF-8: unexpected end of data"),
    "UTF-16": ("good".encode("utf-16"), "undecodable: byte 0 of the text is not UTF-8: invalid start byte"),
    "Latin-1": ("café".encode("latin-1"), "undecodable: byte 3 of the text is not UTF-8: unexpected end of data"),
}
INVALID = "undecodable: byte 0 of the text is not UTF-8: invalid start byte"
GOOD = ["good", None, "bad"]
MIDDLE = [SCORED, NULL, SCORED]

READABLE = [
    *(case(f"compression {kind}", sixty_rows(compression=kind), [SCORED] * 60) for kind in COMPRESSIONS),
    case("one row a group", sixty_rows(row_group_size=1), [SCORED] * 60, split_bytes=300),
    case("data pages of version 2", sixty_rows(data_page_version="2.0"), [SCORED] * 60),
    case(
        "delta encodings",
        sixty_rows(use_dictionary=False, column_encoding={"id": "DELTA_BINARY_PACKED", "text": "DELTA_BYTE_ARRAY"}),
        [SCORED] * 60,
    ),
    case("pages with checksums", sixty_rows(write_page_checksum=True), [SCORED] * 60),
    case("no row groups", without_rows(0), []),
    case("an empty row group", without_rows(1), []),
    *(case(f"text of {kind}", of_text(like(kind)), [SCORED, NULL, SCORED, SCORED]) for kind in TEXT_KINDS),
    *(
        case(f"text of {kind}", of_text(values), [f"wrong_type: the text is of type {kind}", NULL])
        for kind, values in OTHER_KINDS.items()
    ),
    case(
        "text of a dictionary of numbers",
        of_text(pa.array([5, None]).dictionary_encode()),
        ["wrong_type: the text is of type int64", NULL],
    ),
    case("text of no type", of_text(pa.nulls(2)), [NULL, NULL]),
    *(
        case(f"text column {name!r}", of_text(GOOD, name=name), MIDDLE, text_columns=(name,), results={"id": [0, 2]})
        for name in NAMES_OF_COLUMNS
    ),
    case(
        "a column a.b beside b in a",
        of_text(["the good news"], name="a.b", a=[{"b": "bad"}]),
        [SCORED],
        text_columns=("a.b",),
        results={"num_tokens": [5]},
    ),
    case("other columns twice", twice("id", "o", "o", "text"), [SCORED, SCORED]),
    case(
        "text is id, and empty",
        of_text(["good", "", None, " "]),
        [SCORED, EMPTY, NULL, EMPTY],
        id_column="text",
        bad_ids=["", None, " "],
    ),
    case("text kept", of_text(GOOD), MIDDLE, keep_columns=("text",), results={"text": ["good", "bad"]}),
    case("ids null", of_text(GOOD, pa.array([None, None, "x"])), MIDDLE, results={"id": [None, "x"]}, bad_ids=[None]),
    case("ids of no type", of_text(GOOD, pa.nulls(3)), MIDDLE, results={"id": [None, None]}, bad_ids=[None]),
    case("ids twice", of_text(GOOD, ["a", "a", "a"]), MIDDLE, results={"id": ["a", "a"]}, bad_ids=["a"]),
    case("ids of int64", of_text(GOOD, [7, 8, 9]), MIDDLE, results={"id": [7, 9]}, bad_ids=["8"]),
    case("ids of double", of_text(GOOD, [0.5, NAN, 2.0]), MIDDLE, results={"id": [0.5, 2.0]}, bad_ids=["nan"]),
    *(
        case(
            f"ids of {kind}",
            of_text(GOOD, pa.array([b"\xff", b"\xfe", b"\0"], pa.binary()).cast(kind)),
            MIDDLE,
            results={"id": [b"\xff", b"\0"]},
            bad_ids=[r"b'\xfe'"],
        )
        for kind in (pa.binary(), pa.large_binary(), pa.binary_view())
    ),
    case("ids of struct", of_text(GOOD, [{"a": 1}, {"a": 2}, {"a": 3}]), MIDDLE, bad_ids=["{'a': 2}"]),
    *(
        case(
            f"ids of {kind} not UTF-8",
            of_text(GOOD, unchecked([b"a", b"\xff", b"c"], kind)),
            MIDDLE,
            bad_ids=[r"b'\xff'"],
        )
        for kind in (pa.string(), pa.large_string(), pa.string_view())
    ),
    case("ids beyond the calendar", of_text(GOOD, pa.array([1, 2**62, 3], pa.timestamp("us"))), MIDDLE),
    case(
        "ids that are lists not UTF-8",
        of_text(GOOD, pa.ListArray.from_arrays([0, 1, 2, 3], unchecked([b"a", b"\xff", b"c"], pa.string()))),
        MIDDLE,
    ),
    case(
        "kept views",
        of_text(GOOD, k=pa.array([b"\xff", None, b""], pa.binary_view())),
        MIDDLE,
        keep_columns=("k",),
        results={"k": [b"\xff", b""]},
    ),
    *(
        case(f"text {name}", of_text(pa.array([b"good", value, b"bad"])), [SCORED, end, SCORED])
        for name, (value, end) in TEXTS.items()
    ),
    *(
        case(
            f"text of {kind} not UTF-8", of_text(unchecked([b"good", b"\xff", b"bad"], kind)), [SCORED, INVALID, SCORED]
        )
        for kind in (pa.string(), pa.large_string(), pa.string_view())
    ),
    case(
        "text of string with a lone surrogate",
        of_text(unchecked([b"\xed\xa0\x80", b"good"], pa.string())),
        ["undecodable: byte 0 of the text is not UTF-8: invalid continuation byte", SCORED],
    ),
    case(
        "text of a dictionary not UTF-8",
        of_text(unchecked([b"good", b"\xff", b"good"], pa.string()).dictionary_encode()),
        [SCORED, INVALID, SCORED],
    ),
]


@pytest.mark.parametrize(("write", "expected", "results", "bad_ids", "options"), READABLE)
def test_every_row_has_one_end(write, expected, results, bad_ids, options, tmp_path, model_directory):
    directory, output = tmp_path / "in", Storage(str(tmp_path / "out"))
    directory.mkdir()
    write(directory / "a.parquet")
    failed = score_shards(list_shards(Storage(str(directory))), directory, model_directory, output, **options)
    assert not failed, failed
    assert ends_of(output) == {("a.parquet", row): end for row, end in enumerate(expected)}
    for name, values in results.items():
        assert open_output(output.uri).to_table(columns=["row", name]).sort_by("row")[name].to_pylist() == values
    if bad_ids is not None:
        quarantined = open_output(output.uri, quarantine=True).to_table().sort_by("row")
        assert quarantined["id"].to_pylist() == bad_ids


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory) -> Path:
    """As many positions as a real model has: windows of 32 would make long documents thousands of tiny ones."""
    directory = tmp_path_factory.mktemp("wide")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tiny_classifier(max_position_embeddings=512, reduction_layers=[0], **sizes).save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    return directory


# Tokens with the two special ones of each window and the 63 that it shares with the one before it.
LONG = {
    "a million tokens": ("good " * 1_000_000, "windows", SCORED, 1_000_000 + 2 * 2237 + 63 * 2236),
    "a line of 20 MB": (("x" * 999 + " ") * 20_000, "windows", SCORED, 20_000 + 2 * 45 + 63 * 44),
    "20 MB of white space": (" " * 20_000_000, "windows", EMPTY, 0),
    "a million tokens, of which 510 count": ("good " * 1_000_000, "truncate", SCORED, 512),
    "500 words after a long one": ("x" * 300_000 + " good" * 500, "truncate", SCORED, 503),
    "a word after much white space": (" " * 300_000 + "good", "truncate", SCORED, 3),
}


@pytest.mark.parametrize(("text", "overflow", "end", "tokens"), [pytest.param(*LONG[name], id=name) for name in LONG])
def test_documents_of_any_length_have_one_end(text, overflow, end, tokens, tmp_path, wide_model):
    write_shard(tmp_path / "in/a.parquet", {"id": range(3), "text": ["good", text, "bad"]})
    shards, output = list_shards(Storage(str(tmp_path / "in"))), Storage(str(tmp_path / "out"))
    engine = EngineOptions(device="cpu", overflow=overflow)
    assert not score_shards(shards, tmp_path / "in", wide_model, output, engine=engine)
    assert ends_of(output) == {("a.parquet", row): SCORED if row != 1 else end for row in range(3)}
    counts = open_output(output.uri).to_table().sort_by("row")["num_tokens"].to_pylist()
    assert counts == [3, *([tokens] if tokens else []), 3]


# ---- shards that cannot be read ----


def damaged(change: Callable[[bytes], bytes], **options) -> Write:
    def write(path: Path) -> None:
        sixty_rows(**options)(path)
        path.write_bytes(change(path.read_bytes()))

    return write


def one_bit_of_the_texts(data: bytes) -> bytes:
    texts = pq.ParquetFile(pa.BufferReader(data)).metadata.row_group(0).column(1)
    place = texts.data_page_offset + texts.total_compressed_size // 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


def footer_says(file_rows: int, group_rows: int) -> Callable[[bytes], bytes]:
    """A footer with one of its two row counts changed, of the file or of its only row group."""

    def change(data: bytes) -> bytes:
        for place in range(len(data) - 8 - int.from_bytes(data[-8:-4], "little"), len(data) - 8):
            changed = data[:place] + bytes([2 * min(file_rows, group_rows)]) + data[place + 1 :]  # Thrift's zigzag
            with contextlib.suppress(pa.ArrowException, OSError):
                footer = pq.ParquetFile(pa.BufferReader(changed)).metadata
                if (footer.num_rows, footer.row_group(0).num_rows) == (file_rows, group_rows):
                    return changed
        raise AssertionError("no byte of the footer does it")

    return change


def content(data: bytes) -> Write:
    return lambda path: path.write_bytes(data)


def encrypted(**options) -> Write:
    properties = pe.create_encryption_properties(b"0123456789abcdef", **options)
    return sixty_rows(encryption_properties=properties)


def name_not_utf8(path: Path) -> None:
    of_text(["good"], kkkk=["x"])(path)
    path.write_bytes(path.read_bytes().replace(b"kkkk", b"k\xff\xfek"))


def unreadable(name: str, write: Write, pattern: str, **options):
    return pytest.param(write, pattern, options, id=name)


PLAIN = {"compression": "none", "use_dictionary": False}
NO_PARQUET = "^ShardError: not a readable Parquet file: "
UNREADABLE = [
    unreadable("zero bytes", content(b""), NO_PARQUET + "Parquet file size is 0 bytes"),
    unreadable("nothing but magic", content(b"PAR1"), NO_PARQUET + "Parquet file size is 4 bytes"),
    unreadable("a text file", content(b"id,text\n1,good\n" * 9), NO_PARQUET + "Parquet magic bytes not found"),
    unreadable("a gzip of it", damaged(gzip.compress), NO_PARQUET + "Parquet magic bytes not found"),
    unreadable("zeros", damaged(lambda data: bytes(len(data))), NO_PARQUET + "Parquet magic bytes not found"),
    unreadable(
        "half of it", damaged(lambda data: data[: len(data) // 2]), NO_PARQUET + "Parquet magic bytes not found"
    ),
    unreadable("the footer cut", damaged(lambda data: data[:-100]), NO_PARQUET + "Parquet magic bytes not found"),
    unreadable("wrong magic", damaged(lambda data: data[:-4] + b"PAR2"), NO_PARQUET + "Parquet magic bytes not found"),
    unreadable(
        "a footer larger than the file",
        damaged(lambda data: data[:-8] + bytes([255, 255, 255, 0]) + data[-4:]),
        NO_PARQUET + ".*smaller than the size reported by footer",
    ),
    unreadable("a footer of rubbish", damaged(lambda data: data[:-99] + b"\xff" * 91 + data[-8:]), NO_PARQUET),
    unreadable("pages cut out", damaged(lambda data: data[:300] + data[700:], **PLAIN), r"a\.parquet: cannot read: "),
    unreadable(
        "pages overwritten",
        damaged(lambda data: data[:300] + b"\xff" * 400 + data[700:]),
        r"a\.parquet: cannot read: ",
    ),
    unreadable(
        "a bit of a page with a checksum",
        damaged(one_bit_of_the_texts, write_page_checksum=True, **PLAIN),
        r"a\.parquet: cannot read: .*CRC checksum",
    ),
    unreadable("rows missing", damaged(footer_says(60, 50)), r"^ShardError: .*\b50\b.*\b60\b"),
    unreadable("more rows than it says", damaged(footer_says(50, 60)), r"^ShardError: .*\b60\b.*\b50\b"),
    unreadable("encrypted", encrypted(), NO_PARQUET + ".*encrypted"),
    unreadable("encrypted but for its footer", encrypted(plaintext_footer=True), r"a\.parquet: cannot read: .*decrypt"),
    unreadable("a column name that is not UTF-8", name_not_utf8, "utf-8"),
    unreadable("no text column", of_text(["good"], name="body"), "^ShardError: no column 'text'; .* 'id', 'body'$"),
    unreadable(
        "a text column in capitals", of_text(["good"], name="TEXT"), "^ShardError: no column 'text'; .* 'TEXT'$"
    ),
    unreadable("no id column", of_text(["good"]), "^ShardError: no column 'key'; .* 'id', 'text'$", id_column="key"),
    unreadable(
        "no kept columns",
        of_text(["good"]),
        "^ShardError: no column 'date', 'by\\\\nline'; its columns are 'id', 'text'$",
        keep_columns=("date", "by\nline"),
    ),
    unreadable(
        "a column within a column",
        of_text([{"b": "good"}], name="a"),
        r"^ShardError: no column 'a\.b'; its columns are 'id', 'a'$",
        text_columns=("a.b",),
    ),
    unreadable("two text columns", twice("id", "text", "text"), r"^ShardError: .*'text'.* 2 times"),
    unreadable("two id columns", twice("id", "id", "text"), r"^ShardError: .*'id'.* 2 times"),
    unreadable("two kept columns", twice("id", "k", "k", "text"), r"^ShardError: .*'k'.* 2 times", keep_columns=("k",)),
]


@pytest.mark.parametrize(("write", "pattern", "options"), UNREADABLE)
def test_an_unreadable_shard_is_one_line_and_no_shard(write, pattern, options, tmp_path, model_directory):
    directory, output = tmp_path / "in", Storage(str(tmp_path / "out"))
    directory.mkdir()
    write(directory / "a.parquet")
    failed = score_shards([only_shard(directory)], directory, model_directory, output, **options)
    error = failed["a.parquet"]
    assert error["shard"] == "a.parquet"
    assert_one_line(error["error"], pattern)
    assert error["error"].startswith(("ShardError: ", "StorageError: "))
    assert error["index"] == -1, "the shard is at fault: another run would find the same"
    with pytest.raises(UsageError, match="no complete shard"):
        open_output(output.uri)


# ---- names ----


@dataclasses.dataclass
class Corpus:
    """Shards by their names below the input; what else lies there; those of the shards that cannot be read."""

    shards: list[str]
    others: Callable[[Path], object] = lambda directory: None
    unreadable: list[str] = dataclasses.field(default_factory=list)
    below: str = "in"  # the input's name
    pattern: str = ""  # what of it to read


def written(*names: str) -> Callable[[Path], None]:
    """Files that would be read if they were shards."""

    def write(directory: Path) -> None:
        for name in names:
            write_shard(directory / name, {"id": [0], "text": ["good"]})

    return write


def empty(*names: str) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        for name in names:
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).touch()

    return write


def link(path: Path) -> None:
    """A file's place taken by a younger link to it."""
    os.utime(path, (1, 1))
    path.symlink_to(path.rename(path.parent.parent / "elsewhere"))


def pipe(path: Path) -> None:
    """A link to a pipe elsewhere, which nobody writes into."""
    os.mkfifo(path.parent.parent / "pipe")
    path.symlink_to(path.parent.parent / "pipe")


NFC, NFD = (unicodedata.normalize(form, "é.parquet") for form in ("NFC", "NFD"))
CORPORA = {
    "spaces": Corpus(["a b.parquet", " .parquet", "ends .parquet"]),
    "percent": Corpus(["50%25.parquet", "%2e%2e%2f.parquet", "%.parquet"]),
    "hash, question mark and equals": Corpus(["a#b.parquet", "a?b=c&d.parquet"]),
    "dots": Corpus(["a..b.parquet", "a.parquet.parquet", "ends..parquet"]),
    "dots first": Corpus(["a.parquet"], written("..parquet", "...parquet", ".parquet")),
    "quotes": Corpus(['it\'s "it".parquet', "`a`.parquet"]),
    "backslashes": Corpus(["a\\b.parquet", "a\\..\\b.parquet"]),
    "line breaks": Corpus(["a\nb.parquet", "\r\n.parquet", "a\u2028b.parquet"]),
    "control characters": Corpus(["\x01\x1b[31m.parquet", "\x7f.parquet"]),
    "composed and decomposed": Corpus([NFC, NFD]),
    "no letters of ASCII": Corpus(["文書.parquet", "😀.parquet", "\u202egnp.parquet"]),
    "long": Corpus(["n" * 200 + ".parquet", "ü" * 120 + ".parquet"]),
    "glob characters": Corpus(["[a].parquet", "a*b.parquet", "{a}.parquet"]),
    "shells and options": Corpus(["$HOME.parquet", "-rf.parquet", "~.parquet", "a;b|c.parquet"]),
    "protocols": Corpus(["s3:.parquet", "file:/x.parquet", "a::b.parquet"]),
    "Hive directories": Corpus(["date=2026-01-01/part.parquet", "date=2026-01-02/part.parquet"]),
    "a directory named like a shard": Corpus(["d.parquet/x.parquet"], lambda d: (d / "empty.parquet").mkdir()),
    "one slug": Corpus(["a b.parquet", "a#b.parquet", "a-b.parquet", "d/a b.parquet"]),
    "an output's name": Corpus(["part-0123456789abcdef-0123456789ab-000000.parquet"]),
    "hidden": Corpus(
        ["a.parquet"], written(".a.parquet", "_a.parquet", ".d/a.parquet", "_d/a.parquet", "d/_a.parquet")
    ),
    "empty objects": Corpus(["a.parquet"], empty("_SUCCESS", "d/.keep", ".a.parquet.crc", "d_$folder$", "readme")),
    "an empty shard": Corpus(["a.parquet", "z.parquet"], empty("m.parquet"), unreadable=["m.parquet"]),
    "other endings": Corpus(["a.parquet"], written("b.PARQUET", "c.Parquet", "d.parq", "e.parquet.gz")),
    "without an ending": Corpus(["000000_0", "20240101_000000_00001_abcde", "a.parquet", "d/export-000000000000"]),
    "a pipe": Corpus(["a.parquet"], lambda directory: os.mkfifo(directory / "b.parquet")),
    "a link to a pipe": Corpus(["a.parquet"], lambda directory: pipe(directory / "b.parquet")),
    "a link to a pipe by a glob": Corpus(
        ["a.parquet"], lambda directory: pipe(directory / "b.parquet"), pattern="/*.parquet"
    ),
    "links": Corpus(["a.parquet", "b.parquet"], lambda directory: link(directory / "b.parquet")),
    "links by a glob": Corpus(["b.parquet"], lambda directory: link(directory / "b.parquet"), pattern="/*.parquet"),
    "a link to nowhere": Corpus(
        ["a.parquet"], lambda d: (d / "b.parquet").symlink_to(d / "nowhere"), unreadable=["b.parquet"]
    ),
    "a link to itself": Corpus(
        ["a.parquet"], lambda d: (d / "b.parquet").symlink_to(d / "b.parquet"), unreadable=["b.parquet"]
    ),
    "an odd prefix": Corpus(["a.parquet", "d/b.parquet"], below="it's [50%] #1?"),
    "a prefix with two colons": Corpus(["a.parquet"], below="in::put"),
    "a file with two colons": Corpus(["a::b.parquet"], written("b.parquet"), pattern="/a::b.parquet"),
    "a file in brackets": Corpus(["[a].parquet"], written("a.parquet"), pattern="/[a].parquet"),
    "a glob of stars": Corpus(["a/x.parquet", "b/c/x.parquet"], written("y.parquet"), pattern="/**/x.parquet"),
    "a glob of brackets": Corpus(["a/x.parquet", "b/x.parquet"], written("c/x.parquet"), pattern="/[ab]/*.parquet"),
    "a glob of question marks": Corpus(
        ["a1/x.parquet", "a2/x.parquet"], written("a/x.parquet"), pattern="/a?/*.parquet"
    ),
}


@pytest.mark.parametrize("corpus", [pytest.param(corpus, id=name) for name, corpus in CORPORA.items()])
def test_shards_are_scored_and_known_by_their_names(corpus, tmp_path, model_directory):
    directory, output = tmp_path / corpus.below, Storage(str(tmp_path / f"out of {corpus.below}"))
    for name in corpus.shards:
        write_shard(directory / name, {"id": [name, name], "text": ["good", None]})
    corpus.others(directory)
    shards = list_shards(Storage(str(directory) + corpus.pattern))
    assert [shard.path for shard in shards] == sorted([*corpus.shards, *corpus.unreadable])
    settings = {"input": Storage(input_root(str(directory) + corpus.pattern))}
    failed = score_shards(shards, directory, model_directory, output, **settings)
    assert sorted(failed) == corpus.unreadable
    assert all("\n" not in row["error"] for row in failed.values())
    wanted = {(name, row): end for name in corpus.shards for row, end in enumerate([SCORED, NULL])}
    assert ends_of(output) == wanted
    ids = open_output(output.uri).to_table(columns=["shard", "id"]).to_pylist()
    assert all(row["shard"] == row["id"] for row in ids)
    for file in output.files():
        folder, _, name = file.path.rpartition("/")
        assert folder in ("", MARKERS, QUARANTINE)
        assert OBJECT_NAME.match(name)
        assert name[0] not in "._"


def test_a_name_that_is_not_utf8_is_refused(tmp_path):
    write_shard(tmp_path / "a.parquet", {"id": [1], "text": ["good"]})
    shutil.copy(tmp_path / "a.parquet", os.fsencode(tmp_path) + b"/b\xff.parquet")
    with pytest.raises(UsageError) as refused:
        list_shards(Storage(str(tmp_path)))
    assert_one_line(str(refused.value), r"b\\(udc|x)ff\.parquet.*not UTF-8")


# ---- models ----


def config(**changes) -> Write:
    """Entries of config.json changed, or taken out where they are `...`."""

    def change(model: Path) -> None:
        values = json.loads((model / "config.json").read_text()) | changes
        kept = {name: value for name, value in values.items() if value is not ...}
        (model / "config.json").write_text(json.dumps(kept))

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Write:
    def write(model: Path) -> None:
        tensors = load_file(model / WEIGHTS)
        change(tensors)
        save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})

    return write


def file(name: str, change: Callable[[bytes], bytes]) -> Write:
    return lambda model: (model / name).write_bytes(change((model / name).read_bytes()))


def without(*names: str) -> Write:
    return lambda model: [(model / name).unlink() for name in names]


def all_of(*changes: Write) -> Write:
    return lambda model: [change(model) for change in changes]


class Trap:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def pickled(model: Path) -> None:
    torch.save({"classifier.weight": Trap(model.parent / EXECUTED)}, model / "pytorch_model.bin")


def plainly_pickled(model: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(model.parent / EXECUTED)))


def remote_code(model: Path) -> None:
    (model / "remote.py").write_text(f"open({str(model.parent / EXECUTED)!r}, 'w')")


def index(model: Path) -> None:
    (model / f"{WEIGHTS}.index.json").write_text('{"metadata": {}, "weight_map": {"x": "pytorch_model.bin"}}')


def weights_outside(model: Path) -> None:
    tiny_classifier(1).save_pretrained(model.parent / "other")
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": {"x": f"../other/{WEIGHTS}"}}))


def tokenizer_that_panics(model: Path) -> None:
    values = json.loads((model / "tokenizer.json").read_text())
    values["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    (model / "tokenizer.json").write_text(json.dumps(values))


def more_tokens(model: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["more", "tokens"])
    tokenizer.save_pretrained(model)


def a_token_far_off(model: Path) -> None:
    values = json.loads((model / "tokenizer.json").read_text())
    values["model"]["vocab"]["game"] = 500
    (model / "tokenizer.json").write_text(json.dumps(values))


def two_labels(model: Path) -> None:
    tiny_classifier(id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1}).save_pretrained(model)


def vocabulary_as_text(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    (model / "vocab.txt").write_text("\n".join([*SPECIAL, *WORDS]))


EXECUTED, WEIGHTS, QUERY = "executed", "model.safetensors", "bert.encoder.layer.0.attention.self.query.weight"
REMOTE = dict.fromkeys(("AutoConfig", "AutoModel", "AutoModelForSequenceClassification"), "remote.X")
REMOTE_TOKENIZER = b'{"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["remote.X", "remote.X"]}}'
ONLY_PICKLED = "only pickled weights there, which are not read"
BAD_MODELS = {
    "not there": (shutil.rmtree, r"no config\.json there"),
    "a file": (all_of(shutil.rmtree, lambda model: model.touch()), r"no config\.json there"),
    "no config": (without("config.json"), r"no config\.json there"),
    "config cut": (file("config.json", lambda data: data[:-9]), "not a valid JSON file"),
    "config empty": (file("config.json", lambda data: b""), "not a valid JSON file"),
    "config not UTF-8": (file("config.json", lambda data: b"\xff\xfe"), "not a valid JSON file"),
    "config a list": (file("config.json", lambda data: b"[]"), "must be a mapping, not list"),
    "another architecture": (config(architectures=["BertForMaskedLM"]), r"architecture is \['BertForMaskedLM'\]"),
    "no architecture": (config(architectures=...), "architecture is None"),
    "a size that is a word": (config(hidden_size="big"), "hidden_size"),
    "reduction beyond its layers": (config(reduction_layers=[9]), r"reduction_layers \[9\]"),
    "a threshold too few": (config(selector_thresholds=[0.5]), r"selector_thresholds \[0\.5\]"),
    "no weights": (without(WEIGHTS), r"no model\.safetensors there"),
    "weights empty": (file(WEIGHTS, lambda data: b""), "header too small"),
    "weights rubbish": (file(WEIGHTS, lambda data: b"rubbish" * 99), "header too large"),
    "weights cut": (file(WEIGHTS, lambda data: data[:-100]), "incomplete metadata, file not fully covered"),
    "weights pickled": (all_of(without(WEIGHTS), pickled), ONLY_PICKLED),
    "weights plainly pickled": (all_of(without(WEIGHTS), plainly_pickled), ONLY_PICKLED),
    "an index of pickled weights": (all_of(without(WEIGHTS), pickled, index), r"pytorch_model\.bin.*safetensors"),
    "a weight missing": (weights(lambda tensors: tensors.pop(QUERY)), QUERY),
    "a weight of another shape": (weights(lambda tensors: tensors.update({QUERY: torch.zeros(32, 8)})), QUERY),
    "a weight that is no number": (weights(lambda tensors: tensors[QUERY].fill_(NAN)), f"not finite.*{QUERY}"),
    "a vocabulary too small": (config(vocab_size=10), "word_embeddings"),
    "positions too many": (config(max_position_embeddings=64), "position_embeddings"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    "tokenizer cut": (file("tokenizer.json", lambda data: data[:-99]), "cannot be loaded"),
    "tokenizer without its config": (without("tokenizer_config.json"), "tokenizer.*(cls|CLS)"),
    "tokenizer too large": (more_tokens, "tokenizer has 23 tokens, the model's embeddings only 21"),
    "a token beyond the embeddings": (a_token_far_off, "tokenizer.* 50[01] .*embeddings only 21"),
    "a tokenizer of remote code": (
        all_of(remote_code, file("tokenizer_config.json", lambda data: REMOTE_TOKENIZER)),
        "custom code",
    ),
    "a tokenizer in Python": (
        file("tokenizer_config.json", lambda data: b'{"tokenizer_class": "CanineTokenizer"}'),
        "a CanineTokenizer, is none of the tokenizers library",
    ),
    "a tokenizer that panics": (tokenizer_that_panics, "cannot be loaded: Precompiled"),
    "an index of weights outside": (all_of(without(WEIGHTS), weights_outside), "names .*, outside the directory"),
    "weights of another name": (config(transformers_weights="x.safetensors"), "transformers_weights"),
    "an adapter": (lambda model: (model / "adapter_config.json").write_text("{}"), r"adapter_config\.json"),
    "no label map for three labels": (config(id2label=..., label2id=...), r"classifier\.weight"),
    "one label": (config(id2label={"0": "bad"}), r"classifier\.weight"),
    "one label of one": (
        config(id2label={"0": "bad"}, problem_type="single_label_classification"),
        "requires `num_labels > 1`",
    ),
    "a problem of another kind": (config(problem_type="ranking"), "problem_type"),
    "more labels than weights": (config(id2label={str(i): str(i) for i in range(5)}), r"classifier\.weight"),
    "labels with a gap": (config(id2label={"0": "bad", "1": "fine", "3": "good"}), "id2label"),
    "labels from 1": (config(id2label={"1": "bad", "2": "fine", "3": "good"}), "id2label"),
    "labels by name": (config(id2label={"bad": "0", "fine": "1", "good": "2"}), "bad"),
    "a label that is null": (config(id2label={"0": "bad", "1": None, "2": "good"}), "id2label"),
    "labels that are numbers": (config(id2label={"0": 0, "1": 1, "2": 2}), "id2label"),
}
ODD_MODELS = {
    "pickled weights beside": (pickled, ["bad", "fine", "good"]),
    "a weight too many": (weights(lambda tensors: tensors.update(more=torch.zeros(1))), ["bad", "fine", "good"]),
    "remote code in its config": (all_of(remote_code, config(auto_map=REMOTE)), ["bad", "fine", "good"]),
    "remote code of an unknown type": (
        all_of(remote_code, config(auto_map=REMOTE, model_type="remote")),
        ["bad", "fine", "good"],
    ),
    "no model type": (config(model_type=...), ["bad", "fine", "good"]),
    "a vocabulary as text": (vocabulary_as_text, ["bad", "fine", "good"]),
    "no label map for two labels": (all_of(two_labels, config(id2label=..., label2id=...)), ["LABEL_0", "LABEL_1"]),
    "fewer names than labels": (config(id2label={"0": "bad"}, num_labels=3), ["LABEL_0", "LABEL_1", "LABEL_2"]),
}


@pytest.fixture
def places(tmp_path, model_directory) -> dict[str, str]:
    """A corpus, a place for its results and a copy of the model."""
    write_shard(tmp_path / "in/a.parquet", {"id": [1, 2], "text": ["the good game", "bad"]})
    shutil.copytree(model_directory, tmp_path / "model")
    return {name: str(tmp_path / path) for name, path in (("input", "in"), ("output", "out"), ("model", "model"))}


@pytest.fixture
def nobody_there(monkeypatch):
    """Whoever is asked to allow remote code might say yes."""
    monkeypatch.setattr("builtins.input", lambda *prompt: pytest.fail("asked whether to run the model's code"))


@pytest.mark.parametrize(("change", "pattern"), [pytest.param(*model, id=name) for name, model in BAD_MODELS.items()])
def test_a_model_that_does_not_fit_is_refused_before_anything_starts(change, pattern, places, nobody_there, tmp_path):
    change(tmp_path / "model")
    with pytest.raises(UsageError) as refused:
        score(ScoreConfig(**places, dry_run=True))
    assert_one_line(str(refused.value), pattern)
    assert places["model"] in str(refused.value)
    assert not (tmp_path / EXECUTED).exists()


@pytest.mark.parametrize(("change", "labels"), [pytest.param(*model, id=name) for name, model in ODD_MODELS.items()])
def test_an_odd_model_that_fits_scores(change, labels, places, nobody_there, tmp_path):
    change(tmp_path / "model")
    assert score(ScoreConfig(**places, dry_run=True))["exit_code"] == 0
    output = Storage(places["output"])
    assert not score_shards([only_shard(tmp_path / "in")], tmp_path / "in", tmp_path / "model", output)
    assert set(ends_of(output).values()) == {SCORED}
    assert set(open_output(output.uri).to_table()["label"].to_pylist()) <= set(labels)
    assert not (tmp_path / EXECUTED).exists()


# ---- options ----


NUMBERS = {
    name: float if float in (hint, *typing.get_args(hint)) else int
    for name, hint in typing.get_type_hints(ScoreConfig).items()
    if {int, float} & {hint, *typing.get_args(hint)}
}
BAD_OPTIONS = [
    *(
        pytest.param({name: kind(-1)}, f"{name} -1", id=f"{name} negative")
        for name, kind in NUMBERS.items()
        if name != "no_answer_threshold"  # a difference of probabilities
    ),
    pytest.param({"no_answer_threshold": -1.5}, "no_answer_threshold -1.5 must be at least -1", id="no difference"),
    *(
        pytest.param({name: 0}, f"{name} 0 must be at least 1", id=f"{name} 0")
        for name in ("split_bytes", "num_actors", "threads_per_actor", "max_tokens_per_batch")
    ),
    *(
        pytest.param({name: NAN}, f"{name} nan", id=f"{name} not a number")
        for name, kind in NUMBERS.items()
        if kind is float
    ),
    *(
        pytest.param({name: ""}, f"{name} is required", id=f"{name} empty")
        for name in ("input", "output", "model", "text_column")
    ),
    pytest.param({"dtype": "int8"}, "dtype 'int8' is none of auto, float32", id="dtype unknown"),
    pytest.param({"overflow": "cut"}, "overflow 'cut' is neither 'windows' nor", id="overflow unknown"),
    pytest.param({"id_column": "shard"}, r"columns \['shard'\].*results", id="id_column named like a result"),
    pytest.param({"keep_columns": ("shard", "row")}, r"columns \['row', 'shard'\]", id="kept like results"),
    pytest.param({"keep_columns": ("a", "a")}, r"columns \['a'\].*keep_columns", id="kept twice"),
    pytest.param({"id_column": "a", "keep_columns": ("b", "a")}, r"columns \['a'\].*id_column", id="id kept"),
    pytest.param({"keep_columns": "date"}, "keep_columns 'date'", id="keep_columns a string"),
    pytest.param({"speedup": 0.5}, "speedup 0.5 must be at least 1", id="a speed-up that slows down"),
    pytest.param({"speedup": 2.0, "max_drop": 1.0}, "speedup and max_drop cannot go together", id="two choices"),
    pytest.param({"thresholds": (0.5,), "speedup": 2.0}, "speedup and thresholds cannot", id="a choice and thresholds"),
    pytest.param({"reduce": False, "max_drop": 1.0}, "no_reduce and max_drop cannot go", id="a choice for dense"),
    pytest.param({"thresholds": (0.5, 1.5)}, r"thresholds \(0.5, 1.5\) must be probabilities", id="no probability"),
]


@pytest.mark.parametrize(("wrong", "pattern"), BAD_OPTIONS)
def test_an_option_that_cannot_work_is_refused_by_name(wrong, pattern):
    with pytest.raises(UsageError) as refused:
        ScoreConfig(**{"input": "in", "output": "out", "model": "m"} | wrong)
    assert_one_line(str(refused.value), pattern)


def test_a_column_kept_like_one_of_the_tasks_results_is_refused(places):
    with pytest.raises(UsageError, match=r"columns \['label'\] of the input are named like columns of the results"):
        score(ScoreConfig(**places, keep_columns=("label", "answer"), dry_run=True))
    assert score(ScoreConfig(**places, keep_columns=("answer", "labels"), dry_run=True))["exit_code"] == 0


BAD_PLACES = {
    "memory as input": ({"input": "memory://x"}, "^memory://x: memory:// is private to one process"),
    "memory as output": ({"output": "memory://x"}, "^memory://x: memory:// is private to one process"),
    "memory as model": ({"model": "memory://x"}, "^memory://x: memory:// is private to one process"),
    "secret in the input": ({"input": "s3://key:secret@bucket/x"}, "bucket.*credentials do not belong in a URI"),
    "secret in the output": ({"output": "s3://key:secret@bucket/x"}, "bucket.*credentials do not belong in a URI"),
    "secret in the model": ({"model": "s3://key:secret@bucket/x"}, "bucket.*credentials do not belong in a URI"),
    "secret with a slash": ({"output": "s3://key:se/secret@bucket/x"}, "bucket.*credentials do not belong in a URI"),
    "secret in a chain": ({"input": "simplecache::s3://key:secret@bucket/x"}, "bucket.*credentials do not belong"),
    "no such protocol": ({"input": "nosuch://x"}, "^nosuch://x: Protocol not known"),
    "a protocol without its package": ({"output": "gs://bucket/x"}, "^gs://bucket/x: .*gcsfs"),
    "no bucket": ({"output": "s3://"}, "^s3://: "),
    "one slash": ({"output": "s3:/bucket/x"}, "^s3:/bucket/x: a URI has two slashes after its protocol"),
    "secret for Azure": ({"output": "abfs://me:secret@account/x"}, "account/x: credentials do not belong in a URI"),
    "Azure without its package": (
        {"output": "abfs://container@account.dfs/x"},
        "^abfs://container@account.dfs/x: .*adlfs",
    ),
    "half an IPv6 address": ({"input": "s3://["}, r"^s3://\["),
    "a chain to nowhere": ({"input": "zip://x::{tmp}/nowhere.zip"}, r"^zip://x::.*nowhere\.zip: "),
    "input not there": ({"input": "{tmp}/nowhere"}, r"nowhere: no Parquet files there \(0 other files\)"),
    "input not there, two lines": ({"input": "{tmp}/no\nwhere"}, r"no.*where: no Parquet files there"),
    "input of other files": ({"input": "{tmp}/model"}, r"model: no Parquet files there \(4 other files\)"),
    "input not Parquet": (
        {"input": "{tmp}/model/config.json"},
        r"config\.json: no Parquet files there \(1 other files\)",
    ),
    "input a hidden file": (
        {"input": "{tmp}/other/_a.parquet"},
        r"_a\.parquet: no Parquet files there \(1 other files\)",
    ),
    "output is input": ({"output": "{tmp}/in"}, "output .*/in and input .*/in lie inside each other"),
    "output inside input": ({"output": "{tmp}/in/scores"}, "output .*/in/scores and input .* lie inside each other"),
    "input inside output": ({"output": "{tmp}"}, "output .* and input .*/in lie inside each other"),
    "output around an input file": ({"input": "{tmp}/in/a.parquet", "output": "{tmp}/in"}, "inside each other"),
    "output in an input file": ({"input": "{tmp}/in/a.parquet", "output": "{tmp}/in/a.parquet/x"}, "inside each other"),
    "output inside input by dots": ({"output": "{tmp}/x/../in/y"}, "output .* lie inside each other"),
    "output inside input by a link": ({"output": "{tmp}/link/x"}, "output .* lie inside each other"),
    "a threshold too few": ({"thresholds": (0.5,)}, r"thresholds \(0.5,\) must be one for each of .* \[1, 2\]"),
    "a speed nobody measured": (
        {"speedup": 2.0, "dtype": "float32"},
        "speedup 2: .*model has no calibration table for float32 and windows of 32 tokens; make it with: python jobs",
    ),
    "a damaged table": (
        {"model": "{tmp}/damaged", "max_drop": 1.0, "dtype": "float32"},
        r"damaged/calibration\.json: damaged .*jobs/evaluate\.py",
    ),
    "stride as long as a window": ({"stride": 30}, "stride 30 must be less than the 30 tokens of a window"),
}


@pytest.mark.parametrize(("wrong", "pattern"), [pytest.param(*place, id=name) for name, place in BAD_PLACES.items()])
def test_places_that_cannot_work_are_refused_before_anything_starts(wrong, pattern, places, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "in")
    written("_a.parquet")(tmp_path / "other")
    shutil.copytree(tmp_path / "model", tmp_path / "damaged")
    (tmp_path / "damaged/calibration.json").write_text("{")
    wrong = {name: value.format(tmp=tmp_path) if isinstance(value, str) else value for name, value in wrong.items()}
    with pytest.raises(UsageError) as refused:
        score(ScoreConfig(**places | wrong, dry_run=True))
    assert_one_line(str(refused.value), pattern)
    assert "secret" not in str(refused.value)


MARKER = "_shards/a-0123456789abcdef-0123456789ab.json"
BAD_OUTPUTS = {
    "identity cut": ("_output.json", b"{"),
    "identity not UTF-8": ("_output.json", b"\xff"),
    "identity a list": ("_output.json", b"[]"),
    "a marker empty": (MARKER, b""),
    "a marker without entries": (MARKER, b"{}"),
    "a marker that is null": (MARKER, b"null"),
    "manifest cut": ("_SUCCESS", b'{"shards": ['),
    "manifest a list": ("_SUCCESS", b"[1]"),
    "manifest without shards": ("_SUCCESS", b'{"format": 1}'),
}


@pytest.mark.parametrize(("name", "data"), [pytest.param(*output, id=name) for name, output in BAD_OUTPUTS.items()])
def test_a_damaged_file_of_the_output_is_named(name, data, places):
    Storage(places["output"]).write(name, data)
    with pytest.raises(PipelineError) as refused:  # noqa: PT012 - whichever of the two reads it
        score(ScoreConfig(**places, dry_run=True))
        open_output(places["output"])
    assert_one_line(str(refused.value), f"/out/{re.escape(name)}: .*damaged")


OPTIONS = "input: in\noutput: out\nmodel: m\n"
BAD_FILES = {
    "empty": ("", "must be a mapping"),
    "a list": ("- input", "must be a mapping"),
    "a word": ("input", "must be a mapping"),
    "cut": ("input: [a", "cannot be read as YAML: while parsing a flow sequence"),
    "two documents": (OPTIONS + "---\n" + OPTIONS, "cannot be read as YAML: expected a single document"),
    "tabs": ("input:\n\t- a", "cannot be read as YAML: "),
    "NUL": ("input: a\0", "cannot be read as YAML: unacceptable character"),
    "not UTF-8": (b"input: \xff", "cannot be read as YAML: unacceptable character"),
    "nested without end": ("[" * 5000, "cannot be read as YAML"),
    "an unknown option": (OPTIONS + "colour: red", r"unknown options \['colour'\]; known are"),
    "options that are no words": (OPTIONS + "1: x\nnull: y", r"unknown options \['1', 'None'\]"),
    "an option that is a list": (OPTIONS + "? [a]\n: b", "cannot be read as YAML: .*unhashable key"),
    "a word for a number": (OPTIONS + "split_bytes: big", "split_bytes must be a int, not 'big'"),
    "a fraction for a number": (OPTIONS + "stride: 1.5", r"stride must be a int, not 1\.5"),
    "an exponent for a number": (OPTIONS + "split_bytes: 1e9", "split_bytes must be a int, not '1e9'"),
    "a switch for a number": (OPTIONS + "num_actors: yes", "num_actors must be a int, not True"),
    "a number for a switch": (OPTIONS + "probabilities: 1", "probabilities must be a bool, not 1"),
    "a word for a switch": (OPTIONS + 'reduce: "no"', "reduce must be a bool, not 'no'"),
    "a number for a word": (OPTIONS + "text_column: 5", "text_column must be a str, not 5"),
    "a date for a word": (OPTIONS + "id_column: 2026-01-01", "id_column must be a str, not datetime"),
    "a word for a list": (OPTIONS + "keep_columns: a", "keep_columns must be a list, not 'a'"),
    "a number in a list": (OPTIONS + "keep_columns: [a, 1]", r"keep_columns\[1\] must be a str, not 1"),
    "null for a word": (OPTIONS + "dtype: null", "dtype must be a str, not None"),
    "itself": ("input: &x [*x]", r"input must be a str, not \[\[...\]\]"),
    "Python objects": (
        OPTIONS + "dtype: !!python/object/apply:os.mkdir [{executed}]",
        "cannot be read as YAML: could not determine a constructor for the tag .*python",
    ),
}


@pytest.mark.parametrize(("text", "pattern"), [pytest.param(*file, id=name) for name, file in BAD_FILES.items()])
def test_an_options_file_that_does_not_fit_is_refused_by_name(text, pattern, tmp_path):
    path = tmp_path / "options.yaml"
    text = text.replace("{executed}", str(tmp_path / EXECUTED)).encode() if isinstance(text, str) else text
    path.write_bytes(text)
    with pytest.raises(ConfigurationError) as refused:
        parse_options(ScoreConfig, ["--config", str(path)], "")
    assert_one_line(str(refused.value), r"options\.yaml: " + pattern)
    assert not (tmp_path / EXECUTED).exists()


@pytest.mark.parametrize("path", ["nowhere.yaml", "."])
def test_an_options_file_that_cannot_be_opened_is_named(path, tmp_path):
    with pytest.raises(ConfigurationError) as refused:
        parse_options(ScoreConfig, ["--config", str(tmp_path / path)], "")
    assert_one_line(str(refused.value), f"^{re.escape(str(tmp_path / path))}: cannot be read as YAML: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--split-bytes big", "argument --split-bytes: invalid int value: 'big'"),
        ("--gpus-per-actor half", "argument --gpus-per-actor: invalid float value: 'half'"),
        ("--dtype", "argument --dtype: expected one argument"),
        ("--colour red", "unrecognized arguments: --colour red"),
        ("more", "unrecognized arguments: more"),
    ],
)
def test_arguments_that_do_not_fit_exit_with_2(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_options(ScoreConfig, ["--input", "in", "--output", "out", "--model", "m", *arguments.split()], "")
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
