"""Three tiny tasks with each method of adapters for task sequences, in the loop, saved and loaded between the tasks."""

import pytest
import torch

from llmtune.adapters import AdapterStack, LoRA, adapter_parameters, attach
from llmtune.adapters.attach import adapter_layers
from llmtune.data.collate import collate_padded
from llmtune.errors import CheckpointError
from llmtune.forgetting import SLAO, OrthogonalLoRA, inflora_start, input_basis
from llmtune.integrations import with_loss
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.classification import classification_loss
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.types import Callback

TASKS = ("maths", "french", "code")
KINDS = {
    "llama": (tiny_llama, causal_lm_loss, {"targets": ["q_proj", "down_proj"]}),
    "gpt2": (tiny_gpt2, causal_lm_loss, {"targets": ["c_attn", "c_fc"]}),
    "bert": (lambda: tiny_bert(labels=3), classification_loss, {"targets": ["query"], "train_modules": ["classifier"]}),
    "t5": (tiny_t5, sequence_to_sequence_loss, {"targets": ["q", "wo"]}),
}


def rows_of(kind, task):
    generator = torch.Generator().manual_seed(task)
    rows = []
    for number in range(8):
        ids = torch.randint(3 + 30 * task, 33 + 30 * task, (4 + number % 3,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": number % 3 if kind == "bert" else ids})
    return rows


def collate(rows):
    if not isinstance(rows[0]["labels"], int):
        return collate_padded(rows)
    batch = collate_padded([{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows])
    return batch | {"labels": torch.tensor([row["labels"] for row in rows])}


def fit(kind, model, task, *, penalties=(), callbacks=()):
    settings = LoopSettings(max_steps=3, rows_per_step=4, learning_rate=1e-2, weight_decay=0.1, progress=False)
    loop = TrainingLoop(
        model, rows_of(kind, task), settings=settings, collate=collate, loss=KINDS[kind][1], penalties=penalties,
        callbacks=callbacks,
    )  # fmt: skip
    return loop.fit()


def given(kind, model, task=0):
    batch = collate(rows_of(kind, task))
    if kind != "t5":
        batch = {name: value for name, value in batch.items() if name != "labels"}
    with torch.no_grad():
        return model.eval()(**batch).logits


def reloaded(kind, stack, folder):
    """Return the stack as it comes back from files, onto a new model."""
    stack.save(folder)
    again = AdapterStack.load(KINDS[kind][0](), folder)
    assert torch.equal(given(kind, again.model), given(kind, stack.model))
    assert (again.names, again.active, again.trained) == (stack.names, stack.active, stack.trained)
    return again


@pytest.mark.parametrize("method", ["IncLoRA", "O-LoRA", "InfLoRA"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_for_every_task(kind, method, tmp_path):
    stack = AdapterStack(KINDS[kind][0]())
    seen, protected, penalty = {(): given(kind, stack.model)}, None, OrthogonalLoRA(strength=3.0)
    for number, task in enumerate(TASKS):
        stack.start(LoRA(rank=4, alpha=8, **KINDS[kind][2]), task)
        assert torch.equal(given(kind, stack.model), seen[tuple(stack.names[:-1])])
        old = {name: [p.clone() for p in adapter_parameters(stack.model, name).values()] for name in stack.names[:-1]}
        batches = [collate(rows_of(kind, number))]
        if method == "InfLoRA":
            report = inflora_start(stack.model, task, batches, protected=protected)
        history = fit(kind, stack.model, number, penalties=[penalty] if method == "O-LoRA" else ())
        if method == "O-LoRA":
            assert (history[-1]["penalty"] > 0) == (number > 0)
            assert all(value < 1 for value in penalty.report(stack.model).cosines.values())
        if method == "InfLoRA":
            check_untouched(stack.model, task, protected)
            protected = input_basis(stack.model, batches, energy=0.5, modules=report.rows, extend=protected)
        for name, parameters in old.items():
            now = adapter_parameters(stack.model, name).values()
            assert all(torch.equal(p, q) for p, q in zip(parameters, now, strict=True))
        seen[tuple(stack.names)] = given(kind, stack.model)
        stack = reloaded(kind, stack, tmp_path / task)
    for names, expected in seen.items():
        stack.use(names)
        assert torch.equal(given(kind, stack.model), expected), names
    assert not torch.equal(seen[TASKS], seen[TASKS[:2]])


def check_untouched(model, task, protected):
    """Check that a trained change is 0 on the protected inputs, to float32's rounding."""
    for (place, basis), layer in zip((protected or {}).items(), low_rank_layers(model, task), strict=bool(protected)):
        change = layer.deltas()["weight"].T if layer.transposed else layer.deltas()["weight"]
        assert change.norm() > 0, place
        assert (change @ basis).norm() < 1e-5 * change.norm(), place


def low_rank_layers(model, task):
    return [layer for layer in adapter_layers(model, task) if layer.low_rank() is not None]


def test_o_lora_keeps_the_tasks_further_apart_than_inclora():
    cosines = []
    for strength in (0.0, 1.0):
        torch.manual_seed(0)
        stack = AdapterStack(tiny_llama())
        for number, task in enumerate(TASKS):
            stack.start(LoRA(rank=4, alpha=8, targets=["q_proj"]), task)
            for _ in range(8):
                fit("llama", stack.model, number, penalties=[OrthogonalLoRA(strength)])
        cosines.append(OrthogonalLoRA(1.0).report(stack.model).cosines)
    assert all(cosines[1][name] < 0.3 * cosines[0][name] for name in TASKS[:2])


@pytest.mark.parametrize("kind", KINDS)
def test_seqlora_is_one_adapter_that_trains_on(kind):
    model = KINDS[kind][0]()
    stack = AdapterStack(model)
    stack.start(LoRA(rank=4, alpha=8, **KINDS[kind][2]), "all")
    outputs = [given(kind, model)]
    for number in range(3):
        fit(kind, model, number)
        outputs.append(given(kind, model))
        assert not torch.equal(outputs[-1], outputs[-2])
    assert stack.names == stack.trained == ["all"]


@pytest.mark.parametrize("kind", KINDS)
def test_slao_is_one_adapter_and_one_b(kind, tmp_path):
    model = KINDS[kind][0]()
    attach(model, LoRA(rank=4, alpha=8, **KINDS[kind][2]))
    slao, tuned, merged = SLAO(model), None, None
    for number in range(3):
        slao.start_task()
        fit(kind, model, number, callbacks=[slao])
        layers = low_rank_layers(model, "default")
        tuned = [layer.lora_b.detach().clone() for layer in layers]
        root = (number + 1) ** 0.5
        merged = tuned if merged is None else [m + (b - m) / root for m, b in zip(merged, tuned, strict=True)]
        slao.finish_task()
        assert all(
            torch.allclose(layer.lora_b, m, rtol=1e-5, atol=1e-7) for layer, m in zip(layers, merged, strict=True)
        )
        again = reloaded(kind, AdapterStack(model), tmp_path / str(number)).model
        restored = SLAO(again)
        restored.load_state_dict(slao.state_dict())
        model, slao = again, restored
    assert slao.tasks == 3


def test_a_killed_inflora_task_goes_on_bit_for_bit(tmp_path):
    """The stack from between the tasks and the loop's checkpoint are all there is to keep; another A is refused."""

    def loop(model, steps):
        settings = LoopSettings(
            max_steps=steps, rows_per_step=4, schedule="constant", progress=False, folder=tmp_path / "run", save_every=1
        )
        return TrainingLoop(model, rows_of("llama", 0), settings=settings, collate=collate, callbacks=[stop])

    class Stop(Callback):
        after = 1

        def on_step_end(self, loop, metrics):
            if loop.step == self.after:
                raise KeyboardInterrupt

    stop, stack = Stop(), AdapterStack(tiny_llama())
    stack.start(LoRA(rank=4, alpha=8, targets=["q_proj"]), "maths")
    inflora_start(stack.model, "maths", [collate(rows_of("llama", 0))])
    stack.save(tmp_path / "stack")
    with pytest.raises(KeyboardInterrupt):
        loop(stack.model, 3).fit()
    stop.after = None
    again = AdapterStack.load(tiny_llama(), tmp_path / "stack").model
    loop(again, 3).fit(resume=True)
    whole = AdapterStack.load(tiny_llama(), tmp_path / "stack").model
    settings = LoopSettings(max_steps=3, rows_per_step=4, schedule="constant", progress=False)
    TrainingLoop(whole, rows_of("llama", 0), settings=settings, collate=collate).fit()
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), whole.parameters(), strict=True))
    other = AdapterStack.load(tiny_llama(), tmp_path / "stack").model
    with torch.no_grad():
        adapter_layers(other)[0].lora_a += 1
    with pytest.raises(CheckpointError, match="lora_a"):
        loop(other, 4).fit(resume=True)


def test_o_lora_in_the_trainer(tmp_path):
    from transformers import Trainer, TrainingArguments

    stack, cosines = AdapterStack(tiny_llama()), []
    stack.start(LoRA(rank=4, alpha=8, targets=["q_proj"]), "maths")
    stack.start(LoRA(rank=4, alpha=8, targets=["q_proj"]), "french")
    penalty = OrthogonalLoRA(strength=30.0)
    cosines.append(penalty.report(stack.model).cosines["maths"])
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=10, learning_rate=5e-3, per_device_train_batch_size=4, report_to=[],
        disable_tqdm=True, use_cpu=True, save_strategy="no", remove_unused_columns=False,
    )  # fmt: skip
    kind = with_loss(Trainer, causal_lm_loss, penalties=[penalty])
    kind(stack.model, arguments, train_dataset=rows_of("llama", 1), data_collator=collate).train()
    cosines.append(penalty.report(stack.model).cosines["maths"])
    assert cosines[1] < 0.5 * cosines[0]
