"""O-LoRA: a new task's adapter reads other directions of its inputs than the adapters of the tasks before it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmtune.adapters.attach import adapter_layers, adapter_names, record_of
from llmtune.adapters.autocast import no_autocast
from llmtune.adapters.config import LoRA
from llmtune.adapters.layer import AdapterLayer, adapter_chain, named_places, wide
from llmtune.adapters.lora import LowRankLayer
from llmtune.adapters.parameters import LoRAParameter
from llmtune.errors import did_you_mean
from llmtune.modules import unwrap

FORMS = ("normalised", "paper", "code")


def row_overlap(rows: Tensor, earlier: Tensor, *, form: str = "normalised") -> Tensor:
    """Return how much the rows of one matrix point where those of another do, from the products of rows alone.

    normalised   sum_jk cos(a_j, b_k)^2        0 for a row of zeros
    paper        sum_jk <a_j, b_k>^2
    code         sum_jk |<a_j, b_k>|

    Args:
        rows: a, [..., r, n].
        earlier: b, [..., R, n].
        form: one of the three.

    Returns:
        A scalar, in at least float32, over all leading dimensions.

    Raises:
        ValueError: `form` is another, or the rows are of different lengths.

    Example:
        >>> row_overlap(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 2.0]]), form="paper")
        tensor(64.)
    """
    _check_form(form)
    if rows.shape[-1] != earlier.shape[-1]:
        raise ValueError(f"rows of length {rows.shape[-1]} have no angle to rows of length {earlier.shape[-1]}")
    rows, earlier = wide(rows), wide(earlier)
    if form == "normalised":
        rows, earlier = nn.functional.normalize(rows, dim=-1), nn.functional.normalize(earlier, dim=-1)
    products = rows @ earlier.mT
    return products.abs().sum() if form == "code" else products.square().sum()


@dataclass(frozen=True)
class OverlapReport:
    """Which modules a new adapter shares with earlier ones, and how far its A overlaps theirs.

    Attributes:
        name: the new adapter.
        modules: of each earlier adapter, how many modules both adapt.
        cosines: of each earlier adapter, the mean of cos^2 over all pairs of rows in these; NaN where there are none.
        alone: the modules that no earlier adapter touches; the penalty says nothing of them.
    """

    name: str
    modules: dict[str, int]
    cosines: dict[str, float]
    alone: tuple[str, ...]

    def __str__(self) -> str:
        """Return one line for each earlier adapter."""
        if not self.modules:
            return f'adapter "{self.name}": no earlier adapter, so the penalty is 0'
        lines = [f'adapter "{self.name}": {len(self.alone)} modules that no earlier adapter touches']
        lines += [f"{n}: {count} modules, mean cos^2 {self.cosines[n]:.4g}" for n, count in self.modules.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class OrthogonalLoRA:
    """A penalty that holds a new LoRA's A orthogonal to the A of each earlier adapter, module by module.

    penalty(model) = strength * sum over modules, and earlier adapters i, of overlap(A, A_i); see `row_overlap`.

    Gradient goes to the new A alone, whatever of the earlier ones is frozen. It keeps no state: between tasks the
    stack of adapters is all there is to save (`AdapterStack`). Modules that only one adapter touches count nothing. On
    the first task there is nothing to be orthogonal to: the penalty is 0, with gradient 0, and `report` says so.

    The A meant is that of `LoRA`, [r, in] (of an embedding [r, V]): the *input* side. Where A is orthogonal to what an
    earlier adapter reads, the new change is 0 on inputs from the span of the earlier A. In the paper's
    letters A is the output side; the authors' code penalises the input side (`lora_A`), as here.

    Where we differ: the default form takes the rows' lengths out, since otherwise A can shrink while B grows, which
    lowers the penalty and changes nothing. "paper" is the sum of squares as it stands; "code" is the sum
    of absolute values that the public code has.

    What a LoRA may train beside its A and B (biases, whole modules, rows of new tokens) is not counted.

    Attributes:
        strength: 0 or more. The lambda_1 of the authors' scripts, there 0.5 in most, for "code".
        form: "normalised", "paper" or "code".
        name: the new adapter; left out, the newest of the model.
        earlier: the adapters to be orthogonal to, on or off, merged or not; left out, all that came before it.

    Raises:
        ValueError: `strength` is negative or not finite, or `form` is none of the three.
        TypeError: `earlier` is a string.

    Example:
        >>> from llmtune.adapters import AdapterStack, LoRA
        >>> from llmtune.testing.models import tiny_llama
        >>> stack, penalty = AdapterStack(tiny_llama()), OrthogonalLoRA(strength=0.5)
        >>> for task in ("maths", "french"):
        ...     _ = stack.start(LoRA(rank=4, alpha=8, targets=["q_proj"]), task)  # and train, with penalties=[penalty]
        >>> bool(penalty(stack.model) > 0), penalty.report(stack.model).modules
        (True, {'maths': 2})

    Reference:
        Wang et al. 2023, "Orthogonal Subspace Learning for Language Model Continual Learning", section 3;
        code: cmnfriend/O-LoRA, `src/uie_trainer_lora.py`.
    """

    strength: float
    form: str = "normalised"
    name: str | None = None
    earlier: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.strength, bool) or not (self.strength >= 0 and math.isfinite(self.strength)):
            raise ValueError(f"strength must be a finite number, 0 or more; got {self.strength}")
        _check_form(self.form)
        if isinstance(self.earlier, str):
            raise TypeError(f'earlier must be a list of adapters\' names; got the string "{self.earlier}"')

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the penalty, a scalar in at least float32 with gradient to the new adapter's A.

        Args:
            model: with the adapters, with or without wrappers.

        Raises:
            ValueError: there is no such adapter; one of them is no LoRA, starts from the weights, or changes parameters
                by themselves; the new one is merged or its A is frozen; earlier tasks were merged for good, and
                `earlier` does not say that the others are enough.
        """
        model = unwrap(model)
        name, earlier = self._names(model)
        layers = _layers(model, name)
        if torch.is_grad_enabled() and not any(layer.lora_a.requires_grad for layer in layers):
            raise ValueError(f'O-LoRA reaches no parameter: every A of adapter "{name}" is frozen')
        groups: dict[tuple[object, ...], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
        for layer in layers:
            old = [inner.lora_a.detach() for inner in _inside(layer, earlier)]
            if old:  # one product for all modules of one shape
                new, rows = layer.lora_a, sum(len(a) for a in old)
                news, olds = groups[(new.shape, rows, new.device, new.dtype)]
                news.append(new)
                olds.extend(old)
        device = layers[0].lora_a.device
        with no_autocast(device):
            value = 0.0 * wide(layers[0].lora_a).sum()
            for news, olds in groups.values():
                columns = news[0].shape[1]
                together = torch.cat(olds).view(len(news), -1, columns)
                value = value + row_overlap(torch.stack(news), together, form=self.form).to(device)
            return self.strength * value

    @torch.no_grad()
    def report(self, model: nn.Module) -> OverlapReport:
        """Return which modules are shared and how far the rows overlap.

        Args:
            model: as for the call.

        Raises:
            ValueError: as the call.
        """
        model = unwrap(model)
        name, earlier = self._names(model)
        places = {id(layer): place for place, module in named_places(model) for layer in adapter_chain(module)}
        sums, counts, modules = (dict.fromkeys(earlier, 0.0) for _ in range(3))
        alone = []
        for layer in _layers(model, name):
            inside = list(_inside(layer, earlier))
            for inner in inside:
                old = inner.adapter_name
                sums[old] += float(row_overlap(layer.lora_a, inner.lora_a))
                counts[old] += len(layer.lora_a) * len(inner.lora_a)
                modules[old] += 1
            if not inside:
                alone.append(places[id(layer)])
        cosines = {n: sums[n] / counts[n] if counts[n] else math.nan for n in earlier}
        return OverlapReport(name, {n: int(count) for n, count in modules.items()}, cosines, tuple(alone))

    def _names(self, model: nn.Module) -> tuple[str, list[str]]:
        """Return the new adapter's name and the earlier ones', checked."""
        there = adapter_names(model)
        if not there:
            raise ValueError("O-LoRA needs a model with adapters: start a task with AdapterStack(model).start(...)")
        name = there[-1] if self.name is None else self.name
        record = record_of(model, name)
        before = there[: there.index(name)]
        if name in record.merged:
            raise ValueError(f'adapter "{name}" is merged into the weights: unmerge it to train it')
        if self.earlier is None and record.folded:
            raise ValueError(
                f"the tasks {', '.join(record.folded)} were merged for good, and their A is gone: merge with "
                "keep_base=True, or name in earlier those that are still to be held apart"
            )
        earlier = before if self.earlier is None else list(self.earlier)
        for other in earlier:
            if other not in before:
                raise ValueError(
                    f'earlier names "{other}", which did not come before "{name}".{did_you_mean(other, before)}'
                )
        for other in (*earlier, name):
            _check_lora(other, record.configs[other])
        return name, earlier


def _check_form(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"form must be one of {', '.join(FORMS)}; got {form!r}.{did_you_mean(str(form), FORMS)}")


def _check_lora(name: str, config: object) -> None:
    if not isinstance(config, LoRA) or config.decomposes:
        raise ValueError(
            f'adapter "{name}" is {type(config).__name__}: O-LoRA compares the A of plain LoRA adapters, and other '
            "methods change the weights in other ways; name in earlier those to compare with"
        )


def _layers(model: nn.Module, name: str) -> list[LowRankLayer]:
    """Return the layers of low rank of an adapter, checked."""
    found = adapter_layers(model, name)
    if any(isinstance(layer, LoRAParameter) for layer in found):
        raise ValueError(f'adapter "{name}" has target_parameters, which O-LoRA does not compare: give them their own')
    low_rank = [layer for layer in found if isinstance(layer, LowRankLayer)]
    if not low_rank:
        raise ValueError(f'adapter "{name}" has no A: it adapts no module by LoRA')
    for layer in low_rank:
        _check_start(layer)
    return low_rank


def _check_start(layer: LowRankLayer) -> None:
    if layer.start_a is not None:
        raise ValueError(
            f'adapter "{layer.adapter_name}" starts from the weights, so that its A alone does not say what it reads: '
            'use initialise="kaiming"'
        )


def _inside(layer: AdapterLayer, earlier: list[str]) -> Iterator[LowRankLayer]:
    """Yield the earlier adapters' layers at the same module, newest first."""
    for inner in adapter_chain(layer.base):
        if isinstance(inner, LowRankLayer) and inner.adapter_name in earlier:
            _check_start(inner)
            yield inner
