"""NEFTune: the noise's bound and variance, which tokens get it, and that nothing is left behind."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from traces import LOSSES, MODELS, assert_same, batch_of, equal, logits_of, traces, trained

from llmtune.adapters.attach import attach
from llmtune.adapters.config import LoRA
from llmtune.adapters.prefix import PrefixTuning
from llmtune.data.collate import collate_packed, collate_padded
from llmtune.regularizers.neftune import neftune, neftune_noise, token_lengths
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

DOCUMENTS = [[5, 7, 11], [13, 17, 19, 23, 29], [31, 37]]
WIDTHS = {"llama": 28, "gpt2": 26, "bert": 22, "t5": 26}
ENCODERS = {"llama": lambda m: m, "gpt2": lambda m: m, "bert": lambda m: m, "t5": lambda m: m.get_encoder()}


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("alpha", [5.0, 11.0])
def test_bound_variance_and_mean(alpha):
    lengths, E = torch.tensor([2, 5, 3]), 97
    draws = torch.stack(
        [
            neftune_noise(torch.zeros(3, 5, E, dtype=torch.float64), lengths, alpha, generator=g)
            for g in [seeded()] * 211
        ]
    )
    for row, L in enumerate(lengths.tolist()):
        noise = draws[:, row, :L]
        bound = alpha / math.sqrt(L * E)
        assert noise.abs().max() <= bound
        assert noise.abs().max() > 0.999 * bound
        variance, n = alpha**2 / (3 * L * E), noise.numel()
        assert abs(noise.square().mean() / variance - 1) < 5 * math.sqrt(0.8 / n)  # var(u^2) / E[u^2]^2 = 4 / 5
        assert abs(noise.mean()) < 5 * math.sqrt(variance / n)
        assert not draws[:, row, L:].any()


def test_it_is_the_uniform_draw_times_the_scale():
    lengths, E, alpha = torch.tensor([2, 5, 0]), 7, 5.0
    found = neftune_noise(torch.zeros(3, 5, E, dtype=torch.float64), lengths, alpha, generator=seeded())
    uniform = torch.empty(3, 5, E, dtype=torch.float64).uniform_(-1, 1, generator=seeded())
    for row, L in enumerate(lengths.tolist()):
        torch.testing.assert_close(
            found[row, :L], uniform[row, :L] * alpha / math.sqrt(max(L, 1) * E), rtol=1e-12, atol=0
        )
        assert torch.equal(found[row, L:], torch.zeros(5 - L, E, dtype=torch.float64))


def test_bfloat16_is_the_float32_draw_rounded():
    embeddings, lengths = torch.zeros(2, 3, 5), torch.tensor([3, 2])
    wide = neftune_noise(embeddings, lengths, 5.0, generator=seeded())
    narrow = neftune_noise(embeddings.bfloat16(), lengths, 5.0, generator=seeded())
    assert torch.equal(narrow, wide.bfloat16())


@pytest.mark.parametrize(
    ("mask", "positions", "expected"),
    [
        (None, None, [[4, 4, 4, 4]] * 2),
        ([[1, 1, 0, 0], [1, 1, 1, 0]], None, [[2, 2, 0, 0], [3, 3, 3, 0]]),
        ([[0, 0, 1, 1], [0, 1, 1, 1]], None, [[0, 0, 2, 2], [0, 3, 3, 3]]),
        ([[0, 0, 1, 1], [0, 1, 1, 1]], [[1, 1, 0, 1], [0, 0, 1, 2]], [[0, 0, 2, 2], [0, 3, 3, 3]]),
        ([[1, 1, 0, 0], [1, 1, 1, 0]], [[0, 1, 2, 3]], [[2, 2, 0, 0], [3, 3, 3, 0]]),
        (None, [[0, 1, 2, 0], [0, 0, 1, 0]], [[3, 3, 3, 1], [1, 2, 2, 1]]),
        ([[1, 1, 1, 0], [1, 1, 1, 1]], [[0, 1, 0, 0], [0, 1, 0, 1]], [[2, 2, 1, 0], [2, 2, 2, 2]]),
        ([[1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 1, 1]], None, [[0] * 4, [0, 3, 3, 3]]),  # two positions in a cache before
        ([[0, 0, 0, 0], [1, 0, 0, 1]], None, [[0] * 4, [2, 0, 0, 2]]),
        ([[1, 1, 0, 1], [1, 0, 1, 1]], [[0, 1, 1, 2], [0, 1, 1, 2]], [[3, 3, 0, 3], [3, 0, 3, 3]]),  # masked in between
        ([[1, 1, 0, 1], [1, 0, 1, 1]], [[0, 1, 2, 3]], [[3, 3, 0, 3], [3, 0, 3, 3]]),
        ([[1, 1, 0, 1], [1, 0, 1, 1]], [[0, 1, 0, 0], [0, 0, 0, 1]], [[2, 2, 0, 1], [1, 0, 2, 2]]),  # and packed
    ],
)
def test_lengths_of_documents(mask, positions, expected):
    mask = None if mask is None else torch.tensor(mask)
    positions = None if positions is None else torch.tensor(positions)
    assert token_lengths(mask, positions, 2, 4).tolist() == expected


@pytest.mark.parametrize("T", [1, 3])
def test_documents_of_one_token_each(T):
    assert token_lengths(None, torch.zeros(2, T, dtype=torch.long), 2, T).tolist() == [[1] * T] * 2


def noise_in(name, model, batch, *, alpha=5.0, seed=7):
    """Return what the model's token embeddings get added, [B, T, E], and run the model."""
    seen = []
    embedding = ENCODERS[name](model).get_input_embeddings()
    with neftune(model, alpha):
        handle = embedding.register_forward_hook(lambda module, args, output: seen.append((args[0], output.detach())))
        torch.manual_seed(seed)
        model(**batch)
        handle.remove()
    ids, noised = seen[0]
    return noised - torch.nn.functional.embedding(ids, embedding.weight.detach())


def inputs(name, batch):
    labels = {"labels": torch.tensor([[5, 7]] * len(batch["input_ids"]))} if name == "t5" else {}
    return {key: value for key, value in batch.items() if key != "labels"} | labels


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_padded_rows_get_the_noise_of_their_real_length(name, side):
    model = MODELS[name]().train()
    batch = collate_padded([{"input_ids": row} for row in DOCUMENTS], side=side)
    noise = noise_in(name, model, inputs(name, batch))
    uniform = torch.empty(noise.shape).uniform_(-1, 1, generator=torch.manual_seed(7))
    real = batch["attention_mask"].bool()
    lengths = torch.tensor([3, 5, 2])[:, None, None]
    expected = uniform * 5.0 / (lengths * WIDTHS[name]).sqrt()
    torch.testing.assert_close(noise[real], expected[real], rtol=1e-3, atol=1e-6)
    assert not noise[~real].any()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_document_has_one_scale_packed_or_padded(name):
    model = MODELS[name]().train()
    packed = inputs(name, collate_packed([{"input_ids": row} for row in DOCUMENTS]))
    noise = noise_in(name, model, packed)[0]
    uniform = torch.empty(noise.shape).uniform_(-1, 1, generator=torch.manual_seed(7))
    lengths = torch.tensor([3] * 3 + [5] * 5 + [2] * 2)[:, None]
    torch.testing.assert_close(noise, uniform * 5.0 / (lengths * WIDTHS[name]).sqrt(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_train_mode_alone_and_no_trace_afterwards(name):
    model = MODELS[name]()
    plain = logits_of(name, model)
    before = traces(model.train())
    with neftune(model, 5.0):
        assert list(model.state_dict()) == list(before[1])
        assert not torch.equal(logits_of(name, model), logits_of(name, model))
        assert torch.equal(logits_of(name, model.eval()), plain)
        LOSSES[name](model.train(), batch_of(name)).backward()
    assert_same(before, traces(model))
    assert torch.equal(logits_of(name, model), plain)
    with pytest.raises(KeyError), neftune(model, 5.0):
        raise KeyError
    assert_same(before, traces(model))


def test_the_decoder_of_an_encoder_decoder_gets_none():
    model, seen = tiny_t5().train(), []
    decoder = model.get_decoder()
    with neftune(model, 5.0):
        handle = decoder.get_input_embeddings().register_forward_hook(lambda m, a, output: seen.append((a[0], output)))
        model(**batch_of("t5"))
        handle.remove()
    ids, output = seen[-1]
    assert torch.equal(output, nn.functional.embedding(ids, decoder.get_input_embeddings().weight))


def test_token_types_get_none():
    """GPT-2 embeds them with the module of the tokens."""
    model, seen = tiny_gpt2().train(), []
    batch = inputs("gpt2", batch_of("gpt2"))
    with neftune(model, 5.0):
        handle = model.transformer.wte.register_forward_hook(lambda m, a, output: seen.append((a[0], output)))
        model(**batch, token_type_ids=batch["input_ids"] * 0 + 3)
        handle.remove()
    noisy = [
        not torch.equal(output, nn.functional.embedding(ids, model.transformer.wte.weight)) for ids, output in seen
    ]
    assert noisy == [True, False]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_embeddings_given_by_hand_get_noise_too(name):
    model = MODELS[name]().train()
    batch = inputs(name, collate_padded([{"input_ids": row} for row in DOCUMENTS]))
    embeds = model.get_input_embeddings()(batch.pop("input_ids")).detach().requires_grad_()
    with neftune(model, 5.0):
        torch.manual_seed(7)
        noisy = model(inputs_embeds=embeds, **batch).logits
    torch.manual_seed(7)
    noise = neftune_noise(embeds, torch.tensor([3, 5, 2]), 5.0)
    torch.testing.assert_close(noisy, model(inputs_embeds=embeds + noise, **batch).logits)


def test_a_bare_body_and_positional_arguments():
    model = tiny_llama().model.train()
    ids, mask = torch.tensor([[5, 7, 11], [13, 17, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    with neftune(model, 5.0):
        torch.manual_seed(7)
        first = model(ids, mask).last_hidden_state
        torch.manual_seed(7)
        assert torch.equal(model(input_ids=ids, attention_mask=mask).last_hidden_state, first)


@pytest.mark.parametrize("method", [LoRA(rank=2, alpha=4), PrefixTuning(tokens=3)])
def test_under_adapters(method):
    model = tiny_llama().train()
    attach(model, method)
    before = traces(model)
    with neftune(model, 5.0):
        assert not torch.equal(logits_of("llama", model), logits_of("llama", model))
    assert_same(before, traces(model))


def test_inside_a_module_of_ones_own():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = tiny_bert()

        def forward(self, ids):
            return self.inner(ids).logits

    model, ids = Outer().train(), torch.tensor([[5, 7, 11]])
    with neftune(model, 5.0):
        assert not torch.equal(model(ids), model(ids))


def test_a_compiled_model_that_ran_before_gets_noise_inside_alone():
    model, ids = tiny_llama().train(), torch.tensor([[5, 7, 11, 13, 17]])
    run = torch.compile(model, backend="eager")
    plain = run(ids, use_cache=False).logits
    with neftune(model, 5.0):
        torch.manual_seed(7)
        noisy = run(ids, use_cache=False).logits
        torch.manual_seed(7)
        torch.testing.assert_close(model(ids, use_cache=False).logits, noisy)
        assert not torch.equal(run(ids, use_cache=False).logits, noisy)
    assert (noisy - plain).abs().max() > 1e-3
    assert torch.equal(run(ids, use_cache=False).logits, plain)


def test_nested_use_raises_and_the_outer_one_goes_on():
    model = tiny_llama().train()
    with neftune(model, 5.0):
        with pytest.raises(ValueError, match="neftune is on this model already"), neftune(model, 3.0):
            pass
        assert not torch.equal(logits_of("llama", model), logits_of("llama", model))


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_two_runs_of_one_seed_are_equal_and_so_is_a_resumed_one(name, tmp_path):
    context, loss = partial(neftune, alpha=5.0), LOSSES[name]
    knobs = {"loss": loss} | ({} if name == "llama" else {"collate": collate_padded})
    whole = trained(MODELS[name](), context, **knobs)
    assert equal(whole, trained(MODELS[name](), context, **knobs))
    assert not equal(whole, trained(MODELS[name](), partial(neftune, alpha=9.0), **knobs))
    trained(MODELS[name](), context, folder=tmp_path / "run", stop=2, **knobs)
    assert equal(whole, trained(MODELS[name](), context, folder=tmp_path / "run", resume=True, **knobs))


def test_activation_checkpointing_changes_nothing():
    whole = trained(tiny_llama(), partial(neftune, alpha=5.0))
    other = trained(tiny_llama(), partial(neftune, alpha=5.0), activation_checkpointing=True)
    for name, value in whole.items():
        torch.testing.assert_close(other[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.ones(2), 5.0), r"embeddings \[B, T, E\] and lengths .* got \[2, 3\] and \[2\]"),
        ((torch.ones(2, 3, 5), torch.ones(3), 5.0), r"got \[2, 3, 5\] and \[3\]"),
        ((torch.ones(2, 3, 5), torch.tensor([2, 4]), 5.0), r"lengths must be from 0 to T = 3; got \[2, 4\]"),
        ((torch.ones(2, 3, 5), torch.tensor([2, -1]), 5.0), r"got \[2, -1\]"),
        ((torch.ones(2, 3, 5), torch.tensor([2, 3]), 0), "alpha must be a number above 0; got 0"),
    ],
)
def test_what_the_function_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        neftune_noise(*arguments)


def test_what_the_block_refuses():
    model, ids = tiny_llama().train(), torch.tensor([[5, 7, 11]])
    with pytest.raises(ValueError, match="alpha must be a number above 0; got -1"):
        neftune(model, -1).__enter__()
    with pytest.raises(TypeError, match=r"neftune needs one Hugging Face model .* this Linear holds none"):
        neftune(nn.Linear(3, 5), 5.0).__enter__()
    with neftune(model, 5.0):
        with pytest.raises(ValueError, match=r"off an attention_mask \[B, T\], T = 3; got \[1, 1, 3, 3\]"):
            model(ids, attention_mask=torch.ones(1, 1, 3, 3))
        with pytest.raises(ValueError, match=r"off position_ids \[B, T\], T = 3; got \[1, 1, 3\]"):
            model(ids, position_ids=torch.tensor([[[0, 1, 2]]]))
        with pytest.raises(ValueError, match="got cu_seq_lens_q alone: give both"):
            model(ids, cu_seq_lens_q=torch.tensor([0, 3]))
