import re

import pytest
import torch
from torch.nn import functional as F

from llmtune.data.collate import collate_packed, collate_padded
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.classification import classification_loss
from llmtune.regularizers.freelb import FreeLBLoss
from llmtune.regularizers.perturbation import blank_noise, embeddings_moved, examples_of, real_tokens
from llmtune.testing.close import assert_close
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama
from llmtune.types import LossFunction

ROWS = uneven_rows(5)
PADDED = collate_padded(ROWS)


def test_equals_algorithm_1_written_out():
    """With `inputs_embeds`, from noise 0, in float64: the mean over three places on the way."""
    model = tiny_gpt2().double()
    freelb = FreeLBLoss(epsilon=0.5, step_size=0.3, start=0.0)
    total, parts = freelb(model, PADDED)
    total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    real = PADDED["attention_mask"][..., None]
    words, losses = model.get_input_embeddings()(PADDED["input_ids"]), []
    delta = torch.zeros_like(words).detach()
    for _ in range(3):
        delta = delta.requires_grad_()
        logits = model(inputs_embeds=words + delta, attention_mask=PADDED["attention_mask"]).logits[:, :-1]
        losses.append(F.cross_entropy(logits.flatten(0, 1), PADDED["labels"][:, 1:].flatten()))
        slope = torch.autograd.grad(losses[-1], delta, retain_graph=True)[0] * real
        slope = slope / slope.flatten(1).norm(dim=1)[:, None, None]
        delta = (delta + 0.3 * slope).detach()
        delta = delta * (0.5 / delta.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None]
    torch.stack(losses).mean().backward()
    assert_close(total.detach(), torch.stack(losses).mean().detach(), rtol=1e-9)
    assert_close(parts["first"], losses[0].detach(), rtol=1e-9)
    assert losses[2] > losses[1] > losses[0]
    assert parts["highest"].item() == pytest.approx(losses[2].item())
    for name, parameter in model.named_parameters():
        assert_close(found[name], parameter.grad, rtol=1e-7)
    assert isinstance(freelb, LossFunction)
    assert freelb.count_targets(PADDED) == causal_lm_loss.count_targets(PADDED)


class SumOfSquares:
    """A loss that does not know padding: its slope there is not 0."""

    def __init__(self):
        self.seen = []

    def __call__(self, model, batch):
        self.seen.append(model.get_input_embeddings()(batch["input_ids"]))
        return self.seen[-1].square().sum()

    def count_targets(self, batch):
        return 1


def test_no_noise_comes_onto_padding_whatever_the_loss_looks_at():
    model, loss = tiny_llama(), SumOfSquares()
    words = model.get_input_embeddings()(PADDED["input_ids"])
    FreeLBLoss(loss, epsilon=0.5, step_size=0.3)(model, PADDED)
    real = PADDED["attention_mask"].bool()
    assert not real.all()
    assert len(loss.seen) == 3
    for moved in loss.seen:
        assert torch.equal(moved[~real], words[~real])
        assert (moved[real] != words[real]).any(-1).all()


def test_noise_is_on_the_tokens_alone_where_one_embedding_serves_token_types_too():
    model = tiny_gpt2()
    ids = torch.tensor([[5, 7, 11, 13, 2]])
    embedding, noise = model.get_input_embeddings(), torch.randn(1, 5, 26)
    plain = embedding(ids)
    with embeddings_moved(model, noise):
        assert torch.equal(embedding(ids), plain + noise)
        assert torch.equal(embedding(ids), plain)  # GPT-2 looks up token types after the tokens


def test_the_first_noise_has_the_papers_size():
    """Uniform in +- epsilon / sqrt(entries of the example), 0 on padding, also for documents of a packed row."""
    freelb = FreeLBLoss(epsilon=0.6, step_size=0.1)
    rows = [{"input_ids": [5] * n, "labels": [5] * n} for n in (3, 97)]
    for batch in (collate_padded(rows), collate_packed(rows)):
        real = real_tokens(batch)
        noise = freelb._first(blank_noise(tiny_llama(), real), real, examples_of(batch, real))
        assert not noise[~real].any()
        for example, n in zip((noise[0, :3], noise[-1, -97:]), (3, 97), strict=True):
            bound = 0.6 / (n * 28) ** 0.5
            assert 0.9 * bound < example.abs().max() <= bound
            assert example.norm().item() == pytest.approx(0.6 / 3**0.5, rel=0.15)


def gradient_of(loss, model, batches):
    counts = [loss.count_targets(batch) for batch in batches]
    model.zero_grad()
    for batch, count in zip(batches, counts, strict=True):
        (loss(model, batch)[0] * count / sum(counts)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_rows_in_any_split_padded_or_packed_give_one_gradient():
    freelb, model = FreeLBLoss(epsilon=0.5, step_size=0.3, start=0.0), tiny_gpt2().double()
    whole = gradient_of(freelb, model, [PADDED])
    for batches in ([collate_padded([row]) for row in ROWS], [collate_packed(ROWS)]):
        assert_close(gradient_of(freelb, model, batches), whole, rtol=1e-8)


def test_dropout_is_the_same_at_every_place_and_another_in_the_next_batch():
    model = tiny_gpt2(dropout=0.3).train()
    for start in (0.0, 1.0):
        freelb = FreeLBLoss(epsilon=1e-4, step_size=1e-5, start=start)
        first, again = (freelb(model, PADDED)[1] for _ in range(2))
        assert abs(first["highest"] - first["first"]) < 1e-3
        assert abs(first["first"] - again["first"]) > 1e-3


def test_any_loss_and_its_parts_and_evaluation():
    class Own:
        def __call__(self, model, batch):
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            return logits.square().mean(), {"own": 3.0}

        def count_targets(self, batch):
            return len(batch["labels"])

    model, own = tiny_bert(labels=3), FreeLBLoss(Own(), epsilon=0.5, step_size=0.3)
    batch = collate_padded([{**row, "labels": 1} for row in ROWS])
    total, parts = own(model, batch)
    assert parts["own"] == 3.0
    assert total > parts["first"]
    freelb = FreeLBLoss(classification_loss, epsilon=0.5, step_size=0.3)
    with torch.no_grad():
        assert freelb(model, batch).item() == classification_loss(model, batch).item()


def test_under_checkpointing_and_autocast():
    freelb, model = FreeLBLoss(epsilon=0.5, step_size=0.3, start=0.0), tiny_llama().train()
    whole = gradient_of(freelb, model, [PADDED])
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_close(gradient_of(freelb, model, [PADDED]), whole, rtol=1e-5)
    model.gradient_checkpointing_disable()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = freelb(model, PADDED)
    total.backward()
    assert total.dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"epsilon": 0.0}, ValueError, "epsilon must be a finite number larger than 0; got 0.0"),
        ({"step_size": -1.0}, ValueError, "step_size must be a finite number larger than 0; got -1.0"),
        ({"steps": 1}, ValueError, "steps must be a whole number, 2 or more, or no place is adversarial; got 1"),
        ({"steps": 2.5}, ValueError, "steps must be a whole number, 2 or more, or no place is adversarial; got 2.5"),
        ({"start": 1.5}, ValueError, "start must be between 0 and 1, a share of epsilon; got 1.5"),
        ({"loss": F.cross_entropy}, TypeError, "the loss needs a count_targets(batch) method"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        FreeLBLoss(**{"epsilon": 0.5, "step_size": 0.1, **options})


def test_a_compiled_model_is_refused():
    compiled = torch.compile(tiny_llama(), backend="eager")
    with pytest.raises(ValueError, match="train the model uncompiled"):
        FreeLBLoss(epsilon=0.5, step_size=0.1)(compiled, PADDED)
