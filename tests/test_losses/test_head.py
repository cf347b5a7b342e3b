from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmtune.losses.causal_lm import CausalLMLoss, causal_lm_loss
from llmtune.losses.head import hidden_before_head, model_inputs
from llmtune.losses.masked_lm import masked_lm_loss
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.testing.close import assert_close
from llmtune.testing.models import VOCABULARY, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

SMALL = {
    "vocab_size": 97, "hidden_size": 28, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def seeded(make: Any, config: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make(config)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.ndim >= 2 or "final_logits_bias" in name:
                nn.init.normal_(tensor, std=0.3)
    return model.eval()


def gemma2() -> nn.Module:
    from transformers import Gemma2Config, Gemma2ForCausalLM

    return seeded(Gemma2ForCausalLM, Gemma2Config(**SMALL, final_logit_softcapping=2.0, query_pre_attn_scalar=8))


def cohere() -> nn.Module:
    from transformers import CohereConfig, CohereForCausalLM

    return seeded(CohereForCausalLM, CohereConfig(**SMALL, logit_scale=0.3))


def granite() -> nn.Module:
    from transformers import GraniteConfig, GraniteForCausalLM

    return seeded(GraniteForCausalLM, GraniteConfig(**SMALL, logits_scaling=1.7))


def phi_with_a_head_bias() -> nn.Module:
    from transformers import PhiConfig, PhiForCausalLM

    model = seeded(PhiForCausalLM, PhiConfig(**{**SMALL, "num_key_value_heads": 4}))
    nn.init.normal_(model.lm_head.bias)
    return model


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=97, d_model=28, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=31, decoder_ffn_dim=31, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return seeded(BartForConditionalGeneration, config)


def m2m() -> nn.Module:
    from transformers import M2M100Config, M2M100ForConditionalGeneration

    config = M2M100Config(
        vocab_size=97, d_model=28, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=31, decoder_ffn_dim=31, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2,
    )  # fmt: skip
    return seeded(M2M100ForConditionalGeneration, config)


def causal_batch(*, masked: bool = True) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    if masked:
        labels[:, :4] = -100
        labels[1] = -100
    return {"input_ids": ids, "labels": labels}


def two_sequences() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(3, VOCABULARY, (3, 7), generator=generator)
    labels[0, 5:] = -100
    return {"input_ids": torch.randint(3, VOCABULARY, (3, 11), generator=generator), "labels": labels}


MODELS = {
    "llama": (tiny_llama, causal_lm_loss, causal_batch),
    "gpt2": (tiny_gpt2, causal_lm_loss, causal_batch),
    "gemma2, soft cap": (gemma2, causal_lm_loss, causal_batch),
    "cohere, multiplies": (cohere, causal_lm_loss, causal_batch),
    "granite, divides": (granite, causal_lm_loss, causal_batch),
    "phi, bias": (phi_with_a_head_bias, causal_lm_loss, causal_batch),
    "bert": (tiny_bert, masked_lm_loss, causal_batch),
    "t5": (tiny_t5, sequence_to_sequence_loss, two_sequences),
    "bart, final_logits_bias": (bart, sequence_to_sequence_loss, two_sequences),
    "m2m100, shifts by a function": (m2m, sequence_to_sequence_loss, two_sequences),
}


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_the_models_own(name: str) -> None:
    make, loss, make_batch = MODELS[name]
    model, batch = make(), make_batch()
    ours, own = loss(model, batch), model(**batch).loss
    assert_close(ours, own, rtol=1e-6)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = torch.autograd.grad(ours, parameters, allow_unused=True)
    wanted = torch.autograd.grad(own, parameters, allow_unused=True)
    for grad, want in zip(grads, wanted, strict=True):
        if want is None:
            assert grad is None
        elif want.abs().max() > 1e-6:
            assert_close(grad, want, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_the_head_gives_the_models_own_logits_and_its_settings_matter(name: str) -> None:
    make, _, make_batch = MODELS[name]
    model, batch = make(), make_batch()
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = batch["labels"].clamp(min=0)
    hidden, head = hidden_before_head(model, batch)
    own = model(**model_inputs(model, batch)).logits
    assert_close(head.logits(hidden), own, rtol=1e-6)
    assert head.classes == own.shape[-1]
    weight, bias = head.linear()
    raw = nn.functional.linear(hidden, weight, bias)
    assert_close(head.finish(raw) if head.extra_bias is None else raw, own, rtol=1e-6)
    after = any(word in name for word in ("cap", "multiplies", "divides", "final_logits_bias"))
    assert after == (not torch.allclose(model.get_output_embeddings()(hidden), own, rtol=1e-3))


def test_the_head_sees_one_position_and_keeps_no_hook() -> None:
    model, batch = tiny_llama(), causal_batch()
    seen: list[tuple[int, ...]] = []
    handle = model.lm_head.register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    causal_lm_loss(model, batch)
    handle.remove()
    assert seen == [(1, 1, VOCABULARY)]
    assert not model.lm_head._forward_pre_hooks
    assert not model.lm_head._forward_hooks
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        causal_lm_loss(model, {**batch, "input_ids": None})
    assert not model.lm_head._forward_pre_hooks


def test_a_tied_head_gets_both_gradients() -> None:
    model, batch = tiny_llama(tied=True), causal_batch()
    (ours,) = torch.autograd.grad(causal_lm_loss(model, batch), model.lm_head.weight)
    (own,) = torch.autograd.grad(model(**batch).loss, model.lm_head.weight)
    assert_close(ours, own)


@pytest.mark.parametrize("plain_first", [True, False])
def test_inside_torch_compile(plain_first: bool) -> None:
    torch._dynamo.reset()
    model = tiny_llama()
    compiled = torch.compile(model, backend="eager")
    for seed in range(3):  # the hooks of one call must not be those of the next, nor of a call without any
        ids = torch.randint(3, VOCABULARY, (2, 11), generator=torch.Generator().manual_seed(seed))
        batch = {"input_ids": ids, "labels": ids}
        own = model(**batch)
        if plain_first:
            assert_close(compiled(input_ids=ids, use_cache=False).logits, own.logits)
        ours = causal_lm_loss(compiled, batch)
        assert_close(ours, own.loss, rtol=1e-6)
        for grad, want in zip(
            torch.autograd.grad(ours, list(model.parameters())),
            torch.autograd.grad(own.loss, list(model.parameters())),
            strict=True,
        ):
            assert_close(grad, want)
        assert_close(compiled(input_ids=ids, use_cache=False).logits, own.logits)
    assert type(model.lm_head) is nn.Linear


@pytest.mark.parametrize("find_unused_parameters", [False, True])
def test_inside_data_parallel(tmp_path: Any, find_unused_parameters: bool) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model, batch = tiny_llama(), causal_batch()
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused_parameters)
        causal_lm_loss(wrapped, batch).backward()
        grads = [p.grad.clone() for p in model.parameters()]
        own = torch.autograd.grad(model(**batch).loss, list(model.parameters()))
        for grad, want in zip(grads, own, strict=True):
            assert_close(grad, want)
    finally:
        torch.distributed.destroy_process_group()


def test_inside_pefts_wrapper_with_an_adapter_on_the_head() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_llama(), LoraConfig(r=3, target_modules=["q_proj", "lm_head"], init_lora_weights=False))
    batch = causal_batch()
    assert model_inputs(model, batch)["use_cache"] is False
    ours, own = causal_lm_loss(model, batch), model(**batch).loss
    assert_close(ours, own, rtol=1e-6)
    trained = [p for p in model.parameters() if p.requires_grad]
    for grad, want in zip(torch.autograd.grad(ours, trained), torch.autograd.grad(own, trained), strict=True):
        assert_close(grad, want)


class HeadAdapter(nn.Module):
    """What any adapter layer on a head looks like: `base` and `takes_part`."""

    def __init__(self, base: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.base, self.takes_part, self.dropout = base, True, nn.Dropout(dropout)
        self.a = nn.Parameter(0.3 * torch.randn(3, base.in_features, generator=torch.Generator().manual_seed(0)))
        self.b = nn.Parameter(0.3 * torch.randn(base.out_features, 3, generator=torch.Generator().manual_seed(1)))

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        out = self.base(x)
        return out + self.dropout(x) @ self.a.T @ self.b.T if self.takes_part else out


@pytest.mark.parametrize("make", [tiny_llama, gemma2])
def test_an_adapter_on_the_head_is_used_and_trained(make: Any) -> None:
    model, batch = make(), causal_batch()
    without = causal_lm_loss(model, batch)
    model.lm_head = HeadAdapter(model.lm_head)
    options = {"label_smoothing": 0.1, "z_loss": 0.01}
    ours, own = causal_lm_loss(model, batch), model(**batch).loss
    assert_close(ours, own, rtol=1e-6)
    assert not torch.allclose(ours, without)
    parameters = [model.lm_head.a, model.lm_head.b, model.lm_head.weight]
    for grad, want in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(own, parameters), strict=True):
        assert_close(grad, want)
    merged = make()
    with torch.no_grad():
        merged.lm_head.weight = nn.Parameter(model.lm_head.weight + model.lm_head.b @ model.lm_head.a)
    if model.config.tie_word_embeddings:
        return  # merging would change the embedding too
    assert_close(CausalLMLoss(**options)(model, batch), CausalLMLoss(**options)(merged, batch), rtol=1e-6)


def test_a_head_adapter_switched_off_is_the_head_under_it() -> None:
    model, batch = tiny_llama(), causal_batch()
    without = causal_lm_loss(model, batch)
    model.lm_head = HeadAdapter(model.lm_head)
    model.lm_head.takes_part = False
    assert torch.equal(causal_lm_loss(model, batch), without)
    _, head = hidden_before_head(model, batch)
    assert head.linear()[0] is model.lm_head.base.weight


def test_dropout_on_the_head_is_the_same_in_the_backward_pass() -> None:
    model, batch = tiny_llama(), causal_batch()
    model.lm_head = HeadAdapter(model.lm_head, dropout=0.5).train()
    torch.manual_seed(3)
    loss = causal_lm_loss(model, batch)
    (grad,) = torch.autograd.grad(loss, model.lm_head.b)
    torch.manual_seed(3)
    model.lm_head.dropout.p = 0.5
    again = causal_lm_loss(model, batch)
    assert torch.equal(loss, again)
    assert not torch.equal(loss, causal_lm_loss(model, batch))  # another draw
    step = 1e-2 * grad / grad.norm()
    with torch.no_grad():
        model.lm_head.b -= step
        torch.manual_seed(3)
        lower = causal_lm_loss(model, batch)
    assert abs((loss - lower).item() / (1e-2 * grad.norm().item()) - 1) < 0.05


def test_with_lora_on_the_head_on_off_and_merged() -> None:
    from llmtune.adapters.attach import attach, disabled
    from llmtune.adapters.config import LoRA
    from llmtune.adapters.merge import merge

    model, batch = tiny_llama(), causal_batch()
    without = causal_lm_loss(model, batch)
    attach(model, LoRA(rank=3, alpha=6, targets=["q_proj", "lm_head"]))
    assert_close(causal_lm_loss(model, batch), without.detach(), rtol=1e-6)  # B is 0
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    ours, own = causal_lm_loss(model, batch), model(**batch).loss
    assert not torch.allclose(ours, without)
    assert_close(ours, own, rtol=1e-6)
    trained = [p for p in model.parameters() if p.requires_grad]
    for grad, want in zip(torch.autograd.grad(ours, trained), torch.autograd.grad(own, trained), strict=True):
        assert_close(grad, want)
    with disabled(model):
        assert torch.equal(causal_lm_loss(model, batch), without)
        assert hidden_before_head(model, batch)[1].linear() is not None
    merge(model)
    assert_close(causal_lm_loss(model, batch), ours.detach())
    assert hidden_before_head(model, batch)[1].linear() is not None


def test_no_head_is_a_clear_error() -> None:
    model = tiny_llama().model
    with pytest.raises(ValueError, match="LlamaModel has no language-modelling head"):
        causal_lm_loss(model, causal_batch())
    with pytest.raises(
        ValueError, match=r"Linear has no language-modelling head: get_output_embeddings\(\) is missing"
    ):
        causal_lm_loss(nn.Linear(2, 3), causal_batch())


class OddModel(nn.Module):
    """A language model whose forward does with its head's logits what `after` says."""

    def __init__(self, after: Any, **config: float) -> None:
        super().__init__()
        self.embed, self.head, self.after = nn.Embedding(97, 5), nn.Linear(5, 97), after
        self.config = SimpleNamespace(**config)
        nn.init.normal_(self.embed.weight, generator=torch.Generator().manual_seed(0))
        nn.init.normal_(self.head.weight, generator=torch.Generator().manual_seed(1))

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.after(self.head, self.embed(input_ids)))


@pytest.mark.parametrize(
    ("after", "scale"),
    [
        (lambda head, h: 1.7 * head(h), 1.7),  # HyperCLOVA X multiplies by logits_scaling
        (lambda head, h: head(h) / 1.7, 1 / 1.7),  # Granite divides
        (lambda head, h: head(h / 1.7), 1.0),  # MiniCPM3 divides before the head
    ],
)
def test_one_entry_of_the_configuration_read_in_three_ways(after: Any, scale: float) -> None:
    model, batch = OddModel(after, logits_scaling=1.7), causal_batch()
    hidden, head = hidden_before_head(model, batch)
    assert head.logit_scale == pytest.approx(scale)
    assert_close(head.logits(hidden), model(batch["input_ids"]).logits, rtol=1e-6)


def test_an_unknown_change_of_the_logits_is_not_silently_ignored() -> None:
    with pytest.raises(ValueError, match="changes its logits after the head in a way that its configuration does not"):
        causal_lm_loss(OddModel(lambda head, h: head(h) * 1.3), causal_batch())
    with pytest.raises(ValueError, match=r"softcap 5\.0 and scale 1, softcap None and scale 1 all give other logits"):
        causal_lm_loss(OddModel(lambda head, h: head(h) ** 2, final_logit_softcapping=5.0), causal_batch())
    with pytest.raises(ValueError, match="must call its head Linear once in a forward pass; it called it 0 times"):
        causal_lm_loss(OddModel(lambda head, h: h @ head.weight.T), causal_batch())
    with pytest.raises(ValueError, match="called it 2 times"):
        causal_lm_loss(OddModel(lambda head, h: head(h) + head(h)), causal_batch())


def test_half_precision_does_not_blur_what_the_model_does() -> None:
    """A soft cap far above the logits changes them by less than bfloat16 shows; still the right reading is taken."""
    batch = causal_batch()
    for cap, after in (
        (500.0, lambda head, h: head(h)),  # an entry of that name which means something else
        (500.0, lambda head, h: 500.0 * torch.tanh(head(h) / 500.0)),
        (5.0, lambda head, h: (5.0 * torch.tanh(head(h).float() / 5.0)).bfloat16()),
    ):
        model = OddModel(after, softcap=cap).bfloat16()
        hidden, head = hidden_before_head(model, batch)
        assert torch.equal(head.logits(hidden), model(batch["input_ids"]).logits) or head.softcap == cap == 5.0


def test_outputs_as_a_tuple() -> None:
    class TupleModel(OddModel):
        def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
            return torch.zeros(()), super().forward(input_ids).logits

    batch = causal_batch()
    model = TupleModel(lambda head, h: head(h) * 0.6, logit_scale=0.6)
    assert hidden_before_head(model, batch)[1].logit_scale == 0.6
    with pytest.raises(ValueError, match="changes its logits"):
        hidden_before_head(TupleModel(lambda head, h: head(h) * 0.5, logit_scale=0.6), batch)


def test_a_head_of_another_kind_is_called_as_it_stands() -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model, batch = tiny_llama(), causal_batch()
    model.lm_head = Doubling(28, VOCABULARY, bias=False)
    assert hidden_before_head(model, batch)[1].linear() is None
    ours, own = causal_lm_loss(model, batch), model(**batch).loss
    assert_close(ours, own, rtol=1e-6)
    parameters = list(model.parameters())
    for grad, want in zip(torch.autograd.grad(ours, parameters), torch.autograd.grad(own, parameters), strict=True):
        assert_close(grad, want)


def test_model_inputs() -> None:
    model = tiny_llama()
    ids, ones = torch.arange(8).reshape(1, 8), torch.ones(1, 8, dtype=torch.long)
    packed, whole = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]]), torch.arange(8)[None]
    inputs = model_inputs(model, {"input_ids": ids, "labels": ids})
    assert set(inputs) == {"input_ids", "use_cache"}
    assert inputs["use_cache"] is False
    assert "use_cache" not in model_inputs(nn.Linear(2, 2), {"input": ids})
    assert model_inputs(model, {"input_ids": ids, "use_cache": True})["use_cache"] is True
    batch = {"input_ids": ids, "attention_mask": ones, "position_ids": packed}
    assert "attention_mask" not in model_inputs(model, batch)
    assert "attention_mask" in batch
    assert "attention_mask" in model_inputs(model, {**batch, "position_ids": whole})
    holes = ones.clone()
    holes[0, -1] = 0
    with pytest.raises(ValueError, match=r"the batch is packed .* and its attention_mask has zeros"):
        model_inputs(model, {**batch, "attention_mask": holes})
    left = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])  # left padding looks like packing, and is none
    positions = torch.tensor([[0, 0, 0, 0, 1, 2, 3, 4]])
    assert "attention_mask" in model_inputs(model, {**batch, "attention_mask": left, "position_ids": positions})


def test_packed_documents_are_apart() -> None:
    """A row of two documents gives the hidden states of each by itself; a mask of ones would undo that."""
    model = tiny_llama()
    first, second = torch.randint(3, VOCABULARY, (2, 1, 6), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(6).repeat(2)[None]
    packed = {
        "input_ids": torch.cat([first, second], 1),
        "position_ids": positions,
        "attention_mask": torch.ones(1, 12),
    }
    hidden, _ = hidden_before_head(model, packed)
    for part, ids in zip(hidden.split(6, 1), (first, second), strict=True):
        alone, _ = hidden_before_head(model, {"input_ids": ids})
        assert_close(part, alone)


def test_a_routers_balancing_loss_is_not_silently_left_out() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**{**SMALL, "intermediate_size": 36}, num_local_experts=3, num_experts_per_tok=2)
    model, batch = seeded(MixtralForCausalLM, config), causal_batch()
    assert_close(causal_lm_loss(model, batch), model(**batch).loss, rtol=1e-6)
    model.config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits=True, which adds a balancing loss"):
        causal_lm_loss(model, batch)


def test_an_encoder_decoder_is_refused_where_it_would_be_wrong() -> None:
    for loss in (causal_lm_loss, masked_lm_loss):
        with pytest.raises(ValueError, match="is an encoder-decoder: use sequence_to_sequence_loss"):
            loss(tiny_t5(), causal_batch())
