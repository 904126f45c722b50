"""Precision, recall and F1 of entities, as seqeval computes them in its default mode."""

from collections.abc import Collection

import numpy as np

from ...scores import Scores

# Type, first and last word.
Entity = tuple[str, int, int]


def entity_counts(predicted: Collection[Entity], right: Collection[Entity]) -> np.ndarray:
    """How many entities are predicted correctly, are predicted, and are there; int64 (3,), to be summed."""
    return np.array([len(set(predicted) & set(right)), len(predicted), len(right)], np.int64)


def entity_scores(counts: np.ndarray) -> dict[str, Scores]:
    """F1, precision and recall of documents from their `entity_counts`, int64 (documents, 3)."""
    correct, predicted, right = counts.T.astype(np.float64)
    return {
        "f1": Scores(2 * correct, predicted + right),
        "precision": Scores(correct, predicted),
        "recall": Scores(correct, right),
    }
