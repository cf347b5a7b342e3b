"""Every loss and penalty inside Hugging Face's Trainer: a class of it whose loss is the mean over a step's targets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from llmtune.integrations.transformers_loss import check_loss_function
from llmtune.training.checks import loss_and_parts, sum_of_penalties, targets_of
from llmtune.training.evaluation import mean_by_name
from llmtune.types import Callback, LossFunction, Penalty

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object  # a mixin of whatever Trainer it is given; importing this loads none

TrainerClass = TypeVar("TrainerClass", bound=type)


def with_loss(trainer: TrainerClass, loss: LossFunction, *, penalties: Sequence[Penalty] = ()) -> TrainerClass:
    """Return a subclass of a Hugging Face `Trainer` class that trains by the loss; made and used as that class is.

        gradient of a step = that of (sum over all its targets) / (number of all its targets)  +  the penalties'

    Targets are counted by `loss.count_targets` over all micro-batches and processes, as in `TrainingLoop`, and the loss
    is given the model and the whole batch: every `LossFunction` works, those that run the model several times as well.
    The loss's parts are logged beside "loss", means over the targets since the last log. A micro-batch without a target
    adds nothing; those of a step come first, so that its last backward pass, in which processes meet, has a gradient.
    Penalties are added once per optimizer step, "penalty" is logged and "loss" includes it.

    In evaluation "eval_loss" and "eval_<part>" are means over all targets, where the Trainer gives the mean over rows
    of batches' means, and penalties are left out. Of several processes, rows that accelerate repeats to fill the last
    batch count twice. With `compute_metrics` the model is run once more for its logits.

    The Trainer drops columns that the model's forward does not name: set remove_unused_columns=False where the loss or
    the collator needs them (pairs of answers). Tested in one process and under DDP; FSDP, DeepSpeed, other
    parallelism and DataParallel are refused. `trainer_loss` is for the case in which the class cannot be chosen.

    Args:
        trainer: `transformers.Trainer` or a subclass (`Seq2SeqTrainer`) that leaves `compute_loss` alone.
        loss: any `LossFunction`.
        penalties: functions of the model; such as act between steps (a callback with hooks) are for `TrainingLoop`.

    Returns:
        A class. Making one raises ValueError for arguments that would go unheeded: label_smoothing_factor (the loss
        has label_smoothing), compute_loss_func, and average_tokens_across_devices=False in several processes.

    Raises:
        TypeError: `trainer` is no class of a Trainer, or the loss has no `count_targets`.
        ValueError: a penalty has hooks that the Trainer would not call.

    Example:
        >>> from transformers import Trainer, TrainingArguments
        >>> from llmtune.data import collate_padded
        >>> from llmtune.losses import CausalLMLoss
        >>> from llmtune.testing.models import tiny_llama
        >>> rows = [{"input_ids": [5, 7, 11, 13], "labels": [5, 7, 11, 13]}] * 4
        >>> arguments = TrainingArguments("run", max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        ...                               save_strategy="no", logging_strategy="no")
        >>> trainer = with_loss(Trainer, CausalLMLoss(label_smoothing=0.1))(
        ...     tiny_llama(), arguments, train_dataset=rows, data_collator=collate_padded)
        >>> trainer.compute_loss(trainer.model, collate_padded(rows)).shape
        torch.Size([])
    """
    if not isinstance(trainer, type) or not hasattr(trainer, "get_batch_samples"):
        raise TypeError(f"a class is expected, transformers.Trainer or one made of it; got {trainer!r}")
    if issubclass(trainer, TrainerByTargets):
        raise TypeError(f"{trainer.__name__} has a loss already: give with_loss the class that it was made of")
    check_loss_function(loss)
    for penalty in penalties:
        hooks = [name for name in vars(Callback) if name.startswith("on_")]
        own = [name for name in hooks if getattr(type(penalty), name, None) not in (None, getattr(Callback, name))]
        if own:
            raise ValueError(
                f"the penalty {type(penalty).__name__} acts in {own[0]}, which the Trainer does not call: use it in "
                "llmtune.TrainingLoop"
            )
    namespace = {"loss": staticmethod(loss), "penalties": tuple(penalties)}  # a function is not to become a method
    made: Any = type(f"{trainer.__name__}WithLoss", (TrainerByTargets, trainer), namespace)
    return made


class TrainerByTargets(Trainer):
    """What `with_loss` puts in front of a Trainer class; see there.

    Attributes:
        loss: a `LossFunction`.
        penalties: functions of the model.
    """

    loss: LossFunction
    penalties: tuple[Penalty, ...] = ()
    loss_is_scaled_for_ga = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check(self)
        self.model_accepts_loss_kwargs = True  # before loss_is_scaled_for_ga, what kept the Trainer from dividing
        self._logged, self._evaluated = _Means(), _Means()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the micro-batches of a step, those without a target first, and how many targets all processes have.

        Raises:
            ValueError: a process has no target in this step.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, None
        counts = [targets_of(self.loss, dict(batch)) for batch in batches]
        of_each: Tensor = self.accelerator.gather(torch.tensor([sum(counts)], device=device))
        if not bool(of_each.all()):
            raise ValueError(
                f"step {self.state.global_step + 1} has no target to learn from: in the {len(batches)} micro-batches "
                f"of process {int(of_each.argmin())} every label is ignored (-100), or no row has what the loss asks "
                "for. Check the labels, or drop such rows"
            )
        order = sorted(range(len(batches)), key=lambda at: counts[at] > 0)
        return [batches[at] for at in order], of_each.sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return in training the micro-batch's share of the step's loss; in eval mode, or without a count, its mean.

        Args:
            model: as the Trainer calls it.
            inputs: the whole batch, tensors of any shape.
            return_outputs: whether to run the model once more and return (loss, outputs).
            num_items_in_batch: how many targets the step has, a scalar.
        """
        batch = dict(inputs)
        count = targets_of(self.loss, batch)
        if not model.training:
            mean, parts = self._mean(model, batch) if count else (self._zero(), {})
            self._evaluated.add({"loss": mean, **parts} if count else {}, count)
            return (mean, model(**batch)) if return_outputs else mean
        loss = self._zero()
        if count:
            step = count if num_items_in_batch is None else num_items_in_batch
            mean, parts = self._mean(model, batch)
            self._logged.add(parts, count / step)
            loss = mean * (count * self.accelerator.num_processes) / step  # DDP takes the mean over processes
        if self.penalties and self.accelerator.sync_gradients:  # the step's last micro-batch
            core: Any = self.model
            penalty = sum_of_penalties(self.penalties, core)
            assert penalty is not None
            self._logged.add({"penalty": penalty}, 1 / self.accelerator.num_processes)
            loss = loss + penalty
        return (loss, model(**batch)) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """Return (mean loss, outputs, labels) of a batch, as the Trainer's; for the loss alone "labels" is no must.

        Args:
            model: as the Trainer calls it.
            inputs: the batch, tensors of any shape.
            prediction_loss_only: whether outputs and labels are None.
            ignore_keys: entries of the outputs to leave out.
        """
        generates = getattr(self.args, "predict_with_generate", False)
        loss = None
        if prediction_loss_only or (generates and "labels" in inputs):
            with torch.no_grad():
                loss = self.compute_loss(model, self._prepare_inputs(inputs)).detach()
        if prediction_loss_only:
            return loss, None, None
        theirs, outputs, labels = super().prediction_step(model, inputs, False, ignore_keys)
        return (theirs if loss is None else loss), outputs, labels

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """Evaluate as the Trainer does, with means over targets in the place of the loss.

        Raises:
            ValueError: no row has a target.
        """
        self._evaluated = _Means()
        output: Any = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        means = self._evaluated.take(self.accelerator.num_processes)
        if f"{metric_key_prefix}_loss" in output.metrics:
            if "loss" not in means:
                raise ValueError("no row of the evaluation's data has a target: every label is ignored (-100)")
            output.metrics.update({f"{metric_key_prefix}_{name}": mean for name, mean in means.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the parts of the loss beside "loss": their means over the targets since the last time."""
        if "loss" in logs:
            logs.update(self._logged.take(self.accelerator.num_processes))
        super().log(logs, start_time)

    def _mean(self, model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, Mapping[str, Any]]:
        with self.accelerator.autocast():  # the Trainer's covers the model's forward pass alone
            return loss_and_parts(self.loss(model, batch), trained=torch.is_grad_enabled())

    def _zero(self) -> Tensor:
        return torch.zeros((), device=self.args.device, requires_grad=torch.is_grad_enabled())


class _Means:
    """Sums of scalars, and of their weights, by name, in this process; kept on the device."""

    def __init__(self) -> None:
        self.totals: dict[str, list[Any]] = {}

    def add(self, values: Mapping[str, Any], weight: Tensor | float) -> None:
        for name, value in values.items():
            total = self.totals.setdefault(name, [0.0, 0.0])
            total[0] = total[0] + torch.as_tensor(value).detach().float() * weight
            total[1] = total[1] + weight

    def take(self, processes: int) -> dict[str, float]:
        """Return the means over all processes, all of which must ask, and start anew."""
        shares = [{name: [float(total), float(weight)] for name, (total, weight) in self.totals.items()}]
        self.totals = {}
        if processes > 1:
            from accelerate.utils import gather_object

            shares = gather_object(shares)
        return mean_by_name(shares)


def _check(trainer: Any) -> None:
    """Raise ValueError where the Trainer has been given what would go unheeded, or what the losses are not made for."""
    args, accelerator = trainer.args, trainer.accelerator
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} smooths the Trainer's own loss, which with_loss "
            "replaces: give label_smoothing to the loss instead, such as CausalLMLoss(label_smoothing=0.1)"
        )
    if trainer.compute_loss_func is not None:
        raise ValueError("with_loss brings the loss, and compute_loss_func is another one: leave one of the two out")
    if args.n_gpu > 1:
        raise ValueError(
            f"{args.n_gpu} devices in one process mean torch's DataParallel, which runs copies of the model that a "
            "loss cannot look into: start one process per device (torchrun), or let it see one (CUDA_VISIBLE_DEVICES=0)"
        )
    sharded = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
    if sharded or getattr(accelerator, "parallelism_config", None) is not None:
        raise ValueError(
            "under FSDP, DeepSpeed or tensor, context and sequence parallelism a loss cannot use the model's head by "
            "itself: train data-parallel, use llmtune.TrainingLoop, or, for a loss of logits, trainer_loss"
        )
    if accelerator.num_processes > 1 and not args.average_tokens_across_devices:
        raise ValueError(
            "average_tokens_across_devices=False would be without effect: with_loss takes the mean over the targets of "
            "all processes. Leave it out"
        )
