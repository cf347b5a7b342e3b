from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from llmtune.data.collate import collate_packed, collate_padded
from llmtune.losses.causal_lm import CausalLMLoss, causal_lm_loss
from llmtune.losses.classification import ClassificationLoss, classification_loss
from llmtune.losses.masked_lm import masked_lm_loss
from llmtune.losses.sequence_to_sequence import SequenceToSequenceLoss, sequence_to_sequence_loss
from llmtune.testing.close import assert_close
from llmtune.testing.models import VOCABULARY, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.types import LossFunction


def token_rows(lengths: tuple[int, ...] = (5, 11, 3), *, seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for n in lengths:
        ids = torch.randint(3, VOCABULARY, (n,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return rows


LOSSES = [causal_lm_loss, classification_loss, masked_lm_loss, sequence_to_sequence_loss]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_keeps_the_protocol_and_needs_labels(loss: Any) -> None:
    assert isinstance(loss, LossFunction)
    with pytest.raises(ValueError, match='"labels"'):
        loss(tiny_llama(), {"input_ids": torch.ones(1, 3, dtype=torch.long)})
    with pytest.raises(ValueError, match='"labels"'):
        loss.count_targets({"input_ids": torch.ones(1, 3, dtype=torch.long)})
    with pytest.raises(AttributeError):
        loss.label_smoothing = 0.1


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_packed_padded_and_single_rows_agree(make: Any) -> None:
    model, rows = make(), token_rows()
    packed, right, left = (
        collate(rows) for collate in (collate_packed, collate_padded, lambda r: collate_padded(r, side="left"))
    )
    counts = [causal_lm_loss.count_targets(batch) for batch in (packed, right, left)]
    assert counts == [4 + 10 + 2] * 3
    singles = [(causal_lm_loss(model, b), causal_lm_loss.count_targets(b)) for b in (collate_padded([r]) for r in rows)]
    expected = sum(loss * count for loss, count in singles) / counts[0]
    assert_close(causal_lm_loss(model, packed), expected)
    assert_close(causal_lm_loss(model, right), expected)
    if make is tiny_llama:  # GPT-2's learned positions need position_ids under left padding
        assert_close(causal_lm_loss(model, left), expected)


def test_the_causal_loss_shifts_and_counts_after_the_shift() -> None:
    model = tiny_llama()
    ids = torch.tensor([[5, 7, 11], [13, 17, 19]])
    labels = torch.tensor([[5, -100, 11], [13, -100, -100]])
    assert causal_lm_loss.count_targets({"labels": labels}) == 1
    logits = model(input_ids=ids).logits
    assert_close(
        causal_lm_loss(model, {"input_ids": ids, "labels": labels}), F.cross_entropy(logits[0, 1:2], labels[0, 2:])
    )


def test_label_smoothing_and_z_loss_act_on_shifted_labels_alone() -> None:
    model, batch = tiny_llama(), collate_padded(token_rows())
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].double()
    targets = batch["labels"][:, 1:]
    z, t = logits[targets != -100], targets[targets != -100]
    expected = F.cross_entropy(z, t, label_smoothing=0.1) + 0.01 * z.logsumexp(-1).square().mean()
    assert_close(CausalLMLoss(label_smoothing=0.1, z_loss=0.01)(model, batch), expected, rtol=1e-6)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_label_smoothing_is_torchs_after_the_shift(make: Any, smoothing: float) -> None:
    """Smoothing before the shift, as transformers once did, teaches each token to repeat itself."""
    model, batch = make(), collate_padded(token_rows())
    loss = CausalLMLoss(label_smoothing=smoothing)(model, batch)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"]
    shifted = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=smoothing)
    assert_close(loss, shifted)
    unshifted = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), label_smoothing=smoothing)
    assert abs(loss - unshifted) > 1e-4 * abs(loss)
    parameters = list(model.parameters())
    found, expected = (
        torch.cat([grad.flatten() for grad in torch.autograd.grad(value, parameters)]) for value in (loss, shifted)
    )
    assert_close(found, expected)


def test_all_labels_ignored_is_an_error() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    batch = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    for loss, model in ((causal_lm_loss, tiny_llama()), (masked_lm_loss, tiny_bert())):
        assert loss.count_targets(batch) == 0
        with pytest.raises(ValueError, match="labels all -100"):
            loss(model, batch)
    with pytest.raises(ValueError, match="labels all -100"):
        classification_loss(tiny_bert(labels=3), {"input_ids": ids, "labels": torch.tensor([-100, -100])})


def test_labels_beyond_the_vocabulary_are_an_error() -> None:
    batch = collate_padded(token_rows())
    batch["labels"][1, 4] = VOCABULARY
    with pytest.raises(ValueError, match=r"targets must be in 0 \.\.\. 96 .* is 97"):
        causal_lm_loss(tiny_llama(), batch)


def test_masked_lm_counts_without_a_shift() -> None:
    labels = torch.tensor([[5, -100, 11], [-100, -100, 13]])
    assert masked_lm_loss.count_targets({"labels": labels}) == 3


def test_sequence_to_sequence_takes_decoder_inputs_as_they_come() -> None:
    model = tiny_t5()
    batch = {"input_ids": torch.tensor([[5, 7, 11]]), "labels": torch.tensor([[13, -100, 17, 1]])}
    assert sequence_to_sequence_loss.count_targets(batch) == 3
    own = torch.tensor([[3, 4, 5, 6]])
    logits = model(input_ids=batch["input_ids"], decoder_input_ids=own).logits
    assert_close(
        sequence_to_sequence_loss(model, {**batch, "decoder_input_ids": own}),
        F.cross_entropy(logits[0], batch["labels"][0]),
    )
    smooth = SequenceToSequenceLoss(label_smoothing=0.2)(model, batch)
    logits = model(**batch).logits[0]
    assert_close(smooth, F.cross_entropy(logits, batch["labels"][0], label_smoothing=0.2))
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot make the decoder's inputs from the labels"):
        sequence_to_sequence_loss(tiny_llama(), batch)


def classifier_batch(labels: Tensor) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([[5, 7, 11], [3, 2, 1], [9, 9, 8]]), "labels": labels}


CASES = {
    "one class a row": (tiny_bert(labels=5), torch.tensor([2, 0, 4]), 3),
    "one ignored": (tiny_bert(labels=5), torch.tensor([2, -100, 4]), 2),
    "regression": (tiny_bert(labels=1), torch.tensor([0.3, -1.0, 2.0]), 3),
    "regression, a column": (tiny_bert(labels=1), torch.tensor([[0.3], [-1.0], [2.0]]), 3),
    "several classes at once": (tiny_bert(labels=2), torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]), 3),
}


@pytest.mark.parametrize("name", CASES)
def test_classification_equals_the_models_own_choice(name: str) -> None:
    model, labels, count = CASES[name]
    model.config.problem_type = None
    batch = classifier_batch(labels)
    assert classification_loss.count_targets(batch) == count
    ours = classification_loss(model, batch)
    assert_close(ours, model(**batch).loss, rtol=1e-6)
    model.config.problem_type = None


def test_regression_on_several_numbers_goes_by_the_configuration() -> None:
    model, labels = tiny_bert(labels=2), torch.tensor([[0.5, 3.0], [1.0, -1.0], [0.0, 0.0]])
    model.config.problem_type = "regression"
    assert_close(
        classification_loss(model, classifier_batch(labels)), model(**classifier_batch(labels)).loss, rtol=1e-6
    )


def test_token_classification() -> None:
    from transformers import BertConfig, BertForTokenClassification

    config = BertConfig(
        vocab_size=97, hidden_size=22, num_hidden_layers=1, num_attention_heads=2, intermediate_size=29, num_labels=5
    )
    model = BertForTokenClassification(config).eval()
    batch = classifier_batch(torch.tensor([[1, -100, 4], [0, 0, -100], [-100, -100, -100]]))
    assert classification_loss.count_targets(batch) == 4
    assert_close(classification_loss(model, batch), model(**batch).loss, rtol=1e-6)


def test_classification_smooths_classes() -> None:
    model, batch = tiny_bert(labels=5), classifier_batch(torch.tensor([2, 0, 4]))
    logits = model(input_ids=batch["input_ids"]).logits
    expected = F.cross_entropy(logits, batch["labels"], label_smoothing=0.2)
    assert_close(ClassificationLoss(label_smoothing=0.2)(model, batch), expected)


@pytest.mark.parametrize(
    ("classes", "labels", "message"),
    [
        (5, torch.tensor([2, 5, 0]), r"targets must be in 0 \.\.\. 4 .* target 1 is 5"),
        (1, torch.tensor([1, 0, 1]), "the model has one logit, so there is nothing to choose from"),
        (2, torch.tensor([[0, 1], [1, 1], [0, 0]]), r"integer labels \[3, 2\] do not fit logits \[3, 2\]"),
        (5, torch.tensor([0.5, 1.0, 2.0]), r"float labels \[3\] do not fit logits \[3, 5\]"),
    ],
)
def test_labels_that_do_not_fit_the_logits(classes: int, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classification_loss(tiny_bert(labels=classes), classifier_batch(labels))


def test_a_configuration_that_contradicts_the_labels() -> None:
    model = tiny_bert(labels=2)
    model.config.problem_type = "regression"
    with pytest.raises(ValueError, match=r'problem_type="regression" needs float labels; got torch\.int64'):
        classification_loss(model, classifier_batch(torch.tensor([0, 1, 0])))
    model.config.problem_type = "single_label_classification"
    with pytest.raises(ValueError, match='problem_type="single_label_classification" needs integer labels'):
        classification_loss(model, classifier_batch(torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])))
    with pytest.raises(ValueError, match="label_smoothing is for integer labels"):
        ClassificationLoss(label_smoothing=0.1)(
            tiny_bert(labels=2), classifier_batch(torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]))
        )


@pytest.mark.parametrize("loss", [CausalLMLoss, ClassificationLoss, SequenceToSequenceLoss])
def test_options_are_checked_at_once(loss: Any) -> None:
    with pytest.raises(ValueError, match="label_smoothing must be between 0 and 1; got 2"):
        loss(label_smoothing=2.0)


@pytest.mark.parametrize("loss", [causal_lm_loss, masked_lm_loss, sequence_to_sequence_loss, classification_loss])
def test_a_byte_that_looks_like_the_ignored_label_counts(loss: Any) -> None:
    """In uint8, 156 and -100 are the same."""
    labels = torch.full((2, 3), 156, dtype=torch.uint8)
    assert loss.count_targets({"labels": labels}) == loss.count_targets({"labels": labels.long()})
