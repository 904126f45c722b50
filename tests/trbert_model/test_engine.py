"""The engine: one result a document, in order, whatever the batches."""

import json
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.conftest import TINY, tiny_classifier, tiny_tokenizer
from trbert_model import CheckpointError, ConfigurationError
from trbert_model.checkpoints.loading import load_model
from trbert_model.engine import Engine, EngineOptions, OutOfMemoryError
from trbert_model.flops import dense_flops


def engine(seed=0, **options):
    options.setdefault("stride", 4)
    return Engine(tiny_classifier(seed), tiny_tokenizer(), EngineOptions(device="cpu", **options))


def documents(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(5, TINY["vocab_size"], length).astype(np.int32) for length in lengths]


ENGINES = {budget: engine(max_tokens_per_batch=budget) for budget in (1, 40, 100, 10_000)}


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 200), max_size=12),
    budget=st.sampled_from(list(ENGINES)),
    seed=st.integers(0, 5),
)
def test_the_token_budget_and_the_neighbours_change_nothing(lengths, budget, seed):
    docs = documents(lengths, seed)
    results = ENGINES[budget].score(docs)
    assert len(results) == len(docs)
    for i, document in enumerate(docs):
        alone = ENGINES[10_000].score([document])
        np.testing.assert_allclose(results.outputs[i], alone.outputs[0], atol=1e-4)
        for name in ("num_tokens", "num_windows", "kept_tokens", "flops", "dense_flops"):
            np.testing.assert_array_equal(getattr(results, name)[i], getattr(alone, name)[0])


def test_batches_stay_within_the_budget():
    sizes = []
    scorer = engine(max_tokens_per_batch=70)
    forward = scorer._forward_once
    scorer._forward_once = lambda windows, policies, *recorded: (
        sizes.append(sum(len(w.input_ids) for w in windows)) or forward(windows, policies, *recorded)
    )
    scorer.score(documents([3, 200, 30, 30, 1, 0, 77]))
    assert max(sizes) <= 70
    assert len(sizes) < 12, "windows of several documents share batches"


def test_a_long_documents_logits_are_its_windows_weighted_by_new_tokens():
    scorer = engine()
    (document,) = documents([75])  # windows of 30 tokens, 4 shared: 30 + 26 + 19 new
    windows = list(scorer.task.windows(document))
    assert [window.new_tokens for window in windows] == [30, 26, 19]
    logits = np.stack([scorer._forward_once([window], scorer._policies, False)[0][0] for window in windows])
    result = scorer.score([document])
    np.testing.assert_allclose(result.outputs[0], np.average(logits, axis=0, weights=[30, 26, 19]), atol=1e-5)
    assert result.num_windows[0] == 3
    assert result.num_tokens[0] == 75 + 2 * 4 + 3 * 2
    assert (result.kept_tokens[0] < result.num_tokens[0]).all()
    lengths = np.array([len(window.input_ids) for window in windows])
    assert result.dense_flops[0] == dense_flops(scorer.config, lengths).sum()


def test_without_reduction_flops_are_the_dense_models():
    results = engine(reduce=False).score(documents([10, 50]))
    np.testing.assert_array_equal(results.flops, results.dense_flops)
    assert results.kept_tokens.shape == (2, 0)


def test_a_million_token_document():
    result = engine(max_tokens_per_batch=20_000).score(documents([1_000_000]))
    assert result.num_windows[0] == 38461 + 1
    assert np.isfinite(result.outputs).all()


def test_texts_are_tokenised_and_scored():
    scorer = engine()
    texts = ["the good news", "", "bad " * 50]
    results = scorer.score_columns(texts)
    expected = scorer.score(scorer.task.tokenize(texts))
    np.testing.assert_array_equal(results.outputs, expected.outputs)
    assert results.num_windows.tolist() == [1, 1, 2]
    assert list(scorer.task.labels) == ["bad", "fine", "good"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_halves_the_batch_and_goes_on(error):
    scorer, docs = engine(max_tokens_per_batch=10_000), documents([20] * 16)
    expected = scorer.score(docs)
    forward, sizes = scorer._forward_once, []

    def out_of_memory_above_100_tokens(windows, policies, *recorded):
        sizes.append(sum(len(window.input_ids) for window in windows))
        if sizes[-1] > 100:
            raise error
        return forward(windows, policies, *recorded)

    scorer._forward_once = out_of_memory_above_100_tokens
    results = scorer.score(docs)
    np.testing.assert_allclose(results.outputs, expected.outputs, atol=1e-5)
    np.testing.assert_array_equal(results.kept_tokens, expected.kept_tokens)
    assert sizes == [352, 176, 88, 88, 176, 88, 88]
    assert scorer.statistics.halved_batches == 3


def test_a_window_that_never_fits_is_named():
    scorer = engine()

    def never(windows, policies, *recorded):
        raise torch.OutOfMemoryError("CUDA out of memory")

    scorer._forward_once = never
    with pytest.raises(OutOfMemoryError, match="a single window of 22 tokens does not fit cpu"):
        scorer.score(documents([20]))


def test_other_errors_are_not_taken_for_out_of_memory():
    scorer = engine()
    scorer._forward_once = lambda windows, policies, *recorded: (_ for _ in ()).throw(RuntimeError("shape mismatch"))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        scorer.score(documents([20]))


def test_bfloat16_is_close_to_fp32():
    docs = documents([30] * 20)
    half, full = engine(dtype="bfloat16", reduce=False), engine(reduce=False)
    assert half.model.classifier.weight.dtype == torch.bfloat16
    np.testing.assert_allclose(half.score(docs).outputs, full.score(docs).outputs, atol=0.05)


def test_a_run_with_a_selection_policy_of_its_own():
    def keep_first_half(candidates):
        return torch.arange(len(candidates.logits)) < len(candidates.logits) / 2

    results = engine().score(documents([18]), keep_first_half)
    assert results.kept_tokens.tolist() == [[10, 5]]


def test_options_out_of_range_are_refused():
    with pytest.raises(ConfigurationError, match="dtype 'int8'"):
        EngineOptions(dtype="int8")
    with pytest.raises(ConfigurationError, match="max_tokens_per_batch 0"):
        EngineOptions(max_tokens_per_batch=0)


def test_a_saved_model_loads(model_directory):
    loaded = Engine.from_pretrained(model_directory, EngineOptions(device="cpu"))
    docs = documents([20, 3])
    same = Engine(tiny_classifier(), tiny_tokenizer(), EngineOptions(device="cpu"))
    np.testing.assert_allclose(loaded.score(docs).outputs, same.score(docs).outputs, atol=1e-6)


def test_directories_that_are_no_model_are_refused_by_name(model_directory, tmp_path):
    def broken(name, change):
        directory = tmp_path / name
        shutil.copytree(model_directory, directory)
        change(directory)
        return directory

    def without_classifier(directory):
        tensors = load_file(directory / "model.safetensors")
        del tensors["classifier.weight"]
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    def as_architecture(name):
        def change(directory):
            config = json.loads((directory / "config.json").read_text())
            (directory / "config.json").write_text(json.dumps(config | {"architectures": [name]}))

        return change

    def with_more_tokens(directory):
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["extra"])
        tokenizer.save_pretrained(directory)

    def pickled(directory):
        (directory / "model.safetensors").rename(directory / "pytorch_model.bin")

    for name, change, message in [
        ("headless", without_classifier, "weights missing.*classifier.weight"),
        (
            "plain",
            as_architecture("BertForSequenceClassification"),
            "none of TRBertForSequenceClassification, ",
        ),
        ("tokens", with_more_tokens, "tokenizer has 22 tokens, the model's embeddings only 21"),
        ("config", lambda d: (d / "config.json").unlink(), "no config.json"),
        ("pickle", pickled, "only pickled weights"),
        ("corrupt", lambda d: (d / "model.safetensors").write_bytes(b"x" * 100), "cannot be read as safetensors"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            Engine.from_pretrained(broken(name, change), EngineOptions(device="cpu"))


def test_fusing_leaves_the_checkpoint_loadable(model_directory):
    Engine.from_pretrained(model_directory, EngineOptions(device="cpu"))
    model, _ = load_model(model_directory)
    assert "query.weight" in " ".join(model.state_dict())
