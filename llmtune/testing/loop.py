"""The law of a training loop: one gradient, however the step is cut, and one result, however it is interrupted."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.errors import LawBroken
from llmtune.testing.close import assert_close
from llmtune.testing.models import VOCABULARY, tiny_gpt2, tiny_llama

MakeLoop = Callable[[nn.Module, Sequence[dict[str, Any]], int], Any]


def uneven_rows(rows: int = 8, *, seed: int = 0) -> list[dict[str, Any]]:
    """Return rows for a small language model whose numbers of tokens and of targets all differ.

    Args:
        rows: how many.
        seed: of the token ids, which lie in 3 ... 96.

    Returns:
        Dicts of "input_ids" and "labels", lists of ints; row i has i + 3 tokens and, after the shift, i + 1 labels.
    """
    generator = torch.Generator().manual_seed(seed)
    made = []
    for index in range(rows):
        ids = torch.randint(3, VOCABULARY, (index + 3,), generator=generator).tolist()
        made.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    return made


def check_loop(make: MakeLoop, *, model: nn.Module | None = None, rows: Sequence[dict[str, Any]] | None = None) -> None:
    """Check the laws of a training loop.

    - one gradient: 1, 2 and 8 micro-batches leave the same gradient, to 1e-6 of its norm in float32 and 1e-10 in
      float64, and it is that of the mean over all targets of the step's rows, dropout off;
    - no trace: `accumulate_gradients` keeps train and eval modes and drops what `.grad` held before;
    - order by step: `micro_batches(step)` gives the same batches whenever it is asked;
    - one result: a run stopped after 2 of 4 steps and resumed ends with the very weights of the run that was not.

    Args:
        make: `make(model, data, rows_per_micro_batch) -> loop`, a loop that takes 8 rows a step. For the
            last law the loop must keep checkpoints where `settings.folder` says; with folder=None that law is left out.
        model: what to train; unless given a tiny Llama, and for the last law a tiny GPT-2 with dropout.
        rows: the data, in whatever form the loop takes; 8 rows with uneven target counts unless given.

    Raises:
        LawBroken: names the law and the difference.
    """
    default = model is None
    model = tiny_llama() if model is None else model
    rows = uneven_rows() if rows is None else rows
    _one_gradient(make, model, rows)
    _no_trace(make, model, rows)
    _order_by_step(make, model, rows)
    _one_result(make, tiny_gpt2(dropout=0.1) if default else model, rows)


def _gradients(loop: Any, batches: Sequence[Any]) -> dict[str, Tensor]:
    loop.accumulate_gradients(batches)
    named = loop.model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.requires_grad and p.grad is not None}


def _one_gradient(make: MakeLoop, model: nn.Module, rows: Sequence[dict[str, Any]]) -> None:
    for dtype, allowed in ((torch.float64, 1e-10), (torch.float32, 1e-6)):
        still = copy.deepcopy(model).to(dtype).eval()  # dropout off: it draws other masks for other batches
        found: dict[int, dict[str, Tensor]] = {}
        for size in (8, 4, 1):
            loop = make(copy.deepcopy(still), rows, size)
            batches = loop.micro_batches(0)
            if len(batches) != 8 // size:
                raise LawBroken(
                    f"one gradient: 8 rows by {size} must give {8 // size} micro-batches, got {len(batches)}"
                )
            found[size] = _gradients(loop, batches)
        for size in (4, 1):
            _same_gradient(found[size], found[8], allowed, f"of {8 // size} micro-batches against 1 in {dtype}")
        if dtype == torch.float64:
            _same_gradient(
                found[8], _true_gradient(make(still, rows, 1)), allowed, "against that of the mean over targets"
            )


def _true_gradient(loop: Any) -> dict[str, Tensor]:
    """Each row's mean loss by itself, weighted by the row's share of the targets."""
    batches = loop.micro_batches(0)
    counts = [loop.count_targets(batch) for batch in batches]
    results = [loop.compute_loss(loop.model, loop.prepare_batch(batch)) for batch in batches]
    losses = [result[0] if isinstance(result, tuple) else result for result in results]
    total = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    penalty = loop.penalty()
    (total if penalty is None else total + penalty).backward()
    return {name: p.grad for name, p in loop.model.named_parameters() if p.grad is not None}


def _same_gradient(found: dict[str, Tensor], wanted: dict[str, Tensor], allowed: float, what: str) -> None:
    if found.keys() != wanted.keys():
        raise LawBroken(f"one gradient: {what}: only one has a gradient of {sorted(found.keys() ^ wanted.keys())[0]}")
    size = sum(float(value.double().square().sum()) for value in wanted.values()) ** 0.5
    parts = {name: float((found[name].double() - value.double()).norm()) for name, value in wanted.items()}
    off = sum(part**2 for part in parts.values()) ** 0.5 / max(size, 1e-300)
    if not off <= allowed:
        worst = max(parts, key=lambda name: parts[name])
        raise LawBroken(
            f"one gradient: the gradient {what} is off by {off:.2g} of its norm, "
            f"most in {worst}; allowed is {allowed:g}"
        )


def _no_trace(make: MakeLoop, model: nn.Module, rows: Sequence[dict[str, Any]]) -> None:
    loop = make(copy.deepcopy(model), rows, 4)
    for mode in (True, False):
        loop.model.train(mode)
        first, second = (_gradients(loop, loop.micro_batches(0)) for _ in range(2))
        if any(module.training != mode for module in loop.model.modules()):
            raise LawBroken(f"no trace: accumulate_gradients changed the model's mode from training={mode}")
        for name, value in first.items() if not mode else ():  # in train mode dropout draws anew
            assert_close(second[name], value, what=f"no trace: the gradient of {name}, accumulated a second time")


def _order_by_step(make: MakeLoop, model: nn.Module, rows: Sequence[dict[str, Any]]) -> None:
    longer = [*rows, *rows[:5]]  # so that a step reaches over an epoch's end
    one, other = make(copy.deepcopy(model), longer, 4), make(copy.deepcopy(model), longer, 4)
    jumping = {step: other.micro_batches(step) for step in (3, 1, 0, 2)}
    for step in range(4):
        for now, then in zip(one.micro_batches(step), jumping[step], strict=True):
            same = all(torch.equal(torch.as_tensor(now[name]), torch.as_tensor(then[name])) for name in now)
            if now.keys() != then.keys() or not same:
                raise LawBroken(f"order by step: micro_batches({step}) depends on what was asked before")


class _Stop(Exception):
    """Ends a run in the middle."""


def _one_result(make: MakeLoop, model: nn.Module, rows: Sequence[dict[str, Any]]) -> None:
    weights: list[dict[str, Tensor]] = []
    with tempfile.TemporaryDirectory() as temporary:
        for number, stops in enumerate(((), (2,))):
            for stop in (*stops, None):
                loop = make(copy.deepcopy(model), rows, 4)
                if loop.settings.folder is None:
                    return
                loop.settings = _in_folder(loop.settings, Path(temporary) / str(number))
                _fit(loop, stop)
            weights.append({name: p.detach().clone() for name, p in loop.model.named_parameters()})
    for name, value in weights[0].items():
        if not torch.equal(value, weights[1][name]):
            off = float((value - weights[1][name]).abs().max())
            raise LawBroken(
                f"one result: after a stop and a resume {name} is off by {off:.2g} from the run without a stop"
            )


def _in_folder(settings: Any, folder: Path) -> Any:
    import dataclasses

    return dataclasses.replace(
        settings, folder=folder, max_steps=4, epochs=None, save_every=1, eval_every=None, progress=False
    )


def _fit(loop: Any, stop: int | None) -> None:
    taken = loop.training_step

    def stopping(batches: Any) -> Any:
        if stop is not None and loop.step >= stop:
            raise _Stop
        return taken(batches)

    loop.total_steps = 4
    loop.training_step = stopping
    try:
        loop.fit(resume=True)
    except _Stop:
        pass
