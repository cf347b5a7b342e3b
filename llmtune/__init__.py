"""Fine-tuning parts for PyTorch: attention, adapters, losses, anti-forgetting parts, data, and a loop to subclass.

Sub-packages and everyday names are loaded when they are first used, so that `import llmtune` runs nothing and costs
nothing beside torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "EWC",
    "DistillToBase",
    "LoRA",
    "LoopSettings",
    "TrainingLoop",
    "adapters",
    "attach",
    "attention",
    "causal_lm_loss",
    "data",
    "detach",
    "disabled",
    "errors",
    "forgetting",
    "gradients",
    "integrations",
    "layers",
    "linear_cross_entropy",
    "load",
    "losses",
    "merge",
    "metrics",
    "optim",
    "pack",
    "quickstart",
    "regularizers",
    "save",
    "scaled_dot_product_attention",
    "testing",
    "training",
    "types",
    "weights",
]

# Where an everyday name lives; every other public name is a sub-package or module.
_HOMES = {
    "DistillToBase": "forgetting",
    "EWC": "forgetting",
    "LoRA": "adapters",
    "LoopSettings": "training",
    "TrainingLoop": "training",
    "attach": "adapters",
    "causal_lm_loss": "losses",
    "detach": "adapters",
    "disabled": "adapters",
    "linear_cross_entropy": "losses",
    "load": "adapters",
    "merge": "adapters",
    "pack": "data",
    "save": "adapters",
    "scaled_dot_product_attention": "attention",
}

if TYPE_CHECKING:  # what type checkers and editors see; below, what happens
    from llmtune import (
        adapters,
        attention,
        data,
        errors,
        forgetting,
        gradients,
        integrations,
        layers,
        losses,
        metrics,
        optim,
        quickstart,
        regularizers,
        testing,
        training,
        types,
        weights,
    )
    from llmtune.adapters import LoRA, attach, detach, disabled, load, merge, save
    from llmtune.attention import scaled_dot_product_attention
    from llmtune.data import pack
    from llmtune.forgetting import EWC, DistillToBase
    from llmtune.losses import causal_lm_loss, linear_cross_entropy
    from llmtune.training import LoopSettings, TrainingLoop
else:

    def __getattr__(name: str) -> Any:
        """Load a sub-package or an everyday name at its first use (PEP 562)."""
        if name not in __all__:
            from llmtune.errors import did_you_mean

            raise AttributeError(f'llmtune has no "{name}".{did_you_mean(name, __all__)}')
        home = _HOMES.get(name)
        if home is None:
            return import_module(f"llmtune.{name}")
        value = getattr(import_module(f"llmtune.{home}"), name)
        globals()[name] = value  # found without this function from now on
        return value


def __dir__() -> list[str]:
    """Return the public names, loaded or not."""
    return sorted([*__all__, "__version__"])
