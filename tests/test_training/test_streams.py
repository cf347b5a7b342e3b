"""Rows that come one after another, cut into steps, left and gone on with."""

import itertools
import random

import pytest
import torch
from runs import Stop
from torch.utils.data import IterableDataset

from llmtune.data.collate import collate_padded
from llmtune.errors import CheckpointError
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_gpt2
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.training.streams import StreamRows, checked_row, is_stream
from llmtune.types import Callback


class Numbers:
    """The numbers below `count`, then an end; its state is the next number."""

    def __init__(self, count, rows=None):
        self.count, self.next, self.rows = count, 0, rows

    def __iter__(self):
        while self.next < self.count:
            self.next += 1
            yield self.next - 1 if self.rows is None else self.rows[self.next - 1]
        self.next = 0

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


class Shuffled(Numbers):
    """Another order in every epoch, as Hugging Face's streams have it: a state counts in its own epoch alone."""

    def __init__(self, count, rows=None):
        super().__init__(count, rows)
        self.epoch, self.loaded = 0, None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = list(range(self.count))
        random.Random(self.epoch).shuffle(order)
        fits = self.loaded is not None and self.loaded["epoch"] == self.epoch
        for at in range(self.loaded["next"] if fits else 0, self.count):
            place, self.next = order[at], at + 1
            yield place if self.rows is None else self.rows[place]

    def state_dict(self):
        return {"epoch": self.epoch, "next": self.next}

    def load_state_dict(self, state):
        self.loaded = dict(state)


class OfTorch(IterableDataset):
    """Torch's own base class has a `__getitem__`, which only raises."""

    def __init__(self, count, rows=None):
        self.inner = Numbers(count, rows)

    def __iter__(self):
        return iter(self.inner)

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)


KINDS = [Numbers, Shuffled, OfTorch]


@pytest.mark.parametrize("kind", [Numbers, OfTorch])
def test_steps_take_the_next_rows_and_start_again_at_the_end(kind):
    rows = StreamRows(kind(5))
    assert [rows.take(step, 3) for step in range(4)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]
    assert rows.take(3, 3) == [4, 0, 1], "the last step's rows may be asked for again"


def test_every_pass_is_told_its_number():
    rows = StreamRows(Shuffled(7))
    flat = [row for step in range(7) for row in rows.take(step, 3)]
    passes = [flat[start : start + 7] for start in (0, 7, 14)]
    for epoch, found in enumerate(passes):
        wanted = list(range(7))
        random.Random(epoch).shuffle(wanted)
        assert found == wanted


def test_of_a_loader_its_data_set_is_told():
    class Loader:
        def __init__(self, dataset):
            self.dataset = dataset

        def __iter__(self):
            return iter(self.dataset)

    rows = StreamRows(Loader(Shuffled(2)))
    rows.take(0, 5)
    assert rows.stream.dataset.epoch == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("done", range(6))
def test_going_on_from_a_state_gives_the_same_rows(kind, done):
    """Also where the state was taken at the very end of a pass, of 9 rows by 3."""
    first = StreamRows(kind(9))
    taken = [first.take(step, 3) for step in range(8)]
    again = StreamRows(kind(9))
    for step in range(done):
        again.take(step, 3)
    state = again.state(done)
    resumed = StreamRows(kind(9))
    resumed.restore(state, done)
    assert resumed.state(done) == state
    assert [resumed.take(step, 3) for step in range(done, 8)] == taken[done:]


def test_a_state_can_be_had_before_and_after_the_rows_of_the_first_step():
    """A resumed run tries its first batch before it may have to save where it began."""
    rows = StreamRows(Numbers(9))
    assert rows.state(0) is None
    rows.take(0, 3)
    assert rows.state(0) is None
    assert rows.state(1) == {"passes": 0, "state": {"next": 3}}
    rows.take(1, 3)
    assert rows.state(1) == {"passes": 0, "state": {"next": 3}}, "as it was asked for before"
    rows.take(2, 3)
    with pytest.raises(CheckpointError, match="the stream has given the rows of step 2 already; save after that step"):
        rows.state(2)


def test_a_stream_cannot_be_read_out_of_order():
    rows = StreamRows(Numbers(9))
    with pytest.raises(ValueError, match="a stream gives its rows in order: step 0 is next, not 2"):
        rows.take(2, 3)
    for step in range(3):
        rows.take(step, 1)
    for wrong in (0, 4):
        with pytest.raises(ValueError, match=f"in order: step 3 is next, not {wrong}"):
            rows.take(wrong, 1)


def test_what_is_a_stream():
    assert is_stream(Numbers(1))
    assert is_stream(OfTorch(1))
    assert not is_stream([{"input_ids": [1]}])
    assert not is_stream(itertools.count())
    assert not is_stream(torch.utils.data.TensorDataset(torch.ones(2)))


@pytest.mark.parametrize(
    ("row", "came"),
    [
        ({"input_ids": torch.ones(2, 3)}, r"a batch, \[2, 3\]"),
        ({"input_ids": [[1, 2, 3], [4, 5, 6]]}, "a batch of lists, 2 of 3"),
        ({"input_ids": [torch.ones(4), torch.ones(4)]}, "a batch of lists, 2 of 4"),
        ([{"input_ids": [1]}, {"input_ids": [2]}], "a list of 2 rows"),
    ],
)
def test_a_batch_is_no_row(row, came):
    with pytest.raises(
        ValueError, match=rf"a stream must give rows, with input_ids \[n\]; got {came}: give its loader"
    ):
        checked_row(row)


@pytest.mark.parametrize(
    "row", [{"input_ids": [1, 2]}, {"input_ids": torch.ones(3)}, {"x": torch.ones(2, 3)}, "text", {"input_ids": []}, 7,
            {"input_ids": list(torch.ones(3))}]
)  # fmt: skip
def test_a_row_is_a_row(row):
    assert checked_row(row) is row


def settings(**changed):
    base = {"max_steps": 9, "rows_per_step": 4, "rows_per_micro_batch": 2, "progress": False, "learning_rate": 1e-2}
    return LoopSettings(**(base | changed))


def run(data, **changed):
    more = {name: changed.pop(name) for name in ("callbacks", "eval_data") if name in changed}
    return TrainingLoop(tiny_gpt2(dropout=0.2), data, settings=settings(**changed), collate=collate_padded, **more)


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("bad", [{"epochs": 2, "max_steps": None}, {"data_workers": 2}])
def test_a_stream_has_no_length_and_its_own_workers(bad):
    with pytest.raises(ValueError, match="a stream has no length and fetches its rows itself: give max_steps instead"):
        run(Numbers(3, uneven_rows(3)), **bad)


def test_an_empty_stream_is_told_of():
    with pytest.raises(ValueError, match="the stream Numbers gives no rows when it is gone through from the start"):
        run(Numbers(0)).fit()


def test_what_is_neither_is_told_of():
    with pytest.raises(TypeError, match=r"must be rows with a length and an index .*, or a stream with state_dict and"):
        run(iter(uneven_rows(3)))


@pytest.mark.parametrize(
    ("state", "said"),
    [({3: 1}, r"keys of saved state must be strings of your own; the root has 3"),
     ({"seen": {1, 2}}, "seen is a set"), ({"when": object()}, "when is a object"), (b"x", "the root is a bytes")],
)  # fmt: skip
def test_a_state_that_cannot_be_saved_is_found_before_the_first_step(tmp_path, state, said):
    class Odd(Numbers):
        def state_dict(self):
            return state

    loop = run(Odd(5, uneven_rows(5)), folder=tmp_path)
    with pytest.raises(TypeError, match=f"the state_dict of the stream Odd cannot be saved: .*{said}"):
        loop.fit()
    assert loop.step == 0
    assert len(run(Odd(5, uneven_rows(5))).fit()) == 9, "without a folder nothing is saved"


def test_any_state_of_json_and_tensors_will_do(tmp_path):
    class Bare(Numbers):
        def state_dict(self):
            return [torch.tensor(self.next), "x", None]

        def load_state_dict(self, state):
            self.next = int(state[0])

    whole = run(Numbers(11, uneven_rows(11))).fit()
    with pytest.raises(KeyboardInterrupt):
        run(Bare(11, uneven_rows(11)), folder=tmp_path, save_every=1, callbacks=[Stop(5)]).fit()
    again = run(Bare(11, uneven_rows(11)), folder=tmp_path, save_every=1).fit(resume=True)
    assert [row["loss"] for row in again] == [row["loss"] for row in whole]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [1, 4, 7])
def test_resume_is_exact(tmp_path, kind, stop):
    """Bit for bit, over ends of the stream, with a saving that is due where the resumed run begins."""
    whole = run(kind(7, uneven_rows(7)))
    whole.fit()
    with pytest.raises(KeyboardInterrupt):
        run(kind(7, uneven_rows(7)), folder=tmp_path, save_every=1, callbacks=[Stop(stop)]).fit()
    resumed = run(kind(7, uneven_rows(7)), folder=tmp_path, save_every=1, eval_every=1, eval_data=uneven_rows(3))
    history = resumed.fit(resume=True)
    assert [row["loss"] for row in history] == [row["loss"] for row in whole.history]
    assert equal(weights(whole.model), weights(resumed.model))


def test_a_loop_whose_step_failed_goes_on_with_the_rows_it_took(tmp_path):
    """The very same loop, in the same program, before anything was saved and after."""

    failing = [1, 5]

    class Fail(Callback):
        def on_before_optimizer_step(self, loop):
            if loop.step in failing:
                failing.remove(loop.step)
                raise LookupError

    whole = run(Numbers(7, uneven_rows(7)))
    whole.fit()
    loop = run(Numbers(7, uneven_rows(7)), folder=tmp_path, save_every=4, callbacks=[Fail()])
    for _ in range(2):
        with pytest.raises(LookupError):
            loop.fit(resume=True)
    loop.fit(resume=True)
    assert equal(weights(whole.model), weights(loop.model))


def test_a_state_that_the_stream_changes_later_is_not_ours():
    class Live(Numbers):
        """Gives out the very dict that it counts in."""

        def __init__(self, count):
            super().__init__(count)
            self.state = {"next": 0}

        def state_dict(self):
            self.state["next"] = self.next
            return self.state

    rows = StreamRows(Live(9))
    rows.take(0, 3)
    state = rows.state(1)
    rows.take(1, 3)
    rows.stream.state_dict()
    assert rows.state(1) == state == {"passes": 0, "state": {"next": 3}}


def test_rows_drawn_at_random_are_drawn_again(tmp_path):
    """What a stream draws from the global state depends on the step alone."""

    class Random(Numbers):
        def __iter__(self):
            for row in super().__iter__():
                noise = [
                    int(torch.randint(3, 97, ())) if random.random() < 0.5 else token for token in row["input_ids"]
                ]
                yield {"input_ids": noise, "labels": row["labels"]}

    whole = run(Random(7, uneven_rows(7))).fit()
    with pytest.raises(KeyboardInterrupt):
        run(Random(7, uneven_rows(7)), folder=tmp_path, save_every=2, callbacks=[Stop(5)]).fit()
    again = run(Random(7, uneven_rows(7)), folder=tmp_path).fit(resume=True)
    assert [row["loss"] for row in again] == [row["loss"] for row in whole]


def test_resume_does_not_go_through_the_rows_before(tmp_path):
    given = []

    class Counted(Numbers):
        def __iter__(self):
            for row in super().__iter__():
                given.append(self.next)
                yield row

    with pytest.raises(KeyboardInterrupt):
        run(Counted(1000, uneven_rows(7) * 143), folder=tmp_path, max_steps=99, save_every=1, callbacks=[Stop(7)]).fit()
    given.clear()
    with pytest.raises(KeyboardInterrupt):
        run(Counted(1000, uneven_rows(7) * 143), folder=tmp_path, max_steps=99, callbacks=[Stop(8)]).fit(resume=True)
    assert given == list(range(7 * 4 + 1, 9 * 4 + 1))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("iterable", [True, False])
def test_torchdata_goes_on_exactly(tmp_path, workers, iterable):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")

    def data():
        dataset = Sharded(uneven_rows(11)) if iterable else uneven_rows(11)
        return torchdata.StatefulDataLoader(dataset, batch_size=None, num_workers=workers, shuffle=False)

    whole = run(data())
    whole.fit()
    with pytest.raises(KeyboardInterrupt):
        run(data(), folder=tmp_path, save_every=2, callbacks=[Stop(5)]).fit()
    resumed = run(data(), folder=tmp_path)
    history = resumed.fit(resume=True)
    assert [row["targets"] for row in history] == [row["targets"] for row in whole.history]
    assert equal(weights(whole.model), weights(resumed.model))


class Sharded(IterableDataset):
    """Every worker gives its share of the rows; the state is the place."""

    def __init__(self, rows):
        self.rows, self.place = rows, None

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        self.place = first if self.place is None else self.place
        while self.place < len(self.rows):
            self.place += step
            yield self.rows[self.place - step]
        self.place = None

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


def test_torchdata_shuffles_and_goes_on_exactly(tmp_path):
    torchdata = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")

    def data(seed=3):
        torch.manual_seed(seed)  # its order is drawn when it is made
        return torchdata.StatefulDataLoader(uneven_rows(11), batch_size=None, shuffle=True)

    whole = run(data())
    whole.fit()
    with pytest.raises(KeyboardInterrupt):
        run(data(), folder=tmp_path, save_every=2, callbacks=[Stop(5)]).fit()
    history = run(data(seed=4), folder=tmp_path).fit(resume=True)
    assert [row["loss"] for row in history] == [row["loss"] for row in whole.history]
    assert len({row["targets"] for row in whole.history}) > 3


def test_the_banner_says_where_rows_come_from(capsys):
    run(Numbers(7, uneven_rows(7)), progress=True, max_steps=1).fit()
    assert "1 steps of 4 rows, from a stream" in capsys.readouterr().out
