"""The methods that `methods.py` compares: for each the record on each task's model, and the learning rates tried."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmtune.adapters import (
    IA3,
    AdaLoRA,
    AdaLoRAOrthogonality,
    AdapterConfig,
    BitFit,
    Bottleneck,
    DoRA,
    LayerNormTuning,
    LoRA,
    LoReFT,
    PrefixTuning,
    PromptTuning,
    PTuning,
    RankBudget,
    VeRA,
)

PLACES = ("encoder", "decoder", "pair")
# The new classifier is trained by every method; the pooler before it ends in a tanh, which saturates at LoRA's rates.
HEAD: dict[str, Any] = {"train_modules": ["classifier"]}
NO_POOLER: dict[str, Any] = {"exclude": ["pooler.dense"]}


@dataclass(frozen=True)
class Method:
    """A way of training: its record on a task's model (None trains all weights), rates, and what goes with it."""

    make: Callable[..., AdapterConfig] | None
    rates: Mapping[str, Sequence[float]]
    where: Mapping[str, Mapping[str, Any]] | None = None
    lora_plus_ratio: float | None = None

    def record(self, place: str, steps: int) -> AdapterConfig | None:
        """Return the record for a task's model and a run's length."""
        if self.make is None:
            return None
        knobs = {**(HEAD if place == "encoder" else {}), **(self.where or {}).get(place, {})}
        return self.make(**knobs, **({"total_steps": steps} if self.make is AdaLoRA else {}))

    def extras(self, record: AdapterConfig | None) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Return the callbacks and penalties that belong to the method."""
        if isinstance(record, AdaLoRA):
            return (RankBudget(),), (AdaLoRAOrthogonality(record.orthogonality),)
        return (), ()


def rates(short: Sequence[float], decoder: Sequence[float] = ()) -> dict[str, Sequence[float]]:
    """Return the rates for the two tasks of many short steps, and for the decoder, whose head is trained already."""
    return {"encoder": short, "pair": short, "decoder": decoder}


LINEAR = {"encoder": NO_POOLER}
IA3_PLACES = {
    "encoder": {"targets": ["key", "value", "output.dense"], "feedforward": r".*\d\.output\.dense"},
    "decoder": {"targets": ["k_proj", "v_proj", "down_proj"], "feedforward": ["down_proj"]},
    "pair": {"targets": ["k_proj", "v_proj", "fc2"], "feedforward": ["fc2"]},
}
USUAL, HIGH = rates((3e-3, 1e-2), (1e-3,)), rates((1e-2, 3e-2), (1e-2,))


SHORT = USUAL | {"decoder": ()}  # on the decoder one of each kind is tried, which takes long enough


def lora(**knobs: Any) -> Callable[..., AdapterConfig]:
    """Return LoRA of rank 8 with knobs."""
    return lambda **where: LoRA(**({"rank": 8, "alpha": 16} | knobs | where))


METHODS: dict[str, Method] = {
    "all weights": Method(None, rates((3e-4, 1e-3), (1e-4,))),
    "lora": Method(lora(), USUAL, LINEAR),
    "lora, rslora": Method(lora(rslora=True), SHORT, LINEAR),
    "lora+": Method(lora(), SHORT, LINEAR, lora_plus_ratio=16.0),
    "lora, pissa": Method(lora(initialise="pissa"), SHORT, LINEAR),
    "lora, olora": Method(lora(initialise="olora"), SHORT, LINEAR),
    "lora, orthogonal": Method(lora(initialise="orthogonal"), SHORT, LINEAR),
    "dora": Method(lambda **where: DoRA(rank=8, alpha=16, **where), USUAL, LINEAR),
    "adalora": Method(
        AdaLoRA, HIGH | {"decoder": ()}, {place: {"alpha": 16} | LINEAR.get(place, {}) for place in PLACES}
    ),
    "vera": Method(lambda **where: VeRA(rank=64, **where), HIGH, LINEAR),
    "ia3": Method(IA3, HIGH, IA3_PLACES),
    "bitfit": Method(BitFit, rates((1e-2, 3e-2))),  # a Llama has no biases
    "layer norms": Method(LayerNormTuning, HIGH),
    "bottleneck, houlsby": Method(lambda **where: Bottleneck(size=8, kind="houlsby", **where), SHORT),
    "bottleneck, pfeiffer": Method(lambda **where: Bottleneck(size=16, kind="pfeiffer", **where), USUAL),
    "bottleneck, parallel": Method(lambda **where: Bottleneck(size=16, kind="parallel", **where), SHORT),
    "loreft": Method(lambda **where: LoReFT(rank=4, **where), HIGH),
    "prefix": Method(lambda **where: PrefixTuning(tokens=20, **where), HIGH),
    "prompt": Method(lambda **where: PromptTuning(tokens=20, **where), HIGH | {"decoder": ()}),
    "p-tuning": Method(lambda **where: PTuning(tokens=20, **where), HIGH | {"decoder": ()}),
}
