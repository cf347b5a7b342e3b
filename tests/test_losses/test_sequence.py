from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmtune.adapters.attach import attach
from llmtune.adapters.config import LoRA
from llmtune.data.collate import collate_packed, collate_padded
from llmtune.losses.head import hidden_before_head
from llmtune.losses.sequence import sequence_log_probabilities
from llmtune.losses.token_loss import head_cross_entropy
from llmtune.testing.close import assert_close
from llmtune.testing.models import VOCABULARY, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.testing.small import moved


def rows(lengths: tuple[int, ...] = (5, 11, 3)) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for n in lengths:
        ids = torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]], "position_ids": list(range(n))})
    return made


def plain(model: nn.Module, one: dict[str, Any]) -> Tensor:
    """The sum over a row's labels by itself, from its full logits in float64."""
    ids = torch.tensor([one["input_ids"]])
    log_p = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(log_p[t - 1, label] for t, label in enumerate(one["labels"]) if label != -100)


def adapted(make: Any, *targets: str) -> nn.Module:
    model = make()
    attach(model, LoRA(rank=3, alpha=6, targets=list(targets)))
    return moved(model)


MODELS = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "llama, adapted": lambda: adapted(tiny_llama, "q_proj", "down_proj"),
    "llama, adapted head": lambda: adapted(tiny_llama, "q_proj", "lm_head"),
    "gpt2, adapted": lambda: adapted(tiny_gpt2, "c_attn"),
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_plain_sum_of_each_row_by_itself(name: str, side: Any) -> None:
    model = MODELS[name]().double()
    given = rows()
    found = sequence_log_probabilities(model, collate_padded(given, side=side))
    expected = torch.stack([plain(model, row) for row in given])
    assert_close(found, expected, rtol=1e-10)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for one, other in zip(
        torch.autograd.grad(found @ weights, trained), torch.autograd.grad(expected @ weights, trained), strict=True
    ):
        assert_close(one, other, rtol=1e-9)
    per_token = sequence_log_probabilities(model, collate_padded(given, side=side), per_token=True)
    assert_close(per_token, expected / torch.tensor([3, 9, 1]), rtol=1e-10)


def test_the_head_makes_no_logits_of_the_whole_batch() -> None:
    model, shapes = tiny_llama(), []
    model.lm_head.register_forward_hook(lambda _, args, output: shapes.append(tuple(output.shape)))
    sequence_log_probabilities(model, collate_padded(rows()))
    assert shapes == [(1, 1, VOCABULARY)]


def test_an_encoder_decoder_predicts_every_label() -> None:
    model = tiny_t5().double()
    batch = {
        "input_ids": torch.tensor([[5, 7, 11], [3, 2, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "labels": torch.tensor([[13, 17, 1], [19, 1, -100]]),
    }
    log_p = model(**batch).logits.log_softmax(-1)
    found = sequence_log_probabilities(model, batch)
    first = log_p[0, 0, 13] + log_p[0, 1, 17] + log_p[0, 2, 1]
    assert_close(found, torch.stack([first, log_p[1, 0, 19] + log_p[1, 1, 1]]), rtol=1e-10)


def test_under_bfloat16_the_sums_are_float32() -> None:
    model, batch = tiny_llama(), collate_padded(rows())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = sequence_log_probabilities(model, batch)
    assert found.dtype == torch.float32
    assert_close(found, sequence_log_probabilities(model, batch), rtol=0.05)


def test_a_virtual_prompt_moves_nothing() -> None:
    from llmtune.adapters.prompt import PromptTuning

    model, batch = tiny_gpt2(), collate_padded(rows())
    attach(model, PromptTuning(tokens=3))
    log_p = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, -11:].log_softmax(-1)
    label, here = batch["labels"][:, 1:], batch["labels"][:, 1:] != -100
    expected = (log_p[:, :-1].gather(2, label.clamp(min=0)[..., None])[..., 0] * here).sum(1)
    inputs = {name: value for name, value in batch.items() if name != "position_ids"}
    assert_close(sequence_log_probabilities(model, inputs), expected)


def test_what_has_no_probability_is_an_error() -> None:
    batch = collate_padded(rows())
    one = copy.deepcopy(batch)
    one["labels"][1] = -100
    one["labels"][1, 0] = 5
    with pytest.raises(ValueError, match=r"row 1 has no label that is predicted"):
        sequence_log_probabilities(tiny_llama(), one)
    with pytest.raises(ValueError, match=r"the batch is packed .* pad one sequence a row"):
        sequence_log_probabilities(tiny_llama(), collate_packed(rows()))
    with pytest.raises(ValueError, match='the loss needs integer "labels"'):
        sequence_log_probabilities(tiny_llama(), {"input_ids": batch["input_ids"]})
    with pytest.raises(ValueError, match="sees the tokens after a place as well"):
        sequence_log_probabilities(tiny_bert(), batch)


@pytest.mark.parametrize("targets", [("q_proj",), ("lm_head",)])
def test_cross_entropy_of_a_head_by_row_sum_and_mean(targets: tuple[str, ...]) -> None:
    model, batch = adapted(tiny_llama, *targets).double(), collate_padded(rows())
    hidden, head = hidden_before_head(model, batch)
    hidden, wanted = hidden[:, :-1], batch["labels"][:, 1:]
    each = head_cross_entropy(hidden, head, wanted, reduction="none")
    assert each.shape == wanted.shape
    assert bool((each[wanted == -100] == 0).all())
    total = head_cross_entropy(hidden, head, wanted, reduction="sum")
    assert_close(total, each.sum(), rtol=1e-12)
    assert_close(head_cross_entropy(hidden, head, wanted), each.sum() / 13, rtol=1e-12)
    nothing = head_cross_entropy(hidden, head, torch.full_like(wanted, -100), reduction="sum")
    assert nothing.item() == 0.0
    with pytest.raises(ValueError, match=r'reduction must be "mean", "sum" or "none"; got .average'):
        head_cross_entropy(hidden, head, wanted, reduction="average")
