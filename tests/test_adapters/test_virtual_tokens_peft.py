"""Prompts and prefixes with PEFT as oracle: what it writes we read, what we write it reads; the same outputs."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BartForConditionalGeneration, OPTConfig, OPTForCausalLM

from llmtune.adapters import PrefixTuning, PromptTuning, PTuning, adapter_names, adapter_parameters, attach, load, save
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

peft = pytest.importorskip("peft", reason="PEFT is the oracle of these tests")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*:UserWarning", "ignore:.*:FutureWarning", "ignore:.*:DeprecationWarning"
)

B, T, N = 3, 11, 5
GENERATOR = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 97, (B, T), generator=GENERATOR)
MASK = torch.ones_like(IDS)
MASK[1, 7:], MASK[2, 10:] = 0, 0
classifier = partial(tiny_bert, labels=3)
head = {"train_modules": ["classifier"]}
lm, features, pair, classes = "CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM", "SEQ_CLS"


def tiny_bart():
    """Decoder layers whose cross-attention is called encoder_attn, of the class of their own attention."""
    config = BartConfig(
        vocab_size=97, d_model=26, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=31, decoder_ffn_dim=37, max_position_embeddings=64, dropout=0.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = BartForConditionalGeneration(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


def tiny_opt():
    """A model that goes round the body it shows, to the decoder within."""
    config = OPTConfig(
        vocab_size=97, hidden_size=26, ffn_dim=31, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0,
        max_position_embeddings=64, word_embed_proj_dim=26, dropout=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return OPTForCausalLM(config).eval()


CASES = {  # name: (model, PEFT's task, record, what PEFT calls it beside num_virtual_tokens)
    "prompt llama": (tiny_llama, lm, PromptTuning(tokens=N), {}),
    "prompt llama tied": (partial(tiny_llama, tied=True), lm, PromptTuning(tokens=N, initialise="vocabulary"),
                          {"prompt_tuning_init": "SAMPLE_VOCAB"}),
    "prompt gpt2": (tiny_gpt2, lm, PromptTuning(tokens=1), {"num_virtual_tokens": 1}),
    "prompt bert": (tiny_bert, features, PromptTuning(tokens=N), {}),
    "prompt classifier": (classifier, classes, PromptTuning(tokens=N, **head), {}),
    "prompt t5": (tiny_t5, pair, PromptTuning(tokens=N), {}),
    "p-tuning llama": (tiny_llama, lm, PTuning(tokens=N), {}),
    "p-tuning gpt2": (tiny_gpt2, lm, PTuning(tokens=N, hidden=13), {"encoder_hidden_size": 13}),
    "p-tuning llama lstm": (
        tiny_llama, lm, PTuning(tokens=N, encoder="lstm", hidden=7, layers=3, dropout=0.3),
        {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 7, "encoder_num_layers": 3,
         "encoder_dropout": 0.3},
    ),
    "p-tuning bert lstm": (tiny_bert, features, PTuning(tokens=N, encoder="lstm"),
                           {"encoder_reparameterization_type": "LSTM"}),
    "p-tuning classifier": (classifier, classes, PTuning(tokens=N, **head), {}),
    "p-tuning t5": (tiny_t5, pair, PTuning(tokens=N, hidden=7), {"encoder_hidden_size": 7}),
    "prefix llama": (tiny_llama, lm, PrefixTuning(tokens=N), {}),
    "prefix llama eager": (partial(tiny_llama, attention="eager"), lm, PrefixTuning(tokens=2),
                           {"num_virtual_tokens": 2}),
    "prefix llama projection": (tiny_llama, lm, PrefixTuning(tokens=N, projection=True), {"prefix_projection": True}),
    "prefix gpt2": (tiny_gpt2, lm, PrefixTuning(tokens=N), {}),
    "prefix gpt2 projection": (tiny_gpt2, lm, PrefixTuning(tokens=N, projection=True, hidden=7),
                               {"prefix_projection": True, "encoder_hidden_size": 7}),
    "prefix bert": (tiny_bert, features, PrefixTuning(tokens=N), {}),
    "prompt bart": (tiny_bart, pair, PromptTuning(tokens=N), {}),
    "prompt opt": (tiny_opt, lm, PromptTuning(tokens=N), {}),
    "p-tuning opt": (tiny_opt, lm, PTuning(tokens=N), {}),
    "prefix opt": (tiny_opt, lm, PrefixTuning(tokens=N), {}),
    "prefix bart": (tiny_bart, pair, PrefixTuning(tokens=N), {}),
    "prefix t5": (tiny_t5, pair, PrefixTuning(tokens=N), {"token_dim": 22}),  # PEFT takes 26 / 2 for a head's 11
}  # fmt: skip
KINDS = {
    PromptTuning: peft.PromptTuningConfig,
    PTuning: peft.PromptEncoderConfig,
    PrefixTuning: peft.PrefixTuningConfig,
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def output(model, mask=MASK):
    inputs = {"labels": IDS[:, :7].contiguous()} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        out = model.eval()(input_ids=IDS, attention_mask=mask, **inputs).logits
    return out[:, -T:] if out.ndim == 3 and out.shape[1] > T else out  # PEFT's has the virtual positions before


def move(parameters):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(parameters.items()):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def close(one, other):
    assert one.shape == other.shape
    assert float((one - other).abs().max()) <= 1e-6 * float(other.abs().max())


def written(folder):
    return {key: (tuple(t.shape), t.dtype) for key, t in load_file(folder / "adapter_model.safetensors").items()}


def entries(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def peft_model(make, task, record, more):
    config = KINDS[type(record)](**{"task_type": task, "num_virtual_tokens": N} | more)
    theirs = peft.get_peft_model(make(), config)
    move({name: p for name, p in theirs.named_parameters() if p.requires_grad})
    return theirs


def test_what_we_write_peft_reads(case, tmp_path):
    make, task, record, _ = case
    model = make()
    start = output(model)
    attach(model, record)
    move(adapter_parameters(model))
    save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours")
    assert not torch.allclose(output(model), start, atol=1e-3)
    for mask in (MASK, None):
        close(output(model, mask), output(theirs, mask))
    theirs.save_pretrained(tmp_path / "theirs")
    assert written(tmp_path / "ours") == written(tmp_path / "theirs")
    ours, back = entries(tmp_path / "ours"), entries(tmp_path / "theirs")
    assert ours.keys() | {"peft_version"} == back.keys()
    assert ours["task_type"] == task
    assert {key: back[key] for key in ours if key != "modules_to_save"} == {
        key: value for key, value in ours.items() if key != "modules_to_save"
    }


def test_what_peft_writes_we_read(case, tmp_path):
    make, task, record, more = case
    theirs = peft_model(make, task, record, more).eval()  # in training mode PEFT writes what dropout has left
    theirs.save_pretrained(tmp_path / "theirs")
    model = make()
    report = load(model, tmp_path / "theirs")
    for mask in (MASK, None):
        close(output(model, mask), output(theirs, mask))
    save(model, tmp_path / "ours")
    said, ours = entries(tmp_path / "theirs"), entries(tmp_path / "ours")
    for key in ("num_layers", "num_attention_heads", "token_dim", "num_virtual_tokens", "peft_type", "task_type"):
        assert ours[key] == said[key]
    sizes, doubled = written(tmp_path / "theirs"), task == pair and not isinstance(record, PrefixTuning)
    if doubled:
        assert sizes["prompt_embeddings"][0][0] == 2 * N
        assert "rows 5 to 9 of prompt_embeddings, which nothing reads" in report.unmatched[0]
        sizes["prompt_embeddings"] = ((N, 26), torch.float32)
    assert report.unmatched == (("modules_to_save score",) if task == classes else report.unmatched[: int(doubled)])
    assert written(tmp_path / "ours") == sizes
    close(output(peft.PeftModel.from_pretrained(make(), tmp_path / "ours")), output(model))


def test_the_loss_is_pefts_where_the_first_token_is_no_target():
    for make, record in ((tiny_llama, PromptTuning(tokens=N)), (tiny_gpt2, PrefixTuning(tokens=N))):
        model, labels = make(), IDS.masked_fill(MASK == 0, -100)
        labels[:, 0] = -100
        attach(model, record)
        theirs = peft.get_peft_model(make(), KINDS[type(record)](task_type=lm, num_virtual_tokens=N))
        table = next(iter(adapter_parameters(model).values()))
        theirs.prompt_encoder["default"].embedding.weight.data.copy_(table.detach())
        inputs = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
        close(model(**inputs).loss.detach(), theirs(**inputs).loss.detach())


def test_token_types_are_widened_as_pefts(tmp_path):
    model = classifier()
    attach(model, PromptTuning(tokens=N, **head))
    save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(classifier(), tmp_path).eval()
    inputs = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": (torch.arange(T) > 4).long().expand(B, -1)}
    with torch.no_grad():
        close(model(**inputs).logits, theirs(**inputs).logits)
        assert not torch.equal(model(**inputs).logits, output(model))


def test_a_classifier_whose_head_is_not_trained_is_for_peft_a_model_of_features(tmp_path):
    model = classifier()
    attach(model, PromptTuning(tokens=N))
    save(model, tmp_path)
    assert entries(tmp_path)["task_type"] == "FEATURE_EXTRACTION"
    close(output(model), output(peft.PeftModel.from_pretrained(classifier(), tmp_path)))


def test_a_window_hides_a_prefix_as_with_peft(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97, hidden_size=26, intermediate_size=37, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, head_dim=14, sliding_window=7,
    )  # fmt: skip
    models = [MistralForCausalLM(config) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    attach(models[0], PrefixTuning(tokens=N))
    move(adapter_parameters(models[0]))
    save(models[0], tmp_path)
    close(output(models[0], None), output(peft.PeftModel.from_pretrained(models[1], tmp_path), None))


@pytest.mark.parametrize("record", [PTuning(tokens=N), PrefixTuning(tokens=N, projection=True)])
def test_a_file_is_not_read_into_a_network(record, tmp_path):
    model = tiny_llama()
    attach(model, record)
    save(model, tmp_path)
    before = {name: p.clone() for name, p in adapter_parameters(model).items()}
    with pytest.raises(
        ValueError, match=r"holds what a network made, .* detach it first, and loading attaches a table"
    ):
        load(model, tmp_path)
    assert all(torch.equal(p, before[name]) for name, p in adapter_parameters(model).items())
    again = tiny_llama()
    load(again, tmp_path)
    move(adapter_parameters(again))
    save(again, tmp_path / "again")
    load(again, tmp_path)  # a table is read into
    assert torch.equal(output(again), output(model))


def test_other_entries_are_refused_by_name(tmp_path):
    model = tiny_llama()
    attach(model, PrefixTuning(tokens=N))
    save(model, tmp_path)
    path, was = tmp_path / "adapter_config.json", entries(tmp_path)
    for change, message in (
        ({"a_new_option": 1}, "a_new_option=1 asks for something that is not offered here"),
        ({"num_virtual_tokens": None}, "tokens must be a whole number of at least 1; got None"),
        ({"num_virtual_tokens": 7}, r"1 mismatched: prompt_embeddings \(5, 112\) in the file, \(7, 112\) in the model"),
        (
            {"num_attention_heads": 4},
            r"the prefixes are for 2 layers of 4 key/value heads and 28 numbers a key; the model has 2, 2 and 28",
        ),
    ):
        path.write_text(json.dumps(was | change))
        again = tiny_llama()
        with pytest.raises(ValueError, match=message):
            load(again, tmp_path)
        assert adapter_names(again) == []


def test_the_dtype_goes_round(tmp_path):
    model = tiny_llama().to(torch.bfloat16)
    attach(model, PromptTuning(tokens=N, dtype=torch.bfloat16))
    save(model, tmp_path)
    again = tiny_llama().to(torch.bfloat16)
    load(again, tmp_path)
    assert {p.dtype for p in adapter_parameters(again).values()} == {torch.bfloat16}
    assert torch.equal(output(again), output(model))


def test_a_doubled_table_of_another_length_is_no_fit(tmp_path):
    model = tiny_t5()
    attach(model, PromptTuning(tokens=N))
    save(model, tmp_path)
    save_file({"prompt_embeddings": torch.zeros(3 * N, 26)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"1 mismatched: prompt_embeddings \(15, 26\) in the file, \(5, 26\)"):
        load(tiny_t5(), tmp_path)
