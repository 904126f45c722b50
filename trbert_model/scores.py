"""Metrics of documents as ratios of sums, with bootstrap intervals."""

from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Scores:
    """A metric over documents: the sum of their numerators divided by that of their denominators.

    The mean of documents' scores is such a ratio, and so are the share of right words in a corpus and its entities'
    micro-F1, which are not means over documents.

    Attributes:
        numerators, denominators: float64 (documents,); both are 0 for documents that the metric does not apply to.
    """

    numerators: np.ndarray
    denominators: np.ndarray

    @classmethod
    def mean_of(cls, values: np.ndarray) -> "Scores":
        """The mean of documents' scores, (documents,); NaN for those that it does not apply to."""
        return cls(np.nan_to_num(values.astype(np.float64)), (~np.isnan(values)).astype(np.float64))

    def __getitem__(self, documents: np.ndarray) -> "Scores":
        return Scores(self.numerators[documents], self.denominators[documents])

    def __mul__(self, factor: float) -> "Scores":
        return Scores(self.numerators * factor, self.denominators)

    @property
    def value(self) -> float:
        """The metric over all the documents; 0 if it applies to none."""
        denominator = self.denominators.sum()
        return float(self.numerators.sum() / denominator) if denominator else 0.0

    def interval(self, before: "Scores | None" = None) -> tuple[float, float]:
        """The 95% bootstrap interval of the value, over documents and with a fixed seed.

        Args:
            before: the metric of another model on the same documents; the interval is then that of the difference.
        """
        rng, documents = np.random.default_rng(0), len(self.numerators)
        chosen = (rng.integers(documents, size=documents) for _ in range(RESAMPLES))
        values = [self[rows].value - (0.0 if before is None else before[rows].value) for rows in chosen]
        low, high = np.percentile(values, [2.5, 97.5])
        return float(low), float(high)
