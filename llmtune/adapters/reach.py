"""Whether what an adapter trains learns at all: what no gradient reaches would be saved as it started."""

from __future__ import annotations

from torch import nn

from llmtune.adapters.attach import adapter_names, adapter_parameters
from llmtune.adapters.layer import AdapterLayer
from llmtune.modules import unwrap


def check_gradients(model: nn.Module) -> None:
    """Raise where a parameter that an adapter trains has no gradient; call it after the first backward pass.

    That happens where the model takes a module's weight without calling the module (Mamba's `dt_proj`), where the
    module does not run at all, where its adapter is switched off, or where reentrant checkpointing cut the graph.
    `TrainingLoop` calls this in its first step.

    Args:
        model: a model, with or without adapters, after `loss.backward()`.

    Raises:
        ValueError: names the first parameters, how many there are, and what to do.

    >>> import torch
    >>> from llmtune.adapters import LoRA, attach, check_gradients
    >>> from llmtune.testing.models import tiny_llama
    >>> model = tiny_llama()
    >>> _ = attach(model, LoRA(rank=2, alpha=4))
    >>> ids = torch.arange(3, 20)[None]
    >>> model(input_ids=ids, labels=ids).loss.backward()
    >>> check_gradients(model)
    """
    model = unwrap(model)
    for name in adapter_names(model):
        trained = {key: p for key, p in adapter_parameters(model, name).items() if p.requires_grad}
        without = [key for key, parameter in trained.items() if parameter.grad is None]
        if not without:
            continue
        layers = [m for m in model.modules() if isinstance(m, AdapterLayer) and m.adapter_name == name]
        if not any(layer.active for layer in layers):
            why = "it is switched off: switch it on (set_active), or freeze its parameters"
        elif len(without) == len(trained):
            why = "none of its parameters has one: the loss does not depend on it, or checkpointing is reentrant"
        else:
            why = "the model takes that module's weight without calling it, or does not run it: exclude it"
        more = f" and {len(without) - 3} more" if len(without) > 3 else ""
        raise ValueError(
            f'adapter "{name}": no gradient has reached {", ".join(without[:3])}{more} of {len(trained)} trained '
            f"parameters; {why}"
        )
