"""Mixout over a whole model for the length of a block: names, state dict and class of the model stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from llmtune.adapters.layer import bare_module, named_places
from llmtune.adapters.record import check_probability
from llmtune.adapters.targets import ALL_LINEAR, linear_places, matching
from llmtune.errors import did_you_mean
from llmtune.regularizers.hooked import Hook, hooked
from llmtune.regularizers.mixout import is_mixable, linear_with, mixout

MIXED = "_mixed_by_llmtune"  # the name in a class that says so


@contextmanager
def mixout_model(
    model: nn.Module,
    p: float,
    *,
    targets: str | Sequence[str] = ALL_LINEAR,
    exclude: str | Sequence[str] = (),
    pretrained: Mapping[str, Tensor] | None = None,
    replace_dropout: bool = False,
) -> Iterator[dict[str, Tensor]]:
    """Mix the weights of a model's linear layers with their pretrained ones in train mode, while the block runs.

    Every forward pass of a layer draws anew, from torch's global random state, so a loop's run that is resumed repeats
    it and recomputation (activation checkpointing) draws the same. A weight that several layers share is drawn once in
    a forward pass of the model. Only weights that require a gradient are mixed: under LoRA those of the base that are
    trained beside it; A and B have no pretrained value to mix with.

    Parameters, state dict and hooks of the model do not change, so checkpoints and a loop's resume work as without. The
    targets lie outside the state dict: enter the block with the pretrained weights in the model, before a checkpoint
    of the run is loaded (`fit(resume=True)` does so inside), or give them as `pretrained`. They take as many bytes as
    the weights that are mixed; in a training step a mixed copy and a mask (one byte an entry) come to that.

    Args:
        model: any module, wrapped or not.
        p: probability of taking the pretrained weight, 0 to below 1; 0.7 to 0.9 in the paper.
        targets: suffixes of modules' names, one full-match regular expression, or "all-linear": all but the output
            head and classifiers on top, which have no pretrained weight to go back to.
        exclude: suffixes or one expression, left out of the targets.
        pretrained: {bare name of the weight: tensor}, more names are no harm; None for copies of the present weights.
        replace_dropout: set every dropout of the model to 0 inside the block, as the paper does: `nn.Dropout`'s `p`,
            and numbers that modules keep under names with "drop" in them. LayerDrop stays.

    Yields:
        {bare name: target}, the weights mixed with.

    Raises:
        ValueError: p is out of range; a pattern matches nothing, or nothing that is trained; a weight is tied to a
            module that is not mixed; a pretrained weight is missing or of another shape; `replace_dropout` finds none;
            or the block is inside another of the same model.
        TypeError: a target is no plain linear layer, or the output head, whose weight losses read without calling it.

    Example:
        >>> from llmtune.testing.models import tiny_bert
        >>> model = tiny_bert(labels=3)
        >>> with mixout_model(model, 0.9) as mixed:
        ...     len(mixed), "bert.encoder.layer.0.attention.self.query.weight" in mixed
        (13, True)

    Lee, Cho and Kang, "Mixout" (2020), section 3. Where we differ, see `mixout`; the paper's code also builds the model
    anew, of layers whose target is no part of the state dict and does not move with the model.
    """
    check_probability("p", p)
    places = {name: bare_module(module) for name, module in named_places(model)}
    if any(hasattr(module, MIXED) for module in places.values()):
        raise ValueError("mixout_model is on this model already: one block at a time")
    chosen = _chosen(model, places, targets, exclude)
    known = {name: _target(name, places[place], pretrained) for name, place in _weights(chosen).items()}
    tied = _Tied(places, chosen)
    drops = _dropouts(model) if replace_dropout else []
    if replace_dropout and not drops:
        raise ValueError(f"this {type(model).__name__} has no dropout above 0 to replace: leave replace_dropout out")
    kinds = {place: type(places[place]) for place in chosen}
    with hooked(tied.hooks(places[""])):
        try:
            for place, kind in kinds.items():
                places[place].__class__ = _mixed(kind, f"{place}.weight", known, p, tied)
            for module, attribute, _ in drops:
                setattr(module, attribute, 0.0)
            yield known
        finally:
            for place, kind in kinds.items():
                places[place].__class__ = kind
            for module, attribute, value in drops:
                setattr(module, attribute, value)


def _mixed(kind: Any, name: str, known: dict[str, Tensor], p: float, tied: _Tied) -> Any:
    """Return a subclass of a linear layer's class that mixes its weight.

    A class, and no hook that exchanges the weight: the parameter stays where it is, so nobody finds the mixed one.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        if not self.training:
            return kind.forward(self, x)
        return linear_with(self, x, tied.weight(name, lambda: _draw(self.weight, name, known, p)))

    return type(
        kind.__name__,
        (kind,),
        {"__module__": kind.__module__, "__doc__": kind.__doc__, "forward": forward, MIXED: True},
    )


def _draw(weight: Tensor, name: str, known: dict[str, Tensor], p: float) -> Tensor:
    target = known[name]
    if target.device != weight.device or target.dtype != weight.dtype:  # the model has moved
        target = known[name] = target.to(weight)
    return mixout(weight, target, p)


class _Tied:
    """The weights that several layers share: mixed once in a forward pass of the model."""

    def __init__(self, places: Mapping[str, nn.Module], chosen: Sequence[str]) -> None:
        holders: dict[int, list[str]] = {}
        for place, module in places.items():
            for parameter in module._parameters.values():
                if parameter is not None:
                    holders.setdefault(id(parameter), []).append(place)
        self.first: dict[str, str] = {}  # of each layer with a shared weight: the first that has it
        for place in chosen:
            shared = holders[id(places[place].weight)]
            outside = [other for other in shared if other not in chosen]
            if outside:
                raise ValueError(
                    f"the weight of {place} is tied to {outside[0]}, which is not mixed and would go on with another "
                    f"weight: exclude {place}"
                )
            if len(shared) > 1:
                self.first[f"{place}.weight"] = shared[0]
        self.made: dict[str, Tensor] | None = None  # in a forward pass of the model: what has been mixed

    def hooks(self, root: nn.Module) -> list[Hook]:
        def begin(*_: Any) -> None:
            self.made = {}

        def end(*_: Any) -> None:
            self.made = None

        return [(root, "before", begin), (root, "ended", end)] if self.first else []

    def weight(self, name: str, draw: Callable[[], Tensor]) -> Tensor:
        """Return a mixed weight: drawn now, or where it is shared what another layer has drawn in this forward pass."""
        if name not in self.first:
            return draw()
        if self.made is None:
            raise ValueError(
                f"{name} is tied, and mixed once in a forward pass of the model; this layer is called outside of one: "
                "call the model itself, without activation checkpointing, or exclude the layer"
            )
        first = self.first[name]
        if first not in self.made:
            self.made[first] = draw()
        return self.made[first]


def _chosen(
    model: nn.Module, places: Mapping[str, nn.Module], targets: str | Sequence[str], exclude: str | Sequence[str]
) -> list[str]:
    """Return the places whose weight is mixed."""
    listed = [name for name in places if name]
    if targets == ALL_LINEAR:
        found = {ALL_LINEAR: linear_places(places[""], places)}
    else:
        found = matching(targets, listed, what="targets")
    left_out = {name for group in matching(exclude, listed, what="exclude").values() for name in group}
    find: Any = getattr(places[""], "get_output_embeddings", None)
    head = find() if callable(find) else None
    chosen: list[str] = []
    for pattern, group in found.items():
        wanted = [name for name in group if name not in left_out]
        for name in wanted:
            if head is not None and places[name] is bare_module(head):
                raise TypeError(f"{name} is the output head, whose weight losses read without calling it: exclude it")
            if not isinstance(getattr(places[name], "weight", None), nn.Parameter):
                raise TypeError(
                    f"{name} is a {type(places[name]).__name__} without a weight: mixout goes to linear layers"
                )
        trained = [name for name in wanted if places[name].weight.requires_grad]
        if not trained:
            raise ValueError(
                f'targets: there is nothing to mix, no weight of "{pattern}" requires a gradient. Under adapters the '
                "base is frozen, and what they train has no pretrained value: unfreeze the base, or leave mixout out"
            )
        for name in trained:
            if not is_mixable(places[name]):
                raise TypeError(
                    f"{name} is a {type(places[name]).__name__}: mixout goes to plain linear layers and Conv1D"
                )
        chosen += trained
    return list(dict.fromkeys(chosen))


def _weights(chosen: Sequence[str]) -> dict[str, str]:
    return {f"{place}.weight": place for place in chosen}


def _target(name: str, module: Any, pretrained: Mapping[str, Tensor] | None) -> Tensor:
    weight = module.weight
    if pretrained is None:
        return weight.detach().clone()
    if name not in pretrained:
        raise ValueError(f'pretrained has no "{name}".{did_you_mean(name, pretrained)}')
    if pretrained[name].shape != weight.shape:
        raise ValueError(f"pretrained: {name} must be {[*weight.shape]}; got {[*pretrained[name].shape]}")
    return pretrained[name].detach().to(weight, copy=True)


def _dropouts(model: nn.Module) -> list[tuple[nn.Module, str, float]]:
    """Return (module, attribute, value) of every probability of dropout above 0."""
    return [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and value > 0
        if (name == "p" and isinstance(module, _DropoutNd)) or ("drop" in name and "layerdrop" not in name)
    ]
