"""Accuracy at each speed, on real corpora, compared with the dense model and with simpler ways to drop tokens.

    python -m benchmarks.quality --data DIR --work build/quality [--runs 20news …]

DIR holds the Parquet files that `benchmarks.corpora` names. Each run trains (or resumes, if it was killed), chooses its
thresholds on a development set, and is measured once, on documents that were not used for any choice. Without --runs,
all runs are executed, which takes hours. Each run's result is a separate file in `results/quality`. The tables contain
all existing results.
"""
