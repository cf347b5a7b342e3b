"""A step that finds no memory is taken again in smaller micro-batches: bit for bit what a smaller size gives."""

import gc
import weakref

import pytest
import torch
from runs import StreamOf
from torch import nn

from llmtune.data.collate import collate_padded
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_gpt2, tiny_llama
from llmtune.training.loop import TrainingLoop
from llmtune.training.memory import is_out_of_memory
from llmtune.training.settings import LoopSettings
from llmtune.types import Callback


def settings(**changed):
    return LoopSettings(**({"max_steps": 3, "rows_per_step": 8, "progress": False, "learning_rate": 1e-2} | changed))


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Small(TrainingLoop):
    """Finds no memory for more than `most` rows, from step `since` on, at the forward or the backward pass."""

    most, since, where, kind = 99, 0, "forward", torch.OutOfMemoryError

    def compute_loss(self, model, batch):
        loss = super().compute_loss(model, batch)
        if len(batch["input_ids"]) <= self.most or self.step < self.since:
            return loss
        if self.where == "forward":
            raise self.kind("CUDA out of memory. Tried to allocate 7.00 GiB")
        loss.register_hook(self._fail)
        return loss

    def _fail(self, gradient):
        raise self.kind("CUDA out of memory. Tried to allocate 7.00 GiB")


def small(most=99, *, since=0, where="forward", kind=torch.OutOfMemoryError, data=None, loop=Small, **changed):
    callbacks = changed.pop("callbacks", ())
    made = loop(
        tiny_gpt2(dropout=0.3), data or uneven_rows(13), settings=settings(**changed), collate=collate_padded,
        callbacks=callbacks, penalties=[lambda model: 1e-3 * model.transformer.wte.weight.square().sum()],
    )  # fmt: skip
    made.most, made.since, made.where, made.kind = most, since, where, kind
    return made


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError, MemoryError])
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_step_is_bit_for_bit_that_of_the_smaller_size(where, kind, capsys):
    """With dropout: the masks are those that the smaller size draws when nothing fails."""
    wanted, found = small(rows_per_micro_batch=2), small(most=2, where=where, kind=kind)
    history = wanted.fit()
    capsys.readouterr()
    assert [row["loss"] for row in found.fit()] == [row["loss"] for row in history]
    assert equal(weights(wanted.model), weights(found.model))
    assert found.rows_per_micro_batch == 2
    assert capsys.readouterr().out.splitlines() == [
        "step 1: out of memory; micro-batches of 4 rows instead of 8 from here on, for the same gradient",
        "step 1: out of memory; micro-batches of 2 rows instead of 4 from here on, for the same gradient",
    ]


def test_what_a_collate_draws_is_drawn_again():
    def masked(rows):
        batch = collate_padded(rows)
        return batch | {"input_ids": batch["input_ids"].masked_fill(torch.rand(batch["input_ids"].shape) < 0.3, 5)}

    wanted, found = small(rows_per_micro_batch=4), small(most=4)
    wanted.collate = found.collate = masked
    assert [row["loss"] for row in found.fit()] == [row["loss"] for row in wanted.fit()]


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_gradients_of_micro_batches_before_the_failure_are_dropped(where):
    """Rows of growing length, of which only the last, longest ones find no memory."""

    class Growing(TrainingLoop):
        most = 99
        calls = 0

        def row_indices(self, step):
            return list(range(8))

        def compute_loss(self, model, batch):
            self.calls += 1
            loss = super().compute_loss(model, batch)
            if batch["input_ids"].numel() <= self.most:
                return loss
            if where == "forward":
                raise torch.OutOfMemoryError("out of memory")
            loss.register_hook(lambda gradient: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")))
            return loss

    def gradient(most, size):
        loop = Growing(
            tiny_gpt2(dropout=0.3), uneven_rows(8), settings=settings(max_steps=1, rows_per_micro_batch=size),
            collate=collate_padded,
        )  # fmt: skip
        loop.most = most
        kept = {}
        loop.optimizer.register_step_pre_hook(
            lambda *_: kept.update({name: p.grad.clone() for name, p in loop.model.named_parameters()})
        )
        loop.fit()
        return kept, loop.calls

    wanted, plain = gradient(999, 1)
    found, calls = gradient(10, 2)  # of 2 rows of 5, 2 of 7 (numel 8, 12, 16, 20): the second fails
    assert (plain, calls) == (8, 2 + 8)
    assert equal(wanted, found)


def test_the_smaller_size_stays_and_is_saved_and_resumed(tmp_path, capsys):
    class Stop(Callback):
        def on_step_end(self, loop, metrics):
            if loop.step == 3:
                raise KeyboardInterrupt

    def run(name, callbacks=()):
        return small(most=2, since=1, max_steps=6, folder=tmp_path / name, save_every=1, callbacks=callbacks)

    whole = run("whole")
    whole.fit()
    assert capsys.readouterr().out.count("out of memory") == 2
    with pytest.raises(KeyboardInterrupt):
        run("cut", [Stop()]).fit()
    capsys.readouterr()
    resumed = run("cut")
    resumed.fit(resume=True)
    assert "out of memory" not in capsys.readouterr().out
    assert resumed.rows_per_micro_batch == 2
    assert equal(weights(whole.model), weights(resumed.model))


def test_it_stays_where_something_else_is_told(tmp_path, capsys):
    small(most=2, folder=tmp_path, save_every=1).fit()
    resumed = small(most=2, folder=tmp_path, save_every=1, fused=False)
    resumed.fit(resume=True)
    assert "fused was None and is False" in capsys.readouterr().out
    assert resumed.rows_per_micro_batch == 2
    other = small(most=2, folder=tmp_path, save_every=1, rows_per_micro_batch=4)
    other.fit(resume=True)
    assert other.rows_per_micro_batch == 4, "what the settings now ask for"


def test_with_data_workers_the_batches_made_ahead_are_forgotten():
    """The fourth step fails, when more steps are made already."""
    wanted, found = small(max_steps=6, rows_per_micro_batch=4), small(most=4, since=3, max_steps=6, data_workers=2)
    sizes = []
    found.callbacks.append(
        type("Sizes", (Callback,), {"on_step_end": lambda self, loop, m: sizes.append(loop.rows_per_micro_batch)})()
    )
    wanted.since = 99
    history = found.fit()
    assert sizes == [8, 8, 8, 4, 4, 4]
    same = small(most=4, since=3, max_steps=6)
    assert [row["loss"] for row in same.fit()] == [row["loss"] for row in history]
    assert equal(weights(same.model), weights(found.model))


def test_a_stream_is_not_read_twice():
    class Sized(Small):
        """The size that the other run comes to, from the same step on."""

        def training_step(self, batches):
            if self.step == 1:
                self.rows_per_micro_batch = 4
                batches = self.micro_batches(1)
            return super().training_step(batches)

    wanted, found = small(data=StreamOf(), loop=Sized), small(most=4, since=1, data=StreamOf())
    assert [row["loss"] for row in found.fit()] == [row["loss"] for row in wanted.fit()]
    assert found.train_data.place == wanted.train_data.place == 24 - 13
    assert equal(weights(wanted.model), weights(found.model))


def test_one_row_is_as_small_as_it_gets():
    loop = small(most=0)
    with pytest.raises(torch.OutOfMemoryError, match=r"Tried to allocate 7\.00 GiB"):
        loop.fit()
    assert loop.step == 0


@pytest.mark.parametrize(
    ("size", "rows", "most", "wanted"), [(64, 8, 4, 4), (3, 4, 2, 1), (8, 3, 2, 2), (None, 5, 3, 3)]
)
def test_several_halvings_may_be_needed_until_a_batch_gets_smaller(size, rows, most, wanted, capsys):
    """64 rows of a step of 8 are 8; 3 + 1 rows are as many micro-batches as 2 + 2."""
    loop = small(most=most, rows_per_step=rows, rows_per_micro_batch=size)
    loop.fit()
    assert loop.rows_per_micro_batch == wanted
    assert capsys.readouterr().out.count("out of memory") == 1


def test_a_short_last_step_is_halved_too():
    """Two epochs of 13 rows by 8: the fourth step has two rows."""
    loop = small(most=1, since=3, max_steps=None, epochs=2)
    assert [row["step"] for row in loop.fit()] == [1, 2, 3, 4]
    assert loop.rows_per_micro_batch == 1


def test_micro_batches_that_ignore_the_size_get_the_error():
    class Fixed(Small):
        def micro_batches(self, step):
            return [self.collate(self.train_data[:8])]

    loop = small(most=4, loop=Fixed)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        loop.fit()
    assert loop.rows_per_micro_batch == 8


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("out of memory"), KeyError("x")])
def test_other_errors_are_not_swallowed(error):
    class Faulty(Small):
        calls = 0

        def compute_loss(self, model, batch):
            self.calls += 1
            raise error

    loop = small(loop=Faulty)
    with pytest.raises(type(error)):
        loop.fit()
    assert loop.calls == 1


def test_weights_moved_for_a_moment_are_put_back():
    """Sharpness-aware: the second pass, at other weights, finds no memory."""

    class Aware(Small):
        def accumulate_gradients(self, batches):
            super().accumulate_gradients(batches)
            kept = [(p, p.detach().clone()) for p in self.model.parameters()]
            most, self.most = self.most, self.tight
            try:
                with torch.no_grad():
                    for p, _ in kept:
                        p.add_(0.05 * p.grad)
                return super().accumulate_gradients(batches)
            finally:
                self.most = most
                with torch.no_grad():
                    for p, value in kept:
                        p.copy_(value)

    wanted, found = small(loop=Aware, rows_per_micro_batch=4), small(loop=Aware)
    wanted.tight, found.tight = 99, 4
    wanted.fit()
    found.fit()
    assert found.rows_per_micro_batch == 4
    assert equal(weights(wanted.model), weights(found.model))


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_nothing_of_the_failed_attempt_is_alive_during_the_next(where):
    """With the collector off: what a traceback or a cycle kept would still be there."""
    alive, seen = [], []

    class Watching(Small):
        def compute_loss(self, model, batch):
            if len(batch["input_ids"]) <= self.most:
                seen.append(sum(reference() is not None for reference in alive))
            return super().compute_loss(model, batch)

    loop = small(most=4, where=where, loop=Watching, max_steps=1)

    def keep(module, inputs, output):
        if loop.rows_per_micro_batch == 8:
            alive.append(weakref.ref(output))

    loop.model.transformer.h[0].mlp.c_fc.register_forward_hook(keep)
    gc.collect()
    gc.disable()
    try:
        loop.fit()
    finally:
        gc.enable()
    assert len(alive) == 1
    assert seen == [0, 0]


def test_what_says_that_memory_is_out():
    for error in (
        torch.OutOfMemoryError("x"), MemoryError(), RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"),
        RuntimeError("MPS backend out of memory (MPS allocated: 7 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ):  # fmt: skip
        assert is_out_of_memory(error)
    for error in (RuntimeError("shape"), ValueError("out of memory"), OSError("No space left on device")):
        assert not is_out_of_memory(error)


def test_a_real_allocation_that_cannot_be_is_known():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_the_model_may_be_any_module():
    """What a linear model does with its rows, by hand: the mean over rows of the gradient of each."""

    class Mean:
        def __call__(self, model, batch):
            if len(batch["x"]) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return (model(batch["x"])[:, 0] - batch["y"]).square().mean()

        def count_targets(self, batch):
            return len(batch["y"])

    class Watch(Callback):
        def on_before_optimizer_step(self, loop):
            self.gradient = loop.model.weight.grad.clone()

    rows = [{"x": torch.randn(3), "y": torch.randn(())} for _ in range(7)]
    model, watch = nn.Linear(3, 1, bias=False), Watch()
    x, y = (torch.stack([row[name] for row in rows]) for name in "xy")
    error = x @ model.weight[0].detach() - y
    loop = TrainingLoop(
        model, rows, settings=settings(max_steps=None, epochs=1, rows_per_step=7, clip_norm=None), loss=Mean(),
        collate=lambda rows: {name: torch.stack([row[name] for row in rows]) for name in "xy"}, callbacks=[watch],
    )  # fmt: skip
    loop.fit()
    torch.testing.assert_close(watch.gradient[0], 2 * (error[:, None] * x).mean(0))
    assert loop.rows_per_micro_batch == 2


def test_a_llama_in_bf16_under_checkpointing_too():
    def run(most, size):
        loop = Small(
            tiny_llama(), uneven_rows(13), collate=collate_padded,
            settings=settings(precision="bf16", activation_checkpointing=True, rows_per_micro_batch=size),
        )  # fmt: skip
        loop.most = most
        loop.fit()
        return weights(loop.model)

    assert equal(run(99, 2), run(2, 8))
