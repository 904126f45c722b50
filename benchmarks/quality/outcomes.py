"""Scores and costs of a corpus's documents, as JSON."""

from typing import Any

import numpy as np

from trbert_model.labelled import LabelledCorpus
from trbert_model.scores import Scores
from trbert_model.tasks.base import DocumentResults


def outcome_of(corpus: LabelledCorpus, results: DocumentResults) -> dict[str, Any]:
    """Scores in percent, tokens and FLOPs."""
    return {
        "metric": corpus.metric,
        "scores": {
            name: {
                "numerators": np.round(100 * scores.numerators, 3).tolist(),
                "denominators": scores.denominators.tolist(),
            }
            for name, scores in corpus.all_scores(results).items()
        },
        "tokens": results.num_tokens.tolist(),
        "flops": results.flops.tolist(),
        "dense_flops": results.dense_flops.tolist(),
    }


def scores_in(outcome: dict[str, Any], metric: str | None = None) -> Scores:
    """The documents' scores by a metric, by default the main one."""
    both = outcome["scores"][metric or outcome["metric"]]
    return Scores(np.array(both["numerators"]), np.array(both["denominators"]))


def joined(outcomes: list[dict[str, Any]]) -> dict[str, Any]:
    """The outcome of the documents of several corpora."""
    lists = {name: [value for each in outcomes for value in each[name]] for name in ("tokens", "flops", "dense_flops")}
    scores = {
        metric: {
            part: [value for each in outcomes for value in each["scores"][metric][part]]
            for part in ("numerators", "denominators")
        }
        for metric in outcomes[0]["scores"]
    }
    return {**outcomes[0], **lists, "scores": scores}
