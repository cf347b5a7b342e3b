"""LoRA over an embedding: the rows of W + scaling * (B A)^T."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtune.adapters.layer import PREFIX, bare_module
from llmtune.adapters.lora import LowRankLayer


class LoRAEmbedding(LowRankLayer):
    """An embedding with a change of low rank: the rows of W + scaling * (B A)^T for the tokens that come.

    A [r, V] starts at zero and B [E, r] at standard normal draws, as in PEFT, so the output is the base's to the bit.

    Args:
        base: an `nn.Embedding`; one that multiplies its output by `embed_scale` has the change multiplied too.
        rank: r, from 1 to the smaller of V and E.
        alpha, rslora, initialise, dtype, adapter_name: as for `LoRALinear`; `initialise` says nothing here.
        dropout: must be 0: a token has no entries to drop.
        lora_bias: must be False: an embedding has no bias.

    Raises:
        TypeError: the base is no embedding, or one with a forward pass of its own or with `max_norm`; or
            `initialise` is one for linear layers.
        ValueError: an argument is out of range.
    """

    transposed = True

    def __init__(
        self, base: nn.Module, *, rank: int, alpha: float, dropout: float = 0.0, rslora: bool = False,
        lora_bias: bool = False, initialise: str = "kaiming", dtype: torch.dtype = torch.float32,
        adapter_name: str = "default",
    ) -> None:  # fmt: skip
        bare = bare_module(base)
        own = type(bare).forward is not nn.Embedding.forward and not hasattr(bare, "embed_scale")
        if not isinstance(bare, nn.Embedding) or own or bare.max_norm is not None:  # max_norm rewrites rows as it reads
            raise TypeError(
                f"LoRAEmbedding needs an nn.Embedding with the plain forward pass and without max_norm; "
                f"got {type(bare).__name__}"
            )
        if lora_bias:
            raise ValueError("lora_bias has no meaning for an embedding: leave embeddings out of the targets")
        if dropout:
            raise ValueError(f"dropout has no meaning for an embedding, a token has no entries to drop; got {dropout}")
        super().__init__(
            base, bare.num_embeddings, bare.embedding_dim, rank=rank, alpha=alpha, dropout=0.0, rslora=rslora,
            lora_bias=False, initialise=initialise, dtype=dtype, adapter_name=adapter_name,
        )  # fmt: skip

    def file_tensors(self, place: str) -> dict[str, Tensor]:
        """Return PEFT's names and the tensors; see `AdapterLayer`."""
        start = f"{PREFIX}{place}.lora_embedding_"
        return {f"{start}A": self.lora_a, f"{start}B": self.lora_b}

    def start(self, initialise: str) -> None:
        """Set A to zero and draw B.

        Raises:
            TypeError: `initialise` is one for linear layers.
        """
        if initialise not in ("kaiming", "gaussian"):
            raise TypeError(f'initialise="{initialise}" is for linear layers: an embedding starts in one way')
        nn.init.zeros_(self.lora_a)
        nn.init.normal_(self.lora_b)

    @property
    def num_embeddings(self) -> int:
        """V."""
        return self.lora_a.shape[1]

    @property
    def embedding_dim(self) -> int:
        """E."""
        return self.lora_b.shape[0]

    @property
    def padding_idx(self) -> int | None:
        """The bare embedding's."""
        bare: Any = bare_module(self)
        return bare.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """Return [..., E] in the dtype of the base's output, for token ids [...]."""
        result: Tensor = self.base(ids)
        if not self.takes_part:
            return result
        rows = F.embedding(ids, self.lora_a.T, padding_idx=self.padding_idx)  # which gets no gradient, as in the base
        change = F.linear(rows, self.lora_b) * self.factor()
        factor = getattr(bare_module(self), "embed_scale", None)
        return (result + (change if factor is None else change * factor)).to(result.dtype)
