"""Labelled corpora of several files."""

import pyarrow as pa
import pytest

from pipeline.errors import PipelineError
from pipeline.labelled import corpora_read_as_input
from tests.pipeline.stages import write_shard
from trbert_model import InputError
from trbert_model.options import LabelledColumns
from trbert_model.tasks.classification.labelled import RawTexts


def read(uri):
    with corpora_read_as_input():
        return RawTexts.read(str(uri), LabelledColumns())


@pytest.fixture
def corpus(tmp_path):
    write_shard(tmp_path / "t/a.parquet", {"text": ["a 1", "a 2"], "label": ["x", "y"], "other": [1, 2]})
    write_shard(tmp_path / "t/below/b.parquet", {"label": ["z"], "text": pa.array(["b 1"]).dictionary_encode()})
    write_shard(tmp_path / "t/_old/c.parquet", {"text": ["c 1"], "label": ["x"]})
    (tmp_path / "t/notes.txt").write_text("no Parquet")
    return tmp_path


@pytest.mark.parametrize("form", ["t", "t/", "file://HERE/t", "t/**/[ab].parquet", "t/{a,below/?}.parquet"])
def test_folders_and_globs_are_all_their_files(corpus, monkeypatch, form):
    monkeypatch.chdir(corpus)
    raw = read(form.replace("HERE", str(corpus)))
    assert raw.texts == ["a 1", "a 2", "b 1"]
    assert raw.values == ["x", "y", "z"]
    assert read("t/*.parquet").texts == ["a 1", "a 2"]


def test_hive_folders_and_files_without_an_ending(tmp_path):
    write_shard(tmp_path / "t/date=2026-01-01/part-0", {"text": ["a"], "label": ["x"]})
    write_shard(tmp_path / "t/date=2026-01-02/part-0", {"text": ["b"], "label": ["y"]})
    assert read(tmp_path / "t").texts == ["a", "b"]


def test_a_file_is_read_whatever_its_name(tmp_path):
    for name in ("data", "a[1].parquet", "_hidden.parquet"):
        write_shard(tmp_path / name, {"text": ["a"], "label": ["x"]})
        assert read(tmp_path / name).texts == ["a"]


def test_numbers_of_several_widths_are_one_column(tmp_path):
    write_shard(tmp_path / "t/a.parquet", {"text": ["a"], "label": pa.array([1], pa.int8())})
    write_shard(tmp_path / "t/b.parquet", {"text": pa.array(["b"], pa.large_string()), "label": [2]})
    assert read(tmp_path / "t").values == ["1", "2"]


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "t").mkdir()
    with pytest.raises(PipelineError, match="t: no Parquet files there"):
        read(tmp_path / "t")
    write_shard(tmp_path / "t/a.parquet", {"text": ["a"], "label": ["x"]})
    write_shard(tmp_path / "t/b.parquet", {"text": ["a"], "label": [1]})
    with pytest.raises(InputError, match="t: the types of a column do not fit together"):
        read(tmp_path / "t")
    write_shard(tmp_path / "t/b.parquet", {"text": ["a"], "class": ["x"]})
    with pytest.raises(InputError, match=r"b\.parquet: no column 'label'"):
        read(tmp_path / "t")
    (tmp_path / "t/b.parquet").write_text("not Parquet")
    with pytest.raises(InputError, match=r"b\.parquet: cannot be read as Parquet"):
        read(tmp_path / "t")
