"""Reservoir buffers: uniform, with quotas, and the same after a resume."""

import json
import math

import pytest
import torch
from safetensors.torch import load, save

from llmtune.data.replay import ReplayBuffer
from llmtune.training.checkpoint_state import join_tensors, split_tensors


def rows(n, start=0):
    return [{"input_ids": list(range(at, at + 1 + at % 3)), "labels": at} for at in range(start, start + n)]


def chi_square_bound(cells):
    """Return what a chi-square of so many degrees of freedom exceeds about once in 10 000 times (Wilson-Hilferty)."""
    return cells * (1 - 2 / (9 * cells) + 3.72 * math.sqrt(2 / (9 * cells))) ** 3


@pytest.mark.parametrize("chunks", [[29], [3, 1, 17, 8]])
def test_every_row_is_kept_with_one_probability(chunks):
    """29 rows through 7 slots, 3000 times: each is there 7/29 of the times; so are pairs of first and last."""
    times, counts, given = 3000, torch.zeros(29), rows(29)
    first_and_last = 0
    for seed in range(times):
        buffer, start = ReplayBuffer(7, seed), 0
        for size in chunks:
            buffer.add(given[start : start + size])
            start += size
        kept = [row["labels"] for row in buffer.rows()]
        assert len(set(kept)) == len(kept) == 7
        counts[kept] += 1
        first_and_last += {0, 28} <= set(kept)
    p = 7 / 29
    statistic = float(((counts - times * p) ** 2 / (times * p * (1 - p))).sum()) * 28 / 29  # the counts are coupled
    assert statistic < chi_square_bound(28)
    pair = 7 * 6 / (29 * 28)
    assert abs(first_and_last / times - pair) < 4 * math.sqrt(pair * (1 - pair) / times)


def test_the_chi_square_sees_a_biased_buffer():
    """The common mistake, a slot out of n - 1: then the statistic is far beyond the bound."""
    times, counts = 3000, torch.zeros(29)
    for seed in range(times):
        g, kept = torch.Generator().manual_seed(seed), list(range(7))
        for n in range(7, 29):
            slot = int(torch.randint(max(n - 5, 1), (1,), generator=g))
            if slot < 7:
                kept[slot] = n
        counts[kept] += 1
    p = 7 / 29
    assert float(((counts - times * p) ** 2 / (times * p * (1 - p))).sum()) > chi_square_bound(28)


def test_tasks_share_equally_and_each_is_a_uniform_sample():
    times, counts = 2000, {name: torch.zeros(n) for name, n in (("a", 19), ("b", 3), ("c", 11))}
    for seed in range(times):
        buffer = ReplayBuffer(8, seed, per_task=True)
        buffer.add(rows(13), task="a")
        buffer.add(rows(3), task="b")
        buffer.add(rows(6, start=13), task="a")
        buffer.add(rows(11), task="c")
        assert [len(buffer.rows(task)) for task in "abc"] == [3, 3, 2]
        assert (buffer.tasks, buffer.seen, len(buffer)) == (["a", "b", "c"], 33, 8)
        for name, count in counts.items():
            count[[row["labels"] for row in buffer.rows(name)]] += 1
    assert counts["b"].tolist() == [times] * 3
    for name, p in (("a", 3 / 19), ("c", 2 / 11)):
        n = len(counts[name])
        statistic = float(((counts[name] - times * p) ** 2 / (times * p * (1 - p))).sum()) * (n - 1) / n
        assert statistic < chi_square_bound(n - 1), name


def through_files(state):
    values, tensors = split_tensors(state)
    return join_tensors(json.loads(json.dumps(values)), load(save(tensors)))


@pytest.mark.parametrize("per_task", [False, True])
def test_resumed_it_keeps_what_it_would_have_kept(per_task):
    named = {"task": "first"} if per_task else {}
    whole, cut = ReplayBuffer(5, 3, per_task=per_task), ReplayBuffer(5, 3, per_task=per_task)
    given = [{**row, "x": torch.randn(2, 3), "text": "t", "n": [[1, 2], [3]]} for row in rows(40)]
    whole.add(given[:17], **named)
    cut.add(given[:17], **named)
    state = through_files(cut.state_dict())
    resumed = ReplayBuffer(5, 99, per_task=per_task)
    resumed.load_state_dict(state)
    for buffer in (whole, resumed):
        buffer.add(given[17:], **named)
        if per_task:
            buffer.add(given[:9], task="second")
    assert resumed.seen == whole.seen
    assert len(resumed) == len(whole) == 5
    for one, other in zip(resumed.rows(), whole.rows(), strict=True):
        assert torch.equal(one.pop("x"), other.pop("x"))
        assert one == other
        assert type(one["input_ids"]) is list


def test_rows_are_copies_and_stay_whole():
    x = torch.ones(2, requires_grad=True)
    given = {"input_ids": [1, 2], "x": x}
    buffer = ReplayBuffer(3)
    buffer.add([given])
    given["input_ids"].append(9)
    with torch.no_grad():
        x.zero_()
    (row,) = buffer.rows()
    assert row["input_ids"] == [1, 2]
    assert row["x"].tolist() == [1.0, 1.0]
    assert not row["x"].requires_grad
    assert repr(buffer) == "ReplayBuffer(1 rows kept of 1 seen, capacity 3)"


def test_only_rows_that_stay_are_prepared():
    """As a teacher is run: once, on those that are kept in the end, and on no other."""
    seen = []

    def prepare(kept):
        seen.append(sorted(row["labels"] for row in kept))
        return [{**row, "double": 2 * row["labels"]} for row in kept]

    buffer, plain = ReplayBuffer(4, seed=1), ReplayBuffer(4, seed=1)
    for start, n in ((0, 3), (3, 20)):
        buffer.add(rows(n, start), prepare=prepare)
        plain.add(rows(n, start))
    assert [row["labels"] for row in buffer.rows()] == [row["labels"] for row in plain.rows()]
    assert all(row["double"] == 2 * row["labels"] for row in buffer.rows())
    assert seen[0] == [0, 1, 2]
    assert set(seen[1]) == {row["labels"] for row in buffer.rows()} - {0, 1, 2}


def test_a_failed_call_changes_nothing():
    buffer, other = ReplayBuffer(4, seed=1, per_task=True), ReplayBuffer(4, seed=1, per_task=True)
    for one in (buffer, other):
        one.add(rows(9), task="a")
    with pytest.raises(ValueError, match="prepare was given 2 rows and must return as many; it returned 0"):
        buffer.add(rows(9), task="b", prepare=lambda kept: [])
    with pytest.raises(TypeError, match=r'row 1: field "x" cannot be kept: .* got object'):
        buffer.add([{"x": 1}, {"x": object()}], task="b")
    assert buffer.tasks == ["a"]
    for one in (buffer, other):
        one.add(rows(9), task="b")
    assert buffer.rows() == other.rows()


def test_bad_input():
    for capacity in (0, -3, 2.5, True):
        with pytest.raises(
            ValueError, match=f"capacity must be a whole number, 1 or more: a buffer of {capacity} rows"
        ):
            ReplayBuffer(capacity)
    buffer, tasks = ReplayBuffer(2), ReplayBuffer(2, per_task=True)
    with pytest.raises(ValueError, match="has one reservoir for all: per_task=True; got task='a'"):
        buffer.add(rows(1), task="a")
    with pytest.raises(ValueError, match="needs the name of the rows' task; got task=None"):
        tasks.add(rows(1))
    with pytest.raises(TypeError, match="a list of dicts; got one dict"):
        buffer.add({"input_ids": [1]})
    with pytest.raises(TypeError, match="row 0 must be a dict of fields; got a list"):
        buffer.add([[1, 2]])
    with pytest.raises(IndexError, match="holds 0 rows; there is no row 0"):
        buffer[0]
    tasks.add(rows(3), task="a")
    tasks.add(rows(3), task="b")
    with pytest.raises(ValueError, match="2 rows cannot hold a task more than the 2 it has: make it larger"):
        tasks.add(rows(3), task="c")
    with pytest.raises(ValueError, match="knows no task 'c', only 'a', 'b'"):
        tasks.rows("c")
    with pytest.raises(ValueError, match="per_task is True in the saved buffer and False in this one"):
        buffer.load_state_dict(tasks.state_dict())
    with pytest.raises(ValueError, match="capacity is 2 in the saved buffer and 3 in this one"):
        ReplayBuffer(3).load_state_dict(buffer.state_dict())


def test_another_parts_state_is_refused():
    with pytest.raises(
        ValueError, match=r"the saved state has no \"capacity\": it is none of ReplayBuffer, it has \['"
    ):
        ReplayBuffer(3).load_state_dict({"kept": {}})
