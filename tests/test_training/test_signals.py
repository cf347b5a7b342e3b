"""Being told to stop, at any moment: the step is finished, saved, and the resumed run is the same bit for bit."""

import os
import signal
import subprocess
import sys
import threading
import traceback

import pytest
import torch

from llmtune.data.collate import collate_padded
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_gpt2
from llmtune.training.best import KeepBest
from llmtune.training.checkpoint import newest_valid
from llmtune.training.checkpoint_folder import list_checkpoints
from llmtune.training.early_stopping import EarlyStopping
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings
from llmtune.training.signals import StopSignals, told_by
from llmtune.types import Callback

NUMBERS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture(autouse=True)
def heard():
    """A process started in the background of a shell ignores SIGINT, and so would these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def send(number):
    os.kill(os.getpid(), number)


class Tokenizer:
    """Writes a file into each checkpoint; what it is told to do happens in the middle of a save."""

    def __init__(self):
        self.then = lambda: None

    def save_pretrained(self, folder):
        folder.mkdir()
        (folder / "words").write_text("a b")
        self.then()


class Loop(TrainingLoop):
    """Sends itself a signal at a moment of its choice."""

    moment, at, number = None, 4, signal.SIGTERM

    def here(self, moment):
        if self.moment == moment and self.step == self.at:
            self.moment = None
            send(self.number)

    def row_indices(self, step):
        self.here("batches")
        return super().row_indices(step)

    def compute_loss(self, model, batch):
        self.here("forward")
        loss = super().compute_loss(model, batch)
        if loss.requires_grad:
            loss.register_hook(lambda gradient: self.here("backward"))
        return loss

    def clip_gradients(self):
        self.here("gradients")
        return super().clip_gradients()

    def eval_step(self, batch):
        self.here("evaluation")
        return super().eval_step(batch)


class Moments(Callback):
    def on_fit_start(self, loop):
        loop.here("start")

    def on_step_end(self, loop, metrics):
        loop.here("end of a step")

    def on_eval_end(self, loop, metrics):
        loop.here("end of an evaluation")

    def on_save(self, loop, folder):
        loop.here("after a save")

    def on_fit_end(self, loop):
        loop.here("end")


def make(folder, moment=None, at=4, number=signal.SIGTERM, **changed):
    base = {"max_steps": 6, "rows_per_step": 4, "rows_per_micro_batch": 2, "progress": False, "learning_rate": 1e-2,
            "folder": folder, "save_every": 3, "eval_every": 2}  # fmt: skip
    more = {"eval_data": uneven_rows(5), "tokenizer": Tokenizer()} | changed.pop("more", {})
    loop = Loop(
        tiny_gpt2(dropout=0.3), uneven_rows(13), settings=LoopSettings(**(base | changed)), collate=collate_padded,
        callbacks=[EarlyStopping(patience=2), KeepBest(restore=False), Moments()], **more,
    )  # fmt: skip
    loop.moment, loop.at, loop.number = moment, at, number
    loop.tokenizer.then = lambda: loop.here("save")
    return loop


def in_a_child(work):
    """Run `work` in a forked process and return its exit status: a program's, or minus the signal that killed it."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            for number in NUMBERS:
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
            work()
            status = 0
        except SystemExit as error:
            status = error.code
        except KeyboardInterrupt:
            status = 130
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def results(loop):
    state = loop.model.state_dict()
    early, best = loop.callbacks[0], loop.callbacks[1]
    rows = [{name: value for name, value in row.items() if name != "seconds"} for row in loop.history]
    return state, rows, (early.state_dict(), best.state_dict(), loop.keeper.protected, loop.stopped)


def assert_same(one, other):
    for name, value in one[0].items():
        assert torch.equal(value, other[0][name]), name
    assert one[1] == other[1]
    assert one[2] == other[2]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    loop = make(tmp_path_factory.mktemp("whole"))
    loop.fit()
    return results(loop)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    ("moment", "at", "saved"),
    [
        ("batches", 3, 4), ("forward", 3, 4), ("backward", 3, 4), ("gradients", 3, 4), ("end of a step", 4, 4),
        ("evaluation", 4, 4), ("end of an evaluation", 4, 4), ("save", 3, 3), ("after a save", 3, 3),
        ("forward", 5, 6), ("evaluation", 6, 6), ("end of an evaluation", 6, 6), ("save", 6, 6), ("start", 0, None),
        ("batches", 0, None),
    ],
)  # fmt: skip
def test_the_step_is_finished_and_saved_and_the_resumed_run_is_the_same(tmp_path, whole, moment, at, saved, number):
    assert in_a_child(lambda: make(tmp_path, moment, at, number).fit()) == (143 if number == signal.SIGTERM else 130)
    found = newest_valid(tmp_path)
    assert (found and found[1]["step"]) == saved
    resumed = make(tmp_path)
    resumed.fit(resume=True)
    assert_same(results(resumed), whole)
    assert (tmp_path / "history.csv").read_text().count("\n") == 7


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_told_again_and_again(tmp_path, whole, workers):
    """A run that is stopped in every step and in every evaluation, three times in each evaluation, comes to its end."""
    moments = [("forward", 0), ("forward", 1), *[("evaluation", 2)] * 3, ("forward", 2), ("forward", 3),
               *[("evaluation", 4)] * 2, ("save", 4), ("forward", 4), ("forward", 5), ("evaluation", 6)]  # fmt: skip
    for moment, at in moments:
        status = in_a_child(lambda m=moment, a=at: make(tmp_path, m, a, data_workers=workers).fit(resume=True))
        assert status == 143, (moment, at)
    resumed = make(tmp_path)
    resumed.fit(resume=True)
    assert_same(results(resumed), whole)


def test_an_evaluation_that_was_done_is_not_done_again(tmp_path):
    in_a_child(lambda: make(tmp_path, "end of an evaluation", 4).fit())
    evaluated = []

    class Record(Callback):
        def on_eval_end(self, loop, metrics):
            evaluated.append(loop.step)

    loop = make(tmp_path)
    loop.callbacks.append(Record())
    loop.fit(resume=True)
    assert evaluated == [6]
    loop.fit(resume=True)
    assert evaluated == [6]


def test_the_late_evaluation_is_in_the_file_of_the_history(tmp_path):
    in_a_child(lambda: make(tmp_path, "evaluation", 6).fit())
    loop = make(tmp_path)
    history = loop.fit(resume=True)
    lines = (tmp_path / "history.csv").read_text().splitlines()
    assert len(lines) == 7
    assert str(history[-1]["eval_loss"]) in lines[-1]


def test_in_the_background_too(tmp_path, whole):
    assert in_a_child(lambda: make(tmp_path, "forward", 3, background_save=True).fit()) == 143
    assert newest_valid(tmp_path)[1]["step"] == 4
    resumed = make(tmp_path, background_save=True)
    resumed.fit(resume=True)
    assert_same(results(resumed), whole)


def test_with_data_workers(tmp_path, whole):
    """The workers hear nothing of a Ctrl-C, which a terminal sends to all of a program's processes."""

    def work():
        os.setsid()
        loop = make(tmp_path, data_workers=2)

        class All(Callback):
            def on_before_optimizer_step(self, loop):
                if loop.step == 3:
                    os.killpg(0, signal.SIGINT)

        loop.callbacks.append(All())
        loop.fit()

    assert in_a_child(work) == 130
    assert newest_valid(tmp_path)[1]["step"] == 4
    resumed = make(tmp_path, data_workers=2)
    resumed.fit(resume=True)
    assert_same(results(resumed), whole)


@pytest.mark.slow
def test_a_script_ends_with_143(tmp_path):
    """The whole way: a program of its own, told from outside, says where to go on."""
    script = f"""
import os, signal
from llmtune import LoopSettings, TrainingLoop
from llmtune.testing import tiny_llama, uneven_rows
from llmtune.types import Callback

class Tell(Callback):
    def on_step_start(self, loop):
        if loop.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

settings = LoopSettings(max_steps=5, folder={str(tmp_path)!r}, progress=False)
TrainingLoop(tiny_llama(), uneven_rows(), settings=settings, callbacks=[Tell()]).fit()
print("not reached")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 143, done.stderr
    assert f"stopped by SIGTERM after step 2; go on from {tmp_path} by fit(resume=True)" in done.stdout
    assert "SIGTERM: finishing the step, then saving; a second signal interrupts at once" in done.stderr
    assert "not reached" not in done.stdout
    assert "Traceback" not in done.stderr
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("moment", ["end", "after a save"])
def test_what_comes_at_the_very_end_is_not_lost(tmp_path, number, moment):
    """There is no step left after which it could be acted upon."""
    status = in_a_child(lambda: make(tmp_path, moment, 6, number).fit())
    assert status in ({signal.SIGTERM: (143, -15), signal.SIGINT: (130, -2)}[number])
    assert newest_valid(tmp_path)[1]["step"] == 6


def test_in_a_notebook_the_model_is_usable_and_the_run_goes_on(tmp_path, whole, capsys):
    """In one process: with a new loop, and with the very same one."""
    loop = make(tmp_path, "forward", 3, signal.SIGINT)
    loop.model.eval()
    loop.model.transformer.h[0].train()
    modes = [module.training for module in loop.model.modules()]
    handlers = [signal.getsignal(number) for number in NUMBERS]
    with pytest.raises(KeyboardInterrupt, match=r"stopped by SIGINT after step 4; go on from .* by fit\(resume=True\)"):
        loop.fit()
    assert "stopped by SIGINT after step 4" in capsys.readouterr().out
    assert modes == [module.training for module in loop.model.modules()]
    assert handlers == [signal.getsignal(number) for number in NUMBERS]
    assert torch.isfinite(loop.model(input_ids=torch.tensor([[5, 7]])).logits).all()
    assert loop.evaluate()["eval_loss"] == pytest.approx(loop.evaluate()["eval_loss"])

    loop.moment, loop.at, loop.number = "evaluation", 6, signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        loop.fit(resume=True)
    assert loop.step == 6
    loop.fit(resume=True)
    assert_same(results(loop), whole)


def test_without_a_folder_the_same_loop_goes_on_from_where_it_is(whole, capsys):
    loop = make(None, "evaluation", 4, signal.SIGINT, save_every=None)
    loop.callbacks.pop(1)  # without a folder KeepBest copies weights: not what this is about
    with pytest.raises(KeyboardInterrupt, match="stopped by SIGINT after step 4; nothing is saved without a folder"):
        loop.fit()
    loop.fit()
    assert all(torch.equal(value, whole[0][name]) for name, value in loop.model.state_dict().items())
    assert [row.get("eval_loss") for row in loop.history] == [row.get("eval_loss") for row in whole[1]]


def test_events_when_told(tmp_path):
    events = []

    class Record(Callback):
        def on_save(self, loop, folder):
            events.append(folder.name)

        def on_exception(self, loop, error):
            events.append(type(error).__mro__)

        def on_fit_end(self, loop):
            events.append("end")

    loop = make(tmp_path, "forward", 0, signal.SIGINT)
    loop.callbacks.append(Record())
    with pytest.raises(KeyboardInterrupt):
        loop.fit()
    assert events[0] == "step-00000001"
    assert KeyboardInterrupt in events[1]
    assert len(events) == 2


def test_a_disk_that_fails_when_told_is_said_and_the_callbacks_hear_of_it(tmp_path):
    from llmtune.errors import CheckpointError

    heard = []

    class Record(Callback):
        def on_exception(self, loop, error):
            heard.append(type(error).__name__)

    loop = make(tmp_path, "forward", 0, signal.SIGINT)
    loop.callbacks.append(Record())

    def full():
        raise OSError(28, "No space left on device")

    loop.tokenizer.then = full
    with pytest.raises(CheckpointError, match="No space left on device"):
        loop.fit()
    assert heard == ["Interrupted"]


@pytest.mark.parametrize("first", NUMBERS)
@pytest.mark.parametrize("second", NUMBERS)
def test_a_second_signal_interrupts_at_once(tmp_path, first, second):
    class Twice(Loop):
        def compute_loss(self, model, batch):
            if self.step == 2 and torch.is_grad_enabled():
                send(first)
                send(second)
                os._exit(77)  # the second one was not heard
            return super().compute_loss(model, batch)

    def work():
        loop = make(tmp_path)
        loop.__class__ = Twice
        loop.fit()

    assert in_a_child(work) == 130
    assert list_checkpoints(tmp_path) == [tmp_path / "step-00000002"], "that of the best evaluation; none of step 3"


def test_handlers_of_before_are_put_back_whatever_happens():
    def own(number, frame):
        raise AssertionError("not reached")

    before = [signal.signal(number, own) for number in NUMBERS]
    try:
        with StopSignals() as signals:
            assert signals.watching
            assert all(signal.getsignal(number) not in (own, None) for number in NUMBERS)
        assert [signal.getsignal(number) for number in NUMBERS] == [own, own]
        with pytest.raises(KeyError), signals:
            {}[send(signal.SIGTERM)]
        assert [signal.getsignal(number) for number in NUMBERS] == [own, own]
        assert not signals.watching
    finally:
        for number, handler in zip(NUMBERS, before, strict=True):
            signal.signal(number, handler)


def test_what_was_ignored_stays_ignored(tmp_path):
    def work():
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
        loop = make(tmp_path, "forward", 2, signal.SIGINT)
        loop.fit()
        assert loop.step == 6
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        make(tmp_path / "other", "forward", 2, signal.SIGTERM).fit()

    assert in_a_child(work) == 143


def test_what_nobody_acted_upon_goes_to_the_handler_of_before():
    heard = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    try:
        with StopSignals():
            send(signal.SIGTERM)
            assert heard == []
        assert heard == [signal.SIGTERM]
        with pytest.raises(SystemExit), StopSignals() as signals:
            raise told_by(send(signal.SIGTERM) or signals.received, 3, None)
        assert heard == [signal.SIGTERM], "this one was acted upon"
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_in_a_thread_watches_nothing_and_works(tmp_path, whole):
    before = [signal.getsignal(number) for number in NUMBERS]
    seen, loop = [], make(tmp_path)
    loop.callbacks.append(
        type("See", (Callback,), {"on_step_end": lambda *_: seen.append([signal.getsignal(n) for n in NUMBERS])})()
    )
    thread = threading.Thread(target=loop.fit)
    thread.start()
    thread.join()
    assert seen == [before] * 6
    assert_same(results(loop), whole)


@pytest.mark.parametrize("where", ["inner", "outer"])
def test_of_nested_runs_both_are_left_and_saved(tmp_path, where):
    """A run inside a run, as in meta-learning: the inner one's step is finished, and the outer one's last is kept."""

    class Inner(Callback):
        def on_step_end(self, loop, metrics):
            inner = make(tmp_path / f"inner{loop.step}", "forward" if where == "inner" and loop.step == 2 else None, 1)
            inner.fit()

    def work():
        outer = make(tmp_path / "outer", "end of a step" if where == "outer" else None, 2)
        outer.callbacks.append(Inner())
        try:
            outer.fit()
        finally:
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    assert in_a_child(work) == 143
    assert newest_valid(tmp_path / "outer")[1]["step"] == 2
    assert newest_valid(tmp_path / "inner2")[1]["step"] == (2 if where == "inner" else 6)
