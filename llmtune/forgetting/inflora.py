"""InfLoRA: a new task's A is designed from its inputs, orthogonal to those of earlier tasks, and then frozen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmtune.adapters.attach import adapter_names, record_of
from llmtune.adapters.config import LoRA
from llmtune.adapters.layer import adapter_chain, named_places, wide
from llmtune.adapters.lora import LoRALinear, LowRankLayer
from llmtune.errors import did_you_mean
from llmtune.forgetting.layer_inputs import second_moments
from llmtune.forgetting.orthogonal import checked_columns, free_directions, without
from llmtune.modules import unwrap
from llmtune.types import Batch


@dataclass(frozen=True)
class InfLoRAReport:
    """What `inflora_start` set.

    Attributes:
        name: the adapter.
        rows: of each module, how many rows of its A are in use: its rank, or fewer where the protected inputs leave
            fewer directions that the new inputs have. The other rows are 0, and their columns of B learn nothing.
        counted: how many input vectors there were at each module.
    """

    name: str
    rows: dict[str, int]
    counted: dict[str, int]


@torch.no_grad()
def inflora_start(
    model: nn.Module,
    name: str,
    batches: Iterable[Batch | tuple[Tensor, Tensor]],
    *,
    protected: Mapping[str, Tensor] | None = None,
) -> InfLoRAReport:
    """Set the A of a new LoRA from the inputs of its task, orthogonal to the protected ones, and freeze it.

    A = U_r^T / sqrt(3), with U_r the first r left singular vectors of (I - P) X X^T

    X are the inputs of the module on the new task, P projects onto the protected basis. B, which is 0, alone is trained
    then. As A does not move, s B A x = 0 for every protected x after any number of steps of any optimizer, to the
    rounding of A's dtype. The factor 1 / sqrt(3) is the authors' code's, whatever the inputs' scale: it is the expected
    length of a row of LoRA's usual start, uniform in +-1 / sqrt(in), so learning rates carry over.

    Call it on every task after `AdapterStack.start` and before training. On the first there is no `protected`; after
    each task it is `input_basis(model, batches, energy=0.95, modules=report.rows, extend=protected)`, the paper's
    section 4.2. The complement that the authors store of a large basis (DualGPM) is the same projection in less memory,
    and is not kept here. `AdapterStack.save` keeps A and what is frozen.

    Where we differ: a direction left over by rounding alone is no direction; its row is 0 (the code's may be any, a
    protected one too). Each example is run alone, and padding is no input.

    Args:
        model: with the adapter, as `AdapterStack.start` leaves it; the earlier adapters as the task will train on them.
        name: the adapter: a LoRA on linear layers and GPT-2's Conv1D, not yet trained.
        batches: of the new task's training data, as for `input_basis`; the same in all processes.
        protected: {bare name of a module: Q [in, k], orthonormal columns}, as `input_basis` gives it, for every module
            that the adapter goes to or more. Left out, nothing is protected: the first task.

    Returns:
        What was set.

    Raises:
        ValueError: there is no such adapter, or it is not the newest, merged, trained already, or starts from the
            weights; it goes to something without input vectors; a basis is missing, of another size, not orthonormal,
            or leaves no direction free; there is no batch, or the inputs are not finite. Nothing has been changed then.

    Example:
        >>> from llmtune.adapters import LoRA, attach
        >>> model = nn.Sequential(nn.Linear(5, 3))
        >>> _ = attach(model, LoRA(rank=2, alpha=2), "maths")
        >>> inflora_start(model, "maths", [(torch.randn(7, 5), torch.zeros(7))]).rows
        {'0': 2}

    Liang and Li 2024, "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning", section 4 (where LoRA's
    A is called B); code: liangyanshuo/InfLoRA, `methods/inflora.py`.
    """
    model = unwrap(model)
    layers, places = _fresh_layers(model, name), dict(named_places(model))
    bases = {place: _basis_of(place, protected, layer.lora_a.shape[1]) for place, layer in layers.items()}
    for key in protected or {}:
        if key not in places:
            raise ValueError(f'protected names "{key}", which the model has not.{did_you_mean(key, places)}')
    found = second_moments(model, {place: places[place] for place in layers}, batches)
    rows = {}
    for place, layer in layers.items():
        try:
            rows[place] = designed_rows(found[place].total(), len(layer.lora_a), protected=bases[place])
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
    used = {place: int((a.abs().amax(1) > 0).sum()) for place, a in rows.items()}
    for place, count in used.items():
        if count == 0 and bases[place] is None:
            raise ValueError(f"all inputs of {place} are 0: leave it out of the targets")
        if count == 0:
            raise ValueError(
                f"the protected inputs of {place} leave none of the new task's directions free: protect a smaller "
                "share of the energy, or leave the module out of the targets"
            )
    for place, layer in layers.items():
        layer.lora_a.copy_(rows[place] / math.sqrt(3))
        layer.lora_a.requires_grad_(False)
    return InfLoRAReport(name, used, {place: one.rows for place, one in found.items()})


def designed_rows(moment: Tensor, rank: int, *, protected: Tensor | None = None) -> Tensor:
    """Return the directions of the inputs that are largest once the protected ones are taken out.

    The first r left singular vectors of (I - P) C, as rows, with C = X X^T and P = Q Q^T for the protected basis Q.

    They lie in the span of U, the eigenvectors of (I - P) C (I - P) that are no rounding (`extend_basis` says which),
    and are U V for the eigenvectors V of (U^T C)(U^T C)^T, which are less work than singular vectors. Its eigenvalues
    are squares: those of singular values below 1e-4 of the largest have few digits, and are found again in what is left
    without the larger ones.

    Args:
        moment: C = X X^T, [in, in], of the inputs X [in, n], up to any factor; finite.
        rank: r, at least 1.
        protected: Q, [in, k], with orthonormal columns.

    Returns:
        [r, in], in C's dtype, at least float32; rows orthonormal and orthogonal to Q; rows of zeros where fewer than r
        directions are left.

    Raises:
        ValueError: a size or the rank is out of range, or Q's columns are not orthonormal.

    Example:
        >>> designed_rows(torch.diag(torch.tensor([5.0, 3.0, 1.0])), 1, protected=torch.eye(3)[:, :1]).abs()
        tensor([[0., 1., 0.]])
    """
    if moment.ndim != 2 or moment.shape[0] != moment.shape[1]:
        raise ValueError(f"the second moment of inputs is square, [in, in]; got {[*moment.shape]}")
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= len(moment):
        raise ValueError(f"the rank must be a whole number from 1 to {len(moment)}, the inputs' size; got {rank!r}")
    moment = wide(moment)
    basis = moment[:, :0]
    if protected is not None:
        basis = checked_columns(protected, len(moment), "the protected basis").to(moment)
    _, free = free_directions(moment, basis)
    count = min(rank, free.shape[1])
    if basis.shape[1]:
        free = free @ _left_singular_vectors(free.T @ moment, count)
    found = without(free[:, :count], basis)
    return nn.functional.pad(found.T, (0, 0, 0, rank - count))


def _left_singular_vectors(matrix: Tensor, count: int) -> Tensor:
    """Return the first left singular vectors, [n, count], of a matrix [n, m], by symmetric decompositions."""
    found = matrix.new_zeros(len(matrix), 0)
    exact = torch.finfo(matrix.dtype).eps ** 0.5  # of the largest square: smaller ones have lost half of their digits
    while found.shape[1] < count:
        squares, vectors = torch.linalg.eigh(matrix @ matrix.T)
        more = vectors[:, squares > exact * squares[-1]].flip(1)[:, : count - found.shape[1]]
        if not more.shape[1]:
            break
        found = torch.linalg.qr(torch.cat([found, more], dim=1)).Q
        matrix = matrix - found @ (found.T @ matrix)
    return found


def _layers(model: nn.Module, name: str) -> dict[str, LowRankLayer]:
    """Return the adapter's layers of low rank by the bare name of the module, checked."""
    config = record_of(model, name).configs[name]
    if not isinstance(config, LoRA) or config.decomposes:
        raise ValueError(f'adapter "{name}" is {type(config).__name__}: InfLoRA designs the A of a plain LoRA')
    if config.target_parameters:
        raise ValueError(f'adapter "{name}" has target_parameters, whose inputs InfLoRA does not see: leave them out')
    found = {
        place: layer
        for place, module in named_places(model)
        for layer in adapter_chain(module)
        if layer.adapter_name == name and isinstance(layer, LowRankLayer)
    }
    for place, layer in found.items():
        if not isinstance(layer, LoRALinear):
            raise ValueError(f"{place} is an embedding, which has no input vectors: leave it out of the targets")
    if not found:
        raise ValueError(f'adapter "{name}" adapts no module by LoRA: there is no A to design')
    return found


def _fresh_layers(model: nn.Module, name: str) -> dict[str, LowRankLayer]:
    """Return the layers of an adapter whose A may still be set."""
    layers = _layers(model, name)
    if name != adapter_names(model)[-1]:
        raise ValueError(f'adapter "{name}" is not the newest: InfLoRA sets A before the task\'s training')
    if name in record_of(model, name).merged:
        raise ValueError(f'adapter "{name}" is merged into the weights: InfLoRA sets A before the task\'s training')
    for place, layer in layers.items():
        if layer.start_a is not None or bool((layer.lora_b != 0).any()):
            raise ValueError(
                f'adapter "{name}" has a B that is not 0 at {place}: InfLoRA sets A before the task\'s training, with '
                'initialise="kaiming" or "gaussian"'
            )
    return layers


def _basis_of(place: str, protected: Mapping[str, Tensor] | None, size: int) -> Tensor | None:
    if protected is None:
        return None
    if place not in protected:
        raise ValueError(
            f'protected has no basis for "{place}", which the adapter goes to, so that earlier tasks would not be '
            f"protected there: give an empty one, [{size}, 0], if that is meant.{did_you_mean(place, protected)}"
        )
    return checked_columns(protected[place], size, f"the protected basis of {place}")
