"""Encoded documents as an Arrow column and back: what travels from the readers to the actors."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from trbert_model.tasks.question_answering import EncodedContext, EncodedQuestion

# A question has its tokens; its context, which other questions of the split may share, is there once.
_CONTEXT = ("text", "ids", "starts", "ends")


def to_column(documents: Sequence[Any]) -> pa.Array:
    """Token ids, int32 (tokens,) each, or `EncodedQuestion`s → list<int32>, or struct<question, context>."""
    if not documents or not isinstance(documents[0], EncodedQuestion):
        return _lists(documents)
    places: dict[int, int] = {}
    contexts: list[EncodedContext] = []
    for document in documents:
        if id(document.context) not in places:
            places[id(document.context)] = len(contexts)
            contexts.append(document.context)
    columns = [pa.array([context.text for context in contexts], pa.large_string())]
    columns += [_lists([getattr(context, name) for context in contexts]) for name in _CONTEXT[1:]]
    indices = pa.array([places[id(document.context)] for document in documents], pa.int32())
    shared = pa.DictionaryArray.from_arrays(indices, pa.StructArray.from_arrays(columns, names=list(_CONTEXT)))
    questions = _lists([document.ids for document in documents])
    return pa.StructArray.from_arrays([questions, shared], names=["question", "context"])


def from_column(column: pa.ChunkedArray) -> Iterator[Any]:
    """What `to_column` was given, one after the other, without a copy of the token ids."""
    for chunk in column.chunks:
        if pa.types.is_list(chunk.type):
            for document in chunk:
                yield document.values.to_numpy()
        else:
            questions, shared = chunk.field("question"), chunk.field("context")
            contexts: dict[int, EncodedContext] = {}
            for question, place in zip(questions, shared.indices.to_pylist()):
                if place not in contexts:
                    text, *arrays = (shared.dictionary.field(name)[place] for name in _CONTEXT)
                    contexts[place] = EncodedContext(text.as_py(), *(array.values.to_numpy() for array in arrays))
                yield EncodedQuestion(question.values.to_numpy(), contexts[place])


def _lists(arrays: Sequence[np.ndarray]) -> pa.ListArray:
    offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays], dtype=np.int64)])
    values = np.concatenate([*arrays, np.zeros(0, np.int32)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))
