"""Several processes train as one: the same gradient, the same weights, the same history."""

import pytest
import torch
from ranks_cases import CASES, gone_through, make, measured, off
from ranks_worker import run

from llmtune.training.distributed import Ranks

FAST = ["full", "lora", "holes", "sometimes", "penalty", "clipped", "twice", "functional", "sharpness", "aware", "bf16",
        "fp16"]  # fmt: skip
SHARDED = ["full", "lora", "tied", "penalty", "twice", "adaptive"]
NEVER_SHARDED = {"sometimes", "functional", "fp16", "drawing"}


def measure_all(rank, names, sharded):
    return {name: measured(name, sharded) for name in names}


@pytest.fixture(scope="module")
def alone():
    """What one process makes of each case, computed once."""
    made = {}
    return lambda name: made[name] if name in made else made.setdefault(name, measured(name))


def same(found, wanted, *, gradient=1e-6, weights=1e-5):
    """Every process has the gradient, weights and history of the one."""
    for first, after, history in found:
        assert off(first, wanted[0]) < gradient
        assert off(after, wanted[1]) < weights
        assert len(history) == len(wanted[2])
        for row, other in zip(history, wanted[2], strict=True):
            assert row == pytest.approx(other, rel=1e-5)
    for first, after, history in found[1:]:  # and among themselves they agree to the last bit
        assert off(first, found[0][0]) == off(after, found[0][1]) == 0
        assert history == found[0][2]


def compare(world, names, sharded, alone, folder):
    results = run(world, measure_all, names, sharded, folder=folder)
    for name in names:
        same([result[name] for result in results], alone(name))


def test_two_processes_are_one(alone, tmp_path):
    compare(2, FAST, False, alone, tmp_path)


def test_four_processes_are_one(alone, tmp_path):
    compare(4, ["lora", "holes"], False, alone, tmp_path)


@pytest.mark.slow
def test_two_processes_with_a_sharded_model_are_one(alone, tmp_path):
    compare(2, SHARDED, True, alone, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "sharded"), [(2, False), (3, False), (4, False), (1, True), (2, True), (4, True)])
def test_every_case_in_every_way(world, sharded, alone, tmp_path):
    names = [name for name in CASES if name != "drawing" and not (sharded and name in NEVER_SHARDED)]
    compare(world, names, sharded, alone, tmp_path)


def test_cases_cover_what_they_are_for():
    """A micro-batch without targets, fewer micro-batches than processes, targets spread unevenly."""
    loop = make("holes")
    counts = [[loop.count_targets(batch) for batch in loop.micro_batches(step)] for step in range(20)]
    assert all(len(step) == 3 for step in counts)
    assert any(0 in step for step in counts)
    assert any(len(set(step)) == 3 for step in counts)
    sizes = [len(make("epochs").micro_batches(step)) for step in range(8)]
    assert set(sizes) == {2, 3}
    lengths = [batch["input_ids"].numel() > 9 for batch in make("sometimes").micro_batches(0)]
    assert len(set(lengths[0::2])) + len(set(lengths[1::2])) > 2


def draw(rank):
    history = make("drawing", max_steps=3).fit()
    torch.manual_seed(3)
    loop = make("full")
    with loop.ranks.together(loop.model, {}):
        inside = torch.rand(5)
    return [(row["loss"], row["penalty"], row["grad_norm"]) for row in history], inside, torch.rand(5)


def test_processes_draw_alike_but_for_their_batches(tmp_path):
    (history, inside, after), other = run(2, draw, folder=tmp_path)
    assert history == other[0]
    assert not torch.equal(inside, other[1])
    assert torch.equal(after, other[2])


def shares(rank):
    ranks = Ranks(torch.nn.Linear(2, 3))
    batches = [{"n": n} for n in range(7)]
    counts = [5, 0, 3, 1, 0, 2, 7]
    own = list(ranks.share(batches, counts))
    ranks.sharded = True
    return own, list(ranks.share(batches, counts)), ranks.places(3), ranks.exchange(rank**2), ranks.main


def test_each_takes_its_share_and_equally_often_where_the_model_is_sharded(tmp_path):
    found = run(4, shares, folder=tmp_path)
    taken = [[(batch["n"], count) for batch, count in own] for own, *_ in found]
    assert taken == [[(0, 5), (6, 7)], [(2, 3)], [(3, 1)], [(5, 2)]]
    padded = [[(batch["n"], count) for batch, count in own] for _, own, *_ in found]
    assert padded == [[(0, 5), (6, 7)], [(2, 3), (6, 0)], [(3, 1), (6, 0)], [(5, 2), (6, 0)]]
    assert [places for *_, places, _, _ in found] == [[(0, True)], [(1, True)], [(2, True)], [(2, False)]]
    assert all(squares == [0, 1, 4, 9] for *_, squares, _ in found)
    assert [main for *_, main in found] == [True, False, False, False]


def start(rank, sharded):
    """Each process draws weights of its own; the main one's are everyone's."""
    from ranks_cases import ROWS, with_lora

    from llmtune.testing.models import tiny_llama
    from llmtune.training.agreement import whole
    from llmtune.training.loop import TrainingLoop
    from llmtune.training.settings import LoopSettings
    from llmtune.training.sharding import shard

    model = with_lora(tiny_llama(seed=rank))
    drawn = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    if sharded:
        shard(model)
    loop = TrainingLoop(model, ROWS, settings=LoopSettings(max_steps=1, learning_rate=0.0, progress=False))
    loop.fit()
    return drawn, {name: whole(parameter).clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("sharded", [False, True])
def test_all_start_from_the_main_ones_weights(sharded, tmp_path):
    (drawn, began), (other, also) = run(2, start, sharded, folder=tmp_path)
    assert off(other, drawn) > 0.1
    assert off(began, drawn) == off(also, drawn) == 0


def hybrid(rank):
    """Sharded over two processes, and repeated over two."""
    mesh = torch.distributed.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return gone_through(make("full", sharded=True, mesh=mesh))


@pytest.mark.slow
def test_hybrid_sharding_is_one(alone, tmp_path):
    same(run(4, hybrid, folder=tmp_path), alone("full"))
