"""Early exits: equality with what the original systems computed, whatever is in the batch."""

import json
import random
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.conftest import TINY, tiny_classifier, tiny_tagger
from tests.trbert_model.test_fused import needs_bfloat16
from trbert_model import VarlenBatch, convert_checkpoint
from trbert_model.exits.policies import NO_EXITS, ExitThresholds, uncertainty
from trbert_model.flops import spent_flops
from trbert_model.modeling import fuse_for_inference
from trbert_model.reduction.policies import keep_all
from trbert_model.reduction.trace import ATTENDED, COMPUTED, ENTERING, PRESENT
from trbert_model.varlen import varlen_attention

OUTPUTS = Path(__file__).parent.parent / "exit_outputs"


def documents_of(name):
    tensors = load_file(OUTPUTS / name / "expected.safetensors")
    count = json.loads((OUTPUTS / name / "config.json").read_text())["documents"]
    return [{k.split(".", 1)[1]: v for k, v in tensors.items() if k.split(".")[0] == str(i)} for i in range(count)]


@torch.inference_mode()
def run(model, documents, policy, **kwargs):
    batch = VarlenBatch.from_sequences(
        [d["input_ids"] for d in documents],
        [d.get("token_type_ids", torch.zeros_like(d["input_ids"])) for d in documents],
    )
    return model(
        batch.input_ids,
        token_type_ids=batch.token_type_ids,
        cu_seqlens=batch.cu_seqlens,
        selection_policy=keep_all,
        exit_policy=policy,
        **kwargs,
    )


def batches(documents):
    """One by one, and together in several orders."""
    for index in range(len(documents)):
        yield [index]
    for seed in range(3):
        yield random.Random(seed).sample(range(len(documents)), len(documents))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 0.145, 0.245, 0.32, 0.38, 0.703])
def test_deebert(threshold, fused):
    documents, model = documents_of("deebert"), convert_checkpoint(OUTPUTS / "deebert")
    if fused:
        fuse_for_inference(model)
    policy = ExitThresholds([threshold / torch.log(torch.tensor(2.0)).item()] * 6)
    for order in batches(documents):
        output = run(model, [documents[i] for i in order], policy)
        for row, i in enumerate(order):
            torch.testing.assert_close(output.logits[row], documents[i][f"t{threshold}.logits"], atol=1e-4, rtol=0)
            left = int(output.exits.layers[row])
            assert (left or 6) == int(documents[i][f"t{threshold}.exit_layer"])
            assert bool(left) == bool(documents[i][f"t{threshold}.from_exit"])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    ("gate", "threshold"), [(1.0, 0.0), (0.5, 0.0), (1.0, 0.14), (0.5, 0.62), (0.35, 0.08), (0.65, 0.59)]
)
def test_smartbert(gate, threshold, fused):
    documents, model = documents_of("smartbert"), convert_checkpoint(OUTPUTS / "smartbert")
    if fused:
        fuse_for_inference(model)
    policy = ExitThresholds([threshold / torch.log(torch.tensor(2.0)).item()] * 6, gate)
    for order in batches(documents):
        output = run(model, [documents[i] for i in order], policy)
        for row, i in enumerate(order):
            expected = {k.removeprefix(f"s{gate}.t{threshold}."): v for k, v in documents[i].items()}
            torch.testing.assert_close(output.logits[row], expected["logits"], atol=1e-4, rtol=0)
            assert int(output.exits.layers[row]) == int(expected["exit_layer"])
            ran = (output.trace.counts[COMPUTED, row] > 0).int()
            asked = expected["exit_layer"].int()
            assert (1 - ran)[:asked].tolist() == expected["skipped"][:asked].tolist()
            assert not ran[asked:].any()


WORDS = json.loads((OUTPUTS / "words/config.json").read_text())


def words_model(fused, **exits):
    """SENTEE's and TOKEE's reference model: one for both, with other ways to exit."""
    model = convert_checkpoint(OUTPUTS / "words")
    model.config.exits = model.config.exits | exits
    if fused:
        fuse_for_inference(model)
    return model


def words_of(document):
    """The index of each token's word, -1 for [CLS] and [SEP]."""
    inside = torch.arange(len(document["word_pieces"])).repeat_interleave(document["word_pieces"])
    return torch.cat([torch.tensor([-1]), inside, torch.tensor([-1])])


def word_results(model, documents, policy):
    """Each document's logits and exit layers by word."""
    words = torch.cat([words_of(document) for document in documents])
    output = run(model, documents, policy, words=words)
    lengths = [len(document["input_ids"]) for document in documents]
    layers = torch.where(output.exits.layers > 0, output.exits.layers, model.config.num_hidden_layers)
    return [
        (logits[document["word_starts"]], left[document["word_starts"]])
        for document, logits, left in zip(documents, output.logits.split(lengths), layers.split(lengths))
    ]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("setting", WORDS["sentence_settings"], ids=lambda each: f"{each['pool']}-{each['threshold']}")
def test_sentee(setting, fused):
    pool, threshold = setting["pool"], setting["threshold"]
    documents, model = documents_of("words"), words_model(fused, unit="sequence", pool={"avg": "mean"}.get(pool, pool))
    name = f"sentee.{pool}.t{threshold}"
    for order in batches(documents):
        found = word_results(model, [documents[i] for i in order], ExitThresholds([threshold] * 11))
        for i, (logits, layers) in zip(order, found):
            torch.testing.assert_close(logits, documents[i][f"{name}.logits"], atol=1e-4, rtol=0)
            assert set(layers.tolist()) == {int(documents[i][f"{name}.exit_layer"])}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(
    "setting", WORDS["token_settings"], ids=lambda each: "-".join(str(value) for value in each.values())
)
def test_tokee(setting, fused):
    kept, pieces, window, threshold = setting.values()
    exits = {"unit": "word", "kept": "before_norm" if kept else "after_norm", "pieces": pieces, "window": window}
    documents, model = documents_of("words"), words_model(fused, **exits)
    name = f"tokee.norm{kept}.{pieces}.w{window}.t{threshold}"
    policy = ExitThresholds([threshold] * 6 + [2 * threshold] * 5)
    for order in batches(documents):
        for i, (logits, layers) in zip(order, word_results(model, [documents[i] for i in order], policy)):
            assert layers.tolist() == documents[i][f"{name}.exit_layer"].tolist()
            torch.testing.assert_close(logits, documents[i][f"{name}.logits"], atol=1e-4, rtol=0)


def test_uncertainty_of_logits_far_apart_is_none():
    """DeeBERT's code computes NaN for the first two, and never lets them leave."""
    logits = torch.tensor([[200.0, 0.0], [0.0, 120.0], [95.0, 95.0], [1.0, 1.0]])
    torch.testing.assert_close(uncertainty(logits), torch.tensor([0.0, 0.0, 1.0, 1.0]), atol=1e-6, rtol=0)


# --- exits, gates and reduction together ------------------------------------------------------------------------------

KINDS = {
    "documents": {"head": "first", "thresholds": [0.4, 0.6, 0.75]},
    "documents, with attention": {"head": "attention", "size": 16, "heads": 2, "thresholds": [0.85, 0.95, 0.9]},
    "sentences": {"head": "words"},
    "words": {"head": "words", "unit": "word", "window": 3},
    "words after the norm": {"head": "words", "unit": "word", "window": 3, "kept": "after_norm"},
    "first tokens of words": {"head": "words", "unit": "word", "window": 1, "pieces": "first"},
}


def model_with(kind, dtype=torch.float32, fused=True, seed=0):
    """A model with two reductions, exits and, for documents, gates; all of them really decide."""
    exits = {"layers": [0, 1, 2], "thresholds": [0.75, 0.85, 0.9], **KINDS[kind]}
    gates = {} if exits["head"] == "words" else {"gates": {"size": 16, "threshold": 0.6}}
    tiny = tiny_tagger if exits["head"] == "words" else tiny_classifier
    model = tiny(seed=seed, reduction_layers=[1, 3], exits=exits, **gates)
    heads = (model.bert.encoder.exits, model.bert.encoder.gates)
    for module in heads:
        for parameter in module.parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.3)
    model = model.to(dtype)
    for module in (model.bert.encoder.selectors, *heads):
        module.float()
    if fused:
        fuse_for_inference(model)
    return model


@torch.inference_mode()
def outcome(model, sequences):
    """Of each sequence: its logits, exit layers, and tokens by layer."""
    batch = VarlenBatch.from_sequences(sequences)
    output = model(batch.input_ids, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
    lengths = batch.cu_seqlens.diff().tolist()
    if output.exits.words is None:
        answers = zip(output.logits, output.exits.layers)
    else:
        answers = zip(output.logits.split(lengths), output.exits.layers.split(lengths))
    return [(logits, left, output.trace.counts[:, i]) for i, (logits, left) in enumerate(answers)]


def sequences_of(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, TINY["vocab_size"], (n,), generator=generator) for n in lengths]


@pytest.mark.parametrize("kind", KINDS)
def test_something_leaves_is_skipped_and_halted(kind):
    """The other tests are about models in which all of this happens."""
    found = outcome(model_with(kind), sequences_of([32] * 20, 0))
    layers = torch.cat([left.flatten() for _, left, _ in found])
    assert 0 < int((layers > 0).sum()) < len(layers)
    counts = torch.stack([counts for _, _, counts in found], 1)
    assert (counts[PRESENT] < counts[ENTERING]).any()
    if "documents" in kind:
        assert ((counts[COMPUTED] == 0) & (counts[PRESENT] > 0)).any()
    elif kind != "sentences":
        assert ((counts[COMPUTED] < counts[ATTENDED]) & (counts[COMPUTED] > 0)).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=needs_bfloat16)])
@settings(max_examples=6, deadline=None)
@example(lengths=[14, 27], seed=0)  # an exit's logits between two numbers of bfloat16
@given(lengths=st.lists(st.integers(1, 32), min_size=1, max_size=24), seed=st.integers(0, 3))
def test_neighbours_change_nothing(kind, dtype, lengths, seed):
    model, sequences = model_with(kind, dtype, seed=seed), sequences_of(lengths, seed)
    for sequence, (logits, left, counts) in zip(sequences, outcome(model, sequences)):
        ((alone, alone_left, alone_counts),) = outcome(model, [sequence])
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=0)
        assert torch.equal(left, alone_left)
        assert torch.equal(counts, alone_counts)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_model_equals_the_plain_one(kind):
    sequences = sequences_of([1, 2, 9, 32, 32, 17, 31, 5], 1)
    results = [outcome(model_with(kind, fused=fused), sequences) for fused in (False, True)]
    for (plain, left, counts), (fused, fused_left, fused_counts) in zip(*results):
        torch.testing.assert_close(fused, plain, atol=1e-5, rtol=0)
        assert torch.equal(fused_left, left)
        assert torch.equal(fused_counts, counts)


@pytest.mark.parametrize("kind", KINDS)
def test_thresholds_that_let_nobody_leave_change_nothing(kind):
    model, sequences = model_with(kind), sequences_of([32, 7, 20], 2)
    batch = VarlenBatch.from_sequences(sequences)
    with torch.inference_mode():
        output = model(batch.input_ids, cu_seqlens=batch.cu_seqlens, exit_policy=NO_EXITS)
        model.config.exits = model.config.gates = None
        expected = model(batch.input_ids, cu_seqlens=batch.cu_seqlens)
    assert torch.equal(output.logits, expected.logits)
    assert torch.equal(output.trace.counts, expected.trace.counts)


def test_flops_are_those_of_what_was_computed():
    """By hand: a layer's products of computed tokens, two projections of halted ones, and the heads that were asked."""
    model = model_with("words")
    _, _, counts = outcome(model, sequences_of([32], 0))[0]
    hidden, inner = TINY["hidden_size"], TINY["intermediate_size"]
    asked, expected = torch.tensor([[30, 12, 5]]), 2 * hidden * 5 * (30 + 12 + 5)
    for layer in range(TINY["num_hidden_layers"]):
        computed, attended = int(counts[COMPUTED, layer]), int(counts[ATTENDED, layer])
        per_token = 2 * hidden**2 + 2 * hidden * inner  # query and output, and the feed-forward
        expected += 2 * (computed * per_token + attended * 2 * hidden**2 + 2 * hidden * computed * attended)
        if layer in model.config.reduction_layers:
            expected += int(counts[ENTERING, layer]) * 2 * (hidden * 32 + 32)
    assert spent_flops(model.config, counts[:, None].numpy(), asked.numpy()) == expected


def test_keys_of_their_own_reach_the_varlen_kernel(monkeypatch):
    calls = []
    monkeypatch.setattr(
        "torch.nn.attention.varlen.varlen_attn",
        lambda q, k, v, *lengths, **_: calls.append(lengths) or torch.empty_like(q),
    )
    with FakeTensorMode():
        query, key, value = (torch.empty(1, 4, n, 8, dtype=torch.bfloat16, device="cuda") for n in (4, 10, 10))
        queries, keys = (torch.zeros(3, dtype=torch.int32, device="cuda") for _ in range(2))
        lengths = {"cu_seqlens": queries, "max_seqlen": 3, "key_cu_seqlens": keys, "max_keys": 6}
        output, _ = varlen_attention(torch.nn.Identity(), query, key, value, None, **lengths)
    assert output.shape == (1, 4, 4, 8)
    assert calls[0][0] is queries
    assert calls[0][1] is keys
    assert calls[0][2:] == (3, 6)
