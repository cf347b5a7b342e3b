"""Gradients of single examples out of one batched backward pass.

A module's input and the gradient of its output say what each example adds to the gradient of the module's parameters:
for a linear layer, example n adds sum over t of g[n, t] a[n, t]^T. So one forward and one backward pass of a whole
batch give every example's own gradient, provided that the examples do not see each other. Nothing here is trusted: the
engine in `per_example` compares two examples with the plain loop first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PIECE_BYTES = 64 * 2**20  # gradients of single examples of one parameter that are held at once

Rule = Callable[[Any, Tensor, Tensor], Tensor]
"""(module, input [n, ...], gradient of the output [n, ...]) -> gradients of single examples [n, *shape]."""


class UnsupportedModuleError(ValueError):
    """A chosen parameter is in a module, or is used in a way, whose examples cannot be told apart by hooks."""


def _linear_weight(module: nn.Linear, a: Tensor, g: Tensor) -> Tensor:
    n, out = g.shape[0], g.shape[-1]
    return g.reshape(n, -1, out).mT @ a.reshape(n, -1, a.shape[-1])


def _conv1d_weight(module: Any, a: Tensor, g: Tensor) -> Tensor:
    return _linear_weight(module, g, a)  # GPT-2 stores [in, out]


def _bias(module: Any, a: Tensor, g: Tensor) -> Tensor:
    return g.reshape(g.shape[0], -1, g.shape[-1]).sum(1)


def _embedding_weight(module: nn.Embedding, ids: Tensor, g: Tensor) -> Tensor:
    n, V, E = g.shape[0], *module.weight.shape
    if module.padding_idx is not None:
        g = g.masked_fill((ids == module.padding_idx)[..., None], 0.0)
    place = ids.reshape(n, -1) + V * torch.arange(n, device=ids.device)[:, None]
    return g.new_zeros(n * V, E).index_add_(0, place.flatten(), g.reshape(-1, E)).view(n, V, E)


def _layer_norm_weight(module: nn.LayerNorm, a: Tensor, g: Tensor) -> Tensor:
    return _layer_norm_bias(module, a, g * F.layer_norm(a, module.normalized_shape, eps=module.eps))


def _layer_norm_bias(module: nn.LayerNorm, a: Tensor, g: Tensor) -> Tensor:
    return g.reshape(g.shape[0], -1, *module.normalized_shape).sum(1)


def _rms_norm_weight(module: Any, a: Tensor, g: Tensor) -> Tensor:
    eps = next(getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name))
    eps = torch.finfo(a.dtype).eps if eps is None else eps
    return _bias(module, a, g * a * torch.rsqrt(a.square().mean(-1, keepdim=True) + eps))


def _lora_a(module: Any, a: Tensor, g: Tensor) -> Tensor:
    pulled = _wide(module.lora_b.detach()).T @ g.reshape(g.shape[0], -1, g.shape[-1]).mT * module.scaling  # [n, r, t]
    if a.is_floating_point():
        return pulled @ a.reshape(a.shape[0], -1, a.shape[-1])
    n, V = a.shape[0], module.lora_a.shape[1]
    return pulled.new_zeros(n, pulled.shape[1], V).scatter_add_(2, a.reshape(n, 1, -1).expand_as(pulled), pulled)


def _lora_b(module: Any, a: Tensor, g: Tensor) -> Tensor:
    lora_a = _wide(module.lora_a.detach())
    pushed = a @ lora_a.T if a.is_floating_point() else F.embedding(a, lora_a.T)
    return _linear_weight(module, pushed, g) * module.scaling


def _lora_bias(module: Any, a: Tensor, g: Tensor) -> Tensor:
    return _bias(module, a, g) * module.scaling


def _rules(module: nn.Module) -> dict[str, Rule]:
    """Return the rule for each parameter of a module, by the parameter's local name; empty for unknown modules.

    Adapter layers are known by their tensors' names, as anything that has them behaves alike.
    """
    kind = type(module)
    if isinstance(module, nn.Linear) and kind.forward is nn.Linear.forward:
        return {"weight": _linear_weight, "bias": _bias}
    if isinstance(module, nn.Embedding) and kind.forward is nn.Embedding.forward:
        plain = module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
        return {"weight": _embedding_weight} if plain else {}
    if isinstance(module, nn.LayerNorm) and kind.forward is nn.LayerNorm.forward:
        return {"weight": _layer_norm_weight, "bias": _layer_norm_bias}
    if kind.__name__ == "Conv1D" and hasattr(module, "nf"):
        return {"weight": _conv1d_weight, "bias": _bias}
    matrices = all(getattr(getattr(module, name, None), "ndim", 0) == 2 for name in ("lora_a", "lora_b"))
    if matrices and isinstance(getattr(module, "scaling", None), float):
        rules: dict[str, Rule] = {"lora_a": _lora_a, "lora_b": _lora_b, "lora_bias": _lora_bias}
        return rules if getattr(module, "takes_part", True) else {}
    if hasattr(module, "trained_bias"):
        return {"trained_bias": _bias} if getattr(module, "takes_part", True) else {}
    if kind.__name__.endswith(("RMSNorm", "T5LayerNorm")) and set(module._parameters) == {"weight"}:
        known = hasattr(module, "variance_epsilon") or hasattr(module, "eps")
        return {"weight": _rms_norm_weight} if known else {}
    return {}


class Call(NamedTuple):
    """One call of a module: its input, the input's version then, and where the output stands in the graph."""

    input: Tensor
    version: int
    edge: Any


class HookTape:
    """Records, while it is entered, what the modules of chosen parameters take in and give out.

    Args:
        model: the model, in eval mode.
        parameters: the chosen parameters by name; each may belong to several modules (tied weights).
        examples: how many examples the forward pass will hold, in the first dimension of every module's input.

    Raises:
        UnsupportedModuleError: a chosen parameter is in a module that no rule knows.
    """

    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor], examples: int) -> None:
        self.parameters, self.examples = parameters, examples
        self.sites: list[tuple[str, nn.Module, Rule]] = []
        self.calls: dict[int, list[Call]] = {}
        self._modules: dict[int, nn.Module] = {}
        self._handles: list[Any] = []
        names = {id(parameter): name for name, parameter in parameters.items()}
        found = set()
        for module in model.modules():
            for local, parameter in module._parameters.items():
                if parameter is None or id(parameter) not in names:
                    continue
                rule = _rules(module).get(local)
                if rule is not None:
                    self.sites.append((names[id(parameter)], module, rule))
                    self._modules[id(module)] = module
                    found.add(names[id(parameter)])
        for name in parameters:
            if name not in found:
                raise UnsupportedModuleError(f"{name} is in no module of a known kind")

    def __enter__(self) -> HookTape:
        self._handles = [module.register_forward_hook(self._record) for module in self._modules.values()]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _record(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            raise UnsupportedModuleError(f"a {type(module).__name__} is called without a tensor as its first argument")
        given = args[0]
        if (
            isinstance(module, nn.Embedding) and given.shape[0] == 1
        ):  # positions, the same for all examples: one row each
            given = given.expand(self.examples, *given.shape[1:])
            output = output.expand(self.examples, *output.shape[1:])
        if given.shape[0] != self.examples or output.shape[0] != self.examples:
            raise UnsupportedModuleError(
                f"a {type(module).__name__} is called with {given.shape[0]} rows for {self.examples} examples"
            )
        # the edge, not the tensor: it stays that of this output when the model changes the tensor in place afterwards
        call = Call(given.detach(), given._version, torch.autograd.graph.get_gradient_edge(output))
        self.calls.setdefault(id(module), []).append(call)
        return output

    def gradients(self, score: Tensor, *, keep: bool = False) -> Iterator[tuple[str, slice, Tensor]]:
        """Yield (name, which examples, their gradients [n, *shape] in at least float32), a few examples at a time.

        Args:
            score: the sum over examples of a scalar that depends on its own example alone.
            keep: keep the graph for another score of the same forward pass.

        Raises:
            UnsupportedModuleError: no module of a chosen parameter was called, or an input was changed since.
        """
        every = [call for calls in self.calls.values() for call in calls]
        if not every or not score.requires_grad:
            raise UnsupportedModuleError("the forward pass calls no module of the chosen parameters")
        if any(call.input._version != call.version for call in every):
            raise UnsupportedModuleError("the model changes a module's input in place")
        given = torch.autograd.grad(score, [call.edge for call in every], retain_graph=keep, allow_unused=True)
        gradient_of = {id(call): gradient for call, gradient in zip(every, given, strict=True)}
        for name, parameter in self.parameters.items():
            calls = [
                (module, rule, call.input, gradient_of[id(call)])
                for site, module, rule in self.sites
                if site == name
                for call in self.calls.get(id(module), [])
                if gradient_of[id(call)] is not None
            ]
            step = max(1, PIECE_BYTES // (4 * parameter.numel()))
            for start in range(0, self.examples if calls else 0, step):
                rows = slice(start, min(start + step, self.examples))
                pieces = [rule(module, _wide(a[rows]), _wide(g[rows])) for module, rule, a, g in calls]
                yield name, rows, pieces[0] if len(pieces) == 1 else torch.stack(pieces).sum(0)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
