"""What one number of processes has saved, any other goes on with; a signal to one process stops all at one step."""

import os
import signal
import time

import pytest
import torch
from ranks_cases import make, off, weights
from ranks_worker import Processes, run

from llmtune.errors import CheckpointError
from llmtune.training.checkpoint_folder import list_checkpoints
from llmtune.training.checkpoint_read import read_checkpoint
from llmtune.types import Callback

WAYS = {"one": (1, False), "two": (2, False), "sharded": (2, True)}


class Leave(Exception):
    """Ends a run in the middle."""


class LeaveAfter(Callback):
    def __init__(self, step):
        self.step = step

    def on_step_start(self, loop):
        if loop.step == self.step:
            raise Leave


def part(rank, name, sharded, folder, stop=None):
    """Train up to `stop`, or from there to the end, and return the weights and the losses."""
    loop = make(name, sharded=sharded, folder=folder, save_every=3, max_steps=10, eval_every=5)
    if stop is not None:
        loop.callbacks.append(LeaveAfter(stop))
    try:
        loop.fit(resume=True)
    except Leave:
        return None
    return weights(loop.model), [row["loss"] for row in loop.history], [row.get("eval_loss") for row in loop.history]


def in_way(way, *arguments, folder):
    world, sharded = WAYS[way]
    return run(world, part, arguments[0], sharded, *arguments[1:], folder=folder)[0]


@pytest.fixture(scope="module", params=["lora", pytest.param("full", marks=pytest.mark.slow)])
def uninterrupted(request, tmp_path_factory):
    name = request.param
    made = {}

    def of(way):
        if way not in made:
            folder = tmp_path_factory.mktemp("whole")
            made[way] = in_way(way, name, folder / "run", folder=folder)
        return name, made[way]

    return of


@pytest.mark.parametrize(("first", "then"), [("sharded", "one"), ("one", "sharded"), ("sharded", "two")])
def test_a_run_goes_on_with_other_processes(first, then, uninterrupted, tmp_path):
    name, (wanted, losses, evaluations) = uninterrupted("one")
    in_way(first, name, tmp_path / "run", 7, folder=tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000003", "step-00000006"]
    found, also, third = in_way(then, name, tmp_path / "run", folder=tmp_path)
    assert off(found, wanted) < 1e-5
    assert also == pytest.approx(losses, rel=1e-5)
    assert [value and pytest.approx(value, rel=1e-5) for value in evaluations] == third


@pytest.mark.parametrize("way", ["two", "sharded"])
def test_as_many_processes_go_on_bit_for_bit(way, uninterrupted, tmp_path):
    name, wanted = uninterrupted(way)
    in_way(way, name, tmp_path / "run", 7, folder=tmp_path)
    found = in_way(way, name, tmp_path / "run", folder=tmp_path)
    assert off(found[0], wanted[0]) == 0
    assert found[1:] == wanted[1:]


def test_one_and_several_write_the_same_files(tmp_path):
    states = []
    for way in WAYS:
        in_way(way, "lora", tmp_path / way, folder=tmp_path)
        newest = list_checkpoints(tmp_path / way)[-1]
        states.append(read_checkpoint(newest))
        assert (newest / "adapters" / "default" / "adapter_config.json").exists() == (way != "sharded")
    shapes = [{name: (tuple(t.shape), t.dtype) for name, t in state["model"].items()} for state in states]
    assert shapes[0] == shapes[1] == shapes[2]
    assert states[0].keys() == states[1].keys() == states[2].keys()
    moments = [state["optimizer"]["state"]["0"] for state in states]
    for moment in moments[1:]:
        for key in moments[0]:
            torch.testing.assert_close(moment[key], moments[0][key], rtol=1e-4, atol=1e-7)
    rows = [len((tmp_path / way / "history.csv").read_text().splitlines()) for way in WAYS]
    assert rows == [11, 11, 11]


def until_told(rank, sharded, folder, told):
    """Train, and have one process told to stop in its fourth step."""
    loop = make("full", sharded=sharded, folder=folder, max_steps=20, eval_every=None)

    class Tell(Callback):
        def on_before_optimizer_step(self, loop):
            if loop.step == 3 and rank == told:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.2)

    loop.callbacks.append(Tell())
    loop.fit()


@pytest.mark.parametrize(("sharded", "told"), [(False, 1), (True, 1), (False, 0)])
def test_a_signal_to_one_stops_all_after_the_same_step(sharded, told, tmp_path):
    started = Processes(2, until_told, sharded, tmp_path / "run", told, folder=tmp_path)
    assert started.codes() == [143, 143]
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-00000004"]
    printed = [(started.folder / f"{rank}.txt").read_text() for rank in range(2)]
    assert all("stopped by SIGTERM after step 4" in text for text in printed)


def refuse(rank, folder):
    """The main process cannot write; every process must hear of it."""
    loop = make("full", folder=folder, max_steps=2, eval_every=None)

    def full(*_, **__):
        raise CheckpointError("no space is left on the disk")

    if rank == 0:
        import llmtune.training.background as background

        background.write_checkpoint = full
    try:
        loop.fit()
    except CheckpointError as error:
        return str(error)
    return "nothing was raised"


def test_a_full_disk_in_the_main_process_is_heard_in_all(tmp_path):
    main, other = run(2, refuse, tmp_path / "run", folder=tmp_path)
    assert main == "no space is left on the disk"
    assert other == "in the main process: no space is left on the disk"


def used(rank, folder):
    with pytest.raises(CheckpointError, match="already holds a run") as caught:
        make("full", folder=folder, max_steps=2).fit()
    return str(caught.value)


def damaged(rank, folder):
    return [
        row["step"] for row in make("full", folder=folder, max_steps=10, save_every=3, eval_every=5).fit(resume=True)
    ]


def test_all_take_the_same_checkpoint(tmp_path):
    in_way("two", "full", tmp_path / "run", 7, folder=tmp_path)
    run(2, used, tmp_path / "run", folder=tmp_path)
    newest = list_checkpoints(tmp_path / "run")[-1]
    tensors = next(newest.glob("*.safetensors"))
    tensors.write_bytes(tensors.read_bytes()[:-7])
    started = Processes(2, damaged, tmp_path / "run", folder=tmp_path)
    assert started.results() == [list(range(1, 11))] * 2
    assert "skipped a damaged checkpoint" in started.printed()


def unshared(rank, folder):
    """The folder of the second process is another one, as on a machine that does not share it."""
    loop = make("full", folder=folder if rank == 0 else folder / "elsewhere", max_steps=10, save_every=3, eval_every=5)
    if rank == 1:  # it is told the main one's path, which its machine does not have
        whole = loop.ranks.in_main
        loop.ranks.in_main = lambda work: folder / "elsewhere" / whole(work).name
    with pytest.raises(CheckpointError) as caught:
        loop.fit(resume=True)
    return str(caught.value)


def test_a_folder_that_is_not_shared_is_named(tmp_path):
    in_way("two", "full", tmp_path / "run", 7, folder=tmp_path)
    for sentence in run(2, unshared, tmp_path / "run", folder=tmp_path):
        assert "process 1 does not find" in sentence
        assert "on storage that all machines share" in sentence
