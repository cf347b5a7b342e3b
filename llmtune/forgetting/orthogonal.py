"""What the inputs of each layer span: the subspaces of gradient projection memory (GPM)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, nn

from llmtune.adapters.layer import bare_module, wide
from llmtune.errors import did_you_mean
from llmtune.forgetting.layer_inputs import inputs_of, linear_places, second_moments
from llmtune.modules import check_module, unwrap
from llmtune.optim.update_projection import check_basis
from llmtune.types import Batch

ENERGY = 0.95
NOISE = 1e-12  # a share of the energy below which a direction is rounding of inputs: 1e-6 of their size

Modules = Collection[str] | Callable[[str], bool] | None


def extend_basis(
    moment: Tensor, basis: Tensor | None = None, *, energy: float | None = None, rank: int | None = None
) -> Tensor:
    """Return an orthonormal basis of the main directions of inputs, or a given one with what of them is new to it.

    M the given basis, x inputs, C = sum x x^T,   C' = (I - M M^T) C (I - M M^T) = sum_i s_i u_i u_i^T, s falling
    [M, u_1 ... u_k],  k the least with  tr(M^T C M) + s_1 + ... + s_k >= energy * tr(C)

    The s_i are the squared singular values of the matrix of inputs that the paper decomposes; C is summed over batches
    in float64, in which squaring costs no digit that float32 inputs had. Directions with less than 1e-12 of the energy
    (of a float32 C 1e-6) are rounding and are left out, so energy=1.0 gives the span of the inputs.

    Args:
        moment: C, [in, in], symmetric.
        basis: M, [in, m], orthonormal columns (none where m = 0), or None. They come back as they are, first.
        energy: the share of the inputs' squared length to be within the span, above 0, at most 1; left out, 0.95.
        rank: in place of energy: how many directions to add, where there are so many.

    Returns:
        [in, m + k], orthonormal columns, in at least float32.

    Raises:
        ValueError: both or neither of energy and rank make sense; C is 0 and there is no basis, or not finite; or the
            basis does not fit.

    Example:
        >>> inputs = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
        >>> basis = extend_basis(inputs.T @ inputs, energy=0.9)  # the first holds 9 of 10
        >>> basis.abs(), extend_basis(inputs.T @ inputs, basis, energy=1.0).abs()
        (tensor([[1.],
                [0.],
                [0.]]), tensor([[1., 0.],
                [0., 1.],
                [0., 0.]]))

    Saha et al. 2021, "Gradient projection memory for continual learning", equations 5, 8 and 9.
    """
    energy, moment = check_extent(energy, rank), wide(moment)
    known = moment[:, :0] if basis is None else checked_columns(basis, len(moment), "the basis to extend").to(moment)
    values, vectors = free_directions(moment, known)
    most, total = len(values), float(moment.trace())
    if total == 0 and basis is None:
        raise ValueError("all inputs are 0: they span nothing to protect")
    if rank is not None:
        count = min(rank, most)
    elif energy == 1:
        count = most
    else:
        held = (known * (moment @ known)).sum()  # tr(M^T C M)
        before = values.cumsum(0) - values  # what is covered of the rest without the i-th
        count = int((held + before < energy * total).sum())
    made = without(vectors[:, :count], known).to(
        torch.float32 if basis is None else torch.promote_types(basis.dtype, torch.float32)
    )
    return made.contiguous() if basis is None else torch.cat([basis.to(made), made], dim=1)


def free_directions(moment: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return the directions of inputs outside a subspace, and how much of the inputs' energy each holds.

    (I - M M^T) C (I - M M^T) = sum_i s_i u_i u_i^T, without those that rounding alone may have left.

    Args:
        moment: C, [in, in], symmetric, in float32 or float64.
        basis: M, [in, m], orthonormal columns (not checked); m may be 0.

    Returns:
        s [k], falling; and u [in, k], orthonormal columns, orthogonal to M, but for rounding; in C's dtype.

    Raises:
        ValueError: C is not finite.
    """
    if not bool(moment.isfinite().all()):
        raise ValueError("the inputs are not finite: the model gives NaN or overflows")
    known = basis.to(moment)
    rest = moment - known @ (known.T @ moment)
    rest = rest - (rest @ known) @ known.T
    values, vectors = torch.linalg.eigh((rest + rest.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    noise = max(NOISE, 10 * torch.finfo(moment.dtype).eps)
    count = min(int((values > noise * moment.trace()).sum()), len(moment) - known.shape[1])
    values, vectors = values[:count], vectors[:, :count]
    return values, vectors - known @ (known.T @ vectors)  # rounding leaves more of M in those of less energy


def without(vectors: Tensor, basis: Tensor) -> Tensor:
    """Return directions made orthonormal, and orthogonal to a subspace, to the last bits.

    Args:
        vectors: [in, k], orthonormal columns but for rounding.
        basis: [in, m], orthonormal columns; m may be 0.
    """
    return torch.linalg.qr(vectors - basis @ (basis.T @ vectors)).Q


def input_basis(
    model: nn.Module,
    batches: Iterable[Batch | tuple[Tensor, Tensor]],
    *,
    energy: float | None = None,
    rank: int | None = None,
    modules: Modules = None,
    extend: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return, for each linear layer, an orthonormal basis of what its inputs on some examples span (GPM).

    See `extend_basis` for the formula. A change of the weight that is orthogonal to the basis leaves the layer's output
    on those inputs as it is; `protected_parameters` and `UpdateProjection` keep it so. Where all layers are protected
    with energy=1.0 and everything else is frozen, the whole model's outputs on the examples stay.

    Each example is run alone, in eval mode, without padding, so batch size, order and padding change nothing (pairs run
    as they come). Modes and the random state are as before. While it runs it holds in^2 float64 numbers a layer: choose
    `modules` where that is too much. Look at the number of columns: few directions hold most of the energy where some
    features are far larger than the others, and a basis of `in` columns holds its layer still.

    Where we differ: the paper keeps the matrix of inputs of about 100 examples and decomposes that; here their second
    moment, which has the same directions and does not grow with the examples.

    Args:
        model: any module with `nn.Linear` or GPT-2's `Conv1D` layers, with or without adapters and wrappers.
        batches: dicts for `model(**batch)`, labels not needed, padded or packed; or pairs (inputs [n, ...], targets)
            for `model(inputs)`. Read once.
        energy: the share of the inputs' squared length to be within the span, above 0, at most 1; left out, 0.95.
        rank: in place of energy: how many directions a layer gets or adds.
        modules: bare names of layers, or a function of a bare name; left out, all linear layers with something that is
            trained, apart from a head that is tied to the embeddings (its rows are trained by their other use).
        extend: bases of earlier tasks. Their columns come first, unchanged, and what is new is added; those of layers
            that are not chosen now are handed on.

    Returns:
        {bare name of the layer: [in, k]}, float32, contiguous, on the layer's device: `safetensors.torch.save_file`
        takes it as it is.

    Raises:
        ValueError: energy or rank is out of range; a name is no linear layer's; no layer is chosen, or one is not
            called or has inputs of 0 or NaN; or a basis to extend does not fit. Names the first.
        TypeError: `batches` is a single batch, or a batch is neither dict nor pair.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
        >>> old = (torch.tensor([[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]]), torch.tensor([0, 1]))
        >>> bases = input_basis(model, [old], energy=1.0)
        >>> {name: list(basis.shape) for name, basis in bases.items()}
        {'0': [3, 1], '2': [5, 2]}

    Saha et al. 2021, "Gradient projection memory for continual learning", section 5.
    """
    check_module(model)
    check_extent(energy, rank)
    inner = unwrap(model)
    places = chosen_places(inner, modules)
    extend = extend or {}
    for name, basis in extend.items():
        if name in places:
            checked_columns(basis, inputs_of(places[name]), f"the basis of {name}")
    bases = dict(extend)
    for name, one in second_moments(inner, places, batches).items():
        moment, old = one.total(), extend.get(name)
        try:
            old = old.to(moment.device) if old is not None else None
            bases[name] = extend_basis(moment, old, energy=energy, rank=rank)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return bases


def checked_columns(basis: Tensor, size: int, what: str) -> Tensor:
    """Return a basis, [size, k] with orthonormal columns; k may be 0 here, where nothing is protected so far.

    Raises:
        ValueError: it is none; `what` begins the sentence.
        TypeError: it is no tensor of floats.
    """
    if not isinstance(basis, Tensor) or basis.shape != (size, 0):
        check_basis(basis, torch.Size([size]), what=what)
    return basis


def check_extent(energy: float | None, rank: int | None) -> float:
    """Return the energy; 0.95 where it is left out.

    Raises:
        ValueError: energy or rank is out of range, or both are given.
    """
    if energy is not None and rank is not None:
        raise ValueError(f"give energy or rank, not both; got energy={energy!r} and rank={rank!r}")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise ValueError(f"rank must be a whole number of at least 1; got {rank!r}")
    if energy is None:
        return ENERGY
    number = isinstance(energy, int | float) and not isinstance(energy, bool) and math.isfinite(energy)
    if not number or not 0 < energy <= 1:
        raise ValueError(f"energy must be above 0 and at most 1; got {energy!r}")
    return float(energy)


def chosen_places(model: nn.Module, modules: Modules) -> dict[str, nn.Module]:
    """Return {bare name: place} of the layers that `modules` means, as in `input_basis`; `model` unwrapped."""
    every = linear_places(model)
    if isinstance(modules, str):
        raise TypeError(f"modules must be a list of names or a function of a name; got the one string {modules!r}")
    if modules is None:
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        chosen = {
            name: place
            for name, place in every.items()
            if any(p.requires_grad for p in place.parameters()) and id(bare_module(place).weight) not in embeddings
        }
    elif callable(modules):
        chosen = {name: place for name, place in every.items() if modules(name)}
    else:
        for name in modules:
            if name not in every:
                raise ValueError(f'the bare model has no linear layer "{name}".{did_you_mean(name, every)}')
        chosen = {name: every[name] for name in modules}
    if not chosen:
        why = "none is trained" if modules is None else "nothing matches"
        raise ValueError(f"none of the model's {len(every)} linear layers is chosen: {why}")
    return chosen
