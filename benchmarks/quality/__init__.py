"""Accuracy at every speed, on real corpora, against the dense model and against simpler ways to drop tokens.

    python -m benchmarks.quality --data DIR --work build/quality [--runs 20news …]

DIR holds the Parquet files that `benchmarks.corpora` names. Each run trains (killed, it resumes), chooses its
thresholds on a development set, and is measured once on documents that nothing was chosen on. Without --runs,
everything is run, for hours. A run's result is a file of its own in `results/quality`, and the tables are made of all
that are there.
"""
