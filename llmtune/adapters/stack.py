"""Task after task: freeze the adapters that are there and add one, or fold the last into the weights and start anew."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from llmtune.adapters.attach import (
    adapter_layers,
    adapter_names,
    adapter_parameters,
    attach,
    detach,
    record_of,
    set_active,
)
from llmtune.adapters.merge import merge
from llmtune.adapters.record import AdapterConfig
from llmtune.adapters.report import AttachReport, MergeReport
from llmtune.adapters.stack_files import load_stack, save_stack
from llmtune.adapters.trial import trial
from llmtune.modules import unwrap


class AdapterStack:
    """The adapters of a model as a chain of tasks; all it knows stands in the model, so a copied model has its own.

    `start` for every task is what the literature calls IncLoRA: the earlier adapters are frozen and stay on, so that
    their changes and the new one add up. SeqLoRA is one adapter for all tasks: `start` once, and train on.

    A module trained whole (`train_modules`: a classification head) has a copy in every task that names it. A new copy
    starts from the one in use; the newest that is on runs; `use` brings an earlier task's back, to the bit. A task that
    does not name it leaves it as it is, frozen. (PEFT's new copy starts from the base model's, so that an untrained
    head starts anew with every task.) They are merged in the order in which they came.

    Args:
        model: any module, with or without adapters.

    Raises:
        TypeError: it is no module.

    Example:
        >>> from llmtune.adapters import AdapterStack, LoRA
        >>> from llmtune.testing.models import tiny_llama
        >>> stack = AdapterStack(tiny_llama())
        >>> for task in ("maths", "french"):
        ...     _ = stack.start(LoRA(rank=4, alpha=8, targets=["q_proj"]), task)  # and train
        >>> stack.names, stack.active, stack.trained
        (['maths', 'french'], ['maths', 'french'], ['french'])
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"a stack of adapters is a module's; got {type(model).__name__}")
        self.model = model  # as it came, for attach refuses what comes after DistributedDataParallel

    @property
    def names(self) -> list[str]:
        """The adapters there are, oldest first."""
        return adapter_names(self.model)

    @property
    def active(self) -> list[str]:
        """Those that take part in the forward pass, or stand in the weights (`merge`)."""
        return [name for name in self.names if all(layer.active for layer in adapter_layers(self.model, name))]

    @property
    def trained(self) -> list[str]:
        """Those with a parameter that requires a gradient."""
        return [n for n in self.names if any(p.requires_grad for p in adapter_parameters(self.model, n).values())]

    @property
    def folded(self) -> list[str]:
        """The tasks that were merged for good, of which only the changed weights are left."""
        return list(record_of(self.model, self.names[-1]).folded) if self.names else []

    def start(self, config: AdapterConfig, name: str) -> AttachReport:
        """Freeze what there is, and add an adapter, the only one that is trained. The others stay on, or off.

        Args:
            config: what to adapt and how.
            name: the task's name.

        Raises:
            ValueError, TypeError: as `attach`.
        """
        return attach(self.model, config, name)

    def merge_and_start(
        self,
        config: AdapterConfig,
        name: str,
        *,
        keep_base: bool = False,
        untie: bool = False,
        dequantize: bool | torch.dtype = False,
    ) -> tuple[MergeReport, AttachReport]:
        """Fold the newest adapter into the weights, and add another, the only one that is trained.

        The new one is tried first, so that where either cannot be done nothing has changed.

        Args:
            config: what to adapt and how.
            name: the new task's name.
            keep_base: keep the merged adapter and the weights from before, so that `unmerge` is exact; otherwise the
                adapter is gone for good.
            untie, dequantize: as for `merge`.

        Raises:
            ValueError: there is no adapter yet; and as `merge` and `attach`.
            TypeError: as `attach`.
        """
        if not self.names:
            raise ValueError("there is no adapter to merge: start the first task with start(config, name)")
        last = self.names[-1]
        record = record_of(self.model, last)
        with trial(unwrap(self.model)):
            if not keep_base and last not in record.merged:
                detach(self.model, last)
            attach(self.model, config, name)
            detach(self.model, name)
        merged = merge(self.model, last, keep_base=keep_base, untie=untie, dequantize=dequantize)
        report = attach(self.model, config, name)
        record_of(self.model, name).folded = record.folded  # the record goes with the last adapter
        return merged, report

    def use(self, names: str | Iterable[str]) -> None:
        """Let exactly these tasks' adapters take part; says nothing about which are trained.

        Args:
            names: one name or several; () for none.

        Raises:
            ValueError: as `set_active`.
        """
        set_active(self.model, names)

    def save(self, folder: str | Path) -> Path:
        """Write every adapter as `save` does, and `adapter_stack.json`: their order, which are on, trained and frozen.

        Args:
            folder: where to; the file of the order is moved there last.

        Raises:
            ValueError: there is no adapter; and as `save`.
        """
        if not self.names:
            raise ValueError("there is no adapter to save: start a task first")
        state = {key: getattr(self, key) for key in ("names", "active", "trained", "folded")}
        record = record_of(self.model, self.names[-1])
        parameters = {name: adapter_parameters(self.model, name) for name in state["trained"]}
        frozen = {name: [k for k, p in some.items() if not p.requires_grad] for name, some in parameters.items()}
        return save_stack(self.model, folder, state | {"merged": record.merged}, over=record.over, frozen=frozen)

    @classmethod
    def load(cls, model: nn.Module, folder: str | Path, *, folded: Sequence[str] = ()) -> AdapterStack:
        """Put a saved stack onto a model: the adapters in their order, on or off, trained or frozen, merged or not.

        Args:
            model: a model without adapters.
            folder: what `save` wrote.
            folded: the tasks that had been merged for good when it was saved. Their change is in none of the files but
                in the weights: naming them says that this model's weights hold it.

        Raises:
            FileNotFoundError: a file is missing.
            ValueError: the model has adapters, `folded` is not what the stack was saved with, or as `load`. The model
                is then as it was.
        """
        stack = cls(model)
        load_stack(stack.model, folder, folded=folded)
        return stack
