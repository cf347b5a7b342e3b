"""Virtual tokens before a text: what the body reads, what comes out, generation, and what is refused."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from llmtune.adapters import (
    LoRA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    active,
    adapter_parameters,
    attach,
    detach,
    disabled,
    load,
    save,
    set_active,
)
from llmtune.adapters.body import BodyLayer
from llmtune.integrations import register
from llmtune.losses import causal_lm_loss, classification_loss, masked_lm_loss, sequence_to_sequence_loss
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

B, T, N = 3, 11, 5
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 97, (B, T), generator=GENERATOR)
LEFT = torch.ones_like(IDS)
LEFT[1, :4], LEFT[2, :1] = 0, 0
RIGHT = LEFT.flip(1)
classifier = partial(tiny_bert, labels=3)
RECORDS = [PromptTuning(tokens=N), PTuning(tokens=N, hidden=7), PrefixTuning(tokens=N)]


def with_adapter(make, record=RECORDS[0]):
    torch.manual_seed(7)
    model = make()
    attach(model, record)
    assert not any(module.training for module in model.modules())  # as the model was
    return model


@torch.no_grad()
def logits(model, ids=IDS, **inputs):
    return model.eval()(input_ids=ids, **inputs).logits


@torch.no_grad()
def greedy(model, ids, mask, steps=9):
    """A loop without a cache, each time over the whole text."""
    model.eval()
    for _ in range(steps):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        rows = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, -1]
        rows[:, 2] = -torch.inf  # min_new_tokens of generate
        ids = torch.cat([ids, rows.argmax(1, keepdim=True)], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return ids


def generated(model, ids, mask, **options):
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False} | options
    return model.eval().generate(input_ids=ids, attention_mask=mask, **options)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_padding_on_the_left_is_not_counted_without_positions_either(make, record):
    model = with_adapter(make, record)
    positions = (LEFT.cumsum(1) - 1).clamp(min=0)
    found = logits(model, attention_mask=LEFT)
    assert torch.equal(found[LEFT.bool()], logits(model, attention_mask=LEFT, position_ids=positions)[LEFT.bool()])
    for row, mask in enumerate(LEFT.bool()):
        alone = logits(model, IDS[row : row + 1, mask])[0]
        torch.testing.assert_close(found[row, mask], alone, rtol=1e-5, atol=1e-5)
    first = model(input_ids=IDS[:, :7], attention_mask=LEFT[:, :7], use_cache=True)  # and in a second call alike
    second = model(input_ids=IDS[:, 7:], attention_mask=LEFT, past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, found[:, 7:], rtol=1e-5, atol=1e-5)
    assert torch.equal(logits(model, attention_mask=torch.ones_like(IDS)), logits(model))


def test_an_encoder_and_a_table_that_begins_with_padding_have_their_own_positions():
    from transformers import RobertaConfig, RobertaForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 26, "num_hidden_layers": 1, "num_attention_heads": 2}
    roberta = RobertaForCausalLM(RobertaConfig(**sizes, intermediate_size=31, is_decoder=True))
    for model in (tiny_bert(), roberta):
        attach(model, RECORDS[0])
        assert not next(layer for layer in model.modules() if isinstance(layer, BodyLayer)).counts_real_tokens


@pytest.mark.parametrize("attention", ["eager", "sdpa", "llmtune"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert])
def test_the_body_reads_the_virtual_tokens_and_nobody_else_sees_them(make, attention):
    register()
    base, model = make(attention=attention), with_adapter(partial(make, attention=attention))
    table = next(iter(adapter_parameters(model).values()))
    for mask in (None, RIGHT):
        vectors = torch.cat([table.expand(B, -1, -1), base.get_input_embeddings()(IDS)], 1)
        wide = None if mask is None else torch.cat([torch.ones(B, N, dtype=torch.long), mask], 1)
        with torch.no_grad():
            expected = base(inputs_embeds=vectors, attention_mask=wide, output_hidden_states=True)
            found = model(input_ids=IDS, attention_mask=mask, output_hidden_states=True)
            embedded = model(inputs_embeds=base.get_input_embeddings()(IDS), attention_mask=mask)
            as_tuple = model(input_ids=IDS, attention_mask=mask, return_dict=False)
        assert torch.equal(found.logits, expected.logits[:, N:])
        assert torch.equal(embedded.logits, found.logits)
        assert torch.equal(as_tuple[0], found.logits)
        assert len(found.hidden_states) == 3
        for one, other in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert torch.equal(one, other[:, N:])


def test_attention_weights_lose_the_virtual_queries_and_keep_the_virtual_keys():
    model = with_adapter(partial(tiny_llama, attention="eager"))
    weights = model(input_ids=IDS, output_attentions=True).attentions
    assert {tuple(layer.shape) for layer in weights} == {(B, 4, T, N + T)}
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(B, 4, T))


def test_an_encoder_keeps_them_for_its_decoder():
    model, base = with_adapter(tiny_t5), tiny_t5()
    labels = IDS[:, :7].contiguous()
    table = next(iter(adapter_parameters(model).values()))
    vectors = torch.cat([table.expand(B, -1, -1), base.shared(IDS)], 1)
    with torch.no_grad():
        wide = torch.cat([torch.ones(B, N, dtype=torch.long), RIGHT], 1)
        expected = base(inputs_embeds=vectors, attention_mask=wide, labels=labels).logits
        encoded = model.get_encoder()(input_ids=IDS, attention_mask=RIGHT)
        assert encoded.last_hidden_state.shape == (B, N + T, 26)
        assert torch.equal(logits(model, attention_mask=RIGHT, labels=labels), expected)
        again = model(encoder_outputs=encoded, attention_mask=RIGHT, labels=labels).logits
        assert torch.equal(again, expected)
        with disabled(model):
            plain = model.get_encoder()(input_ids=IDS, attention_mask=RIGHT)
        model(encoder_outputs=plain, attention_mask=RIGHT, labels=labels)  # its mask is long enough as it is


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_generation_with_a_cache_is_the_loop_without_one(make, record):
    model = with_adapter(make, record)
    for mask in (torch.ones_like(IDS), LEFT):
        expected = greedy(model, IDS, mask)
        assert torch.equal(generated(model, IDS, mask), expected)
        assert torch.equal(generated(model, IDS, mask, use_cache=False), expected)
    with disabled(model):
        assert not torch.equal(generated(model, IDS, LEFT), expected)
    assert torch.equal(
        generated(model, IDS, LEFT, num_beams=3), generated(model, IDS, LEFT, num_beams=3, use_cache=False)
    )
    for row in range(B):  # padding on the left changes nothing
        alone = generated(
            model, IDS[row : row + 1, LEFT[row] > 0], torch.ones(1, int(LEFT[row].sum()), dtype=torch.long)
        )
        assert torch.equal(alone[0, -9:], expected[row, -9:])


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_an_encoder_decoder_generates_alike_with_and_without_a_cache(record):
    model = with_adapter(tiny_t5, record)
    with torch.no_grad():
        ids = torch.zeros(B, 1, dtype=torch.long)
        for _ in range(6):
            rows = model(input_ids=IDS, attention_mask=RIGHT, decoder_input_ids=ids, use_cache=False).logits[:, -1]
            rows[:, 1] = -torch.inf
            ids = torch.cat([ids, rows.argmax(1, keepdim=True)], 1)
    short = {"max_new_tokens": 6, "min_new_tokens": 6}
    assert torch.equal(generated(model, IDS, RIGHT, **short), ids)
    assert torch.equal(generated(model, IDS, RIGHT, use_cache=False, **short), ids)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_generation_is_pefts_own_loop(record, tmp_path):
    """PEFT's loop, not its generate, which with transformers' newer name for the cache puts the prompt in each time."""
    peft = pytest.importorskip("peft", reason="PEFT is the oracle of this test")
    for make in (tiny_llama, tiny_gpt2):
        model = with_adapter(make, record)
        save(model, tmp_path)
        theirs, ids = peft.PeftModel.from_pretrained(make(), tmp_path).eval(), IDS
        with torch.no_grad():
            for _ in range(9):
                rows = theirs(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1]
                rows[:, 2] = -torch.inf
                ids = torch.cat([ids, rows.argmax(1, keepdim=True)], 1)
        assert torch.equal(generated(model, IDS, torch.ones_like(IDS)), ids)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert, tiny_t5])
def test_gradient_checkpointing_changes_no_gradient(make, record):
    more = {"labels": IDS} if make is tiny_t5 else {}
    gradients = []
    for checkpointing in (False, True):
        model = with_adapter(make, record).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(input_ids=IDS, attention_mask=RIGHT, **more).logits.square().mean()
        loss.backward()
        gradients.append({name: p.grad for name, p in adapter_parameters(model).items()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


@pytest.mark.parametrize(
    "record",
    [
        PromptTuning(tokens=3),
        PTuning(tokens=3, encoder="lstm", hidden=2),
        PrefixTuning(tokens=3),
        PrefixTuning(tokens=3, projection=True, hidden=2),
    ],
)
@pytest.mark.parametrize("make", [tiny_gpt2, tiny_bert])  # the others' norms are float32 whatever the model is
def test_gradients_are_finite_differences(make, record):
    model = with_adapter(make, record).double().eval()

    def value():
        return model(input_ids=IDS, attention_mask=RIGHT).logits.square().mean()

    parameters = list(adapter_parameters(model).values())
    for parameter, gradient in zip(parameters, torch.autograd.grad(value(), parameters), strict=True):
        change = torch.randn(parameter.shape, generator=GENERATOR).double()
        with torch.no_grad():
            above = (parameter.add_(1e-6 * change), value())[1]
            below = (parameter.sub_(2e-6 * change), value())[1]
            parameter.add_(1e-6 * change)
        numeric = float(above - below) / 2e-6
        assert float((gradient * change).sum()) == pytest.approx(numeric, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("record", [*RECORDS, PrefixTuning(tokens=N, projection=True)])
def test_training_reduces_a_loss(record):
    for make, loss in (
        (tiny_llama, causal_lm_loss), (tiny_t5, sequence_to_sequence_loss), (tiny_bert, masked_lm_loss),
        (classifier, classification_loss),
    ):  # fmt: skip
        model = with_adapter(make, record)
        labels = torch.tensor([0, 2, 1]) if make is classifier else IDS
        batch = {"input_ids": IDS, "attention_mask": RIGHT, "labels": labels}
        if make is not classifier:
            torch.testing.assert_close(loss(model, batch), model(**batch).loss, rtol=1e-5, atol=1e-6)
        optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=3e-2)
        losses = []
        for _ in range(12):
            optimizer.zero_grad()
            losses.append(loss(model, batch))
            losses[-1].backward()
            optimizer.step()
        assert losses[-1] < losses[0] - 0.02


def test_the_start_is_drawn_from_the_seed_or_the_vocabulary():
    tables = []
    for seed in (3, 3, 4):
        model = with_adapter(tiny_llama, PromptTuning(tokens=N, seed=seed))
        tables.append(next(iter(adapter_parameters(model).values())))
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    model = with_adapter(tiny_llama, PromptTuning(tokens=N, initialise="vocabulary", seed=3))
    table, words = next(iter(adapter_parameters(model).values())), model.get_input_embeddings().weight
    assert all((words == row).all(1).any() for row in table)
    with torch.no_grad():
        table += 1
    assert torch.equal(words, tiny_llama().get_input_embeddings().weight)


def test_what_an_encoder_makes_is_saved_without_dropout(tmp_path):
    model = with_adapter(tiny_llama, PTuning(tokens=N, encoder="lstm", hidden=7, layers=3, dropout=0.5)).train()
    outputs = [model(input_ids=IDS).logits for _ in range(2)]
    assert not torch.equal(*outputs)
    save(model, tmp_path)
    assert model.model.prompt_source.lstm.training
    again = tiny_llama()
    load(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


def test_prompts_and_prefixes_compose_in_any_order():
    """[prefix; first prompt; second prompt; text], whatever was put on first."""
    outputs = {}
    for order in (("prefix", "prompt"), ("prompt", "prefix")):
        model = tiny_llama()
        for name in order:
            torch.manual_seed(len(name))
            attach(model, PromptTuning(tokens=N) if name == "prompt" else PrefixTuning(tokens=3), name)
        set_active(model, order)
        outputs[order] = [
            logits(model), logits(model, attention_mask=LEFT, position_ids=(LEFT.cumsum(1) - 1).clamp(min=0)),
            generated(model, IDS, LEFT), generated(model, IDS, LEFT, use_cache=False),
        ]  # fmt: skip
        assert torch.equal(outputs[order][2], outputs[order][3])
        gradients = []
        table = (model.model if order[1] == "prefix" else model.model.base).prefix_table.table.requires_grad_(True)
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            gradients += torch.autograd.grad(model.train()(input_ids=IDS).logits.sum(), table)
        torch.testing.assert_close(*gradients)
    for one, other in zip(*outputs.values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_two_of_a_kind_add_up_and_one_at_a_time_is_itself(record):
    model, alone = tiny_gpt2(), {}
    for name in ("one", "two"):
        attach(model, record, name)
    for name in ("one", "two"):
        with active(model, name):
            alone[name] = logits(model)
            assert torch.equal(generated(model, IDS, LEFT), greedy(model, IDS, LEFT))
    both = logits(model)
    assert torch.equal(generated(model, IDS, LEFT), greedy(model, IDS, LEFT))
    assert not torch.allclose(alone["one"], both, atol=1e-3)
    assert not torch.allclose(alone["one"], alone["two"], atol=1e-3)
    checked = model.train()
    checked.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(checked(input_ids=IDS).logits, both, rtol=1e-5, atol=1e-5)
    detach(model, "one")
    assert torch.equal(logits(model), alone["two"])


def test_beside_lora_on_everything():
    model = tiny_llama()
    attach(model, LoRA(rank=2, alpha=3, targets=["embed_tokens", "q_proj", "v_proj"]), "lora")
    with torch.no_grad():
        for parameter in adapter_parameters(model, "lora").values():
            parameter.add_(0.1)
    before = logits(model)
    for record in RECORDS[0], RECORDS[2]:
        attach(model, record, "virtual")
        assert not torch.allclose(logits(model), before, atol=1e-3)
        copied = copy.deepcopy(model)
        detach(model, "lora")
        assert not torch.allclose(logits(model), logits(copied), atol=1e-3)
        model = copied
        detach(model, "virtual")
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("record", [*RECORDS, PrefixTuning(tokens=N, projection=True)])
@pytest.mark.parametrize("make", [tiny_llama, partial(tiny_llama, attention="llmtune"), tiny_gpt2, tiny_t5])
def test_half_precision_and_autocast(make, record):
    register()
    more = {"labels": IDS} if make is tiny_t5 else {}
    full = logits(with_adapter(make, record), **more)
    half = with_adapter(make, record).to(torch.float32)
    for name, parameter in half.named_parameters():
        if name not in adapter_parameters(half):
            parameter.data = parameter.data.to(torch.bfloat16)
    found = half(input_ids=IDS, **more).logits
    assert found.dtype == torch.bfloat16
    assert float((found.detach() - full).norm() / full.norm()) < 0.1
    found.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in adapter_parameters(half).values())
    model = with_adapter(make, record).train()
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", torch.bfloat16):
            found = model(input_ids=IDS, attention_mask=RIGHT, **more).logits
        found.float().square().mean().backward()
        found = found.detach().float()[0]
        assert float((found - full[0]).norm() / full[0].norm()) < 0.1


def test_under_autocast_a_prefix_has_the_dtype_of_the_keys_it_stands_before():
    model = with_adapter(tiny_gpt2, PrefixTuning(tokens=N))
    for enabled, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            cache = model(input_ids=IDS, use_cache=True).past_key_values
        assert {layer.keys.dtype for layer in cache.layers} == {dtype}
        assert {layer.keys.shape for layer in cache.layers} == {(B, 2, N + T, 13)}


def test_compiled_it_says_the_same():
    for record in RECORDS[0], RECORDS[2]:
        model = with_adapter(tiny_llama, record)
        expected = logits(model, attention_mask=RIGHT)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(logits(compiled, attention_mask=RIGHT), expected)


def test_a_body_on_the_meta_device_can_be_adapted():
    for record in (*RECORDS, PromptTuning(tokens=N, initialise="vocabulary")):
        with torch.device("meta"):
            model = tiny_llama()
        attach(model, record)
        assert {p.device.type for p in adapter_parameters(model).values()} == {"meta"}


def test_what_is_set_from_outside_goes_to_the_body():
    model = with_adapter(tiny_llama)
    model.resize_token_embeddings(101, mean_resizing=False)
    assert model.get_input_embeddings().weight.shape == (101, 28)
    assert model.model.embed_tokens is model.model.base.embed_tokens
    assert "embed_tokens" not in model.model._modules
    logits(model, IDS + 4)


class Reader(nn.Module):
    """A user's own model around a bare body."""

    def __init__(self):
        super().__init__()
        self.reader = tiny_bert().bert
        self.head = nn.Linear(22, 3)

    def forward(self, ids):
        return self.head(self.reader(ids).last_hidden_state)


def test_a_body_within_a_module_of_ones_own(tmp_path):
    torch.manual_seed(0)
    model = Reader()
    start = model(IDS)
    report = attach(model, PromptTuning(tokens=N, train_modules=["head"]))
    assert report.modules == ("reader",)
    assert model(IDS).shape == start.shape == (B, T, 3)
    save(model, tmp_path)
    again = Reader()
    load(again, tmp_path)
    detach(model)
    assert torch.equal(model(IDS), start)
