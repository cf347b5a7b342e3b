"""Gradients of single examples: a plain loop that is always right, and hooks where they agree with it.

torch.func's vmap(grad) is no third way. transformers reads numbers out of attention masks, at which vmap raises: BERT
under any attention, Llama and GPT-2 under all but "eager". Where it runs it gives what the hooks give, later, and it
knows no gradient checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from llmtune.gradients.examples import split_examples, stack_examples
from llmtune.gradients.hooks import HookTape, UnsupportedModuleError
from llmtune.modules import eval_mode, unwrap
from llmtune.types import Batch, LossFunction

Method = Literal["auto", "loop", "hooks"]
SHORT = 128  # tokens; on a CPU a batch of longer examples runs no faster than the examples one by one


def per_example_gradients(
    model: nn.Module,
    batch: Batch,
    *,
    loss: LossFunction,
    parameters: Mapping[str, nn.Parameter] | None = None,
    method: Method = "auto",
) -> dict[str, Tensor]:
    """Return the gradient of each example's own mean loss, as if it had been run alone.

    G[n] = gradient of loss(model, example n), without padding and without the other examples. Computed in eval mode;
    modes, `requires_grad` flags, `.grad` and the random state are as before afterwards. Holds n times the chosen
    parameters.

    Args:
        model: any module that `loss` can run; wrappers are taken off.
        batch: one row an example; a packed row (position ids that start again at 0) holds one example a document.
        loss: a `LossFunction`: a mean over `count_targets` of its batch, each example on its own.
        parameters: which, by any names; left out, those that require a gradient, by the model's own names. A frozen
            parameter may be chosen.
        method: "loop" runs the examples one by one; "hooks" takes all gradients out of one batched pass (linear layers,
            GPT-2's Conv1D, embeddings, layer and RMS norms, tied or called more than once) and raises where it cannot;
            "auto" takes hooks where they are faster and agree with the loop on two examples, else the loop.

    Returns:
        [n, *shape] for each parameter, in the parameter's dtype; 0 for an example without a target.

    Raises:
        ValueError: no parameter is chosen or one cannot have a gradient; the loss depends on none of them; the batch
            cannot be cut into examples; or `method` is "hooks" and a module is not known to them, or they disagree with
            the loop.

    Example:
        >>> from llmtune.losses.causal_lm import causal_lm_loss
        >>> from llmtune.testing.models import tiny_llama
        >>> ids = torch.tensor([[5, 7, 11], [3, 2, 1]])
        >>> gradients = per_example_gradients(tiny_llama(), {"input_ids": ids, "labels": ids}, loss=causal_lm_loss)
        >>> gradients["lm_head.weight"].shape
        torch.Size([2, 97, 28])
    """
    inner = unwrap(model)
    if parameters is None:
        parameters = {name: p for name, p in inner.named_parameters() if p.requires_grad}
    examples = split_examples(inner, batch)
    counts = [int(loss.count_targets(example)) for example in examples]
    gradients = {name: p.new_zeros(len(examples), *p.shape) for name, p in parameters.items()}
    chosen = [index for index, count in enumerate(counts) if count]

    def total(group: Batch) -> Tensor:
        result = loss(inner, group)
        return (result[0] if isinstance(result, tuple) else result) * loss.count_targets(group)

    with undisturbed(inner, parameters):
        engine = ExampleGradients(inner, parameters, method, total)
        for places, group, tape in engine.groups([examples[index] for index in chosen]):
            with tape:
                score = total(group)
            for name, rows, piece in tape.gradients(score):
                for index, gradient in zip([chosen[place] for place in places[rows]], piece, strict=True):
                    gradients[name][index] = gradient / counts[index]
    return gradients


@contextmanager
def undisturbed(model: nn.Module, parameters: Mapping[str, Tensor]) -> Iterator[None]:
    """Let exactly the given parameters require a gradient, in eval mode; put flags, modes and random state back after.

    Args:
        model: the module whose other parameters are switched off for the block.
        parameters: parameters of the model by name, frozen or not.

    Raises:
        ValueError: there are none, or one is of integers.
    """
    if not parameters:
        raise ValueError("there is no parameter to take gradients of: none requires a gradient, or none was chosen")
    for name, parameter in parameters.items():
        if not parameter.is_floating_point():
            raise ValueError(f"{name} is {parameter.dtype}: only floating-point parameters have a gradient")
    flags = {parameter: parameter.requires_grad for parameter in (*model.parameters(), *parameters.values())}
    chosen = {id(parameter) for parameter in parameters.values()}
    accelerators = {p.device for p in flags if p.device.type not in ("cpu", "meta")}
    kind = next((device.type for device in accelerators), "cuda")
    indices = sorted(device.index or 0 for device in accelerators)
    with eval_mode(model), torch.random.fork_rng(indices, device_type=kind), torch.enable_grad():
        try:
            for parameter in flags:
                parameter.requires_grad_(id(parameter) in chosen)
            yield
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)


class LoopTape:
    """The plain way: one example, and autograd's own gradient of each parameter."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.parameters = parameters

    def __enter__(self) -> LoopTape:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def gradients(self, score: Tensor, *, keep: bool = False) -> Iterator[tuple[str, slice, Tensor]]:
        """Yield (name, the one example, its gradient [1, *shape]) for each parameter that the score depends on."""
        if not score.requires_grad:
            raise ValueError(
                f"the result of {len(self.parameters)} chosen parameters (the first: {next(iter(self.parameters))}) "
                "depends on none of them"
            )
        given = torch.autograd.grad(score, list(self.parameters.values()), retain_graph=keep, allow_unused=True)
        for name, gradient in zip(self.parameters, given, strict=True):
            if gradient is not None:
                yield name, slice(0, 1), gradient[None]


class ExampleGradients:
    """Chooses how examples are run, and hands out groups of them with a tape to record each.

    Args:
        model: the bare module, inside `undisturbed`.
        parameters: the chosen ones by name.
        method: "auto", "loop" or "hooks".
        probe: gives, for a batch of examples, the sum over examples of a scalar that depends on its own example alone
            and is the same at every call; what hooks and loop are compared by.

    Raises:
        ValueError: the method is unknown.
    """

    def __init__(
        self, model: nn.Module, parameters: Mapping[str, Tensor], method: Method, probe: Callable[[Batch], Tensor]
    ) -> None:
        if method not in get_args(Method):
            raise ValueError(f'method must be "auto", "loop" or "hooks"; got {method!r}')
        self.model, self.parameters, self.probe = model, parameters, probe
        self.method, self.checked = method, False

    def groups(self, examples: Sequence[Batch]) -> Iterator[tuple[list[int], Batch, LoopTape | HookTape]]:
        """Yield (which examples, those as one batch, a tape to enter for their forward pass)."""
        if len(examples) > 1 and not self.checked and self.method != "loop":
            self._choose(examples)
        for group in _neighbours(examples) if self.method == "hooks" else [[index] for index in range(len(examples))]:
            stacked = stack_examples([examples[index] for index in group]) if len(group) > 1 else None
            if stacked is not None:
                yield group, stacked, HookTape(self.model, self.parameters, len(group))
                continue
            for index in group:
                yield [index], examples[index], LoopTape(self.parameters)

    def _choose(self, examples: Sequence[Batch]) -> None:
        """Settle on hooks or the loop, by two examples run both ways."""
        if self.method == "auto" and not self._hooks_are_faster(examples):
            self.method = "loop"
            return
        by_length = sorted(examples, key=_tokens)
        try:
            self._compare([by_length[0], by_length[-1]])
            self.method, self.checked = "hooks", True
        except UnsupportedModuleError as error:
            if self.method == "hooks":
                raise ValueError(f'method="hooks" does not fit: {error}. Use method="auto" or "loop"') from error
            self.method = "loop"

    def _hooks_are_faster(self, examples: Sequence[Batch]) -> bool:
        if next(iter(self.parameters.values())).device.type != "cpu":
            return True
        few = sum(p.numel() for p in self.parameters.values()) * 10 < sum(p.numel() for p in self.model.parameters())
        return few and max(map(_tokens, examples)) <= SHORT

    def _compare(self, pair: Sequence[Batch]) -> None:
        """Raise `UnsupportedModuleError` where hooks give other gradients than the loop for two examples."""
        stacked = stack_examples(list(pair))
        if stacked is None:
            raise UnsupportedModuleError("the examples cannot be padded to one length")
        tape = HookTape(self.model, self.parameters, len(pair))
        try:
            with tape:
                score = self.probe(stacked)
            hooked = _collect(tape, score, self.parameters, len(pair))
        except RuntimeError as error:  # the model changes an output in place, or runs in a way that hooks break
            raise UnsupportedModuleError(f"the model does not run under hooks ({error})") from error
        looped = [_collect(LoopTape(self.parameters), self.probe(one), self.parameters, 1) for one in pair]
        largest = max(float(gradient.abs().max()) for one in looped for gradient in one.values())
        for name, parameter in self.parameters.items():
            want = torch.cat([one[name] for one in looped])
            own, rest = (1e-3, 1e-6) if parameter.dtype in (torch.float32, torch.float64) else (0.1, 1e-2)
            off = float((hooked[name] - want).abs().max())
            allowed = own * float(want.abs().max()) + rest * largest  # a gradient that is 0 but for rounding may differ
            if not off <= allowed:
                raise UnsupportedModuleError(f"the gradient of {name} is off by {off:.2g} from the loop's")


def _collect(
    tape: LoopTape | HookTape, score: Tensor, parameters: Mapping[str, Tensor], examples: int
) -> dict[str, Tensor]:
    found = {name: p.new_zeros(examples, *p.shape, dtype=torch.float32) for name, p in parameters.items()}
    for name, rows, piece in tape.gradients(score):
        found[name][rows] = piece.float()
    return found


def _neighbours(examples: Sequence[Batch]) -> list[list[int]]:
    """Return the examples' numbers in groups of neighbours, none of which is more than half padding."""
    groups: list[list[int]] = []
    longest = total = 0  # tokens of the last group's longest example, and of all of its examples
    for index, example in enumerate(examples):
        length = _tokens(example)
        if groups and (len(groups[-1]) + 1) * max(longest, length) <= 2 * (total + length):
            groups[-1].append(index)
            longest, total = max(longest, length), total + length
        else:
            groups.append([index])
            longest = total = length
    return groups


def _tokens(example: Batch) -> int:
    ids: Any = example.get("input_ids")
    return ids.shape[1] if isinstance(ids, Tensor) and ids.ndim > 1 else 1
