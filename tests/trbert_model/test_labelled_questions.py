"""Labelled questions in the forms in which people have SQuAD."""

import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trbert_model import InputError
from trbert_model.tasks.question_answering.labelled import read_questions

CONTEXT = "the good  news of\nthe bank"
STARTS = pa.list_(pa.int32())


def rows_of(path):
    return read_questions(str(path), "question", "context")


def written(directory, form, answers, **more):
    """A file with one question in this form; answers: SQuAD's, or None for a question without them."""
    lists = None if answers is None else {k: [each[k] for each in answers] for k in ("text", "answer_start")}
    asked = {"id": "q", "question": "what"} | more
    if form in ("articles", "rows"):
        given = {} if answers is None else {"answers": answers if form == "articles" else lists}
        row = asked | given | ({"context": CONTEXT} if form == "rows" else {})
        data = [{"paragraphs": [{"context": CONTEXT, "qas": [row]}]}] if form == "articles" else [row]
        (directory / "q.json").write_text(json.dumps({"data": data}))
        return directory / "q.json"
    columns = {name: [value] for name, value in (asked | {"context": CONTEXT}).items()}
    if form == "columns":
        columns |= {"answers": [lists and lists["text"]], "answer_start": [lists and lists["answer_start"]]}
    else:
        columns["answers"] = [answers if form == "structs" else lists]
    pq.write_table(pa.table(columns), directory / "q.parquet")
    return directory / "q.parquet"


FORMS = ["articles", "rows", "columns", "struct", "structs"]


@pytest.mark.parametrize("form", FORMS)
def test_all_forms_are_the_same_questions(tmp_path, form, caplog):
    answers = [{"text": "good", "answer_start": 4}, {"text": "bank", "answer_start": 22}]
    (row,) = rows_of(written(tmp_path, form, answers))
    assert row == {"id": "q", "question": "what", "context": CONTEXT, "answers": ["good", "bank"], "starts": [4, 22]}
    assert not caplog.records
    (row,) = rows_of(written(tmp_path, form, [{"text": "good", "answer_start": "4"}]))
    assert (row["answers"], row["starts"]) == (["good"], [4])
    (row,) = rows_of(written(tmp_path, form, None, is_impossible=True))
    assert (row["answers"], row["starts"]) == ([], [])
    with pytest.raises(InputError, match=r"q\.(json|parquet): .*answers"):
        rows_of(written(tmp_path, form, None))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("answer", "start", "found"),
    [
        *((" good", 4, "good"), ("good ", 4, "good "), ("  good", 3, "good"), ("good news", 4, "good  news")),
        *(("of the bank", 15, "of\nthe bank"), (" bank ", 22, "bank"), ("\u00a0good", 4, "good")),
    ],
)
def test_white_space_that_differs_is_mended_and_counted(tmp_path, form, answer, start, found, caplog):
    with caplog.at_level(logging.WARNING):
        (row,) = rows_of(written(tmp_path, form, [{"text": answer, "answer_start": start}]))
    assert row["answers"] == [found]
    (first,) = row["starts"]
    assert CONTEXT[first : first + len(found)] == found
    mended = [record.getMessage() for record in caplog.records if "1 answers differ" in record.getMessage()]
    assert len(mended) == (answer != found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("answer", "start"),
    [
        *(("good", 3), ("good", 5), ("bank", -4), ("fine", 4), ("good", "four"), ("good", 4.5), ("good", None)),
        *((None, 4), ("   ", 4), ("go od", 4), ("goodnews", 4)),
    ],
)
def test_answers_that_are_elsewhere_are_named(tmp_path, form, answer, start):
    with pytest.raises(InputError, match=r"q\.(json|parquet): question 'q': .*(is not at|answers)") as refused:
        rows_of(written(tmp_path, form, [{"text": answer, "answer_start": start}]))
    assert "\n" not in str(refused.value)


def test_other_json_is_refused(tmp_path):
    for data in (
        "[]",
        "{}",
        '{"data": ["x"]}',
        '{"data": [{"question": 1, "context": "c", "id": 1, "answers": []}]}',
        "x",
    ):
        (tmp_path / "q.json").write_text(data)
        with pytest.raises(InputError, match=r"q\.json: cannot be read as SQuAD's JSON"):
            rows_of(tmp_path / "q.json")
