"""The benchmark against other systems, on a tiny model."""

import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks import measure, peers
from jobs.command import run_command
from tests.conftest import WORDS, tiny_classifier, tiny_tokenizer
from trbert_model.errors import ConfigurationError


def texts(count: int) -> list[str]:
    """Of different lengths, some of several windows."""
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 1 + 7 * (i % 9))) for i in range(count)]


@pytest.fixture(autouse=True)
def _short_peak(monkeypatch):
    """The machine's peak takes longer to measure than the tiny models."""
    monkeypatch.setattr(peers, "matrix_product_peak", lambda config: 1e9)


def test_systems_compute_the_same_documents_once_and_fp32_ones_agree():
    names = peers.chosen(["transformers", "ours"])
    assert len(names) == 10
    measured = peers.engines(tiny_classifier(), tiny_tokenizer(), texts(14), names, warm_up=2, block=5, threads=1)
    assert measured["documents"] == 12
    assert measured["windows"] > 12
    assert list(measured["systems"]) == names
    for name, row in measured["systems"].items():
        assert row["seconds"] > 0
        if "fp32" in name and "reduced" not in name:
            assert row["agreement"] == 1
            assert row["largest_logit_difference"] < 1e-5
    # Otherwise the reduced model's row would be of the dense one, and the one in bf16 of fp32.
    assert measured["systems"]["ours reduced fp32"]["largest_logit_difference"] > 1e-4
    assert measured["systems"]["transformers bf16, batch 1"]["largest_logit_difference"] > 1e-4
    table = peers.markdown(
        {
            "engines": measured,
            "whole_jobs": None,
            "threads": 1,
            "packages": {"openvino": "1.0"},
            "machine": peers.machine() | {"instructions": ["avx2"]},
        }
    )
    assert all(f"| {name} |" in table for name in names)
    assert "(avx2, no AMX)" in table


@pytest.mark.parametrize("sort", [True, False])
def test_padded_batches_give_each_window_its_own_logits_in_order(sort):
    windows = [np.arange(1, 2 + length, dtype=np.int32) for length in (5, 1, 9, 3, 3, 7)]
    logits = measure.run_padded(
        lambda ids, mask: np.stack([ids.max(1), mask.sum(1)], 1), windows, 4, sort_by_length=sort
    )
    assert logits.tolist() == [[len(window), len(window)] for window in windows]


def test_no_document_is_measured_twice_or_in_the_warm_up():
    seen: list[list[int]] = []
    measure.measure({"system": seen.append}, list(range(7)), 3, lambda: 1.0, [7, 8])
    assert seen == [[7, 8], [0, 1, 2], [3, 4, 5], [6]]


def test_an_extra_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda package: None if package == "openvino" else True)
    assert peers.chosen(["ONNX Runtime int8"]) == [
        peers.REFERENCE,
        "ONNX Runtime int8, padded 16 sorted",
        "ONNX Runtime int8, batch 1",
    ]
    with pytest.raises(ConfigurationError, match=r"^openvino not installed; .*'\.\[peers\]'"):
        peers.chosen([""])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--systems", "tensorrt"], "no name begins like this"),
        (["--systems", "ours", "--documents", "5"], "has 20 documents, of which 16 are for the warm-up"),
        (["--systems", "ours", "--block", "0"], "--block and --threads must be at least 1"),
    ],
)
def test_a_wrong_option_is_one_line(model_directory, tmp_path, monkeypatch, capsys, options, said):
    pq.write_table(pa.table({"text": [text.encode() for text in texts(20)]}), tmp_path / "0.parquet")
    arguments = ["peers", "--model", str(model_directory), "--corpus", str(tmp_path), *options]
    monkeypatch.setattr(sys, "argv", arguments)
    assert run_command(peers.main) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
