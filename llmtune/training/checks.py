"""What the loop checks of its rows, its loss and its gradients, each with one sentence."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from llmtune.losses.packed import check_documents_apart
from llmtune.training.memory import is_out_of_memory
from llmtune.training.optimizer import check_schedule, steps_in_all
from llmtune.training.randomness import fixed_randomness, seed_everything
from llmtune.training.settings import LoopSettings
from llmtune.training.sharding import is_dtensor, is_sharded
from llmtune.training.streams import is_stream
from llmtune.training.switches import check_checkpointing
from llmtune.types import Batch, Penalty

if TYPE_CHECKING:
    from llmtune.training.loop import TrainingLoop

RESERVED = {
    "loss", "penalty", "targets", "overflow", "skipped", "grad_norm", "learning_rate", "step", "tokens", "seconds",
}  # fmt: skip


def check_run(model: nn.Module, train_data: Any, eval_data: Any, settings: LoopSettings) -> None:
    """Raise where model, data and settings cannot make a run; the checks below say which."""
    check_data(train_data, eval_data, settings)
    check_trainable(model)
    check_processes(model, settings.precision)
    if settings.activation_checkpointing:
        check_checkpointing(model)
    check_schedule(settings, steps_in_all(settings, train_data))


def check_rows(rows: Any, what: str) -> None:
    """Raise where `rows` cannot be trained on: no length or index (TypeError), or empty (ValueError)."""
    if isinstance(rows, Mapping) or not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        also = ", or a stream with state_dict and load_state_dict" if what == "train_data" else ""
        kind = type(rows).__name__
        raise TypeError(f"{what} must be rows with a length and an index (a list, a PackedDataset){also}; got {kind}")
    if len(rows) == 0:
        raise ValueError(f"{what} is empty: there are no rows to go through")


def check_data(train_data: Any, eval_data: Any, settings: LoopSettings) -> None:
    """Raise where the data cannot be trained and evaluated on as the settings say.

    Raises:
        TypeError: it is neither rows by number nor a stream.
        ValueError: it is empty; a stream comes with epochs; or an evaluation is wanted and there is nothing for it.
    """
    if not is_stream(train_data):
        check_rows(train_data, "train_data")
    elif settings.epochs is not None or settings.data_workers:
        raise ValueError(
            "a stream has no length and fetches its rows itself: give max_steps instead of epochs, and set workers in "
            "the stream's own loader instead of data_workers"
        )
    if eval_data is not None:
        check_rows(eval_data, "eval_data")
    elif settings.eval_every is not None:
        raise ValueError(f"eval_every={settings.eval_every} needs eval_data; none was given")


def targets_of(loss: Any, batch: Batch) -> int:
    """Return `loss.count_targets(batch)`.

    Raises:
        TypeError: the loss has no such method.
        ValueError: it gives no whole number of at least 0.
    """
    count = getattr(loss, "count_targets", None)
    if count is None:
        raise TypeError(
            f"the loop must know over how many targets {loss!r} takes its mean: give it a "
            "count_targets(batch) method, or override TrainingLoop.count_targets"
        )
    given = count(batch)
    number = given.item() if isinstance(given, Tensor) and given.numel() == 1 else given
    if not isinstance(number, int | float | np.number) or not (number >= 0 and number == int(number)):
        raise ValueError(
            f"count_targets of {loss!r} must return how many targets the mean is over, a whole number; got {number!r}"
        )
    return int(number)


def total_of(counts: Sequence[int], *, step: int) -> int:
    """Return the sum of the counts of a step's micro-batches; `step` from 1, for the sentence.

    Raises:
        ValueError: it is 0.
    """
    if sum(counts) == 0:
        raise ValueError(
            f"step {step} has no target to learn from: in its {len(counts)} micro-batches every label is ignored "
            "(-100), or no row has what the loss asks for (a supervised contrast: a row of its class beside it). Check "
            f"the labels of its rows (those of loop.row_indices({step - 1})), or drop such rows"
        )
    return sum(counts)


def check_trainable(model: nn.Module) -> None:
    """Raise ValueError where no parameter requires a gradient, one that does is float16, or one has no data."""
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trained:
        raise ValueError("no parameter of the model requires a gradient: attach an adapter, or unfreeze some")
    empty = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if empty:
        raise ValueError(f"{empty[0]} is on the meta device, without data: load the model's weights first")
    half = [name for name, parameter in trained.items() if parameter.dtype == torch.float16]
    if half:
        raise ValueError(
            f"{half[0]} is trained in float16, which one step of the optimizer can overflow: load the model in float32 "
            'and give precision="fp16", or train an adapter, which is float32 by itself'
        )


def loss_and_parts(result: Any, *, trained: bool = True) -> tuple[Tensor, Mapping[str, Any]]:
    """Return (loss, parts) of what `compute_loss` gave.

    Args:
        result: a scalar tensor, or (scalar tensor, named parts).
        trained: whether the loss must carry a gradient.

    Raises:
        ValueError: the loss is no scalar, or carries no gradient; or a part is no number, or has a name of the loop's
            own.
    """
    loss, parts = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        came = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise ValueError(f"compute_loss must return a scalar tensor, or (scalar, parts); got {came}")
    if not isinstance(parts, Mapping):
        raise ValueError(f"the parts beside a loss must be a dict of names and numbers; got a {type(parts).__name__}")
    for name, part in parts.items():
        if not isinstance(name, str) or not _is_number(part):
            raise ValueError(
                f"the part {name!r} of the loss must be a number or a tensor of one, under a name; got {_short(part)}"
            )
    taken = sorted(RESERVED & set(parts))
    if taken:
        raise ValueError(f'a part of the loss cannot be called "{taken[0]}", which the loop reports itself: rename it')
    if trained and not loss.requires_grad:
        raise ValueError("the loss carries no gradient: it reaches no trainable parameter, or was made under no_grad")
    return loss.float() if loss.dtype in (torch.bfloat16, torch.float16) else loss, parts


def _is_number(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.ndim == 0 and not value.is_complex()
    return isinstance(value, int | float | np.number)


def _short(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def scalar(value: Any, name: str) -> Tensor:
    """Return a penalty's value; raise ValueError where it is no scalar tensor, or carries no gradient.

    Args:
        value: a scalar tensor.
        name: of the penalty, for the sentence.
    """
    if not isinstance(value, Tensor) or value.ndim != 0 or (torch.is_grad_enabled() and not value.requires_grad):
        raise ValueError(
            f"the penalty {name} must return a scalar tensor that reaches a trainable parameter; got "
            + (repr(value) if isinstance(value, Tensor) and value.ndim == 0 else _short(value))
        )
    return value


def checked_penalty(penalty: Penalty, model: nn.Module) -> Tensor:
    """Return `penalty(model)` in float32, a scalar.

    Raises:
        ValueError: it is no scalar tensor, or carries no gradient, or cannot take a model that is spread over
            processes; names the penalty.
    """
    name = getattr(penalty, "__name__", type(penalty).__name__)
    try:
        value = scalar(penalty(model), name)
    except RuntimeError as error:
        if not is_sharded(model) or is_out_of_memory(error):
            raise
        raise ValueError(
            f"the penalty {name} does not take parameters that are spread over processes: train data-parallel, without "
            f"sharding, or leave it out ({str(error).splitlines()[0]})"
        ) from error
    spread: Any = value
    return (spread.full_tensor() if is_dtensor(value) else value).float()


def sum_of_penalties(penalties: Sequence[Penalty], model: nn.Module) -> Tensor | None:
    """Return the sum of the penalties, a scalar in float32, or None where there are none."""
    if not penalties:
        return None
    return torch.stack([checked_penalty(penalty, model) for penalty in penalties]).sum()


def try_out(loop: TrainingLoop, batches: Sequence[Batch]) -> None:
    """Try the first batch of a step. Nothing is changed by it but the random state: what callbacks draw before the
    first step is then a function of (seed, step), whoever made the batch.

    Raises:
        ValueError: there is none; or the model lets documents of such a batch see each other.
        TypeError: the data is a stream whose state cannot be saved, and the run is to be.
    """
    if not batches:
        raise ValueError(f"micro_batches({loop.step}) must return one batch or more; it returned none")
    if loop.stream is not None and loop.settings.folder is not None:
        loop.stream.check_state()
    with fixed_randomness():
        check_documents_apart(loop.model, loop.prepare_batch(batches[0]))
    loop.ranks.settle(loop.model)
    seed_everything(loop.settings.seed, "start", loop.step)


def check_processes(model: nn.Module, precision: str) -> None:
    """Raise where the processes of a run could not train one model together.

    Raises:
        RuntimeError: torchrun started several processes that have not joined.
        ValueError: the model is wrapped for data-parallel training already, or is sharded and trained in fp16.
    """
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    started = int(os.environ.get("WORLD_SIZE", "1") or 1)
    if started > 1 and not joined:
        raise RuntimeError(
            f"{started} processes were started and have not joined: call llmtune.training.join_processes() first in "
            "the script, or each trains a model of its own"
        )
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        raise ValueError(
            f"give the loop the bare model, not inside {type(model).__name__}: it sums gradients over processes itself"
        )
    if precision == "fp16" and is_sharded(model):
        raise ValueError(
            "a sharded model cannot be trained in fp16, whose overflow each process would judge by itself: set "
            'precision="bf16"'
        )
