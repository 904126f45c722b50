"""Documents as an Arrow column and back, through the bytes that travel."""

import numpy as np
import pyarrow as pa
import pytest

from pipeline.rows import from_ipc, to_ipc
from tests.conftest import classification_task, question_task

TASK = question_task()
CONTEXTS = ["the good news 中", "of a game\r\né", "the bank"]


def travelled(column: pa.Array, keep: list[bool] | None = None) -> pa.ChunkedArray:
    table = pa.table({"row": range(len(column)), "document": column})
    if keep is not None:
        table = table.filter(pa.array(keep))
    return from_ipc(to_ipc(table))["document"]


def test_token_ids_travel():
    task = classification_task()
    documents = [np.array([1, 2, 3], np.int32), np.array([], np.int32), np.array([4], np.int32)]
    for before, after in zip(documents, task.from_column(travelled(task.to_column(documents))), strict=True):
        assert np.array_equal(before, after)
        assert after.dtype == np.int32
    assert list(task.from_column(travelled(task.to_column([])))) == []


@pytest.mark.parametrize("keep", [None, [True, False, True, True], [False] * 4])
def test_questions_travel_with_one_copy_of_a_context_they_share(keep):
    questions = TASK.encode(["good", "the bad", "fine", "sport"], [CONTEXTS[0], CONTEXTS[1], CONTEXTS[0], CONTEXTS[2]])
    column = travelled(TASK.to_column(questions), keep)
    expected = [question for question, kept in zip(questions, keep or [True] * 4) if kept]
    found = list(TASK.from_column(column))
    for before, after in zip(expected, found, strict=True):
        assert np.array_equal(before.ids, after.ids)
        assert before.context.text == after.context.text
        for name in ("ids", "starts", "ends"):
            assert np.array_equal(getattr(before.context, name), getattr(after.context, name))
    if keep is None:
        assert found[0].context is found[2].context
        assert len(column.chunk(0).field("context").dictionary) == 3
    again = list(TASK.from_column(column.take(pa.array(range(len(expected))[::-1], pa.int64()))))
    assert [question.context.text for question in again] == [question.context.text for question in expected][::-1]
