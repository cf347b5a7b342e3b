"""(IA)^3: a trained scale for each output of a layer, or for each of its inputs.

    y = l * (x W^T + b)        of the outputs: keys, values
    y = (l * x) W^T + b        of the inputs: a feed-forward part's second layer, whose inputs are its activations

Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning" (2022), section
3.3. As in PEFT the scale of outputs takes the bias along, which the paper's models do not have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from llmtune.adapters.layer import PREFIX, AdapterLayer, adapter_chain, bare_module, named_places
from llmtune.adapters.peft_config import as_targets, check_entries, common_entries, fitted, written_exclude
from llmtune.adapters.plan import Build, Plan, plan_targets
from llmtune.adapters.record import AdapterConfig, Targets, check_dtype, check_expressions, check_names
from llmtune.adapters.targets import check_linear, inside, is_conv1d, linear_sizes, matching, names
from llmtune.adapters.trained_copy import check_first

OWN = {"exclude_modules", "feedforward_modules", "init_ia3_weights", "modules_to_save", "peft_type", "target_modules"}


def ia3_scale(x: Tensor, scale: Tensor) -> Tensor:
    """Return scale * x, made in the wider of the two dtypes and rounded once to that of x; at scale 1 it is x.

    Args:
        x: [..., n], floating.
        scale: [n].

    Returns:
        [..., n], in the dtype of x.

    >>> import torch
    >>> from llmtune.adapters import ia3_scale
    >>> ia3_scale(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([10.0, 0.5]))
    tensor([[10.,  1.],
            [30.,  2.]])
    """
    return (x * scale).to(x.dtype)


class IA3Linear(AdapterLayer):
    """A linear layer with a trained scale for each of its outputs, or inputs: see the top of this file.

    Works over `nn.Linear`, GPT-2's `Conv1D` and any module that maps [..., in] to [..., out] and has `in_features` and
    `out_features`, a quantised one too. The scale starts at 1, so the output is the base's to the bit.

    Args:
        base: the layer to adapt; its parameters are left alone.
        feedforward: scale the inputs instead of the outputs.
        dtype: of the scale.
        adapter_name: the adapter the layer belongs to.

    Attributes:
        scale: l, [out], or [in] with `feedforward`.

    Raises:
        TypeError: the base does not say its sizes, or another adapter already stands there. What it adds is for the
            bare weight, so those that come later stand around it.

    Example:
        >>> base = nn.Linear(5, 3)
        >>> layer = IA3Linear(base)
        >>> x = torch.randn(7, 5)
        >>> torch.equal(layer(x), base(x))
        True
    """

    reads_weight = True

    def __init__(
        self, base: nn.Module, *, feedforward: bool = False, dtype: torch.dtype = torch.float32,
        adapter_name: str = "default",
    ) -> None:  # fmt: skip
        sizes = linear_sizes(base)
        if sizes is None:
            raise TypeError(
                f"IA3Linear needs a module with in_features and out_features; got {type(bare_module(base)).__name__}"
            )
        check_first(base, "IA3", and_bias=not feedforward)
        super().__init__(base, adapter_name=adapter_name)
        self.in_features, self.out_features = sizes
        self.feedforward = feedforward
        self.reads_bias = not feedforward
        device = next((p.device for p in bare_module(base).parameters()), torch.device("cpu"))
        self.scale = nn.Parameter(torch.ones(sizes[0] if feedforward else sizes[1], dtype=dtype, device=device))
        self.train(base.training)

    @property
    def weight(self) -> Any:
        """The bare module's weight."""
        return bare_module(self).weight

    @property
    def bias(self) -> Any:
        """The bare module's bias, or None."""
        return getattr(bare_module(self), "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., out] in the dtype of the base's output, for x [..., in]."""
        if not self.takes_part:
            return self.base(x)
        return self.base(ia3_scale(x, self.scale)) if self.feedforward else ia3_scale(self.base(x), self.scale)

    def deltas(self) -> dict[str, Tensor]:
        """Return W * (l - 1), and b * (l - 1) where outputs are scaled and there is a bias; see `AdapterLayer`.

        Raises:
            ValueError: the layer is merged, so that W stands no longer there; or it has no floating weight of its own
                sizes (a quantised one).
        """
        return self._of_parameters(self.scale - 1)

    def replacements(self) -> dict[str, Tensor]:
        """Return W * l, and b * l, which are exact where the sum of W and its change would round twice."""
        return self._of_parameters(self.scale)

    def _of_parameters(self, factor: Tensor) -> dict[str, Tensor]:
        """Return the weight, and where outputs are scaled the bias, times a factor [n] for each output or input."""
        if self.merged:
            raise ValueError(f'adapter "{self.adapter_name}" is merged: what IA3 changes is known again after unmerge')
        transposed = is_conv1d(self)
        weight, sizes = getattr(bare_module(self), "weight", None), (self.out_features, self.in_features)
        shape = sizes[::-1] if transposed else sizes
        if not isinstance(weight, Tensor) or not weight.is_floating_point() or tuple(weight.shape) != shape:
            raise ValueError(
                f"what IA3 changes is known for a floating weight {list(shape)}, and this "
                f"{type(bare_module(self)).__name__} has none: de-quantise it first"
            )
        columns = self.feedforward != transposed  # whether an input is a column of the weight as it is kept
        found = {"weight": _wide(weight) * (factor if columns else factor[:, None])}
        if self.bias is not None and not self.feedforward:
            found["bias"] = _wide(self.bias) * factor
        return found

    def file_tensors(self, place: str) -> dict[str, Tensor]:
        """Return PEFT's name and a view of the scale, [out, 1], or [1, in] with `feedforward`; see `AdapterLayer`."""
        return {f"{PREFIX}{place}.ia3_l": self.scale[None] if self.feedforward else self.scale[:, None]}

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        what = "inputs" if self.feedforward else "outputs"
        return f"adapter={self.adapter_name}, scales={what}, active={self.active}"


@dataclass(frozen=True, kw_only=True)
class IA3(AdapterConfig):
    """(IA)^3 on chosen linear layers of a model; see `IA3Linear` for the formula.

    The paper adapts keys, values and, by its inputs, the second layer of the feed-forward part; in a Llama that is
    `IA3(targets=["k_proj", "v_proj", "down_proj"], feedforward=["down_proj"])`. PEFT keeps a table of such names by
    architecture; here they are always said.

    Args:
        targets: all modules adapted: suffixes of their names (["k_proj", "v_proj"]), one regular expression that
            matches whole names, or "all-linear": every linear layer but the output head of a Hugging Face model.
        feedforward: suffixes, or one regular expression, of those among them whose inputs are scaled.
        exclude: suffixes, or one regular expression, of modules to leave out.
        train_modules: suffixes of modules to train whole, as copies: a new classification head, for instance.
        dtype: of the adapter's parameters.

    Raises:
        ValueError: a value is out of its range; the sentence names it.
        TypeError: a value has a wrong type.
    """

    targets: Targets
    feedforward: Targets = ()
    exclude: Targets = ()
    train_modules: Sequence[str] = ()
    dtype: torch.dtype = torch.float32

    peft_type: ClassVar[str] = "IA3"

    def __post_init__(self) -> None:
        check_dtype(self.dtype)
        check_names(self.targets, self.exclude, self.train_modules)
        check_expressions("feedforward", self.feedforward)

    def plan(self, model: nn.Module, name: str) -> Plan:
        """Work out the layers; see `AdapterConfig.plan`.

        Raises:
            ValueError: a pattern of feedforward matches none of the modules adapted; and as `plan_targets`.
        """

        def build(place: str, module: nn.Module) -> Build:
            check_linear(place, module, "IA3")
            scales_inputs = names(self.feedforward, place)
            return lambda base: IA3Linear(base, feedforward=scales_inputs, dtype=self.dtype, adapter_name=name)

        plan = plan_targets(
            model, self, name, adaptable=lambda module: linear_sizes(module) is not None, build=build
        )  # fmt: skip
        if self.feedforward:
            matching(self.feedforward, plan.adapted, what="feedforward", where="among the modules adapted")
        return plan

    def file_entries(self, model: nn.Module, name: str) -> dict[str, Any]:
        """Return PEFT's entries; see `AdapterConfig.file_entries`."""
        entries = common_entries(model, self, name, self.peft_type)
        inputs = [place for place, layer in _layers(model, name) if layer.feedforward]
        others = [place for place, layer in _layers(model, name) if not layer.feedforward]
        entries["feedforward_modules"] = _written(self.feedforward, inputs, others, entries["target_modules"])
        return dict(sorted((entries | {"exclude_modules": written_exclude(self), "init_ia3_weights": True}).items()))

    @classmethod
    def from_file(
        cls, entries: Mapping[str, Any], model: nn.Module, tensors: Mapping[str, Tensor]
    ) -> tuple[IA3, tuple[str, ...]]:
        """Return an IA3 record; see `AdapterConfig.from_file`.

        Raises:
            ValueError: the entries ask for an option that is not offered, or leave a choice to PEFT's table.
        """
        check_entries(entries, OWN, {})
        for key in ("target_modules", "feedforward_modules"):
            if entries.get(key) is None:
                raise ValueError(f"{key} is not set, which leaves it to a table of PEFT's: write the names out")
        config, idle = fitted(
            cls(
                targets=as_targets(entries["target_modules"]),
                exclude=as_targets(entries.get("exclude_modules") or ()),
                train_modules=tuple(entries.get("modules_to_save") or ()),
                dtype=next((tensor.dtype for key, tensor in tensors.items() if key.endswith(".ia3_l")), torch.float32),
            ),
            model,
        )
        feedforward, unused = _read(as_targets(entries["feedforward_modules"]), config, model)
        return replace(config, feedforward=feedforward), (*idle, *(f"feedforward_modules {end}" for end in unused))

    def check_attached(self, model: nn.Module, name: str, attached: AdapterConfig, *, source: Path) -> None:
        """Raise where the attached adapter scales inputs in other places.

        Raises:
            ValueError: so it does, or they are of different methods; see `AdapterConfig.check_attached`.
        """
        super().check_attached(model, name, attached, source=source)
        for place, layer in _layers(model, name):
            if layer.feedforward != names(self.feedforward, place):
                raise ValueError(
                    f'the adapter in {source} and the attached "{name}" differ in whether the inputs of {place} are '
                    "scaled: detach it first, and loading attaches what the file describes"
                )


def _layers(model: nn.Module, name: str) -> list[tuple[str, IA3Linear]]:
    return [
        (place, layer)
        for place, module in named_places(model)
        for layer in adapter_chain(module)
        if isinstance(layer, IA3Linear) and layer.adapter_name == name
    ]


def _written(feedforward: Targets, inputs: list[str], others: list[str], targets: Any) -> str | list[str]:
    """Return what says to PEFT which inputs are scaled.

    PEFT takes the ends of names without regard to dots, and wants a list to be part of the list of targets. Where the
    suffixes do not fit that, an expression for the whole names is written.
    """
    if isinstance(feedforward, str):
        return feedforward
    ends = tuple(feedforward)
    alike = all(place.endswith(ends) for place in inputs) and not any(place.endswith(ends) for place in others)
    if alike and (isinstance(targets, str) or set(targets).issuperset(ends)):
        return sorted(ends)
    return "|".join(re.escape(place) for place in inputs)


def _read(given: Targets, config: IA3, model: nn.Module) -> tuple[Targets, list[str]]:
    """Return what names the same modules by the rule of records as PEFT's entry by PEFT's, and what matches nothing."""
    adapted = [
        place
        for place, module in named_places(model)
        if names(config.targets, place) and linear_sizes(module) is not None
        if not names(config.exclude, place) and not inside(place, config.train_modules)
    ]
    if isinstance(given, str):
        return (given, []) if any(re.fullmatch(given, place) for place in adapted) else ((), [given] if given else [])
    found = {end: [place for place in adapted if place.endswith(end)] for end in given}
    same = all(names([end], place) == (place in found[end]) for end in given for place in adapted)
    kept = [end for end in given if found[end]]
    places = dict.fromkeys(place for end in kept for place in found[end])
    return tuple(kept if same else places), [end for end in given if not found[end]]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
