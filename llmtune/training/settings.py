"""The knobs of a run: one frozen record, checked when it is made."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay",
)  # fmt: skip

# What may differ between a run and its resumption: it changes where results go or how often one looks, not the result.
_FREE = frozenset({
    "folder", "save_every", "keep", "save_frozen", "background_save", "eval_every", "log_every", "progress",
    "data_workers",
})  # fmt: skip
# What changes the result by rounding alone: a resumed run may differ in it, and says so.
ROUNDING = frozenset({"rows_per_micro_batch", "compile", "activation_checkpointing", "fused"})


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """The settings of a `TrainingLoop`; frozen, so that a run is what its settings say.

    Args:
        max_steps: optimizer steps to take. Exactly one of `max_steps` and `epochs` is given.
        epochs: passes over the data; each row is seen exactly this many times.
        rows_per_step: rows of the data set whose gradient makes one optimizer step (packs, where the data is packed).
        rows_per_micro_batch: rows in one forward pass; the default is all of `rows_per_step`. The gradient does not
            depend on it, only the memory does. Where memory runs out, the loop halves it and repeats the step.
        learning_rate: the peak learning rate of AdamW.
        schedule: a name `transformers.get_scheduler` knows: "linear", "cosine", "constant" ...
        schedule_options: what that schedule takes beside the warm-up, as `scheduler_specific_kwargs` of
            `get_scheduler`: {"min_lr_rate": 0.1} for "cosine_with_min_lr", {"num_decay_steps": 100} ... Numbers and
            texts by name.
        warmup_steps: optimizer steps over which the learning rate rises from 0; "constant" has none.
        weight_decay: AdamW's decoupled decay, for tensors of two or more dimensions; biases and norms are left out.
        clip_norm: largest gradient norm, over all trained parameters; None only measures it.
        precision: "float32"; "bf16" or "fp16" run the forward pass under autocast (parameters keep their dtype), fp16
            with a gradient scaler.
        fused: whether AdamW updates all parameters in one kernel; None does so where torch can.
        compile: whether the forward pass goes through `torch.compile`; a string names its backend.
        activation_checkpointing: keep only what enters each block of a Hugging Face model, and compute the rest again
            in the backward pass: less memory, more time.
        on_bad_step: what to do where loss or gradient is not finite, or the loss a spike: "raise" before the optimizer
            step, or "skip" it, count it in the history ("skipped"), and raise once ten in a row were skipped.
        spike_factor: a loss more than so many times the median of the 32 steps before, a median above 0, is a bad step;
            None looks at none.
        seed: of the data order and of the run's random state.
        folder: where checkpoints and `history.csv` go; None writes nothing. A relative path is taken from where the
            program is when the settings are made, and "~" is the home folder.
        save_every: optimizer steps between checkpoints; None saves only at the end. Needs `folder`.
        keep: how many checkpoints stay; older ones are removed after a new one is safely written.
        save_frozen: whether checkpoints hold frozen parameters too; else a fingerprint of each makes sure that the same
            ones are there again.
        background_save: write checkpoints in a thread, from a copy in main memory.
        eval_every: optimizer steps between evaluations; None evaluates only at the end. Needs `eval_data`.
        log_every: optimizer steps between rows of the history shown on the bar; every step is recorded.
        data_workers: processes that make batches ahead of the step that needs them; 0 makes them in the loop. Needs
            `micro_batches` to be a function of seed and step alone.
        progress: whether to print the banner, the bar and the end line.

    Raises:
        ValueError: a setting is out of its range, or two settings contradict each other; the sentence names it.
    """

    max_steps: int | None = None
    epochs: int | None = None
    rows_per_step: int = 8
    rows_per_micro_batch: int | None = None
    learning_rate: float = 2e-4
    schedule: str = "linear"
    schedule_options: Mapping[str, Any] = dataclasses.field(default_factory=dict, hash=False)
    warmup_steps: int = 0
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    precision: Literal["float32", "bf16", "fp16"] = "float32"
    fused: bool | None = None
    compile: bool | str = False
    activation_checkpointing: bool = False
    on_bad_step: Literal["raise", "skip"] = "raise"
    spike_factor: float | None = None
    seed: int = 0
    folder: str | Path | None = None
    save_every: int | None = None
    keep: int = 2
    save_frozen: bool = False
    background_save: bool = False
    eval_every: int | None = None
    log_every: int = 10
    data_workers: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        self._check_kinds()
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(
                f"give exactly one of max_steps and epochs; got max_steps={self.max_steps}, epochs={self.epochs}"
            )
        for name in ("warmup_steps", "seed", "data_workers"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} must be a whole number of at least 0; got {value!r}")
        counts = ("max_steps", "epochs", "rows_per_step", "rows_per_micro_batch", "save_every", "eval_every",
                  "keep", "log_every")  # fmt: skip
        for name in counts:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
        for name in ("learning_rate", "weight_decay"):
            value = getattr(self, name)
            if not _is_number(value) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a number of at least 0; got {value!r}")
        if self.clip_norm is not None and not (_is_number(self.clip_norm) and self.clip_norm > 0):
            raise ValueError(f"clip_norm must be above 0, or None to measure without clipping; got {self.clip_norm!r}")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}; got {self.schedule!r}")
        if self.schedule == "constant" and self.warmup_steps:
            raise ValueError(
                'the schedule "constant" has no warm-up: give schedule="constant_with_warmup", or warmup_steps=0'
            )
        if self.precision not in ("float32", "bf16", "fp16"):
            raise ValueError(f'precision must be "float32", "bf16" or "fp16"; got {self.precision!r}')
        if self.on_bad_step not in ("raise", "skip"):
            raise ValueError(f'on_bad_step must be "raise" or "skip"; got {self.on_bad_step!r}')
        if self.spike_factor is not None and not (_is_number(self.spike_factor) and self.spike_factor > 1):
            raise ValueError(f"spike_factor must be above 1, or None to look at none; got {self.spike_factor!r}")
        if self.save_every is not None and self.folder is None:
            raise ValueError("save_every needs a folder to save into: give folder=..., or leave save_every out")

    def what_changes_the_result(self) -> dict[str, Any]:
        """Return the settings that a resumed run must share with the run it goes on with, as JSON values."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["schedule_options"] = dict(self.schedule_options)
        return {name: value for name, value in fields.items() if name not in _FREE}

    def _check_kinds(self) -> None:
        for name in ("activation_checkpointing", "save_frozen", "background_save", "progress", "fused"):
            value = getattr(self, name)
            if not isinstance(value, bool) and not (name == "fused" and value is None):
                raise ValueError(f"{name} must be True or False{', or None' * (name == 'fused')}; got {value!r}")
        if not isinstance(self.compile, bool | str):
            raise ValueError(f"compile must be True, False or the name of a backend; got {self.compile!r}")
        options = self.schedule_options
        if not isinstance(options, Mapping) or not all(
            isinstance(v, int | float | str | None) for v in options.values()
        ):
            raise ValueError(f"schedule_options must be a dict of names to numbers or texts; got {options!r}")
        object.__setattr__(self, "schedule_options", dict(options))
        if self.folder is not None:
            if not isinstance(self.folder, str | Path) or not str(self.folder):
                raise ValueError(f"folder must be a path, or None to write nothing; got {self.folder!r}")
            object.__setattr__(self, "folder", Path(self.folder).expanduser().absolute())


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
