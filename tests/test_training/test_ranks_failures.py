"""What goes wrong in one process is heard in all; what several processes cannot do is refused before any work."""

import os
import socket
import time

import pytest
import torch
from ranks_cases import gradients, make, off
from ranks_worker import Processes, run
from torch import nn

from llmtune.forgetting import EWC
from llmtune.testing.models import tiny_llama
from llmtune.training.distributed import Ranks, join_processes
from llmtune.training.loop import TrainingLoop
from llmtune.training.sharding import shard


def short_of_memory(rank, kind, whom, sizes):
    """One process has no memory for more than `sizes` rows at a time."""
    loop = make("full", rows_per_micro_batch=4, max_steps=2, eval_every=None)
    compute = loop.compute_loss

    def tight(model, batch):
        if rank == whom and int((batch["position_ids"] == 0).sum()) > sizes:
            raise kind("no memory")
        return compute(model, batch)

    loop.compute_loss = tight
    loop.optimizer.step = lambda *_, **__: None  # so that the gradient of the first step can be seen
    seen = []
    step = loop.training_step

    def training_step(batches):
        metrics = step(batches)
        seen.append(gradients(loop.model))
        return metrics

    loop.training_step = training_step
    try:
        loop.fit()
    except (RuntimeError, MemoryError) as error:
        return f"{type(error).__name__}: {error}", loop.rows_per_micro_batch
    return seen[0], loop.rows_per_micro_batch


@pytest.mark.parametrize(("kind", "whom"), [(torch.OutOfMemoryError, 1), (MemoryError, 0)])
def test_all_halve_where_one_has_no_memory(kind, whom, tmp_path):
    wanted, _ = short_of_memory(0, kind, None, 0)
    for gradient, rows in run(2, short_of_memory, kind, whom, 2, folder=tmp_path):
        assert rows == 2
        assert off(gradient, wanted) < 1e-6


def test_where_there_is_none_at_all_every_process_says_so(tmp_path):
    mine, other = run(2, short_of_memory, torch.OutOfMemoryError, 0, 0, folder=tmp_path)
    assert mine == ("OutOfMemoryError: no memory", 1)
    assert other == ("OutOfMemoryError: process 0 of 2 ran out of memory", 1)


def failing(rank, whom):
    loop = make("full", eval_every=None)
    compute = loop.compute_loss

    def bad(model, batch):
        if rank in whom and loop.step == 2:
            raise whom[rank]
        return compute(model, batch)

    loop.compute_loss = bad
    try:
        loop.fit()
    except Exception as error:
        return f"{type(error).__name__}: {error}", loop.step
    return "nothing was raised", loop.step


def test_all_hear_what_failed_in_one(tmp_path):
    found = run(3, failing, {1: KeyError("nothing there")}, folder=tmp_path)
    sentence = "RuntimeError: process 1 of 3 failed: KeyError: 'nothing there'"
    assert found == [(sentence, 2), ("KeyError: 'nothing there'", 2), (sentence, 2)]


def test_a_failure_outweighs_a_want_of_memory(tmp_path):
    found = run(2, failing, {0: torch.OutOfMemoryError("none left"), 1: ValueError("bad")}, folder=tmp_path)
    assert found == [("RuntimeError: process 1 of 2 failed: ValueError: bad", 2), ("ValueError: bad", 2)]


def dying(rank, sharded):
    """One process is gone without a word in the middle of a step."""
    loop = make("full", sharded=sharded, eval_every=None)
    compute = loop.compute_loss

    def gone(model, batch):
        if rank == 1 and loop.step == 2:
            os._exit(7)
        return compute(model, batch)

    loop.compute_loss = gone
    loop.fit()


@pytest.mark.parametrize("sharded", [False, True])
def test_nobody_waits_for_a_process_that_is_gone(sharded, tmp_path):
    began = time.monotonic()
    codes = Processes(2, dying, sharded, folder=tmp_path).codes(seconds=60)
    assert codes[1] == 7
    assert codes[0] not in (0, None)
    assert time.monotonic() - began < 60


def refusals(rank):
    """Return the sentence of each thing that cannot be."""
    said = {}

    def ask(what, work):
        try:
            work()
        except (ValueError, TypeError, RuntimeError) as error:
            said[what] = f"{type(error).__name__}: {error}"

    def different():
        loop = make("full", eval_every=None)
        if rank == 1:
            loop.model.lm_head.weight.requires_grad_(False)
        loop.fit()

    def functional():
        loop = make("functional", sharded=True, eval_every=None)
        loop.accumulate_gradients(loop.micro_batches(0))

    ask("different", different)
    ask("wrapped", lambda: rewrapped(nn.parallel.DistributedDataParallel(tiny_llama())))
    ask("fp16", lambda: make("fp16", sharded=True))
    ask("functional", functional)

    def consolidated():
        model = tiny_llama()
        fisher = {"lm_head.weight": torch.ones(97, 28)}
        penalty = EWC(fisher, {"lm_head.weight": torch.zeros(97, 28)}, strength=1.0)
        loop = rewrapped(shard(model), penalties=[penalty])
        loop.fit()

    ask("penalty", consolidated)
    ask("half a mesh", lambda: rewrapped(shard(tiny_llama(), mesh=half_a_mesh(rank))))
    ask("odd mesh", lambda: rewrapped(odd_mesh()))
    return said


def rewrapped(model, penalties=()):
    loop = make("full")
    return TrainingLoop(model, loop.train_data, settings=loop.settings, eval_data=loop.eval_data, penalties=penalties)


def half_a_mesh(rank):
    meshes = [torch.distributed.DeviceMesh("cpu", [number]) for number in range(2)]
    return meshes[rank]


def odd_mesh():
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = torch.distributed.init_device_mesh("cpu", (2, 1), mesh_dim_names=("mine", "tp"))
    model = tiny_llama()
    spread = distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0), Shard(1)])
    model.lm_head.weight = nn.Parameter(spread)
    return model


def test_what_several_processes_cannot_do_is_said(tmp_path):
    found = run(2, refusals, folder=tmp_path)
    assert found[0] == found[1]
    said = found[0]
    assert said["different"].startswith("ValueError: the processes have different models")
    assert said["wrapped"] == (
        "ValueError: give the loop the bare model, not inside DistributedDataParallel: it sums gradients over "
        "processes itself"
    )
    assert said["fp16"].startswith("ValueError: a sharded model cannot be trained in fp16")
    assert said["functional"].startswith("ValueError: a sharded model cannot be called with other parameters than its")
    assert said["penalty"].startswith("ValueError: the penalty EWC does not take parameters that are spread over")
    assert said["half a mesh"].startswith("ValueError: the model is spread over 1 of 2 processes")
    assert said["odd mesh"].startswith('ValueError: the mesh has a dimension "mine": name those that split the data')


def test_processes_that_have_not_joined_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="2 processes were started and have not joined: call llm"):
        make("full")


def test_one_process_alone_joins_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    device = join_processes()
    assert not torch.distributed.is_initialized()
    assert device.type == (torch.accelerator.current_accelerator() or torch.device("cpu")).type
    ranks = Ranks(nn.Linear(2, 3))
    assert (ranks.rank, ranks.world, ranks.main, ranks.sharded) == (0, 1, True, False)
    assert ranks.exchange("only") == ["only"]


def joined(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    device = join_processes("gloo")
    join_processes()  # a second time changes nothing
    ranks = Ranks(nn.Linear(2, 3))
    return device.type, torch.distributed.get_backend(), ranks.rank, ranks.world, ranks.exchange(rank)


def test_several_join_as_torchrun_says(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = Processes(2, joined, port, folder=tmp_path, joined=False).results()
    kind = (torch.accelerator.current_accelerator() or torch.device("cpu")).type
    assert found == [(kind, "gloo", 0, 2, [0, 1]), (kind, "gloo", 1, 2, [0, 1])]
