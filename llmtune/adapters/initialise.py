"""How A and B of LoRA start: drawn, with B at zero, or taken from the weight itself.

The starts taken from the weight (PiSSA, OLoRA) begin at a product B A that is not zero, over the rest W - s B A as the
frozen base. PEFT writes that rest into the model. Here the base stays as it is, and the layer takes its start off:

    y = x W^T + s x (B A - B_0 A_0)^T

This is the same function with the same gradient, costs a product of rank r more, and leaves nothing to be undone.
Dropout acts on the difference, so that it is silent at the start; PEFT's acts on B A alone.
"""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor, nn

INITIALISATIONS = ("kaiming", "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora")


def known_start(name: object) -> bool:
    """Return whether `name` is one of `INITIALISATIONS`, or "pissa_niter_N" with another N."""
    return isinstance(name, str) and (
        name in INITIALISATIONS or re.fullmatch(r"pissa_niter_[1-9]\d*", name) is not None
    )


def reads_weight(name: str) -> bool:
    """Return whether a start is taken from the weight."""
    return name.startswith("pissa") or name == "olora"


@torch.no_grad()
def drawn_start(lora_a: Tensor, lora_b: Tensor, name: str) -> None:
    """Draw A [r, in] and B [out, r] in place so that B A is zero.

    kaiming     A uniform as in `nn.Linear`, B = 0
    gaussian    A normal with standard deviation 1 / r, B = 0
    orthogonal  A and B random, each on one half of an orthonormal basis of r directions, so that B A = 0 to rounding
                and both learn from the first step; r must be even

    Args:
        lora_a: [r, in].
        lora_b: [out, r].
        name: one of the three.

    Raises:
        ValueError: "orthogonal" with an odd rank.
    """
    rank = lora_a.shape[0]
    if name == "orthogonal":
        check_orthogonal_rank(rank)
        rows, device = rank // 2, lora_a.device
        basis = torch.linalg.qr(torch.randn(rank, rank, device=device))[0]
        lora_a.copy_((torch.randn(lora_a.shape[1], rows, device=device) @ basis[0::2]).T / 10)
        lora_b.copy_(torch.randn(lora_b.shape[0], rows, device=device) @ basis[1::2] / 10)
        return
    if name == "gaussian":
        nn.init.normal_(lora_a, std=1 / rank)
    else:
        nn.init.kaiming_uniform_(lora_a, a=math.sqrt(5))
    nn.init.zeros_(lora_b)


def check_orthogonal_rank(rank: int) -> None:
    """Raise ValueError where the rank is odd."""
    if rank % 2:
        raise ValueError(f'initialise="orthogonal" splits the rank in two halves and needs an even one; got {rank}')


@torch.no_grad()
def weight_start(weight: Tensor, rank: int, scaling: float, name: str) -> tuple[Tensor, Tensor]:
    """Return A_0 [r, in] and B_0 [out, r] taken from a weight, in float32 at least.

    pissa          B_0 A_0 scaling = the best approximation of W of rank r: B_0 = U sqrt(S / scaling), A_0 = sqrt(S /
                   scaling) V^T from the singular values and vectors of W (Meng et al., "PiSSA", 2024, section 3)
    pissa_niter_N  the same from a randomised decomposition with N rounds of subspace iteration, for large matrices
    olora          W = Q R; B_0 = the first r columns of Q, A_0 = the first r rows of R (Büyükakyüz, "OLoRA", 2024)

    Args:
        weight: [out, in], floating.
        rank: r.
        scaling: what the product is multiplied by in the layer.
        name: one of the three.

    >>> import torch
    >>> from llmtune.adapters.initialise import weight_start
    >>> a, b = weight_start(torch.diag(torch.tensor([5.0, 2.0, 1.0])), 1, 2.0, "pissa")
    >>> torch.round(2.0 * b @ a).abs()
    tensor([[5., 0., 0.],
            [0., 0., 0.],
            [0., 0., 0.]])
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if name == "olora":
        q, r = torch.linalg.qr(weight)
        return r[:rank].contiguous(), q[:, :rank].contiguous()
    if name == "pissa":
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    else:
        u, s, v = torch.svd_lowrank(weight, q=rank, niter=int(name.rpartition("_")[2]))
        vt = v.T
    root = (s / scaling).sqrt()
    return root[:, None] * vt, u * root
