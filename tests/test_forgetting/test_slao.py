"""SLAO: the start is an orthonormal basis of A's rows, the merge moves B by 1 / sqrt(task), and memory is constant."""

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from llmtune.adapters import DoRA, LoRA, attach, merge
from llmtune.adapters.attach import adapter_layers
from llmtune.errors import CheckpointError
from llmtune.forgetting import SLAO, merged_b, orthonormal_start
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.testing.small import moved
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings

CONFIG = LoRA(rank=3, alpha=5, targets=["q_proj", "up_proj"])


def gram_schmidt(a):
    """Return the rows made orthonormal one after the other: the Q^T whose R has a positive diagonal."""
    done = []
    for row in a.double():
        rest = row - sum(((row @ other) * other for other in done), torch.zeros_like(row))
        done.append(rest / rest.norm())
    return torch.stack(done)


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
def test_the_start_is_gram_schmidts_basis_of_the_rows(kind):
    a = torch.randn(5, 17, dtype=kind)
    found = orthonormal_start(a)
    assert found.dtype == kind
    torch.testing.assert_close(found.double(), gram_schmidt(a), rtol=0, atol=2e-6 if kind == torch.float32 else 1e-13)
    torch.testing.assert_close(found @ found.T, torch.eye(5, dtype=kind))


def test_a_row_that_hangs_on_the_others_leaves_no_row_of_0():
    a = torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]])
    found = orthonormal_start(a)
    torch.testing.assert_close(found @ found.T, torch.eye(2))


def test_the_merge_moves_by_one_over_the_root_of_the_task():
    before, tuned = torch.randn(5, 3), torch.randn(5, 3)
    assert torch.equal(merged_b(before, tuned, 1), tuned)
    torch.testing.assert_close(merged_b(before, tuned, 4), 0.5 * (before + tuned))
    torch.testing.assert_close(merged_b(before, tuned, 3), before + (tuned - before) / 3**0.5)
    half = merged_b(before.bfloat16(), tuned.bfloat16(), 4)
    assert torch.equal(half, (0.5 * (before.bfloat16().float() + tuned.bfloat16().float())).bfloat16())


@pytest.mark.parametrize(
    ("make", "targets"),
    [
        (tiny_llama, ["q_proj"]),
        (tiny_gpt2, ["c_attn", "wpe"]),
        (tiny_bert, ["word_embeddings"]),
        (tiny_t5, ["q", "wo"]),
    ],
)
def test_four_tasks_by_hand(make, targets):
    model = make()
    attach(model, LoRA(rank=3, alpha=5, targets=targets), "all")
    slao, layers = SLAO(model, "all"), adapter_layers(model, "all")
    tuned_a = tuned_b = merged = None
    for task in range(1, 5):
        slao.start_task()
        for index, layer in enumerate(layers if task > 1 else ()):
            torch.testing.assert_close(layer.lora_a.double(), gram_schmidt(tuned_a[index]), rtol=0, atol=1e-5)
            assert torch.equal(layer.lora_b, tuned_b[index])
        moved(model, seed=task)
        tuned_a = [layer.lora_a.detach().clone() for layer in layers]
        tuned_b = [layer.lora_b.detach().clone() for layer in layers]
        merged = tuned_b if task == 1 else [m + (b - m) / task**0.5 for m, b in zip(merged, tuned_b, strict=True)]
        slao.finish_task()
        for index, layer in enumerate(layers):
            assert torch.equal(layer.lora_a, tuned_a[index])
            torch.testing.assert_close(layer.lora_b.detach(), merged[index], rtol=1e-6, atol=1e-6)
        kept = slao.state_dict()["b"]
        assert sum(b.numel() for b in kept.values()) == sum(layer.lora_b.numel() for layer in layers)
    assert (slao.tasks, slao.training) == (4, False)


def adapted():
    model = tiny_llama()
    attach(model, CONFIG)
    return model, SLAO(model)


@pytest.mark.parametrize("between", [True, False])
def test_state_goes_through_tensors_bit_for_bit(between):
    """Killed between tasks or inside one, with the adapter's own tensors beside."""
    model, slao = adapted()
    for task in (1, 2):
        slao.start_task()
        moved(model, seed=task)
        slao.finish_task()
    if not between:
        slao.start_task()
        moved(model, seed=3)
    state = slao.state_dict()
    tensors = load(save(state["b"]))
    again, other = adapted()
    again.load_state_dict(model.state_dict())
    other.load_state_dict({**state, "b": tensors})
    for b in tensors.values():
        b.fill_(7)  # nothing is shared with what was given
    for one, m in ((slao, model), (other, again)):
        if between:
            one.start_task()
            moved(m, seed=3)
        one.finish_task()
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())
    assert other.tasks == 3


def test_the_loop_trains_no_merge_and_its_checkpoint_has_the_rest(tmp_path):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [5, 6, 7, 8]}] * 4

    def loop(model, slao, steps, folder):
        every = None if folder is None else 1
        settings = LoopSettings(max_steps=steps, rows_per_step=2, progress=False, folder=folder, save_every=every)
        return TrainingLoop(model, rows, settings=settings, callbacks=[slao])

    model, slao = adapted()
    with pytest.raises(ValueError, match=r"call start_task\(\) before fit\(\)"):
        loop(model, slao, 2, None).fit()
    slao.start_task()
    loop(model, slao, 2, tmp_path / "one").fit()
    slao.finish_task()
    slao.start_task()
    start = {n: p.clone() for n, p in model.state_dict().items()}
    loop(model, slao, 2, tmp_path / "two").fit()
    again, other = adapted()
    again.load_state_dict(start)
    other.load_state_dict({"tasks": 0, "training": True, "b": {}})
    loop(again, other, 2, tmp_path / "two").fit(resume=True)
    assert other.tasks == 1
    for one in (slao, other):
        one.finish_task()
    assert all(torch.equal(p, again.state_dict()[name]) for name, p in model.state_dict().items())


def test_what_stands_beside_goes_on():
    model = tiny_bert(labels=3)
    attach(model, LoRA(rank=3, alpha=5, targets=["query"], train_modules=["classifier"]))
    slao = SLAO(model)
    slao.start_task()
    moved(model)
    head = model.classifier.copy.weight.detach().clone()
    slao.finish_task()
    slao.start_task()
    assert torch.equal(model.classifier.copy.weight, head)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            DoRA(rank=2, alpha=3, targets=["q_proj"]),
            'adapter "default" is DoRA: SLAO merges the A and B of a plain LoRA',
        ),
        (LoRA(rank=2, alpha=3, initialise="olora"), 'adapter "default" starts from the weights: use initialise="kai'),
        (LoRA(rank=2, alpha=3, lora_bias=True), 'adapter "default" has lora_bias, which SLAO does not merge'),
        (
            LoRA(rank=2, alpha=3, targets=(), target_parameters=["q_proj.weight"]),
            'adapter "default" has target_parameters, which SLAO does not merge',
        ),
        (LoRA(rank=2, alpha=3, targets=(), train_modules=["lm_head"]), 'adapter "default" adapts no module by LoRA'),
        (LoRA(rank=29, alpha=3, targets=["q_proj"], any_rank=True), "the rank at .* is above its inputs' 28"),
    ],
)
def test_adapters_it_does_not_merge(config, message):
    model = tiny_llama()
    attach(model, config)
    with pytest.raises(ValueError, match=message):
        SLAO(model)


def test_calls_out_of_order():
    model, slao = adapted()
    with pytest.raises(ValueError, match=r"no task is started: start_task\(\) before training"):
        slao.finish_task()
    slao.start_task()
    with pytest.raises(ValueError, match=r"task 1 is started already: finish_task\(\) first"):
        slao.start_task()
    layer = adapter_layers(model)[0]
    nn.init.constant_(layer.lora_b, float("nan"))
    with pytest.raises(ValueError, match=r"the LoRA at .* is not finite: nothing has been merged"):
        slao.finish_task()
    nn.init.zeros_(layer.lora_b)
    slao.finish_task()
    merge(model)
    with pytest.raises(ValueError, match='adapter "default" is merged into the weights: unmerge it first'):
        slao.start_task()


def test_another_adapters_state_is_refused():
    _, slao = adapted()
    slao.start_task()
    slao.finish_task()
    other = tiny_llama()
    attach(other, LoRA(rank=2, alpha=3, targets=["q_proj", "up_proj"]))
    with pytest.raises(
        CheckpointError, match=r'the saved SLAO state does not fit adapter "default" at .*q_proj: is it'
    ):
        SLAO(other).load_state_dict(slao.state_dict())
    with pytest.raises(CheckpointError, match="does not fit"):
        SLAO(other).load_state_dict({"tasks": 1, "training": False, "b": {}})
    with pytest.raises(CheckpointError, match='the saved state has no "tasks": it is none of SLAO'):
        SLAO(other).load_state_dict({"kept": {}})


def test_matrices_that_do_not_fit():
    with pytest.raises(ValueError, match=r"A must be \[r, n\] with r at most n .* got \[3, 2\]"):
        orthonormal_start(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="A is not finite"):
        orthonormal_start(torch.full((2, 3), float("inf")))
    with pytest.raises(ValueError, match=r"B of the tasks before is \[2, 3\], that of the newest \[2, 5\]"):
        merged_b(torch.zeros(2, 3), torch.zeros(2, 5), 2)
    with pytest.raises(ValueError, match="task is a whole number from 1; got 0"):
        merged_b(torch.zeros(2, 3), torch.zeros(2, 3), 0)
