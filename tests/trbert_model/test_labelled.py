"""Labelled corpora: what cannot be trained on is refused by name, and windows keep their labels."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from tests.conftest import classification_task, tiny_classifier, tiny_tokenizer
from trbert_model import InputError
from trbert_model.engine import Engine, EngineOptions
from trbert_model.options import LabelledColumns
from trbert_model.tasks.classification.labelled import LabelledTexts, RawTexts
from trbert_model.training.teacher import TeacherSignals


def test_a_long_document_gives_any_of_its_windows():
    task = Engine(tiny_classifier(), tiny_tokenizer(), EngineOptions(device="cpu", stride=0)).task
    dataset = LabelledTexts([np.arange(100) % 15 + 5], np.array([1]), task).dataset()
    torch.manual_seed(0)
    assert {tuple(dataset[0]) for _ in range(60)} == {(0,), (1,), (2,), (3,)}
    assert {len(window.input_ids) for window in dataset.windows} == {32, 12}


def test_windows_keep_their_documents_labels_and_teachers():
    task = Engine(tiny_classifier(), tiny_tokenizer(), EngineOptions(device="cpu", stride=0)).task
    dataset = LabelledTexts([np.arange(5, 15), np.arange(100) % 15 + 5], np.array([2, 1]), task).dataset()
    assert dataset.labels.tolist() == [2, 1, 1, 1, 1]
    bounds = torch.tensor([0, *(len(window.input_ids) for window in dataset.windows)]).cumsum(0)
    owner = torch.arange(5).repeat_interleave(bounds.diff())
    dataset.teacher = TeacherSignals(torch.arange(5.0)[:, None], torch.arange(6), owner[None].half(), bounds)
    items = [dataset[1], dataset[0], dataset[1]]
    batch = dataset.collate(items)
    assert batch["labels"].tolist() == [1, 2, 1]
    assert batch["example"].tolist() == [0, 1, 2]
    assert batch["teacher"].flatten().tolist() == [float(index) for (index,) in items]
    assert batch["guide"].shape == (1, len(batch["input_ids"]))
    lengths = batch["cu_seqlens"].diff().tolist()
    assert [set(part.flatten().tolist()) for part in batch["guide"].split(lengths, 1)] == [
        {float(index)} for (index,) in items
    ]


def test_crops_are_pieces_of_the_window():
    task = Engine(tiny_classifier(), tiny_tokenizer(), EngineOptions(device="cpu")).task
    dataset = LabelledTexts([np.arange(5, 25), np.array([], np.int32)], np.array([1, 0]), task).dataset()
    dataset.crops = 1.0
    torch.manual_seed(0)
    whole, lengths = dataset.windows[0].input_ids, set()
    for _ in range(200):
        batch = dataset.collate([dataset[0], dataset[1]])
        first, second = batch["input_ids"].split(batch["cu_seqlens"].diff().tolist())
        assert second.tolist() == dataset.windows[1].input_ids.tolist()
        assert (first[0], first[-1]) == (whole[0], whole[-1])
        piece = first[1:-1].tolist()
        assert piece == list(range(piece[0], piece[-1] + 1))
        assert batch["labels"].tolist() == [1, 0]
        lengths.add(len(piece))
    assert lengths <= set(range(4, 21))
    assert len(lengths) > 10
    dataset.crops = 0.3
    cropped = sum(len(dataset.collate([[0]])["input_ids"]) < len(whole) for _ in range(300))
    assert 50 < cropped < 130


def test_labels_that_the_model_does_not_have_are_refused(tmp_path):
    path = tmp_path / "corpus.parquet"
    pq.write_table(pa.table({"text": ["a", "news"], "label": ["x", "y"]}), path)
    task = classification_task(labels=("z", "y", "x"))
    assert LabelledTexts.read(str(path), task, LabelledColumns()).targets.tolist() == [2, 1]
    with pytest.raises(InputError, match=r"corpus.parquet: labels \['y'\] are none of the model's"):
        LabelledTexts.read(str(path), classification_task(labels=("x", "z")), LabelledColumns())


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"body": ["a"], "label": ["x"]}, "no column 'text'"),
        ({"text": ["a", None], "label": ["x", "y"]}, "1 rows have no 'text'"),
        ({"text": [1, 2], "label": ["x", "y"]}, "column 'text' is of type int64, not of text"),
        ({"text": pa.array([], pa.string()), "label": pa.array([], pa.string())}, "it has no rows"),
        ({"text": ["a", "b"], "label": [["x", None], ["y"]]}, "1 rows have a null label"),
    ],
)
def test_a_corpus_without_texts_or_labels_is_refused(tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    with pytest.raises(InputError, match=message):
        RawTexts.read(str(tmp_path / "train.parquet"), LabelledColumns())


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "text.parquet").write_text("not Parquet")
    for name in ("text.parquet", "nowhere.parquet"):
        with pytest.raises(InputError, match=f"{name}: cannot be read as Parquet"):
            RawTexts.read(str(tmp_path / name), LabelledColumns())


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.binary_view(),
        pa.dictionary(pa.int8(), pa.string()),
    ],
    ids=str,
)
def test_texts_and_labels_of_any_text_type_in_any_script(tmp_path, kind):
    texts, labels = ["das große", "中文 🙂"], ["здраво", "日本語"]
    values = [pa.array(each).dictionary_encode() if pa.types.is_dictionary(kind) else each for each in (texts, labels)]
    columns = {name: pa.array(each, kind) for name, each in zip(("text", "label"), values)}
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    raw = RawTexts.read(str(tmp_path / "a.parquet"), LabelledColumns())
    assert (raw.texts, raw.values, raw.names("label")) == (texts, labels, labels)


def write_labels(path, labels, names=None):
    """Rows with these labels; names: of the classes, in the metadata as the `datasets` library writes it."""
    table = pa.table({"text": ["a"] * len(labels), "label": labels})
    if names is not None:
        feature = {"names": names, "_type": "ClassLabel"}
        if pa.types.is_list(table["label"].type):
            feature = {"feature": feature, "_type": "List"}
        information = {"info": {"features": {"text": {"dtype": "string"}, "label": feature}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(information)})
    pq.write_table(table, path)
    return RawTexts.read(str(path), LabelledColumns())


def test_integers_are_names_or_class_ids(tmp_path):
    raw = write_labels(tmp_path / "a.parquet", [10, 2, 2, 1])
    assert raw.names("label") == ["1", "2", "10"]
    assert raw.targets(["1", "2", "10"]).tolist() == [2, 1, 1, 0]
    raw = write_labels(tmp_path / "a.parquet", [2, 0, 2])
    assert raw.targets(["bad", "fine", "good"]).tolist() == [2, 0, 2]
    with pytest.raises(InputError, match=r"labels \['0', '2'\] are none of the model's"):
        raw.targets(["bad", "good"])
    several = write_labels(tmp_path / "a.parquet", [[0, 2], []])
    assert several.targets(["bad", "fine", "good"]).tolist() == [[1, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("several", [False, True])
def test_class_ids_have_the_names_that_their_file_gives_them(tmp_path, several):
    ids = [[2], [0], [2]] if several else [2, 0, 2]
    raw = write_labels(tmp_path / "a.parquet", ids, names=["плохо", "fine", "good"])
    assert raw.values == ([["good"], ["плохо"], ["good"]] if several else ["good", "плохо", "good"])
    assert raw.names("label") == ["плохо", "fine", "good"]
    expected = [[1, 0, 0], [0, 0, 1], [1, 0, 0]] if several else [0, 2, 0]
    assert raw.targets(["good", "fine", "плохо"]).tolist() == expected
    expected = [[0, 0, 1], [1, 0, 0], [0, 0, 1]] if several else ids
    assert raw.targets(["LABEL_0", "LABEL_1", "LABEL_2"]).tolist() == expected
    with pytest.raises(InputError, match=r"a\.parquet: column 'label', row 1: there is no class -1 in"):
        write_labels(tmp_path / "a.parquet", [[0], [-1]] if several else [0, -1], names=["bad", "good"])


@pytest.mark.parametrize("kind", [pa.bool_(), pa.int64(), pa.uint8(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("as_list", [pa.list_, pa.large_list, lambda kind: pa.list_(kind, 3)])
def test_lists_of_a_flag_for_each_class_are_several_labels(tmp_path, kind, as_list):
    """As transformers takes several labels."""
    flags = [[1, 0, 1], [0, 0, 0], [0, 0, 1]]
    column = pa.array(flags, pa.list_(pa.int64())).cast(pa.list_(kind)).cast(as_list(kind))
    raw = write_labels(tmp_path / "a.parquet", column)
    assert raw.problem_type == "multi_label_classification"
    assert raw.names("label") == ["0", "1", "2"]  # also the one that no text has
    assert raw.targets(raw.names("label")).tolist() == raw.targets(["x", "y", "z"]).tolist() == flags
    with pytest.raises(InputError, match="a 0 or 1 for 3 classes, the model has 4 labels"):
        raw.targets(["0", "1", "2", "3"])


def test_other_lists_are_no_flags(tmp_path):
    ids = write_labels(tmp_path / "a.parquet", [[0, 1], [1, 0]])  # no list has a class twice
    assert ids.values == [["0", "1"], ["1", "0"]]
    assert write_labels(tmp_path / "a.parquet", [[1, 0, 0], [1]]).flags is None
    numbers = write_labels(tmp_path / "a.parquet", [[1.0, 0.5], [0.0, 1.0]])
    assert numbers.problem_type == "regression"
    pq.write_table(pa.table({"text": ["a"], "label": [[1.0, 0.0]]}), tmp_path / "a.parquet")
    asked = RawTexts.read(str(tmp_path / "a.parquet"), LabelledColumns(), "regression")
    assert asked.values == [[1.0, 0.0]]


def test_labels_that_are_floats_are_named_as_integers(tmp_path):
    """pandas makes floats of integers where a label is missing."""
    path = str(tmp_path / "a.parquet")

    def read(labels):
        pq.write_table(pa.table({"text": ["a"] * len(labels), "label": labels}), path)
        return RawTexts.read(path, LabelledColumns(), "single_label_classification")

    assert read([0.0, 2.0, 1.0]).names("label") == ["0", "1", "2"]
    assert read([0.0, 2.0]).targets(["2", "1", "0"]).tolist() == [2, 0]
    assert read([0.5, 1.0]).names("label") == ["0.5", "1.0"]
    with pytest.raises(InputError, match=r"column 'label': 2 rows have no label but NaN; remove them first"):
        read([0.0, float("nan"), 1.0, float("nan")])
