"""Precision, recall and F1 of entities, as seqeval computes them in its default mode."""

from collections.abc import Collection

import numpy as np

# Type, first and last word.
Entity = tuple[str, int, int]


def entity_counts(predicted: Collection[Entity], right: Collection[Entity]) -> np.ndarray:
    """How many entities are predicted correctly, are predicted, and are there; int64 (3,), to be summed."""
    return np.array([len(set(predicted) & set(right)), len(predicted), len(right)], np.int64)


def entity_scores(counts: np.ndarray) -> dict[str, float]:
    """Precision, recall and F1 from summed `entity_counts`. As in seqeval, each is 0 if it is 0 / 0."""
    correct, predicted, right = counts.tolist()
    return {
        "f1": 2 * correct / max(predicted + right, 1),
        "precision": correct / max(predicted, 1),
        "recall": correct / max(right, 1),
    }
