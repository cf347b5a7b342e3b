"""LoReFT: the formula, the positions under padding, packing and caches, and what is refused."""

import copy
from functools import partial

import pytest
import torch
import transformers as hf
from torch import nn

from llmtune.adapters import (
    LoRA,
    LoReFT,
    LoReFTLayer,
    PrefixTuning,
    PromptTuning,
    PTuning,
    adapter_parameters,
    attach,
    detach,
    load,
    loreft_change,
    merge,
    prompt_positions,
    save,
)
from llmtune.adapters.attach import record_of
from llmtune.adapters.prompt_positions import BlockInputs
from llmtune.attention import Padding
from llmtune.integrations import register
from llmtune.layers import FeedForward, MultiHeadAttention, TransformerBlock
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

register()
B, T = 3, 11
IDS = torch.randint(3, 97, (B, T), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([11, 7, 2])
RIGHT = (torch.arange(T) < LENGTHS[:, None]).long()
LEFT = RIGHT.flip(1)


def move(model, name="default"):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter_parameters(model, name).values():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def adapted(make, *, seed=0, **options):
    model = make()
    torch.manual_seed(seed)
    attach(model, LoReFT(**({"rank": 3, "positions": (2, 1)} | options)))
    move(model)
    return model


def logits(model, ids=IDS, **inputs):
    with torch.no_grad():
        return model(input_ids=ids, **inputs).logits


# --- positions ------------------------------------------------------------------------------------------------------


def naive(real, prefix, suffix, starts=None):
    """One token after the other."""
    marked = torch.zeros_like(real)
    for b in range(real.shape[0]):
        documents, current = [], []
        for t in range(real.shape[1]):
            if starts is not None and starts[b, t] and current:
                documents.append(current)
                current = []
            if real[b, t]:
                current.append(t)
        for document in [*documents, current]:
            for t in {*document[:prefix], *document[len(document) - min(suffix, len(document)) :]}:
                marked[b, t] = True
    return marked


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("suffix", [0, 2, 5])
def test_positions_are_those_of_a_walk_through_the_rows(prefix, suffix):
    generator = torch.Generator().manual_seed(5)
    for density in (0.0, 0.3, 0.7, 1.0):
        real = torch.rand(7, 13, generator=generator) < density
        starts = torch.rand(7, 13, generator=generator) < 0.2
        assert torch.equal(prompt_positions(real, prefix, suffix), naive(real, prefix, suffix))
        assert torch.equal(prompt_positions(real, prefix, suffix, starts), naive(real, prefix, suffix, starts))


@pytest.fixture
def seen(monkeypatch):
    """What the layers find to be real, and where documents start, in the order of the blocks."""
    found = []

    def watched(real, first, last, starts=None):
        found.append((real, starts))
        return prompt_positions(real, first, last, starts)

    monkeypatch.setattr("llmtune.adapters.loreft.prompt_positions", watched)
    return found


@pytest.mark.parametrize("attention", ["eager", "sdpa", "llmtune"])
@pytest.mark.parametrize(
    ("make", "mask"), [(tiny_llama, LEFT), (tiny_llama, RIGHT), (tiny_gpt2, LEFT), (tiny_bert, RIGHT), (tiny_t5, RIGHT)]
)
def test_real_tokens_are_read_off_the_mask_of_every_attention(make, mask, attention, seen):
    model = adapted(partial(make, attention=attention))
    inputs = {"labels": IDS} if make is tiny_t5 else {}
    logits(model, attention_mask=mask, **inputs)
    assert len(seen) == 2
    assert all(torch.equal(real, mask.bool()) for real, _ in seen)
    seen.clear()
    logits(model, **inputs)
    assert all(bool(real.all()) for real, _ in seen)


@pytest.mark.parametrize("attention", ["eager", "sdpa", "llmtune"])
def test_windows_and_masks_that_are_added_do_not_hide_padding(attention, seen):
    sizes = {**tiny_llama().config.to_dict(), "sliding_window": 3}
    config = hf.MistralConfig(**{k: v for k, v in sizes.items() if k not in ("model_type", "architectures")})
    config._attn_implementation = attention
    model = adapted(lambda: hf.MistralForCausalLM(config).eval())
    logits(model, attention_mask=LEFT)
    assert all(torch.equal(real, LEFT.bool()) for real, _ in seen)
    layer, x = LoReFTLayer(TakesMask(), rank=2, width=5, positions=(1, 1)), torch.randn(B, T, 5)
    seen.clear()
    for mask in ((1.0 - RIGHT) * -1e9, RIGHT.float(), torch.zeros(B, T), RIGHT.bool()[:, None, None]):
        layer(x, attention_mask=mask)
    expected = [RIGHT.bool(), RIGHT.bool(), torch.ones(B, T).bool(), RIGHT.bool()]
    assert all(torch.equal(real, wanted) for (real, _), wanted in zip(seen, expected, strict=True))


class TakesMask(nn.Module):
    def forward(self, x, attention_mask=None):
        return x


@pytest.mark.parametrize("mask", [LEFT, RIGHT])
def test_padding_changes_nothing_for_the_real_tokens(mask):
    model = adapted(tiny_llama)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    together = logits(model, attention_mask=mask, position_ids=position_ids)
    for row, length in enumerate(LENGTHS):
        alone = logits(model, IDS[row : row + 1, mask[row].bool()])
        torch.testing.assert_close(together[row : row + 1, mask[row].bool()], alone, rtol=1e-5, atol=1e-5)
        assert alone.shape[1] == length


def mpt():
    sizes = {"d_model": 26, "n_heads": 2, "n_layers": 2, "max_seq_len": 64, "vocab_size": 97}
    return hf.MptForCausalLM(hf.MptConfig(**sizes)).eval()


def deberta():
    sizes = {"hidden_size": 26, "intermediate_size": 31, "num_hidden_layers": 2, "num_attention_heads": 2}
    return hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**sizes, vocab_size=97)).eval()


def gpt_neo():
    sizes = {"hidden_size": 26, "num_layers": 2, "num_heads": 2, "vocab_size": 97, "max_position_embeddings": 64}
    return hf.GPTNeoForCausalLM(hf.GPTNeoConfig(**sizes, attention_types=[[["global", "local"], 1]])).eval()


@pytest.mark.parametrize("make", [mpt, deberta, gpt_neo])
@pytest.mark.parametrize("mask", [LEFT, RIGHT])
def test_masks_of_other_meanings_are_read_rightly(make, mask, seen):
    logits(adapted(make), attention_mask=mask)
    assert len(seen) == 2
    assert all(torch.equal(real, mask.bool()) for real, _ in seen)


def test_the_layers_of_gpt_neo_are_told_apart_in_a_cache(seen):
    model = adapted(gpt_neo)
    torch.testing.assert_close(logits(model, use_cache=True), logits(model, use_cache=False))
    seen.clear()
    model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)
    assert len(seen) == 2  # both blocks at the prompt, none later


def test_blocks_that_do_not_tell_are_refused():
    sizes = {"vocab_size": 97, "d_model": 26, "d_kv": 13, "d_ff": 31, "num_layers": 1, "num_heads": 2}
    model = hf.LongT5ForConditionalGeneration(hf.LongT5Config(**sizes))
    with pytest.raises(TypeError, match=r'a LongT5Block cuts a row into pieces, .*: use positions="all"'):
        attach(model, LoReFT(rank=2))
    attach(model, LoReFT(rank=2, positions="all"))
    model = hf.RwkvForCausalLM(hf.RwkvConfig(vocab_size=97, hidden_size=26, num_hidden_layers=2))
    with pytest.raises(TypeError, match="a RwkvBlock is told neither of padding nor of earlier tokens"):
        attach(model, LoReFT(rank=2))
    layer = LoReFTLayer(TakesMask(), rank=2, width=5, positions=(1, 1))
    with pytest.raises(TypeError, match=r"a mask of the shape \[2, 1, 3, 3, 9\] does not tell the padding"):
        layer(torch.ones(2, 3, 5), attention_mask=torch.ones(2, 1, 3, 3, 9))


@pytest.mark.parametrize("attention", ["eager", "sdpa", "llmtune"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("order", [1, -1])
def test_a_prefix_is_no_part_of_the_prompt(make, order, attention, seen):
    model = make(attention=attention)
    torch.manual_seed(0)
    records = [("prefix", PrefixTuning(tokens=5)), ("reft", LoReFT(rank=3, positions=(2, 1))),
               ("more", PrefixTuning(tokens=2))]  # fmt: skip
    for name, record in records[::order]:
        attach(model, record, name)
    start = logits(model)
    move(model, "reft")
    assert not torch.allclose(logits(model), start, atol=1e-3)
    for mask in (LEFT, RIGHT):
        for use_cache in (False, True):
            seen.clear()
            logits(model, attention_mask=mask, use_cache=use_cache)
            assert len(seen) == 2
            assert all(torch.equal(real, mask.bool()) for real, _ in seen)
    seen.clear()
    model.generate(input_ids=IDS, attention_mask=LEFT, max_new_tokens=4, do_sample=False)
    assert len(seen) == 2
    model.train().gradient_checkpointing_enable({"use_reentrant": False})
    seen.clear()
    model(input_ids=IDS, attention_mask=LEFT).logits.sum().backward()
    assert len(seen) == 2
    assert all(torch.equal(real, LEFT.bool()) for real, _ in seen)


@pytest.mark.parametrize("prompt", [PromptTuning(tokens=5), PTuning(tokens=5)])
@pytest.mark.parametrize("make", [tiny_llama, tiny_t5])
def test_virtual_tokens_before_the_text_are_refused_in_either_order(make, prompt):
    for first, second in ((prompt, LoReFT(rank=2)), (LoReFT(rank=2), prompt)):
        model = make()
        attach(model, first, "first")
        with pytest.raises(ValueError, match=r"would take the virtual tokens of .* for the prompt's: use .* or Prefix"):
            attach(model, second, "second")
        attach(model, LoReFT(rank=2, positions="all"), "third")
    attach(model, LoReFT(rank=2), "fourth")


@pytest.mark.parametrize("attention", ["sdpa", "llmtune"])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
def test_packed_documents_are_edited_each_by_itself(make, attention):
    model = adapted(partial(make, attention=attention))
    lengths = [5, 2, 4]
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = logits(model, IDS[:1], position_ids=position_ids, use_cache=False)
    for part, out in zip(IDS[:1].split(lengths, 1), packed.split(lengths, 1), strict=True):
        torch.testing.assert_close(out, logits(model, part), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("positions", [(2, 1), (0, 3), (4, 0), "all"])
def test_with_a_cache_only_the_prompt_is_edited(make, positions):
    model = adapted(make, positions=positions)
    prompt_mask = (torch.arange(T) < 6).expand(B, T)
    whole = logits(model, prompt_mask=prompt_mask, use_cache=False)
    with torch.no_grad():
        step = model(input_ids=IDS[:, :6], use_cache=True)
        steps = [step.logits]
        for t in range(6, T):
            cache = getattr(step, "cache", None) or step.past_key_values
            name = "cache" if hasattr(step, "cache") else "past_key_values"
            step = model(input_ids=IDS[:, t : t + 1], use_cache=True, **{name: cache})
            steps.append(step.logits)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-5, atol=1e-5)
    if positions != "all":
        assert not torch.allclose(whole, logits(model)) or positions[1] == 0


class SharedKeys:
    """A cache whose third layer has no keys of its own, as in models that share them."""

    def __init__(self, length):
        self.length = length

    def get_seq_length(self, layer=0):
        if layer == 2:
            raise ValueError("does not track its length")
        return self.length


@pytest.mark.parametrize(("held", "goes_on"), [(4, False), (5, True)])
def test_a_block_without_keys_of_its_own_goes_by_an_earlier_ones(held, goes_on):
    block = TakesCache()
    assert BlockInputs(block).goes_on((torch.zeros(2, 4, 5),), {"cache": SharedKeys(held)}) is goes_on
    block.layer_idx = 1
    assert BlockInputs(block).goes_on((torch.zeros(2, 4, 5),), {"cache": SharedKeys(held)}) is True
    assert BlockInputs(block).goes_on((torch.zeros(2, 4, 5), None), {}) is False


class TakesCache(nn.Module):
    layer_idx = 2

    def forward(self, x, cache=None):
        return x


def test_generation_is_that_of_the_prompt_mask():
    model = adapted(tiny_llama)
    with torch.no_grad():
        ids = model.generate(
            input_ids=IDS, attention_mask=LEFT, max_new_tokens=5, do_sample=False, pad_token_id=2, eos_token_id=None
        )
    mask = torch.cat([LEFT, torch.ones(B, 5, dtype=torch.long)], 1)
    prompt = torch.cat([LEFT.bool(), torch.zeros(B, 5, dtype=torch.bool)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = logits(model, ids, attention_mask=mask, position_ids=positions, prompt_mask=prompt, use_cache=False)
    assert torch.equal(out[:, T - 1 : -1].argmax(-1), ids[:, T:])


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert, tiny_t5])
def test_a_prompt_mask_reaches_the_blocks(make, seen):
    model = adapted(make)
    inputs = {"labels": IDS} if make is tiny_t5 else {}
    prompt = torch.arange(T).expand(B, T) < torch.tensor([[4], [7], [1]])
    logits(model, attention_mask=RIGHT, prompt_mask=prompt, **inputs)
    assert all(torch.equal(real, RIGHT.bool() & prompt) for real, _ in seen)
    with pytest.raises(ValueError, match=r"prompt_mask must be \[B, T\], here \[3, 11\]; got \[3, 4\]"):
        logits(model, prompt_mask=prompt[:, :4], **inputs)


def test_our_own_blocks_and_masks(seen):
    torch.manual_seed(0)
    block = TransformerBlock(MultiHeadAttention(12, heads=2), FeedForward(12, inner=17))
    layer = LoReFTLayer(block, rank=2, width=12, positions=(1, 1))
    layer(torch.randn(B, T, 12), mask=Padding(LENGTHS))
    assert torch.equal(seen[0][0], RIGHT.bool())


# --- the formula ----------------------------------------------------------------------------------------------------


def test_the_change_is_the_papers():
    torch.manual_seed(0)
    h, w, b = (torch.randn(s, dtype=torch.float64) for s in ((2, 7, 5), (3, 5), 3))
    rotation = torch.linalg.qr(torch.randn(5, 3, dtype=torch.float64)).Q.T
    expected = torch.einsum("re,btr->bte", rotation, h @ w.T + b - h @ rotation.T)
    torch.testing.assert_close(loreft_change(h, rotation, w, b), expected, rtol=1e-12, atol=1e-12)
    edited = h + expected
    torch.testing.assert_close(edited @ rotation.T, h @ w.T + b)  # what is in the subspace is replaced
    away = torch.eye(5, dtype=torch.float64) - rotation.T @ rotation
    torch.testing.assert_close(edited @ away, h @ away)  # and what is not stays


def test_rows_stay_orthonormal_and_all_is_learned():
    model = tiny_llama()
    torch.manual_seed(0)
    attach(model, LoReFT(rank=5, positions=(3, 2)))
    optimizer = torch.optim.AdamW(adapter_parameters(model).values(), lr=0.3)
    start = {name: p.clone() for name, p in adapter_parameters(model).items()}
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS).logits.square().mean().backward()
        optimizer.step()
    for layer in (module for module in model.modules() if isinstance(module, LoReFTLayer)):
        rotation = layer.rotation()
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(5), rtol=1e-5, atol=1e-6)
    assert all(not torch.equal(p, start[name]) for name, p in adapter_parameters(model).items())


def test_the_start_is_exact_and_every_parameter_gets_a_gradient_there():
    model = tiny_llama()
    expected = logits(model)
    attach(model, LoReFT(rank=3, positions=(2, 2)))
    assert torch.equal(logits(model), expected)
    layer = model.model.layers[0]
    assert torch.equal(layer.weight_in, layer.rotation())
    model(input_ids=IDS).logits.square().mean().backward()
    assert all(bool(p.grad.any()) for p in adapter_parameters(model).values())


def test_only_the_positions_and_layers_asked_for_are_edited():
    model = adapted(tiny_llama, layers=[1], positions=(1, 2))
    blocks = model.model.layers
    assert not isinstance(blocks[0], LoReFTLayer)
    layer, x = blocks[1], torch.randn(2, 7, 28)
    given = {"position_embeddings": model.model.rotary_emb(x, torch.arange(7)[None]), "attention_mask": None}
    plain = layer.base(x, **given)
    change = loreft_change(plain, layer.rotation(), layer.weight_in, layer.bias_in)
    where = torch.tensor([1, 0, 0, 0, 0, 1, 1]).bool()
    edited = layer(x, **given)
    torch.testing.assert_close(edited[:, where], (plain + change)[:, where])
    assert torch.equal(edited[:, ~where], plain[:, ~where])


def test_dropout_is_of_the_coordinates():
    layer = LoReFTLayer(nn.Linear(5, 7), rank=3, dropout=0.5).train()
    with torch.no_grad():
        layer.bias_in.add_(1.0)
        x = torch.randn(200, 5)
        inside = (layer(x) - layer.base(x)) @ layer.rotation().T
    torch.testing.assert_close(inside, torch.where(inside > 1, 2.0, 0.0), rtol=1e-4, atol=1e-4)
    assert 0.4 < float((inside > 1).float().mean()) < 0.6


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert])
def test_gradient_checkpointing_gives_the_same_gradients(make):
    found = []
    for checkpointing in (False, True):
        model = adapted(make).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        losses = [model(input_ids=IDS, attention_mask=mask).logits.square().mean() for mask in (RIGHT, LEFT)]
        (losses[0] + losses[1]).backward()  # blocks of the first batch run again after the second was seen
        found.append({name: p.grad for name, p in adapter_parameters(model).items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)


def test_a_bf16_base_rounds_once():
    model = tiny_llama().to(torch.bfloat16)
    start = logits(model)
    attach(model, LoReFT(rank=3, positions="all"))
    assert torch.equal(logits(model), start)
    move(model)
    layer, x = model.model.layers[0], torch.randn(2, 7, 28).to(torch.bfloat16)
    given = {"position_embeddings": model.model.rotary_emb(x, torch.arange(7)[None]), "attention_mask": None}
    plain = layer.base(x, **given)
    change = loreft_change(plain.float(), layer.rotation(), layer.weight_in, layer.bias_in)
    assert torch.equal(layer(x, **given), (plain.float() + change).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_becomes_half_as_a_whole_goes_on(dtype):
    model = adapted(tiny_llama)
    whole = logits(model)
    model.to(dtype)
    assert logits(model).dtype == dtype
    torch.testing.assert_close(logits(model).float(), whole, rtol=0.1, atol=0.1 * float(whole.abs().max()))
    model(input_ids=IDS).logits.float().square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) and bool(p.grad.any()) for p in adapter_parameters(model).values())


def test_a_model_without_storage_can_be_attached_to():
    with torch.device("meta"):
        model = hf.LlamaForCausalLM(tiny_llama().config)
    attach(model, LoReFT(rank=3))
    assert all(p.is_meta for p in adapter_parameters(model).values())


# --- where it goes, files, refusals ---------------------------------------------------------------------------------


def test_blocks_of_an_encoder_decoder_are_the_encoders():
    assert attach(tiny_t5(), LoReFT(rank=2)).modules == ("encoder.block.0", "encoder.block.1")
    named = LoReFT(rank=2, blocks=r"(encoder|decoder)\.block\.\d+", layers=[0, 3])
    assert attach(tiny_t5(), named).modules == ("encoder.block.0", "decoder.block.1")


def test_two_at_once_and_with_lora_inside():
    model = adapted(tiny_llama)
    attach(model, LoReFT(rank=2, layers=[1]), "second")
    attach(model, LoRA(rank=2, alpha=3), "lora")
    for name in ("second", "lora"):
        move(model, name)
    tuned = logits(model)
    merge(model, "lora")
    torch.testing.assert_close(logits(model), tuned, rtol=2e-5, atol=2e-5)
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (tiny_llama, LoReFT(rank=3, layers=(1,), positions=(3, 2), dtype=torch.float64)),
        (partial(tiny_bert, labels=3), LoReFT(rank=2, positions="all", dropout=0.1, train_modules=("classifier",))),
        (tiny_gpt2, LoReFT(rank=2, blocks=("h.0",))),
    ],
)
def test_files_of_our_own(make, config, tmp_path):
    model = make()
    attach(model, config)
    move(model)
    save(model, tmp_path)
    again = make()
    load(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert record_of(again, "default").configs["default"] == config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number of at least 1"),
        ({"positions": (0, 0)}, r'positions must be "all", or \(first, last\), .*; got \(0, 0\)'),
        ({"positions": (1, -1)}, r"got \(1, -1\)"),
        ({"positions": 3}, "got 3"),
        ({"layers": [1, 1]}, r'layers must be "all" or different whole numbers from 0; got \[1, 1\]'),
        ({"layers": [-1]}, r"got \[-1\]"),
        ({"layers": []}, r"got \[\]"),
        ({"layers": "last"}, "got 'last'"),
        ({"layers": 3}, r'layers must be "all" or different whole numbers from 0; got 3'),
        ({"layers": None}, "got None"),
        ({"dropout": 1}, "dropout must be a probability"),
        ({"dtype": torch.bfloat16}, "dtype must be float32 or float64, in which rows can be orthonormal"),
        ({"blocks": "(x"}, "blocks must be suffixes or one regular expression"),
    ],
)
def test_a_record_out_of_range_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoReFT(**({"rank": 2} | options))


class TwoStacks(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("left", "right"):
            layers = [nn.TransformerEncoderLayer(12, 2, 17, batch_first=True) for _ in range(2)]
            setattr(self, name, nn.ModuleList(layers))


class Bare(nn.Module):
    def forward(self, x):
        return x


def test_what_cannot_be_done_on_a_model_is_refused():
    model = tiny_llama()
    for make, options, message in (
        (tiny_llama, {"layers": [2]}, "layers names 2, and the blocks count from 0 to 1"),
        (tiny_llama, {"rank": 29}, "the rank 29 is larger than the width 28 of what model.layers.0 returns"),
        (tiny_llama, {"blocks": ["layer.0"]}, 'blocks: "layer.0" matches no module'),
        (lambda: nn.Sequential(nn.Linear(5, 5)), {}, r"this Sequential has no blocks by a name that is known here"),
        (TwoStacks, {}, "this TwoStacks has several stacks of blocks, left, right: name the blocks that are meant"),
        (lambda: nn.Sequential(Bare()), {"blocks": ["0"]}, "the width of what 0 returns is not to be told"),
    ):
        model = make()
        with pytest.raises(ValueError, match=message):
            attach(model, LoReFT(**({"rank": 2} | options)))
        assert not hasattr(model, "_llmtune_adapters")
    with pytest.raises(TypeError, match=r'EncoderLayer is told of padding by src_mask, .* positions="all"'):
        attach(TwoStacks(), LoReFT(rank=2, blocks=r"left\.\d"))
    attach(TwoStacks(), LoReFT(rank=2, blocks=r"left\.\d", positions="all"))
    with pytest.raises(ValueError, match="a Bare does not tell the width of its output: give width"):
        LoReFTLayer(Bare(), rank=2)
    with pytest.raises(ValueError, match="the rank 8 is larger than the width 7 of what is edited"):
        LoReFTLayer(nn.Linear(5, 7), rank=8)
    with pytest.raises(ValueError, match=r"the block's output must be \[B, T, E\]; it is \[2, 7\]"):
        LoReFTLayer(nn.Linear(5, 7), rank=2, positions=(1, 1))(torch.ones(2, 5))
    with pytest.raises(TypeError, match="a mask of type object does not tell the padding"):
        LoReFTLayer(TakesMask(), rank=2, width=5, positions=(1, 1))(torch.ones(2, 3, 5), attention_mask=object())


def test_detach_leaves_the_blocks():
    model = adapted(tiny_llama)
    detach(model)
    assert {type(block) for block in model.model.layers} == {hf.models.llama.modeling_llama.LlamaDecoderLayer}
