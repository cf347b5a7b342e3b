"""What attaching, loading and merging tell, to print and to test against."""

from __future__ import annotations

import html
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from llmtune.adapters.parameter_plan import counted
from llmtune.modules import check_module

if TYPE_CHECKING:
    from llmtune.adapters.plan import Plan


def trainable_summary(model: nn.Module) -> str:
    """Return "trainable params: X || all params: Y || trainable%: Z" of any module."""
    check_module(model)
    parameters = list(model.parameters())
    trainable, total = sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)
    share = 100 * trainable / total if total else 0.0
    return f"trainable params: {trainable:,} || all params: {total:,} || trainable%: {share:.4f}"


class Shown:
    """A report that notebooks show as it prints."""

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


@dataclass(frozen=True)
class AttachReport(Shown):
    """What `attach` did.

    Attributes:
        name: the adapter.
        modules: names of the modules with a layer of the method.
        counts: how many modules each target pattern matched.
        copied: names of the modules trained whole.
        biases: names of the modules whose bias is trained.
        heads: a classifier's heads left frozen.
        summary: the line of `trainable_summary`.
        parameters: names of the parameters with a low-rank change of their own.
        experts: names of stacked weights of experts that "all-linear" left frozen.
        tokens: names of the modules of which rows of single tokens are trained.
    """

    name: str
    modules: tuple[str, ...]
    counts: dict[str, int]
    copied: tuple[str, ...]
    biases: tuple[str, ...]
    heads: tuple[str, ...]
    summary: str
    parameters: tuple[str, ...] = ()
    experts: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module, name: str, plan: Plan) -> AttachReport:
        """Return the report of a plan that has been carried out."""
        parts = (tuple(plan.adapted), dict(plan.counts), tuple(plan.copied), tuple(plan.biases), tuple(plan.heads))
        return cls(
            name, *parts, trainable_summary(model), tuple(plan.parameters), tuple(plan.experts), tuple(plan.tokens)
        )  # fmt: skip

    def __str__(self) -> str:
        patterns = ", ".join(f"{pattern} {count}" for pattern, count in self.counts.items())
        lines = [f'adapter "{self.name}": {len(self.modules)} modules' + (f" ({patterns})" if patterns else "")]
        if self.parameters:
            lines[0] += f", {len(self.parameters)} parameters ({counted(self.parameters)})"
        if self.copied:
            lines.append(f"trained whole, as copies: {', '.join(self.copied)}")
        if self.biases:
            lines.append(f"trained biases: {len(self.biases)}")
        if self.tokens:
            lines.append(f"trained rows of single tokens: {', '.join(self.tokens)}")
        if self.heads:
            heads = ", ".join(self.heads)
            lines.append(f"frozen: {heads}; a head that starts at random must be named in train_modules")
        if self.experts:
            stacks = f"{len(self.experts)} parameters of experts ({counted(self.experts)})"
            lines.append(f"frozen: {stacks}; LoRA changes those that target_parameters names")
        return "\n".join([*lines, self.summary])


@dataclass(frozen=True)
class LoadReport(Shown):
    """What `load` found.

    Attributes:
        name: the adapter the tensors went to.
        loaded: how many tensors.
        missing: tensors the adapter has and the file has not.
        unexpected: tensors the file has and the adapter has not.
        mismatched: tensors whose shapes differ, with both shapes.
        unmatched: patterns of the file's configuration that match no module of this model.
    """

    name: str
    loaded: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    mismatched: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f'adapter "{self.name}": {self.loaded} tensors loaded']
        for what in ("missing", "unexpected", "mismatched", "unmatched"):
            names = getattr(self, what)
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                lines.append(f"{len(names)} {what}: {', '.join(names[:3])}{more}")
        return "; ".join(lines)


@dataclass(frozen=True)
class MergeReport(Shown):
    """What `merge` did.

    Attributes:
        name: the adapter.
        parameters: the bare names of the parameters changed.
        kept_bytes: bytes of originals kept on the CPU for `unmerge`.
        largest_rounding: the largest distance of a merged entry from the exact sum, lost by rounding.
        untied: parameters that were given a copy of their own because they were tied.
        dequantized: weights whose quantised layer has made place for a plain one.
        added_bytes: how much more these take than before; what they replaced counts where it is kept.
    """

    name: str
    parameters: tuple[str, ...]
    kept_bytes: int
    largest_rounding: float
    untied: tuple[str, ...] = field(default=())
    dequantized: tuple[str, ...] = field(default=())
    added_bytes: int = 0

    def __str__(self) -> str:
        kept = f"{self.kept_bytes / 2**20:.1f} MiB of originals kept" if self.kept_bytes else "originals not kept"
        untied = f"; untied: {', '.join(self.untied)}" if self.untied else ""
        merged = f'adapter "{self.name}" merged into {len(self.parameters)} parameters'
        lines = [f"{merged}, {kept}; rounding at most {self.largest_rounding:.3g}{untied}"]
        if self.dequantized:
            more = f"{self.added_bytes / 2**20:.1f} MiB more than before"
            lines.append(f"{len(self.dequantized)} weights de-quantised, which take {more}")
        return "\n".join(lines)


@dataclass(frozen=True)
class CombineReport(Shown):
    """What `combine` did.

    Attributes:
        name: the new adapter.
        weights: the adapters it is made of, and their weights.
        method: how.
        ranks: the rank of each module's change, by the module's name.
        errors: how far each is from what the method asks for before it is brought down to that rank: the Frobenius norm
            of the difference over that of the change; 0 where nothing was cut off.
    """

    name: str
    weights: dict[str, float]
    method: str
    ranks: dict[str, int]
    errors: dict[str, float]

    @property
    def largest_error(self) -> float:
        """The largest of the errors."""
        return max(self.errors.values())

    def __str__(self) -> str:
        made = " + ".join(f'{weight:g} * "{name}"' for name, weight in self.weights.items())
        low, high = min(self.ranks.values()), max(self.ranks.values())
        ranks = f"rank {high}" if low == high else f"ranks {low} to {high}"
        place = max(self.errors, key=self.errors.__getitem__)
        lost = f"relative error at most {self.largest_error:.3g} ({place})" if self.largest_error else "exact"
        return (
            f'adapter "{self.name}": {made} ({self.method})\n{len(self.ranks)} modules, {ranks}, {lost}; '
            f'off until set_active(model, "{self.name}")'
        )
