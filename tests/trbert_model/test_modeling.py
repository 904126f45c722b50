"""The model: equal to transformers' BERT without reduction, and independent of the batch with it."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
)

from tests.conftest import TINY, tiny_classifier
from trbert_model import (
    ConfigurationError,
    InputError,
    TRBertConfig,
    TRBertForQuestionAnswering,
    TRBertForSequenceClassification,
    TRBertModel,
    VarlenBatch,
)
from trbert_model.modeling import fuse_for_inference
from trbert_model.varlen import model_inputs, varlen_attention

CLASSIFIER = tiny_classifier()


def varlen(model, sequences, **kwargs):
    batch = VarlenBatch.from_sequences(sequences)
    return model(batch.input_ids, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen, **kwargs)


def question_answerer(seed=0, **config):
    torch.manual_seed(seed)
    model = TRBertForQuestionAnswering(TRBertConfig(**TINY, **config)).eval()
    for parameter in model.bert.encoder.selectors.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1.0)
    return model


def padded_ids(lengths, seed=0):
    torch.manual_seed(seed)
    ids = torch.randint(5, TINY["vocab_size"], (len(lengths), max(lengths)))
    mask = (torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


# --- without reduction: transformers' BERT -------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[7], [1, 2, 32], [20, 5, 13, 1]])
def test_without_reduction_equal_to_bert(lengths):
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**TINY)).eval()
    model = TRBertModel(TRBertConfig(**TINY)).eval()
    model.load_state_dict(bert.state_dict(), strict=False)
    ids, mask = padded_ids(lengths)
    types = torch.randint(0, 2, ids.shape) * mask
    with torch.inference_mode():
        expected = bert(ids, attention_mask=mask, token_type_ids=types)
        output = model(ids, attention_mask=mask, token_type_ids=types, reduce=False)
    expected_states = expected.last_hidden_state * mask[..., None]
    torch.testing.assert_close(output.last_hidden_state, expected_states, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.pooler_output, expected.pooler_output, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("bert_class", "trbert_class", "names"),
    [
        (BertForSequenceClassification, TRBertForSequenceClassification, ["logits"]),
        (BertForQuestionAnswering, TRBertForQuestionAnswering, ["start_logits", "end_logits"]),
    ],
)
def test_a_bert_checkpoint_loads_as_it_is(tmp_path, bert_class, trbert_class, names):
    torch.manual_seed(0)
    bert = bert_class(BertConfig(**TINY, num_labels=2)).eval()
    bert.save_pretrained(tmp_path)
    model, loading = trbert_class.from_pretrained(tmp_path, output_loading_info=True)
    assert all("selectors" in key for key in loading["missing_keys"])
    assert loading["unexpected_keys"] == set()
    ids, mask = padded_ids([9, 4])
    with torch.inference_mode():
        expected, output = bert(ids, attention_mask=mask), model.eval()(ids, attention_mask=mask, reduce=False)
    for name in names:
        difference = (expected[name] - output[name]) * (mask if name != "logits" else 1)
        assert difference.abs().max() < 1e-5


def test_left_padding_equal_to_bert():
    torch.manual_seed(0)
    bert = BertModel(BertConfig(**TINY)).eval()
    model = TRBertModel(TRBertConfig(**TINY)).eval()
    model.load_state_dict(bert.state_dict(), strict=False)
    ids, mask = padded_ids([9, 4])
    ids, mask = ids.flip(1), mask.flip(1)
    with torch.inference_mode():
        expected = bert(ids, attention_mask=mask).last_hidden_state * mask[..., None]
        output = model(ids, attention_mask=mask, reduce=False).last_hidden_state
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)


# --- batch composition and order change nothing --------------------------------------------------------------------

sequence_lengths = st.lists(st.integers(1, TINY["max_position_embeddings"]), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(lengths=sequence_lengths, layers=st.sampled_from([[1, 2], [0], [0, 1, 3], [3], []]), seed=st.integers(0, 3))
def test_a_sequence_does_not_see_its_batch(lengths, layers, seed):
    model = tiny_classifier(seed, reduction_layers=layers)
    torch.manual_seed(seed)
    sequences = [torch.randint(5, TINY["vocab_size"], (length,)) for length in lengths]
    order = torch.randperm(len(sequences)).tolist()
    with torch.inference_mode():
        together = varlen(model, [sequences[i] for i in order], output_selections=True)
        for row, i in enumerate(order):
            alone = varlen(model, [sequences[i]], output_selections=True)
            # A token that sits on the threshold to within rounding may fall on either side of it.
            on_the_edge = any(
                (torch.sigmoid(selection.logits) - 0.5).abs().min() < 1e-5 for selection in alone.selections
            )
            if not on_the_edge:
                torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-4, rtol=0)
                counts = [int(kept[row]) for kept in together.kept_tokens]
                assert counts == [int(kept[0]) for kept in alone.kept_tokens]


@settings(max_examples=40, deadline=None)
@given(lengths=sequence_lengths.filter(lambda lengths: min(lengths) > 3), seed=st.integers(0, 3))
def test_a_window_of_a_question_does_not_see_its_batch(lengths, seed):
    model = question_answerer(seed, question_aware=True, reduction_layers=[0, 2])
    torch.manual_seed(seed)
    windows = [torch.randint(5, TINY["vocab_size"], (length,)).numpy() for length in lengths]
    segments = [[0] * (2 + length // 5) + [1] * (length - 2 - length // 5) for length in lengths]
    with torch.inference_mode():
        together = model(**model_inputs(windows, segments), output_selections=True)
        answers = together.start_logits.split(lengths)
        for index, (window, segment) in enumerate(zip(windows, segments)):
            alone = model(**model_inputs([window], [segment]), output_selections=True)
            on_the_edge = any(
                (torch.sigmoid(selection.logits) - 0.5).abs().min() < 1e-5 for selection in alone.selections
            )
            if not on_the_edge:
                torch.testing.assert_close(answers[index], alone.start_logits, atol=1e-4, rtol=0)
                assert [int(kept[index]) for kept in together.kept_tokens] == [int(kept) for kept in alone.kept_tokens]


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4), left=st.booleans())
def test_padded_sequences_that_are_too_long_are_truncated_as_tokenizers_do(lengths, left):
    """transformers' pipelines pass texts of any length."""
    positions, (ids, mask) = TINY["max_position_embeddings"], padded_ids(lengths)
    if left and max(lengths) > positions:
        rows = [ids[i, :length] for i, length in enumerate(lengths)]
        ids, mask = (
            torch.nn.utils.rnn.pad_sequence([each.flip(0) for each in of], batch_first=True).flip(1)
            for of in (rows, [torch.ones_like(r) for r in rows])
        )
    whole = [row[there.bool()] for row, there in zip(ids, mask)]
    cut = [row if len(row) <= positions else torch.cat([row[: positions - 1], row[-1:]]) for row in whole]
    answerer = question_answerer()
    with torch.inference_mode():
        logits = CLASSIFIER(ids, attention_mask=mask).logits
        torch.testing.assert_close(logits, varlen(CLASSIFIER, cut).logits, atol=1e-5, rtol=0)
        found = answerer(ids, attention_mask=mask).start_logits
        expected = varlen(answerer, cut).start_logits.split([len(row) for row in cut])
    assert found.shape == ids.shape
    for row, there, answers in zip(found, mask, expected):
        row = row[there.bool()]
        used = row > torch.finfo(row.dtype).min
        assert used.sum() == len(answers)
        torch.testing.assert_close(row[used], answers, atol=1e-5, rtol=0)


@settings(max_examples=30, deadline=None)
@given(lengths=sequence_lengths, seed=st.integers(0, 3))
def test_padded_and_varlen_input_agree(lengths, seed):
    model = question_answerer(seed)
    ids, mask = padded_ids(lengths, seed)
    with torch.inference_mode():
        padded = model(ids, attention_mask=mask)
        packed = varlen(model, [ids[i, :length] for i, length in enumerate(lengths)])
    flat = mask.bool().flatten()
    torch.testing.assert_close(padded.start_logits.flatten()[flat], packed.start_logits, atol=1e-4, rtol=0)
    assert [k.tolist() for k in padded.kept_tokens] == [k.tolist() for k in packed.kept_tokens]


@settings(max_examples=30, deadline=None)
@given(lengths=sequence_lengths, seed=st.integers(0, 5))
def test_kept_tokens_only_shrink_and_never_reach_zero(lengths, seed):
    model = tiny_classifier(seed, reduction_layers=[0, 1, 3])
    with torch.inference_mode():
        kept = varlen(model, [torch.randint(5, 20, (length,)) for length in lengths]).kept_tokens
    for before, after in zip([torch.tensor(lengths), *kept], kept):
        assert (after <= before).all()
        assert (after >= 1).all()


def test_the_selectors_choose_in_these_tests():
    kept = varlen(CLASSIFIER, [torch.arange(5, 20).repeat(2)]).kept_tokens
    assert 1 < int(kept[1]) < int(kept[0]) < 30


@pytest.mark.parametrize("layers", [[0, 2], [1, 3]])
def test_samples_are_the_batch_repeated(layers):
    """Each sample with its own selection, everything before the first reduction computed once."""
    model = question_answerer(reduction_layers=layers)
    ids = [torch.randint(5, TINY["vocab_size"], (length,)) for length in (9, 1, 14)]
    chosen: dict[int, list[torch.Tensor]] = {0: [], 1: []}

    def at_random(candidates):
        keep = (torch.rand(len(candidates.logits)) < 0.5) | candidates.fixed
        chosen[candidates.reduction] += keep.split(candidates.lengths.tolist())
        return keep

    with torch.inference_mode():
        state = model.bert.before_reduction(**model_inputs(ids))
        assert (state.layer, len(state.hidden)) == (layers[0], 24)
        together = model.bert(state=state.repeated(3), selection_policy=at_random)
        for sample in range(3):
            mine = {r: torch.cat(chosen[r][3 * sample : 3 * sample + 3]) for r in (0, 1)}
            alone = varlen(model.bert, ids, selection_policy=lambda seen: mine[seen.reduction])  # noqa: B023
            states = together.last_hidden_state.split(24)[sample]
            torch.testing.assert_close(states, alone.last_hidden_state, atol=1e-5, rtol=0)
            for kept, expected in zip(together.kept_tokens, alone.kept_tokens):
                assert torch.equal(kept[3 * sample : 3 * sample + 3], expected)


@pytest.mark.parametrize("length", [1, 2])
def test_shortest_sequences(length):
    everything_goes = tiny_classifier()
    for selector in everything_goes.bert.encoder.selectors:
        torch.nn.init.constant_(selector.linear_2.bias, -1e4)
    output = varlen(everything_goes, [torch.full((length,), 7), torch.full((5,), 7)])
    assert [kept.tolist() for kept in output.kept_tokens] == [[1, 1], [1, 1]]
    assert torch.isfinite(output.logits).all()


def test_a_token_stays_at_exactly_the_threshold():
    model = tiny_classifier()
    for selector in model.bert.encoder.selectors:
        torch.nn.init.zeros_(selector.linear_2.weight)
        torch.nn.init.zeros_(selector.linear_2.bias)
    assert [int(kept) for kept in varlen(model, [torch.arange(5, 15)]).kept_tokens] == [10, 10]


def test_the_first_segment_goes_on_if_the_configuration_says_so(tmp_path):
    """A question's tokens, whatever thresholds and policies say, through the layers that it is to go through."""
    torch.manual_seed(0)
    config = TRBertConfig(**{**TINY, "question_aware": True, "selector_thresholds": [1.0, 1.0]})
    assert config.question_layers == 2
    TRBertForQuestionAnswering(config).save_pretrained(tmp_path)
    model = TRBertForQuestionAnswering.from_pretrained(tmp_path).eval()
    assert model.config.question_aware
    batch = model_inputs([np.arange(5, 17), np.arange(5, 13)], [[0] * 4 + [1] * 8, [0] * 3 + [1] * 5])
    output = model(**batch, output_selections=True)
    assert [kept.tolist() for kept in output.kept_tokens] == [[4, 3], [1, 1]], "[CLS] goes on in any case"
    first, second = output.selections
    assert torch.equal(first.keep, batch["token_type_ids"] == 0)
    assert torch.equal(first.fixed, first.keep)
    assert second.fixed.tolist() == [True, False, False, False, True, False, False]
    model.config.question_layers = model.config.num_hidden_layers

    def nothing(candidates):
        return torch.zeros_like(candidates.fixed)

    for samples in (1, 2):
        state = model.bert.before_reduction(**batch).repeated(samples)
        output = model(state=state, selection_policy=nothing)
        assert [kept.tolist() for kept in output.kept_tokens] == [[4, 3] * samples] * 2


def test_a_skipped_token_answers_from_the_state_it_left_with():
    model = question_answerer(reduction_layers=[2])
    ids = torch.randint(5, TINY["vocab_size"], (20,))
    with torch.inference_mode():
        output = varlen(model.bert, [ids], output_hidden_states=True, output_selections=True)
    skipped = ~output.selections[0].keep
    assert skipped.any()
    torch.testing.assert_close(output.last_hidden_state[~skipped], output.hidden_states[-1], atol=0, rtol=0)
    dense = varlen(model.bert, [ids], reduce=False, output_hidden_states=True)
    torch.testing.assert_close(output.last_hidden_state[skipped], dense.hidden_states[2][skipped], atol=1e-6, rtol=0)


# --- the traps of the attention interface --------------------------------------------------------------------------


def test_other_attention_is_refused(tmp_path):
    CLASSIFIER.save_pretrained(tmp_path)
    for name in ("sdpa", "eager"):
        with pytest.raises(ConfigurationError, match="trbert_varlen"):
            TRBertForSequenceClassification.from_pretrained(tmp_path, attn_implementation=name)
    assert TRBertForSequenceClassification.from_pretrained(tmp_path).config._attn_implementation == "trbert_varlen"
    model = tiny_classifier()
    with pytest.raises(ConfigurationError, match="trbert_varlen"):
        model.set_attn_implementation("sdpa")
    assert model.config._attn_implementation == "trbert_varlen"


def test_default_positions_restart_in_every_sequence():
    batch = VarlenBatch.from_sequences([[5, 6, 7], [8, 9]])
    given_positions = CLASSIFIER(
        batch.input_ids, position_ids=torch.tensor([0, 1, 2, 0, 1]), cu_seqlens=batch.cu_seqlens
    )
    default = CLASSIFIER(batch.input_ids, cu_seqlens=batch.cu_seqlens)
    torch.testing.assert_close(given_positions.logits, default.logits)


def test_configurations_that_cannot_work_are_refused():
    for wrong, message in [
        ({"reduction_layers": [2, 1]}, "increasing"),
        ({"reduction_layers": [4]}, "from 0 to 3"),
        ({"selector_thresholds": [0.5]}, "one threshold for each"),
        ({"backbone": "electra"}, "backbone 'electra' is none of bert, roberta, modernbert"),
        ({"chunk_size_feed_forward": 8}, "chunk_size_feed_forward"),
        ({"is_decoder": True}, "encoder"),
        ({"pooler_activation": "gelu"}, "pooler_activation"),
        ({"question_layers": 5}, "question_layers 5 must be from 0 to 4"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            TRBertConfig(**TINY | wrong)


def test_batches_that_cannot_work_are_refused():
    with pytest.raises(InputError, match="empty batch"):
        VarlenBatch.from_sequences([])
    with pytest.raises(InputError, match="sequence 1 of the batch has no tokens"):
        VarlenBatch.from_sequences([[5], []])
    with pytest.raises(InputError, match="empty batch"):
        CLASSIFIER(torch.zeros(0, 5, dtype=torch.long))
    with pytest.raises(InputError, match=r"sequence 1 .* mask is all 0"):
        CLASSIFIER(torch.ones(2, 3, dtype=torch.long), attention_mask=torch.tensor([[1, 1, 1], [0, 0, 0]]))
    with pytest.raises(InputError, match="33 tokens is longer than the model's 32 positions"):
        varlen(CLASSIFIER, [torch.full((33,), 7)])
    with pytest.raises(InputError, match="33 tokens"):
        CLASSIFIER.bert(torch.full((2, 33), 7))
    with pytest.raises(InputError, match="shape"):
        CLASSIFIER(torch.full((2, 3), 7), attention_mask=torch.ones(2, 4))


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("task", ["classification", "question answering"])
def test_every_parameter_gets_a_gradient(task, checkpointing):
    model = tiny_classifier() if task == "classification" else question_answerer()
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    sequences = [torch.randint(5, TINY["vocab_size"], (n,)) for n in (9, 30, 1)]
    if task == "classification":
        output = varlen(model, sequences, labels=torch.tensor([0, 2, 1]), output_selections=True)
    else:
        # One answer lies in each sequence's last token, which a selector may have skipped.
        last = torch.tensor([8, 29, 0])
        output = varlen(model, sequences, start_positions=last, end_positions=last, output_selections=True)
    (output.loss + sum(selection.logits.mean() for selection in output.selections)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if name.endswith("key.bias"):
            continue  # adding one vector to all keys of a sequence changes no attention: its gradient is zero
        assert parameter.grad.abs().sum() > 0, name


def test_attention_dropout_is_on_in_training_only():
    model = tiny_classifier(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0, classifier_dropout=0.0)
    sequences = [torch.randint(5, TINY["vocab_size"], (20,))]

    def differs():
        first, second = (varlen(model, sequences, reduce=False).logits for _ in range(2))
        return not torch.equal(first, second)

    assert not differs()
    model.train()
    assert differs()


def test_the_loss_is_the_same_padded_and_varlen():
    ids, mask = padded_ids([9, 4, 20])
    sequences = [ids[i, :n] for i, n in enumerate([9, 4, 20])]
    labels = torch.tensor([0, 2, 1])
    torch.testing.assert_close(
        CLASSIFIER(ids, attention_mask=mask, labels=labels).loss, varlen(CLASSIFIER, sequences, labels=labels).loss
    )
    model, starts, ends = question_answerer(), torch.tensor([3, 0, 19]), torch.tensor([8, 3, 19])
    answers = {"start_positions": starts, "end_positions": ends}
    torch.testing.assert_close(
        model(ids, attention_mask=mask, **answers).loss, varlen(model, sequences, **answers).loss
    )


# --- transformers' conventions -------------------------------------------------------------------------------------


def test_auto_classes_and_saving(tmp_path):
    CLASSIFIER.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), TRBertConfig)
    assert isinstance(AutoModel.from_pretrained(tmp_path), TRBertModel)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ids, mask = padded_ids([9, 4, 20])
    torch.testing.assert_close(again(ids, attention_mask=mask).logits, CLASSIFIER(ids, attention_mask=mask).logits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_default_reduction_layers_are_the_papers():
    assert TRBertConfig().reduction_layers == [1, 6]
    assert TRBertConfig(num_hidden_layers=6).reduction_layers == [1, 3]


def test_selectors_stay_in_fp32(tmp_path):
    CLASSIFIER.save_pretrained(tmp_path)
    model = TRBertForSequenceClassification.from_pretrained(tmp_path, dtype=torch.bfloat16).eval()
    assert model.bert.encoder.selectors[0].linear_1.weight.dtype == torch.float32
    assert model.classifier.weight.dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = varlen(model, [torch.arange(5, 20)], output_selections=True)
    assert all(selection.logits.dtype == torch.float32 for selection in output.selections)


# --- CUDA without a GPU --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_cuda_path_has_the_right_shapes_and_dtypes(dtype):
    """Fake CUDA tensors through the whole model and the varlen kernel's registered shapes; no value ever exists.

    Without reduction: the one place where the model looks at values is the new lengths after one.
    """
    model = TRBertForSequenceClassification(TRBertConfig(**TINY, reduction_layers=[])).eval().to(dtype)
    fuse_for_inference(model, packed=False)
    with FakeTensorMode() as mode, torch.no_grad():
        # A CPU build of torch cannot put parameters on CUDA, not even fake ones, but can compute on fake tensors there.
        state = {
            name: FakeTensor(mode, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"), torch.device("cuda"))
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        }
        inputs = {
            "position_ids": torch.arange(12, device="cuda") % 6,
            "token_type_ids": torch.zeros(12, dtype=torch.int64, device="cuda"),
            "cu_seqlens": torch.zeros(3, dtype=torch.int32, device="cuda"),
            "max_seqlen": 6,
        }
        output = torch.func.functional_call(model, state, torch.full((12,), 7, device="cuda"), inputs)
    assert output.logits.shape == (2, 2)
    assert output.logits.dtype == dtype
    assert output.logits.device.type == "cuda"


def test_half_precision_on_cuda_takes_the_varlen_kernel(monkeypatch):
    calls = []

    def kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **kwargs):
        calls.append((query.shape, cu_seq_q.dtype, max_q, kwargs))
        return torch.empty_like(query)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    with FakeTensorMode(), torch.no_grad():
        qkv = [torch.empty(1, 4, 10, 8, dtype=torch.bfloat16, device="cuda") for _ in range(3)]
        cu_seqlens = torch.zeros(3, dtype=torch.int32, device="cuda")
        output, _ = varlen_attention(None, *qkv, None, cu_seqlens=cu_seqlens, max_seqlen=6, scaling=0.5)
    assert output.shape == (1, 10, 4, 8)
    # num_splits=1 is what makes the kernel's result independent of the batch.
    assert calls == [((10, 4, 8), torch.int32, 6, {"scale": 0.5, "window_size": (-1, -1), "num_splits": 1})]
