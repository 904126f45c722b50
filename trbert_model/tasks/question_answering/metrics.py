"""Exact match and F1, as SQuAD's official evaluation defines them."""

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b", re.UNICODE)


def normalized(answer: str) -> str:
    """Convert to lower case and remove punctuation, articles and extra white space."""
    kept = "".join(character for character in answer.lower() if character not in string.punctuation)
    return " ".join(_ARTICLES.sub(" ", kept).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals one of the answers, else 0.0. Without answers, "" is correct."""
    return max((float(normalized(prediction) == normalized(answer)) for answer in answers or [""]), default=0.0)


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The highest harmonic mean of word precision and recall over the answers. Without answers, "" is correct."""
    return max(_f1(prediction, answer) for answer in answers or [""])


def _f1(prediction: str, answer: str) -> float:
    found, wanted = normalized(prediction).split(), normalized(answer).split()
    if not found or not wanted:
        return float(found == wanted)
    shared = sum((Counter(found) & Counter(wanted)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(found), shared / len(wanted)
    return 2 * precision * recall / (precision + recall)
