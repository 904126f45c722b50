"""ModernBERT: equality with transformers' own, also of what a reduction leaves, and from training to scoring."""

import copy
import dataclasses
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import (
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForMultipleChoice,
    ModernBertForQuestionAnswering,
    ModernBertForSequenceClassification,
    ModernBertForTokenClassification,
    ModernBertModel,
)

from tests.conftest import tiny_tokenizer
from tests.trbert_model.test_fused import BOTH
from tests.trbert_model.test_roberta import TEXT, TOKENIZERS
from tests.trbert_model.two_words import places_in, rows_of, write_parts
from trbert_model import (
    ConfigurationError,
    InputError,
    TRBertConfig,
    TRBertForSequenceClassification,
    TRBertModel,
    convert_checkpoint,
)
from trbert_model.backbones.fused import PACKED_LEAST, PACKED_UNIT
from trbert_model.backbones.local_attention import BlockAttention, GroupedAttention, block_size
from trbert_model.backbones.modernbert import SEGMENT_ROWS, _part_sizes
from trbert_model.calibration.measure import calibrate
from trbert_model.checkpoints.conversion import apply_adapter
from trbert_model.engine import Engine, EngineOptions
from trbert_model.flops import dense_flops, reduced_flops
from trbert_model.modeling import fuse_for_inference
from trbert_model.tasks.classification.losses import SingleLabelLosses
from trbert_model.training import TrainingConfig, train
from trbert_model.training.teacher import attention_guide
from trbert_model.varlen import model_inputs, varlen_attention

SHAPE = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 5}
SHAPE |= {"vocab_size": 60, "max_position_embeddings": 700, "local_attention": 16, "pad_token_id": 0}
SHAPE |= {"bos_token_id": 2, "cls_token_id": 2, "eos_token_id": 3, "sep_token_id": 3, "initializer_range": 0.3}
BIASES = dict.fromkeys(("norm_bias", "attention_bias", "mlp_bias", "classifier_bias"), True)
ACTIVATIONS = {"hidden_activation": "gelu", "classifier_activation": "silu"}
# Shorter than a window, around one, two and three blocks of queries, and some blocks with rest.
LENGTHS = [600, 1, 9, 64, 127, 191, 192, 257]


def source(model_class, directory=None, seed=0, **changes):
    """A random model of transformers, with biases and norms that are not the initial zeros and ones."""
    torch.manual_seed(seed)
    model = model_class(ModernBertConfig(**SHAPE | changes)).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, 1.0 if name.endswith("weight") else 0.0, 0.2)
    if directory is not None:
        model.save_pretrained(directory)
    return model


def texts(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(5, SHAPE["vocab_size"], (length,), generator=generator) for length in lengths]


def choosing(model):
    """Let the selectors of a converted model choose."""
    for selector in model.base_model.encoder.selectors:
        torch.nn.init.normal_(selector.linear_1.weight, std=1.0)
        torch.nn.init.normal_(selector.linear_2.weight, std=1.0)
    return model


def fused(model, **options):
    model = copy.deepcopy(model)
    fuse_for_inference(model, **options)
    return model


# --- equality with transformers -------------------------------------------------------------------------------------

VARIANTS = {
    "cls": (ModernBertForSequenceClassification, {"num_labels": 3}),
    "mean": (ModernBertForSequenceClassification, {"num_labels": 2, "classifier_pooling": "mean"}),
    "biases": (ModernBertForSequenceClassification, {"num_labels": 3} | BIASES | ACTIVATIONS),
    "wide windows": (ModernBertForSequenceClassification, {"num_labels": 3, "local_attention": 160}),
    "answers": (ModernBertForQuestionAnswering, {"num_labels": 2}),
    "tokens": (ModernBertForTokenClassification, {"num_labels": 4}),
}


@pytest.mark.parametrize(("model_class", "changes"), VARIANTS.values(), ids=VARIANTS)
def test_equal_to_transformers_and_saved_and_loaded(tmp_path, model_class, changes):
    theirs = source(model_class, tmp_path / "source", **changes)
    converted = convert_checkpoint(tmp_path / "source")
    converted.save_pretrained(tmp_path / "saved")
    loaded = type(converted).from_pretrained(tmp_path / "saved").eval()
    again = convert_checkpoint(tmp_path / "saved")
    of_tokens = model_class is not ModernBertForSequenceClassification
    sequences = texts(LENGTHS)
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = (torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]).long()
    left, left_mask = ids.flip(1), mask.flip(1)
    with torch.inference_mode():
        alone = [theirs(sequence[None]) for sequence in sequences]
        for model in (converted, loaded, again, fused(converted, packed=False)):
            output = model(**model_inputs(sequences), reduce=False)
            padded = model(ids, attention_mask=mask, token_type_ids=mask, reduce=False)
            for name in ("logits",) if "logits" in output else ("start_logits", "end_logits"):
                expected = torch.cat([each[name].squeeze(0) if of_tokens else each[name] for each in alone])
                assert expected.std() > 0.1
                torch.testing.assert_close(output[name], expected, atol=1e-4, rtol=0)
                found = padded[name][mask.bool()] if of_tokens else padded[name]
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        if model.config.classifier_pooling == "mean":
            flipped = model(left, attention_mask=left_mask, reduce=False).logits
            torch.testing.assert_close(flipped, theirs(left, attention_mask=left_mask).logits, atol=1e-4, rtol=0)
        with pytest.raises(InputError, match="701 tokens is longer than the model's 700 positions"):
            model(**model_inputs([[7] * 701]))


def test_other_windows_and_angles_give_other_outputs(tmp_path):
    """What the comparisons above would not notice if the model did not depend on it."""
    theirs = source(ModernBertForSequenceClassification, tmp_path, num_labels=3)
    model, (ids,) = convert_checkpoint(tmp_path), texts([300])
    changed = {"local_attention": 20}, {"layer_types": ["full_attention"] * 5}
    thetas = {kind: {"rope_type": "default", "rope_theta": 10.0} for kind in theirs.config.layer_types}
    changed += ({"rope_parameters": thetas},)
    with torch.inference_mode():
        expected = model(**model_inputs([ids])).logits
        for change in changed:
            config = TRBertConfig(**model.config.to_dict() | {"layer_config": model.config.layer_config | change})
            other = type(model)(config).eval()
            other.load_state_dict(model.state_dict())
            assert (other(**model_inputs([ids])).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", BOTH)
def test_a_fused_model_equals_the_plain_one_and_long_sequences_go_through_in_parts(tmp_path, dtype):
    source(ModernBertForSequenceClassification, tmp_path, max_position_embeddings=1500, initializer_range=0.1)
    plain = convert_checkpoint(tmp_path).to(dtype)
    sequences = texts([1500, 1030, 500, 40, 7])
    with torch.inference_mode():
        expected = plain(**model_inputs(sequences), reduce=False, output_hidden_states=True)
        output = fused(plain)(**model_inputs(sequences), reduce=False, output_hidden_states=True)
    atol = 1e-5 if dtype == torch.float32 else 0.06
    for a, b in zip(output.hidden_states, expected.hidden_states, strict=True):
        assert (a - b).abs().max() <= atol * b.abs().max()


@given(rows=st.integers(1, 9000) | st.integers(1, 70).map(lambda units: units * PACKED_UNIT))
def test_parts_are_few_different_numbers_of_rows(rows):
    sizes = _part_sizes(rows)
    assert sum(sizes) == rows
    assert max(sizes) <= SEGMENT_ROWS
    if rows % PACKED_UNIT == 0 and rows > SEGMENT_ROWS:
        assert min(sizes) >= PACKED_LEAST
        assert not any(size % PACKED_UNIT for size in sizes)


# --- with reduction -------------------------------------------------------------------------------------------------


def reference_states(theirs: ModernBertModel, ids, alive: dict[int, torch.Tensor]):
    """transformers' layers on a whole sequence, in which from a layer on only some tokens go on and are attended to."""
    hidden, positions = theirs.embeddings(ids[None]), torch.arange(len(ids))
    near = (positions[:, None] - positions).abs() <= theirs.config.local_attention // 2
    here = torch.ones(len(ids), dtype=torch.bool)
    for index, layer in enumerate(theirs.layers):
        here = alive.get(index, here)
        seen = here.expand(len(ids), -1) & (near if layer.attention_type == "sliding_attention" else True)
        mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
        angles = theirs.rotary_emb(hidden, positions[None], layer.attention_type)
        after = layer(hidden, attention_mask=mask[None, None], position_embeddings=angles)
        hidden = torch.where(here[None, :, None], after, hidden)
    return theirs.final_norm(hidden)[0]


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize(("layers", "local"), [([1, 3], 16), ([0, 2], 16), ([2], 160), ([1, 2, 4], 4)])
def test_what_a_reduction_leaves_computes_as_in_transformers_without_the_dropped_tokens(tmp_path, fuse, layers, local):
    theirs = source(ModernBertModel, tmp_path, local_attention=local, attn_implementation="eager")
    model = convert_checkpoint(tmp_path, reduction_layers=layers)
    model = fused(model, packed=False) if fuse else model
    sequences = texts([600, 3, 250, 90])
    generator, bounds = torch.Generator().manual_seed(1), np.cumsum([0, *map(len, sequences)])
    keep = torch.rand(len(layers), int(bounds[-1]), generator=generator) < 0.6
    keep[:, bounds[:-1]] = True
    keep = keep.cummin(0).values
    with torch.inference_mode():
        output = model(
            **model_inputs(sequences), selection_policy=lambda seen: keep[seen.reduction][seen.token_indices]
        )
        for i, ids in enumerate(sequences):
            part = slice(bounds[i], bounds[i + 1])
            expected = reference_states(theirs, ids, dict(zip(layers, keep[:, part])))
            torch.testing.assert_close(output.last_hidden_state[part], expected, atol=2e-4, rtol=0)
            torch.testing.assert_close(output.cls_hidden_state[i], expected[0], atol=2e-4, rtol=0)
    assert output.kept_tokens[-1].sum() == keep[-1].sum() < bounds[-1] / 1.5


def test_mean_pooling_is_over_the_tokens_that_are_left(tmp_path):
    source(ModernBertForSequenceClassification, tmp_path, classifier_pooling="mean")
    model, sequences = choosing(convert_checkpoint(tmp_path)), texts([40, 90])
    with torch.inference_mode():
        output = model.bert(**model_inputs(sequences), output_selections=True)
    left = output.selections[-1].token_indices[output.selections[-1].keep]
    assert 4 < len(left) < 100
    for i, states in enumerate((left[left < 40], left[left >= 40])):
        mean = output.last_hidden_state[states].mean(0)
        torch.testing.assert_close(output.pooled_state[i], mean, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("model_class", [ModernBertForSequenceClassification, ModernBertForQuestionAnswering])
def test_neighbours_and_batches_change_nothing(tmp_path, dtype, model_class):
    source(model_class, tmp_path, classifier_pooling="mean", initializer_range=0.1)
    plain = choosing(convert_checkpoint(tmp_path)).to(dtype)
    for selector in plain.bert.encoder.selectors:
        selector.float()
    for model in (fused(plain), plain) if dtype == torch.float32 else (fused(plain),):
        sequences = texts(LENGTHS, seed=2)
        order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(0)).tolist()
        shuffled = [sequences[i] for i in order]
        with torch.inference_mode():
            together = model(**model_inputs(shuffled))
            alone = [model(**model_inputs([sequence])) for sequence in shuffled]
        for i, kept in enumerate(together.kept_tokens):
            assert kept.tolist() == [int(each.kept_tokens[i]) for each in alone]
        assert together.kept_tokens[0].sum() < 0.9 * sum(LENGTHS)
        name = "logits" if "logits" in together else "start_logits"
        expected = torch.cat([each[name] for each in alone])
        torch.testing.assert_close(together[name], expected, atol=1e-5, rtol=0)


def test_what_is_not_finite_stays_in_its_sequence(tmp_path):
    source(ModernBertModel, tmp_path)
    model, sequences = convert_checkpoint(tmp_path), texts([3, 70, 200, 9])
    model.embeddings.tok_embeddings.weight.data[4] = torch.inf
    bad = torch.full((100,), 4)
    with torch.inference_mode():
        for each in (model, fused(model, packed=False)):
            expected = each(**model_inputs(sequences)).cls_hidden_state
            output = each(**model_inputs([sequences[0], bad, *sequences[1:]])).cls_hidden_state
            assert not output[1].isfinite().any()
            torch.testing.assert_close(output[[0, 2, 3, 4]], expected, atol=1e-5, rtol=0)


# --- windows by position --------------------------------------------------------------------------------------------


def windows_of(lengths, gaps, seed):
    """Positions of survivors, and which tokens attend to which."""
    generator = torch.Generator().manual_seed(seed)
    positions = [torch.randperm(length * gaps, generator=generator)[:length].sort().values for length in lengths]
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return torch.cat(positions), sequence, torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 420), min_size=1, max_size=5),
    gaps=st.integers(1, 6),
    reach=st.sampled_from([1, 8, 64, 70]),
    seed=st.integers(0, 9),
)
def test_windows_hold_the_tokens_near_each_token(lengths, gaps, reach, seed):
    positions, sequence, cu_seqlens = windows_of(lengths, gaps, seed)
    near = (positions[:, None] - positions).abs() <= reach
    seen = near & (sequence[:, None] == sequence)
    torch.manual_seed(seed)
    query, key, value = (torch.randn(1, 2, len(positions), 8) for _ in range(3))
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.7).transpose(1, 2)
    grouped = GroupedAttention.local(positions, cu_seqlens, reach, torch.float32)
    blocks = BlockAttention.of(positions, cu_seqlens, reach)
    for local in (grouped, blocks):
        torch.testing.assert_close(local(query, key, value, 0.7, 0.0), expected, atol=1e-5, rtol=0)
    cost = sum(mask.numel() for group in grouped.groups for mask in group.masks)
    assert cost <= 3 * block_size(reach) * (len(positions) + block_size(reach))
    # Keys and values of other sequences are never read.
    owner = sequence[blocks.queries[:: block_size(reach)]]
    assert (sequence[blocks.keys] == owner[:, None]).all()


@pytest.mark.parametrize("kind", ["grouped", "blocks"])
def test_gradients_through_windows(kind):
    positions, sequence, cu_seqlens = windows_of([300, 5, 70], 3, 0)
    seen = ((positions[:, None] - positions).abs() <= 8) & (sequence[:, None] == sequence)
    torch.manual_seed(0)
    inputs = [torch.randn(1, 2, len(positions), 8, requires_grad=True) for _ in range(3)]
    weights = torch.randn(1, len(positions), 2, 8)
    expected = F.scaled_dot_product_attention(*inputs, attn_mask=seen).transpose(1, 2)
    grouped = GroupedAttention.local(positions, cu_seqlens, 8, torch.float32)
    local = grouped if kind == "grouped" else BlockAttention.of(positions, cu_seqlens, 8)
    found = [torch.autograd.grad((each * weights).sum(), inputs) for each in (expected, local(*inputs, None, 0.0))]
    for a, b in zip(*found):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_a_layer_with_windows_is_not_computed_without_them():
    query = torch.randn(1, 4, 6, 8)
    with pytest.raises(InputError, match="needs the batch's windows"):
        varlen_attention(
            None, query, query, query, None, cu_seqlens=torch.tensor([0, 6]), max_seqlen=6, sliding_window=9
        )


# --- CUDA without a GPU ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("complete", [True, False])
def test_the_cuda_path_has_the_right_shapes_and_dtypes(dtype, complete, monkeypatch):
    """Fake CUDA tensors through the model, with all tokens and with gaps between them; no value ever exists."""
    calls = []

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **kwargs):
        calls.append((tuple(query.shape), kwargs["window_size"]))
        return torch.empty_like(query)

    def global_attention(query, *args):
        return query.transpose(1, 2)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    fields = {name: SHAPE[name] for name in SHAPE if name not in ("local_attention", "cls_token_id", "sep_token_id")}
    config = TRBertConfig(**fields, backbone="modernbert", layer_config={"local_attention": 16}, reduction_layers=[])
    model = TRBertForSequenceClassification(config).eval().to(dtype)
    fuse_for_inference(model, packed=False)
    begin = TRBertModel.begin
    monkeypatch.setattr(
        TRBertModel, "begin", lambda *args, **kwargs: dataclasses.replace(begin(*args, **kwargs), complete=complete)
    )
    if dtype == torch.float32:  # torch's SDPA of global layers asks for the lengths, which fake tensors do not have
        monkeypatch.setattr("trbert_model.varlen.sequence_attention", global_attention)
    with FakeTensorMode() as mode, torch.no_grad():
        state = {
            name: FakeTensor(mode, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), torch.device("cuda"))
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        }
        inputs = {"cu_seqlens": torch.zeros(3, dtype=torch.int32, device="cuda"), "max_seqlen": 150}
        output = torch.func.functional_call(model, state, torch.full((300,), 7, device="cuda"), inputs)
    assert (output.logits.shape, output.logits.dtype, output.logits.device.type) == ((2, 2), dtype, "cuda")
    windows = [(-1, -1), (8, 8), (8, 8), (-1, -1), (8, 8)]
    if dtype == torch.float32:
        windows = []
    elif not complete:
        windows = [(-1, -1), (-1, -1)]
    assert calls == [((300, 4, 8), window) for window in windows]


# --- FLOPs ----------------------------------------------------------------------------------------------------------


def test_flops_count_the_pairs_of_tokens_in_windows():
    config = TRBertConfig(
        backbone="modernbert", hidden_size=768, intermediate_size=1152, num_hidden_layers=22, vocab_size=60
    )
    lengths = np.array([1, 7, 64, 65, 66, 130, 1000])
    distances = [np.abs(np.subtract.outer(np.arange(n), np.arange(n))) for n in lengths]
    linear = (4 * 768**2 + 3 * 768 * 1152) * lengths
    pairs = 8 * lengths**2 + 14 * np.array([(each <= 64).sum() for each in distances])
    np.testing.assert_allclose(dense_flops(config, lengths), 2 * (22 * linear + 2 * 768 * pairs))
    # Share of global attention: 5% at 512 tokens, 18% at 2,048, 47% at 8,192.
    tokens = np.array([512, 2048, 8192])
    share = 2 * 8 * 2 * 768 * tokens**2 / dense_flops(config, tokens)
    np.testing.assert_allclose(share, [0.05, 0.18, 0.47], atol=0.01)
    kept = np.array([[512, 512], [2048, 2048], [8192, 8192]])
    selectors = 2 * 2 * tokens * (768 * 32 + 32)
    np.testing.assert_allclose(reduced_flops(config, tokens, kept), dense_flops(config, tokens) + selectors)


# --- checkpoints ----------------------------------------------------------------------------------------------------


def test_checkpoints_as_they_are_found(tmp_path):
    """The hub's old configurations, and names with modules around the model."""
    theirs = source(ModernBertForSequenceClassification, tmp_path, num_labels=3, attn_implementation="eager")
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["layer_types"], raw["rope_parameters"]
    raw |= {"global_attn_every_n_layers": 2, "global_rope_theta": 5000.0, "local_rope_theta": 500.0}
    raw |= {"layer_norm_eps": 1e-5, "position_embedding_type": "absolute", "reference_compile": None}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    old = ModernBertForSequenceClassification.from_pretrained(tmp_path).eval()
    assert old.config.layer_types[2] == "full_attention"
    from safetensors.torch import save_file

    tensors = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    model, (ids,) = convert_checkpoint(tmp_path), texts([90])
    with torch.inference_mode():
        expected, found = old(ids[None]).logits, model(**model_inputs([ids]), reduce=False).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (model.config.pair_separators, model.config.usable_positions) == (1, 700)


def test_a_masked_language_model_gives_the_bare_model_or_a_fresh_head(tmp_path):
    theirs = source(ModernBertForMaskedLM, tmp_path)
    bare = convert_checkpoint(tmp_path)
    assert type(bare) is TRBertModel
    for task, head in (("classification", {"id2label": {0: "no", 1: "yes"}}), ("question-answering", {})):
        model = convert_checkpoint(tmp_path, task=task, head=head)
        # As transformers does: the language model's transform is where the classifier's begins.
        assert torch.equal(model.bert.pooler.dense.weight, theirs.head.dense.weight)
    ModernBertModel(ModernBertConfig(**SHAPE)).save_pretrained(tmp_path / "bare")
    assert convert_checkpoint(tmp_path / "bare", task="classification", head=head).bert.pooler is not None


def test_more_positions_need_no_table(tmp_path):
    source(ModernBertForSequenceClassification, tmp_path)
    model = convert_checkpoint(tmp_path, max_positions=1000)
    assert model.config.usable_positions == 1000
    assert model(**model_inputs(texts([1000]))).logits.isfinite().all()
    with pytest.raises(ConfigurationError, match=r"max_positions 600: .* has 700 positions already"):
        convert_checkpoint(tmp_path, max_positions=600)


def test_the_class_tells_heads_with_the_same_tensors_apart(tmp_path):
    classes = {
        ModernBertForMultipleChoice: "TRBertForMultipleChoice",
        ModernBertForSequenceClassification: "TRBertForSequenceClassification",
        ModernBertForTokenClassification: "TRBertForTokenClassification",
        ModernBertForQuestionAnswering: "TRBertForQuestionAnswering",
    }
    for model_class, name in classes.items():
        source(model_class, tmp_path / name)
        assert type(convert_checkpoint(tmp_path / name)).__name__ == name


def test_what_the_layers_cannot_do_is_said(tmp_path):
    source(ModernBertForSequenceClassification, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["rope_parameters"]["full_attention"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ConfigurationError, match="rope_type 'dynamic' is not supported"):
        convert_checkpoint(tmp_path)
    with pytest.raises(ConfigurationError, match="classifier_pooling 'max'"):
        TRBertConfig(classifier_pooling="max")


# --- training, engine, calibration ----------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path):
    """Documents longer than a window whose label is which of two words they hold, and a random backbone."""
    write_parts(tmp_path, rows_of(12, 36))
    source(ModernBertModel, tmp_path / "backbone", initializer_range=0.1, classifier_pooling="mean")
    tiny_tokenizer().save_pretrained(tmp_path / "backbone")
    return tmp_path


def training(corpus, **changes):
    values = {"learning_rate": 2e-3, "samples": 2, "speedup": 1.7, "reduction_layers": (1, 2)}
    return TrainingConfig(**places_in(corpus), **values | changes)


def test_trained_from_scratch_scored_and_calibrated(corpus):
    config = training(corpus, fine_tune_epochs=20.0, imitation_epochs=6.0, joint_epochs=2.0)
    measured = train(config)["stages"]
    assert measured["fine_tune"]["accuracy"] > 0.9
    assert measured["joint"]["accuracy"] > 0.9
    assert measured["joint"]["flops_speedup"] == pytest.approx(1.7, rel=0.15)
    engine = Engine.from_pretrained(corpus / "model", EngineOptions(device="cpu"))
    assert (engine.config.backbone, engine.config.classifier_pooling) == ("modernbert", "mean")
    texts = ["the news " * 40 + "good", "bad " + "the game of news " * 500]
    results = engine.score_columns(texts)
    assert results.num_windows.tolist() == [1, 4]
    assert results.num_tokens[1] > 2000
    labelled = engine.task.read_corpus(config.evaluation, config)
    table = calibrate(engine, labelled, key="key", name="evaluation", speedups=[2.5])
    assert table.points[0].flops_speedup == pytest.approx(2.5, rel=0.2)


def test_an_adapter_is_merged_into_its_backbone(corpus):
    train(
        training(
            corpus, adapter_rank=2, fine_tune_epochs=0.5, imitation_epochs=0.0, selectors_epochs=0.0, joint_epochs=0.5
        )
    )
    texts, options = ["the good news", "a bad game " * 30], EngineOptions(device="cpu")
    expected = Engine.from_pretrained(corpus / "model", options).score_columns(texts)
    rebuilt = apply_adapter(corpus / "backbone", corpus / "model/adapter")
    found = Engine(rebuilt, tiny_tokenizer(), options).score_columns(texts)
    np.testing.assert_allclose(found.outputs, expected.outputs, atol=1e-5)


def test_answered(tmp_path):
    source(ModernBertForQuestionAnswering, tmp_path, num_labels=2, vocab_size=400, max_position_embeddings=40)
    model = convert_checkpoint(tmp_path, question_aware=True)
    engine = Engine(model, TOKENIZERS["byte-level"], EngineOptions(device="cpu"))
    results = engine.score_columns(["Who was born?"], [TEXT])
    assert results.num_windows[0] > 1
    (answer,) = results.outputs
    span = TEXT[answer.spans[0].start : answer.spans[0].end]
    assert span
    assert span == span.strip()


# --- early exits ----------------------------------------------------------------------------------------------------


def test_documents_leave_and_skip_layers_beside_the_reduction(tmp_path):
    """Alone and among others the same, in the plain and in the fused model."""
    source(ModernBertForSequenceClassification, tmp_path, classifier_pooling="mean", num_labels=3)
    exits = {"head": "first", "layers": (1, 3), "thresholds": (0.8, 0.8)}
    model = convert_checkpoint(tmp_path, reduction_layers=[1, 3], exits=exits, gates={"threshold": 0.5})
    for parameter in (*model.bert.encoder.exits.parameters(), *model.bert.encoder.gates.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    sequences = texts([300, 1, 40, 90, 130, 7, 200, 64])
    with torch.inference_mode():
        for each in (choosing(model), fused(model, packed=False)):
            together = each(**model_inputs(sequences))
            assert 0 < (together.exits.layers > 0).sum() < len(sequences)
            for i, sequence in enumerate(sequences):
                alone = each(**model_inputs([sequence]))
                torch.testing.assert_close(together.logits[i], alone.logits[0], atol=1e-4, rtol=0)
                assert together.exits.layers[i] == alone.exits.layers[0]


def test_single_words_cannot_be_halted(tmp_path):
    source(ModernBertForTokenClassification, tmp_path, num_labels=3)
    with pytest.raises(ConfigurationError, match="ModernBERT's layers cannot halt single words"):
        convert_checkpoint(tmp_path, exits={"head": "words", "layers": (1,), "unit": "word"})


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_attention_guide_is_of_the_last_layer_that_attends_to_all(tmp_path, pooling):
    theirs = source(ModernBertForSequenceClassification, tmp_path, num_labels=3, classifier_pooling=pooling)
    theirs.set_attn_implementation("eager")
    documents = texts([40, 7])
    batch = {**model_inputs(documents), "labels": torch.tensor([0, 2])}
    _, scores = attention_guide(convert_checkpoint(tmp_path), batch, SingleLabelLosses(3))
    for document, found in zip(documents, scores.split([40, 7], dim=1)):
        weights = theirs(document[None], output_attentions=True).attentions[3][0].mean(0)
        expected = weights[0] if pooling == "cls" else weights.mean(0)
        torch.testing.assert_close(found[0], expected.detach(), atol=1e-6, rtol=1e-3)
