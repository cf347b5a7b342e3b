"""New and replayed rows in one data set: the ratio by targets, and the same run after a resume."""

import pytest
import torch

from llmtune.data.collate import collate_packed, collate_padded
from llmtune.data.mixing import MixedBatches, count_targets, replayed_rows
from llmtune.data.packing import pack
from llmtune.data.replay import ReplayBuffer
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.testing.models import tiny_llama
from llmtune.training import LoopSettings, TrainingLoop
from llmtune.types import Callback


def texts(n, *, seed=0, longest=23):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in torch.randint(3, longest, (n,), generator=generator).tolist():
        ids = torch.randint(3, 97, (length,), generator=generator)
        labels = ids.masked_fill(torch.rand(length, generator=generator) < 0.3, -100)
        made.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return made


def targets(rows):
    """Counted independently: by the loss, of the batch that a loop would make."""
    return sum(causal_lm_loss.count_targets(collate_packed([row])) for row in rows)


@pytest.mark.parametrize("ratio", [0.05, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("old", [7, 400])
def test_the_ratio_is_one_of_targets(ratio, old):
    new, replay = texts(83), texts(old, seed=1)
    mixed = MixedBatches(new, replay, ratio, seed=5)
    everything = [mixed[at] for at in range(len(mixed))]
    assert everything[: len(new)] == new
    fresh, again = targets(everything[: len(new)]), targets(everything[len(new) :])
    longest = max(targets([row]) for row in replay)
    wanted = ratio / (1 - ratio) * fresh
    assert abs(again - wanted) <= longest / 2 + 0.5
    if old == 400:
        assert abs(again - wanted) <= 0.5  # some row fits the gap
    assert mixed.share == again / (fresh + again)
    often = torch.bincount(torch.tensor(mixed.replayed), minlength=old)
    teaching = torch.tensor([targets([row]) > 0 for row in replay])
    assert int(often[teaching].max() - often[teaching].min()) <= 1
    assert not bool(often[~teaching].any())


def test_the_ratio_of_rows_would_be_another():
    """Long old documents: a fifth of the rows would be well over half of the targets."""
    new = [{"input_ids": [5] * 4, "labels": [5] * 4}] * 40
    old = [{"input_ids": [7] * 61, "labels": [7] * 61}] * 40
    mixed = MixedBatches(new, old, 0.5)
    assert len(mixed.replayed) == 2
    assert mixed.share == 0.5


def test_units():
    new, old = texts(31), texts(17, seed=1)
    by_tokens = MixedBatches(new, old, 0.4, unit="tokens")
    fresh = sum(len(row["input_ids"]) for row in new)
    again = sum(len(old[at]["input_ids"]) for at in by_tokens.replayed)
    assert abs(again - fresh * 2 / 3) <= 11.5
    by_rows = MixedBatches(new, old, 0.5, unit=lambda row: 1)
    assert len(by_rows.replayed) == 31
    classes = [{**row, "labels": at % 3} for at, row in enumerate(new)]
    assert len(MixedBatches(classes, classes[:4], 0.5).replayed) == 31


@pytest.mark.parametrize(
    "row",
    [
        {"input_ids": [3, 4, 5], "labels": [3, -100, 5]},
        {"input_ids": [3, 4, 5], "labels": torch.tensor([-100, 4, 5])},
        pack([{"input_ids": [3, 4, 5]}, {"input_ids": [6, 7]}], 5)[0],
        {"input_ids": [3, 4, 5, 6], "labels": [3, 4, 5, 6], "position_ids": [0, 1, 0, 1]},
    ],
)
def test_targets_are_counted_as_the_loss_counts_them(row):
    assert count_targets(row) == causal_lm_loss.count_targets(collate_packed([row]))


def test_targets_of_other_rows():
    assert count_targets({"input_ids": [3, 4], "labels": 2}) == 1
    assert count_targets({"input_ids": [3, 4], "labels": -100}) == 0
    assert count_targets({"input_ids": [3, 4], "labels": [0.0, 1.0, 0.0]}) == 1
    assert count_targets({"input_ids": [3, 4], "labels": [7, 8, 9]}) == 3  # a target sequence of its own
    assert count_targets({"pixels": torch.ones(3), "labels": 2}) == 1
    assert count_targets({"input_ids": [3, 4, 5], "labels": torch.tensor([3, 156, 5], dtype=torch.uint8)}) == 2


def test_chosen_rows_by_hand():
    assert sorted(replayed_rows([5, 2, 0], 16, seed=0)) == [0, 0, 1, 1, 1]  # two passes, and the 2 left are row 1
    assert replayed_rows([5], 2, seed=0) == []
    assert replayed_rows([5], 3, seed=0) == [0]
    assert replayed_rows([0, 0], 3, seed=0) == []
    assert len({tuple(replayed_rows([3] * 20, 15, seed=seed)) for seed in range(9)}) == 9


def test_the_buffer_may_go_on():
    buffer = ReplayBuffer(3)
    buffer.add(texts(3))
    mixed = MixedBatches(texts(9, seed=1), buffer, 0.5)
    before = [mixed[at] for at in range(len(mixed))]
    buffer.add(texts(50, seed=2))
    assert [mixed[at] for at in range(len(mixed))] == before


class Killed(Callback):
    def on_step_start(self, loop):
        if loop.step == 6:
            raise KeyboardInterrupt


def run(folder, *, resume=False, callbacks=()):
    buffer = ReplayBuffer(5)
    buffer.add(texts(20, seed=1))
    model = tiny_llama()
    settings = LoopSettings(
        max_steps=8, rows_per_step=4, folder=folder, save_every=3, schedule="constant", progress=False, seed=3
    )
    loop = TrainingLoop(model, MixedBatches(texts(9), buffer, 0.3), settings=settings, callbacks=callbacks)
    return loop.fit(resume=resume), model.state_dict()


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    history, whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", callbacks=[Killed()])
    again, resumed = run(tmp_path / "cut", resume=True)
    assert [row["loss"] for row in again] == [row["loss"] for row in history]
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_an_epoch_of_a_loop_has_the_ratio():
    mixed = MixedBatches(texts(31), texts(6, seed=1), 0.25)
    settings = LoopSettings(epochs=2, rows_per_step=7, progress=False)
    loop = TrainingLoop(tiny_llama(), mixed, settings=settings)
    for epoch in range(2):
        drawn = [at for step in range(loop.total_steps) for at in loop.row_indices(step)]
        of_epoch = drawn[epoch * len(mixed) : (epoch + 1) * len(mixed)]
        assert sorted(of_epoch) == list(range(len(mixed)))


def test_rows_without_predictions_get_empty_ones():
    kept = {
        "teacher_logprobs": torch.zeros(3, 2), "teacher_indices": torch.ones(3, 2, dtype=torch.int32),
        "teacher_temperature": torch.ones(3),
    }  # fmt: skip
    new = [{"input_ids": [5, 7, 11, 13], "labels": [5, 7, 11, 13]}]
    mixed = MixedBatches(new, [{"input_ids": [5, 7, 11], "labels": [5, 7, 11], **kept}], 0.4)
    for collate in (collate_packed, collate_padded):
        batch = collate([mixed[0], mixed[1]])
        places = (batch["teacher_indices"][..., 0] >= 0).flatten().tolist()
        assert sum(places) == 3
        assert places[:4] == [False] * 4
        assert batch["teacher_logprobs"].shape[-1] == 2
    classes = [{"input_ids": [3], "labels": 1}]
    old = [{"input_ids": [3, 4], "labels": 0, "teacher_logits": torch.tensor([0.5, 2.0])}]
    old += [{**old[0], "teacher_logits": torch.tensor([0.5, 2.0, 3.0])}]
    batch = collate_padded([*(MixedBatches(classes * 3, old, 0.4)[at] for at in (0, 3, 4)),])  # fmt: skip
    assert batch["teacher_logits"].isnan().sum(1).tolist() in ([3, 1, 0], [3, 0, 1])


def translations(count, *, tokens, labels):
    return [{"input_ids": [5 + k % 7] * tokens, "labels": [7] * labels} for k in range(count)]


def test_a_loss_counts_its_own_targets():
    """An encoder-decoder's rows with as many labels as tokens are short of one by the causal count."""
    new, old = translations(10, tokens=4, labels=4), translations(50, tokens=3, labels=9)
    exact = MixedBatches(new, old, 0.5, unit=sequence_to_sequence_loss)
    of_new = sequence_to_sequence_loss.count_targets(collate_padded(new))
    of_old = sum(sequence_to_sequence_loss.count_targets(collate_padded([old[at]])) for at in exact.replayed)
    assert (of_new, of_old) == (40, 36)
    assert exact.share == of_old / (of_old + of_new)
    assert len(MixedBatches(new, old, 0.5).replayed) == 3  # of 30, not of 40
    with pytest.raises(ValueError, match=r"unit must be .* a loss or a function of a row; got <class"):
        MixedBatches(new, old, 0.5, unit=type(sequence_to_sequence_loss))
    short = translations(7, tokens=1, labels=1)
    with pytest.raises(ValueError, match=r"the new rows have no targets.*give unit=loss"):
        MixedBatches(short, short, 0.5)
    assert MixedBatches(short, short, 0.5, unit=sequence_to_sequence_loss).share == 0.5


def test_bad_input():
    rows = texts(5)
    for ratio in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=f"ratio must be 0 or more and less than 1, .*; got {ratio}"):
            MixedBatches(rows, rows, ratio)
    with pytest.raises(ValueError, match="there are no replayed rows to mix: fill the buffer"):
        MixedBatches(rows, ReplayBuffer(3))
    with pytest.raises(ValueError, match="there are no new rows to mix"):
        MixedBatches([], rows)
    with pytest.raises(
        ValueError, match=r'unit must be "targets", "tokens", a loss or a function of a row; got \'rows\''
    ):
        MixedBatches(rows, rows, unit="rows")
    for odd in (-1, 1.5):
        with pytest.raises(ValueError, match=f"a whole number, 0 or more, in each row; got {odd} of new row 0"):
            MixedBatches(rows, rows, unit=lambda row, odd=odd: odd)
    silent = [{"input_ids": [3, 4], "labels": [3, -100]}]
    with pytest.raises(ValueError, match="the replayed rows have no targets"):
        MixedBatches(rows, silent)
    with pytest.raises(ValueError, match="the new rows have no targets"):
        MixedBatches(silent, rows)
    with pytest.raises(ValueError, match='need the same fields; "x" is in only one of new row 0 and replayed row 1'):
        MixedBatches(rows, [rows[0], {**rows[1], "x": 3}])
    with pytest.raises(ValueError, match='a row needs "labels" for its targets'):
        MixedBatches([{"input_ids": [3]}], [{"input_ids": [3]}])
    with pytest.raises(ValueError, match=r"ratio=0.2 of these rows is 1 targets to replay, less than half"):
        MixedBatches([{"input_ids": [3] * 5, "labels": [3] * 5}], [{"input_ids": [3] * 9, "labels": [3] * 9}])
    with pytest.raises(IndexError, match="there are 5 rows; there is no row 5"):
        MixedBatches(rows, rows, 0.0)[5]
