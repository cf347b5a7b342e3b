"""Documents of many lengths into rows of one length, almost without padding: best-fit decreasing."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import Tensor

from llmtune.data.collate import IGNORED

FIELDS = {"input_ids", "labels", "attention_mask"}


def pack(
    examples: Sequence[Mapping[str, Any]], max_tokens: int, *, too_long: Literal["raise", "split", "drop"] = "raise"
) -> PackedDataset:
    """Return the documents packed into rows of at most `max_tokens` tokens.

    Best-fit decreasing: longest first, each into the fullest row that still has room, which wastes little (Johnson
    1974: at most 11/9 of the fewest rows possible, plus 4). Within a row the documents stand in the order of
    `examples`. The result depends on the lengths alone; n documents take O(n log n).

    Args:
        examples: each with "input_ids" [n], and "labels" [n] unshifted (left out: the input_ids). An "attention_mask"
            of ones is allowed and left out; other fields raise.
        max_tokens: the longest row, in tokens.
        too_long: what becomes of a longer document: "raise", "split" into pieces of `max_tokens` that do not see each
            other, or "drop".

    Returns:
        A data set of rows {"input_ids", "labels", "position_ids"}, each [n] with n <= max_tokens: positions start at 0
        for each document, and its first label is masked, so that no document predicts across a boundary.

    Raises:
        ValueError: there are no documents, or none is left; a document is empty, too long, padded, has labels of
            another length, or a field that would be lost. Names the row.

    Example:
        >>> documents = [{"input_ids": [1, 2, 3]}, {"input_ids": [4, 5, 6, 7]}, {"input_ids": [8, 9]}]
        >>> packs = pack(documents, max_tokens=5)
        >>> packs[1]["input_ids"].tolist(), packs[1]["position_ids"].tolist()
        ([1, 2, 3, 8, 9], [0, 1, 2, 0, 1])
    """
    if max_tokens < 2:
        raise ValueError(f"max_tokens must be 2 or more (one token predicts the next); got {max_tokens}")
    if too_long not in ("raise", "split", "drop"):
        raise ValueError(f'too_long must be "raise", "split" or "drop"; got {too_long!r}')
    if len(examples) == 0:
        raise ValueError("there is nothing to pack: the data has no documents")
    pieces: list[tuple[Tensor, Tensor]] = []
    dropped = 0
    for index in range(len(examples)):
        ids, labels = _document(examples[index], index)
        if len(ids) <= max_tokens:
            pieces.append((ids, labels))
        elif too_long == "split":
            pieces += zip(ids.split(max_tokens), labels.split(max_tokens), strict=True)
        elif too_long == "drop":
            dropped += 1
        else:
            raise ValueError(
                f"row {index} has {len(ids)} tokens, more than max_tokens={max_tokens}: pass a larger max_tokens, or "
                'too_long="split" to cut such documents into pieces, or too_long="drop" to leave them out'
            )
    if not pieces:
        raise ValueError(f"nothing is left to pack: all {dropped} documents are longer than max_tokens={max_tokens}")
    return PackedDataset(pieces, max_tokens, dropped=dropped)


class PackedDataset:
    """Rows of packed documents, made by `pack`: `len`, indexing, and iteration.

    A row is {"input_ids", "labels", "position_ids"}, each [n] int64 with n <= max_tokens.

    Args:
        pieces: the documents, pairs of ids and labels [n], none longer than max_tokens.
        max_tokens: the longest a row may be.
        dropped: how many documents were left out as too long.

    Attributes:
        lengths: the number of tokens in each row.
        max_tokens: the longest a row may be.
        documents: how many documents (pieces, where long ones were split) the rows hold.
        dropped: how many documents were left out as too long.
    """

    def __init__(self, pieces: Sequence[tuple[Tensor, Tensor]], max_tokens: int, *, dropped: int = 0) -> None:
        sizes = [len(ids) for ids, _ in pieces]
        self._rows = best_fit_decreasing(sizes, max_tokens)
        self._offsets = [0, *accumulate(sizes)]
        self._ids = torch.cat([ids for ids, _ in pieces])
        self._labels = torch.cat([labels for _, labels in pieces])
        self._labels[self._offsets[:-1]] = IGNORED
        self.lengths = [sum(sizes[piece] for piece in row) for row in self._rows]
        self.max_tokens, self.documents, self.dropped = max_tokens, len(sizes), dropped

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return row `index`: {"input_ids", "labels", "position_ids"}, each [n] int64."""
        spans = [range(self._offsets[piece], self._offsets[piece + 1]) for piece in self._rows[index]]
        return {
            "input_ids": torch.cat([self._ids[span.start : span.stop] for span in spans]),
            "labels": torch.cat([self._labels[span.start : span.stop] for span in spans]),
            "position_ids": torch.cat([torch.arange(len(span)) for span in spans]),
        }

    def __repr__(self) -> str:
        tokens = sum(self.lengths)
        left_out = f", {self.dropped} too long and left out" if self.dropped else ""
        return (
            f"PackedDataset({self.documents} documents in {len(self)} rows of at most {self.max_tokens} tokens, "
            f"{tokens / (len(self) * self.max_tokens):.1%} full{left_out})"
        )


def best_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Return bins of at most `capacity`, each the rising indices of the sizes in it.

    Args:
        sizes: numbers from 1 to capacity.
        capacity: what a bin holds.
    """
    bins: list[list[int]] = []
    room: dict[int, deque[int]] = {}  # by free space: the bins that have just that much, oldest first
    spaces: list[int] = []  # the keys of `room`, rising
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        at = bisect_left(spaces, sizes[item])
        if at == len(spaces):
            bins.append([])
            chosen, space = len(bins) - 1, capacity
        else:
            space = spaces[at]
            chosen = room[space].popleft()
            if not room[space]:
                del room[space], spaces[at]
        bins[chosen].append(item)
        left = space - sizes[item]
        if left > 0:
            if left not in room:
                room[left] = deque()
                insort(spaces, left)
            room[left].append(chosen)
    return [sorted(members) for members in bins]


def _document(example: Mapping[str, Any], index: int) -> tuple[Tensor, Tensor]:
    if "input_ids" not in example:
        raise ValueError(f'row {index} has no "input_ids"; its fields are {sorted(example)}')
    lost = sorted(set(example) - FIELDS)
    if lost:
        raise ValueError(
            f'row {index} has a field "{lost[0]}" that packing would lose: only input_ids and labels are kept'
        )
    fields = {name: torch.as_tensor(value, dtype=torch.long) for name, value in example.items()}
    ids = fields["input_ids"]
    if ids.ndim != 1 or len(ids) == 0:
        raise ValueError(f'row {index}: "input_ids" must be [n] token ids, n > 0; got shape {[*ids.shape]}')
    labels = fields.get("labels", ids)
    if labels.shape != ids.shape:
        raise ValueError(f"row {index}: {len(ids)} input_ids need as many labels; got shape {[*labels.shape]}")
    if not bool(fields.get("attention_mask", ids.new_ones(1)).all()):
        raise ValueError(f"row {index} is padded: its attention_mask has zeros. Cut the padding off before packing")
    return ids, labels
