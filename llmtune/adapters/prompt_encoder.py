"""What virtual tokens are made of: a table of them, or P-tuning's small network that makes them of another table."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtune.adapters.autocast import no_autocast
from llmtune.modules import eval_mode


class PromptTable(nn.Module):
    """Virtual tokens trained as they are.

    Args:
        start: [n, E], what they start as; a parameter is made of it as it stands.

    Attributes:
        table: [n, E], trained.
    """

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(start)

    @property
    def tokens(self) -> int:
        """n."""
        return len(self.table)

    def forward(self) -> Tensor:
        """Return the virtual tokens [n, E]."""
        return self.table

    def flat(self) -> Tensor:
        """Return what a file holds [n, E]: the table itself, so that loading may write to it."""
        return self.table


class PromptEncoder(PromptTable):
    """Virtual tokens that a small network makes of a table, all of it trained.

    "mlp":  W_3 relu(W_2 relu(W_1 e))         "lstm":  W_2 relu(W_1 h), h the states of a two-way LSTM over e_1 ... e_n

    Liu et al., "GPT Understands, Too" (2021), section 3.2, in PEFT's sizes: [E, F], [F, F], [F, E], and E -> 2 F for
    the LSTM, [2 F, 2 F], [2 F, E], each with a bias.

    Args:
        start: [n, E], what the table starts as.
        kind: "mlp" or "lstm".
        hidden: F.
        layers: of the LSTM.
        dropout: between these layers, in training mode.

    Attributes:
        table: [n, E], trained.
    """

    def __init__(self, start: Tensor, *, kind: str, hidden: int, layers: int, dropout: float) -> None:
        super().__init__(start)
        E, like = start.shape[1], {"device": start.device, "dtype": start.dtype}
        self.lstm: nn.LSTM | None = None
        if kind == "lstm":
            self.lstm = nn.LSTM(
                E, hidden, num_layers=layers, dropout=dropout, bidirectional=True, batch_first=True, **like
            )  # fmt: skip
            widths = [2 * hidden, 2 * hidden, E]
        else:
            widths = [E, hidden, hidden, E]
        self.linears = nn.ModuleList(nn.Linear(*sizes, **like) for sizes in pairwise(widths))  # type: ignore[arg-type]

    def forward(self) -> Tensor:
        """Return the virtual tokens [n, E]."""
        with no_autocast(self.table.device):  # so that a file holds what was trained
            x: Tensor = self.table if self.lstm is None else self.lstm(self.table[None])[0][0]
            for i, linear in enumerate(self.linears):
                x = linear(F.relu(x) if i else x)
        return x

    @torch.no_grad()
    def flat(self) -> Tensor:
        """Return what a file holds [n, E]: what the network makes, without dropout."""
        with eval_mode(self):
            return self()
