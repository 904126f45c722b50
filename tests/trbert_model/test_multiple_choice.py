"""The RACE head: equality with what the original computed (tests/reference_outputs/README.md), groups, conversion."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMultipleChoice, BertConfig, BertForMultipleChoice

from trbert_model import InputError, VarlenBatch, convert_checkpoint
from trbert_model.reduction.group import GroupPolicy
from trbert_model.reduction.state import Candidates
from trbert_model.tasks.multiple_choice.head import TRBertForMultipleChoice
from trbert_model.varlen import first_tokens, positions_in

REFERENCE = Path(__file__).parent.parent / "reference_outputs/bert6-multiple-choice"


def groups():
    tensors = load_file(REFERENCE / "expected.safetensors")
    count = len({name.split(".")[0] for name in tensors})
    return [{k.split(".", 1)[1]: v for k, v in tensors.items() if k.split(".")[0] == str(i)} for i in range(count)]


def model():
    return convert_checkpoint(REFERENCE, task="multiple-choice")


def assert_same(logits, kept_tokens, expected):
    torch.testing.assert_close(logits, expected["logits"], atol=1e-4, rtol=0)
    assert [int(kept.max()) for kept in kept_tokens] == expected["kept"].tolist()


def test_each_group_alone_equals_the_original():
    choosing, found = model(), groups()
    assert len(found) == 21
    for group in found:
        with torch.inference_mode():
            output = choosing(
                group["input_ids"][None],
                group["attention_mask"][None],
                group["token_type_ids"][None],
                shared_tokens=group["shared_tokens"],
            )
        assert_same(output.logits[0], output.kept_tokens, group)


def test_all_groups_in_one_varlen_batch_equal_the_original():
    found = groups()
    rows = [
        (ids[mask.bool()], types[mask.bool()])
        for group in found
        for ids, mask, types in zip(group["input_ids"], group["attention_mask"], group["token_type_ids"])
    ]
    batch = VarlenBatch.from_sequences([ids for ids, _ in rows], [types for _, types in rows])
    with torch.inference_mode():
        output = model()(
            batch.input_ids,
            token_type_ids=batch.token_type_ids,
            cu_seqlens=batch.cu_seqlens,
            num_choices=4,
            shared_tokens=torch.cat([group["shared_tokens"] for group in found]),
        )
    for i, group in enumerate(found):
        assert_same(output.logits[i], [kept[4 * i : 4 * i + 4] for kept in output.kept_tokens], group)


def test_a_policy_that_draws_at_random_keeps_the_same_in_all_rows_of_a_group():
    torch.manual_seed(3)
    lengths = torch.tensor([9, 7, 8, 20, 18, 25])
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    token_indices, positions = torch.arange(int(lengths.sum())), positions_in(cu_seqlens, int(lengths.sum()))
    logits, fixed = torch.randn(len(token_indices)), torch.zeros(len(token_indices), dtype=torch.bool)
    fixed[first_tokens(cu_seqlens)] = True
    policy = GroupPolicy(lambda seen: torch.rand_like(seen.logits) < 0.5, torch.tensor([6, 15]), 3)
    candidates = Candidates(0, logits[:, None], logits, fixed, token_indices, positions, cu_seqlens, None)
    rows = policy(candidates).split(lengths.tolist())
    for group, shared in ((rows[:3], 6), (rows[3:], 15)):
        assert all(torch.equal(row[:shared], group[0][:shared]) and row[shared:].all() for row in group)
        assert group[0][0]
        assert not group[0][:shared].all()


def test_a_fresh_conversion_answers_as_its_source_and_is_found_by_auto_classes(tmp_path):
    torch.manual_seed(1)
    shape = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 99}
    source = BertForMultipleChoice(BertConfig(**shape, num_hidden_layers=4)).eval()
    source.save_pretrained(tmp_path / "bert")
    converted = convert_checkpoint(tmp_path / "bert")
    assert isinstance(converted, TRBertForMultipleChoice)
    converted.save_pretrained(tmp_path / "trbert")
    ids, labels = torch.randint(1, 99, (3, 5, 20)), torch.tensor([4, 0, 2])
    for each in (converted, AutoModelForMultipleChoice.from_pretrained(tmp_path / "trbert").eval()):
        with torch.inference_mode():
            output = each(ids, shared_tokens=torch.tensor([1, 1, 1]), labels=labels)
            expected = source(ids, labels=labels)
        torch.testing.assert_close(output.logits, expected.logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(output.loss, expected.loss, atol=1e-5, rtol=0)


def test_rows_that_make_no_whole_groups_are_refused():
    batch = VarlenBatch.from_sequences([[2, 5, 6]] * 7)
    with pytest.raises(InputError, match="7 rows are not 2 groups of 4 options"):
        model()(batch.input_ids, cu_seqlens=batch.cu_seqlens, num_choices=4, shared_tokens=torch.tensor([2, 2]))
