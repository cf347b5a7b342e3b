"""Samples on the way: what the model would write, and a run that is the same with them and without."""

import json
import math

import pytest
import torch
from torch import nn

from llmtune.data.collate import collate_padded
from llmtune.errors import LlmtuneWarning
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.training.loop import TrainingLoop
from llmtune.training.samples import GenerateSamples, greedy
from llmtune.training.settings import LoopSettings


class Letters:
    """A tokenizer that writes token i as <i>."""

    def __call__(self, text):
        return {"input_ids": [int(part) for part in text.strip("<>").split("><")]}

    def decode(self, ids, *, skip_special_tokens):
        assert skip_special_tokens
        return "".join(f"<{token}>" for token in ids)

    def save_pretrained(self, folder):
        folder.mkdir()
        (folder / "tokenizer.json").write_text("{}")


def loop(callbacks, model=None, **changed):
    settings = LoopSettings(
        **({"max_steps": 4, "rows_per_step": 4, "learning_rate": 0.05, "progress": False} | changed)
    )
    return TrainingLoop(
        model or tiny_gpt2(dropout=0.3), uneven_rows(), settings=settings, callbacks=callbacks, collate=collate_padded,
        eval_data=uneven_rows(3) if settings.eval_every else None,
    )  # fmt: skip


@torch.no_grad()
def by_hand(model, ids, count, end):
    """The likeliest token each time, by whole forward passes without a cache."""
    for _ in range(count):
        logits = model.eval()(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids = [*ids, int(logits[0, -1].argmax())]
        if ids[-1] == end:
            break
    return ids


def test_the_likeliest_token_each_time():
    for model in (tiny_llama(), tiny_gpt2(dropout=0.3).train()):
        model.generation_config.do_sample, model.generation_config.temperature = True, 0.7
        model.config.use_cache = False
        found = greedy(model, [5, 7, 11], max_new_tokens=13, device=torch.device("cpu"))
        assert not model.config.use_cache
        assert model.generation_config.do_sample
        assert found == by_hand(model, [5, 7, 11], 13, 2)[3:]


def test_an_encoder_decoder_writes_its_decoder_s_tokens():
    model = tiny_t5().eval()
    found = greedy(model, [5, 7, 11], max_new_tokens=13, device=torch.device("cpu"))
    ids = [0]
    with torch.no_grad():
        for _ in range(13):
            logits = model(input_ids=torch.tensor([[5, 7, 11]]), decoder_input_ids=torch.tensor([ids])).logits
            ids.append(int(logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
    assert found == ids[1:]


def test_samples_are_those_of_their_step_and_change_nothing(tmp_path, capsys):
    plain = loop([], eval_every=2)
    plain.fit()
    prompts = ["<5><7>", [11, 13, 17]]
    samples = GenerateSamples(prompts, tokenizer=Letters(), max_new_tokens=5)
    watched = loop([samples], eval_every=2, folder=tmp_path)
    watched.fit()
    for one, other in zip(plain.model.parameters(), watched.model.parameters(), strict=True):
        assert torch.equal(one, other)
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(line["step"], line["prompt"]) for line in lines] == [
        (step, prompt) for step in (2, 4) for prompt in ("<5><7>", "11 13 17")
    ]
    assert lines[0]["text"] != lines[2]["text"], "the model has learned in between"
    for line, ids in zip(lines[2:], ([5, 7], [11, 13, 17]), strict=True):
        wanted = by_hand(watched.model, ids, 5, 2)[len(ids) :]
        assert line["text"] == "".join(f"<{token}>" for token in wanted)
    shown = capsys.readouterr().out
    assert f"step 2: '<5><7>' -> {lines[0]['text']!r}" in shown


def test_every_so_many_steps_without_evaluations_or_tokenizer(tmp_path):
    run = loop([GenerateSamples([[5, 7]], every=3, max_new_tokens=2)], folder=tmp_path, max_steps=7)
    run.fit()
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 6]
    assert lines[0]["prompt"] == "5 7"
    assert [int(token) for token in lines[0]["text"].split()]


def test_a_resumed_run_drops_the_samples_beyond_its_step(tmp_path):
    file = tmp_path / "samples.jsonl"
    rows = [{"step": step, "prompt": "5", "text": "old"} for step in (1, 2, 3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 1, "pro')
    run = loop([], folder=tmp_path)
    run.step = 2
    GenerateSamples([[5]], every=1).on_fit_start(run)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [1, 2]


def test_the_loop_s_tokenizer_is_the_default(tmp_path):
    run = loop([GenerateSamples(["<5><7>"], every=4, max_new_tokens=3)], folder=tmp_path)
    run.tokenizer = Letters()
    run.fit()
    assert json.loads((tmp_path / "samples.jsonl").read_text())["text"].startswith("<")


def test_a_failure_is_told_once_and_does_not_cost_the_run():
    run = loop([GenerateSamples([[5]], every=1)])
    run.model.generate = lambda **_: 1 / 0
    with pytest.warns(LlmtuneWarning) as seen:
        history = run.fit()
    assert len(seen) == 1
    assert "samples at step 1 failed and training goes on: ZeroDivisionError" in str(seen[0].message)
    assert all(math.isfinite(loss) for loss in history.column("loss"))
    assert run.model.transformer.h[0].training is False, "fit puts the modes back"


def test_an_encoder_decoder_in_a_run(tmp_path):
    rows = [{"input_ids": [5, 7, 11], "labels": [13, 17, 1]}, {"input_ids": [19, 23], "labels": [29, 1]}] * 4
    settings = LoopSettings(max_steps=2, rows_per_step=4, progress=False, folder=tmp_path)
    TrainingLoop(
        tiny_t5(), rows, settings=settings, collate=collate_padded, loss=sequence_to_sequence_loss,
        callbacks=[GenerateSamples([[5, 7, 11]], every=2, max_new_tokens=3)],
    ).fit()  # fmt: skip
    assert len(json.loads((tmp_path / "samples.jsonl").read_text())["text"].split()) <= 3


@pytest.mark.parametrize("model", [tiny_bert, lambda: nn.Linear(3, 5)])
def test_a_model_that_cannot_generate_is_refused(model):
    run = loop([])
    run.model = model()
    with pytest.raises(TypeError, match=r"needs a model that can generate; (BertForMaskedLM|Linear) cannot"):
        GenerateSamples([[5]], every=1).on_fit_start(run)


def test_what_is_missing_is_said_before_the_first_step():
    with pytest.raises(ValueError, match="prompts that are strings need a tokenizer"):
        loop([GenerateSamples(["Once"], every=1)]).fit()
    with pytest.raises(ValueError, match="samples come after evaluations, and there will be none: give every="):
        loop([GenerateSamples([[5]])]).fit()


@pytest.mark.parametrize(
    ("prompts", "changed", "error", "message"),
    [
        ("Once", {}, ValueError, "prompts must be a list of one or more prompts, none of them empty; got 'Once'"),
        ([], {}, ValueError, "prompts must be a list of one or more"),
        (["Once", ""], {}, ValueError, "none of them empty"),
        ([["Once"]], {}, TypeError, r"a prompt must be a string or a list of token ids; got \['Once'\]"),
        ([[5]], {"every": 0}, ValueError, "every must be a whole number of at least 1; got 0"),
        ([[5]], {"max_new_tokens": 0.5}, ValueError, "max_new_tokens must be a whole number of at least 1; got 0.5"),
    ],
)
def test_what_is_refused(prompts, changed, error, message):
    with pytest.raises(error, match=message):
        GenerateSamples(prompts, **changed)
