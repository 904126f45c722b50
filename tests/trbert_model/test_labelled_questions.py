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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("start", [-1, 0, None])
def test_an_empty_answer_is_none(tmp_path, form, start):
    """As many files have questions without an answer."""
    (row,) = rows_of(written(tmp_path, form, [{"text": "", "answer_start": start}]))
    assert (row["answers"], row["starts"]) == ([], [])


@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_rows_are_a_list_or_one_per_line(tmp_path, ending):
    """As `Dataset.to_json` writes them; U+2028 in a text ends no line."""
    answers = {"text": ["bank"], "answer_start": [6]}
    rows = [{"id": i, "question": "what", "context": "the\u2028g bank", "answers": answers} for i in range(2)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path = tmp_path / f"q.{ending}"
    found = []
    for text in ("\n".join(lines) + "\n", f"[{','.join(lines)}]", lines[0], "\ufeff" + "\r\n".join(lines)):
        path.write_bytes(text.encode())
        found.append(rows_of(path))
    assert [len(each) for each in found] == [2, 2, 1, 2]
    assert {row["answers"][0] for each in found for row in each} == {"bank"}
    path.write_text(lines[0] + "\n{")
    with pytest.raises(InputError, match=r"q\.jsonl?: cannot be read as SQuAD's JSON"):
        rows_of(path)


def test_other_json_is_refused(tmp_path):
    (tmp_path / "q.json").write_text("[]")
    with pytest.raises(InputError, match=r"q\.json: it has no questions"):
        rows_of(tmp_path / "q.json")
    for data in (
        "{}",
        '{"data": ["x"]}',
        '{"data": [{"question": 1, "context": "c", "id": 1, "answers": []}]}',
        "x",
    ):
        (tmp_path / "q.json").write_text(data)
        with pytest.raises(InputError, match=r"q\.json: cannot be read as SQuAD's JSON"):
            rows_of(tmp_path / "q.json")
