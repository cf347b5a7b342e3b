"""Which tokens of a batch are a prompt's first and last: what a block of a transformer is called with tells.

A block's own arguments tell, and nothing that is noted elsewhere: gradient checkpointing runs blocks again by
themselves, with the arguments they had, when the model may long be at another batch.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.around import first_input
from llmtune.adapters.body import HELD
from llmtune.adapters.layer import bare_module

_CACHES = ("cache", "past_key_values", "past_key_value", "layer_past")
_MASKS = ("attention_mask", "mask")
_ADDED = -1e3  # a mask that is added to scores is 0 where a token may look, and far below this where it may not
_MASKED_IS_TRUE = ("MptBlock",)  # blocks whose bool mask says where a token may not look
_UNREADABLE = {  # blocks whose arguments do not tell what is asked here
    "LongT5Block": "cuts a row into pieces, and its mask with it",
    "RwkvBlock": "is told neither of padding nor of earlier tokens by a mask or a cache",
}


def prompt_positions(real: Tensor, prefix: int, suffix: int, starts: Tensor | None = None) -> Tensor:
    """Return True at the first `prefix` and the last `suffix` real tokens of each row, or of each document in it.

    Args:
        real: bool [B, T], False at padding, wherever that is.
        prefix: how many of the first.
        suffix: how many of the last; where there are fewer than both together, all are marked.
        starts: bool [B, T], True where a document begins; left out, a row is one document.

    Returns:
        Bool [B, T].

    >>> import torch
    >>> from llmtune.adapters import prompt_positions
    >>> prompt_positions(torch.tensor([[0, 1, 1, 1, 1, 1]]).bool(), 1, 2).int()
    tensor([[0, 1, 0, 0, 1, 1]], dtype=torch.int32)
    """
    document = torch.zeros_like(real, dtype=torch.long) if starts is None else starts.cumsum(1)
    earlier = torch.where(real, document + 1, 0).cummax(1).values.roll(1, 1)  # that of the real token before, plus 1
    earlier[:, 0] = 0
    first = real & (document + 1 != earlier)
    number = real.cumsum(1)  # real tokens up to here
    begun = torch.where(first, number - 1, 0).cummax(1).values  # those before this document
    ends = torch.where(first, number - 1, number[:, -1:]).roll(-1, 1)
    ends[:, -1] = number[:, -1]
    ended = ends.flip(1).cummin(1).values.flip(1)  # those up to this document's end
    return real & ((number - begun <= prefix) | (ended - number < suffix))


class BlockInputs:
    """Reads the arguments of a block, by name or by place, as transformers' blocks and this library's take them.

    Args:
        block: the block; its `forward` tells the names.

    Raises:
        TypeError: it takes a mask by a name that is not known, so that padding would not be seen, or it is one of the
            few kinds whose arguments do not tell.
    """

    def __init__(self, block: nn.Module) -> None:
        bare = bare_module(block)
        self.names = tuple(inspect.signature(bare.forward).parameters)
        kind = type(bare).__name__
        if kind in _UNREADABLE:
            raise TypeError(
                f"a {kind} {_UNREADABLE[kind]}, so the first and last real tokens are not to be told: use "
                'positions="all"'
            )
        self.masked_is_true = kind in _MASKED_IS_TRUE
        index = (getattr(module, name, None) for name in ("layer_idx", "layer_id") for module in bare.modules())
        self.layer = next((found for found in index if isinstance(found, int)), 0)
        odd = [name for name in self.names if "mask" in name]
        if odd and not any(name in _MASKS for name in self.names):
            raise TypeError(
                f"a {kind} is told of padding by {odd[0]}, which is not known here, so the first and "
                'last real tokens are not to be told: use positions="all"'
            )

    def get(self, args: tuple[Any, ...], kwargs: dict[str, Any], *names: str) -> Any:
        """Return the argument of one of these names that is not None, or None."""
        named = dict(zip(self.names, args, strict=False)) | kwargs
        return next((named[name] for name in names if named.get(name) is not None), None)

    def goes_on(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Return whether a cache holds earlier tokens, so that these are generated ones and no prompt.

        A prefix is none: the body layer that has put it there says on the cache how long it is.
        """
        cache = self.get(args, kwargs, *_CACHES)
        if cache is None:
            return False
        if not hasattr(cache, "get_seq_length"):
            return bool(cache.length > 0)
        held = getattr(cache, HELD, 0)
        try:
            return bool(cache.get_seq_length(self.layer) > held)
        except ValueError:  # a block without keys of its own: an earlier one's hold the new tokens already
            return bool(cache.get_seq_length() > first_input(args, kwargs).shape[1] + held)

    def real(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Return bool [B, T], True at the tokens that are no padding and that `prompt_mask`, where given, marks.

        Args:
            hidden: [B, T, E].
            args, kwargs: what the block was called with.

        Raises:
            TypeError: the mask is of a kind that does not tell its padding.
            ValueError: `prompt_mask` is not [B, T].
        """
        B, T = hidden.shape[:2]
        mask, cache = self.get(args, kwargs, *_MASKS), self.get(args, kwargs, *_CACHES)
        if self.masked_is_true and isinstance(mask, Tensor) and mask.dtype == torch.bool:
            mask = ~mask
        real = _real(mask, T, None if cache is None else getattr(cache, HELD, 0))
        real = torch.ones(B, T, dtype=torch.bool, device=hidden.device) if real is None else real.expand(B, T)
        prompt = self.get(args, kwargs, "prompt_mask")
        if prompt is not None:
            if prompt.shape != (B, T):
                raise ValueError(f"prompt_mask must be [B, T], here {[B, T]}; got {[*prompt.shape]}")
            real = real & prompt.bool()
        return real.to(hidden.device)

    def starts(self, hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """Return bool [B, T], True where a packed document begins: its position ids start again. None without them.

        Args:
            hidden: [B, T, E].
            args, kwargs: what the block was called with.
        """
        ids = self.get(args, kwargs, "position_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] != hidden.shape[1]:
            return None
        starts = torch.ones_like(ids, dtype=torch.bool)
        starts[:, 1:] = ids[:, 1:] <= ids[:, :-1]
        return starts.expand(*hidden.shape[:2])


def _real(mask: Any, T: int, held: int | None) -> Tensor | None:
    """Return bool [B or 1, T] of a mask of any kind that attention takes; None where all tokens are real.

    Args:
        mask: the mask, or None.
        T: how many tokens.
        held: how many positions of a prefix are before them; None without a cache, where what the mask has more is a
            prefix (under gradient checkpointing GPT-2 takes the cache away and leaves the mask).
    """
    if mask is None:
        return None
    if hasattr(mask, "dense"):  # one of this library's masks
        mask = mask.dense(T, T)
        mask = mask[None, None] if mask.ndim == 2 else mask
    if not isinstance(mask, Tensor):
        raise TypeError(
            f"a mask of type {type(mask).__name__} does not tell the padding: load the model with another "
            'attn_implementation, or use positions="all"'
        )
    if mask.ndim not in (2, 4):
        raise TypeError(
            f'a mask of the shape {[*mask.shape]} does not tell the padding of [B, T] tokens: use positions="all"'
        )
    n = max(mask.shape[-1] - T, 0) if held is None else held
    if mask.ndim == 2:  # 1 and 0; or what attn_implementation="llmtune" has: documents, or windows, negative at padding
        added = mask.is_floating_point() and not bool((mask > 0).any())  # Pegasus-X: 0, and far below it at padding
        return None if mask.dtype == torch.int32 else mask[:, n : n + T] > (_ADDED if added else 0)
    # bool; or whole numbers, 0 at padding (DeBERTa); or what is added
    seen = mask[:, 0] > _ADDED if mask.is_floating_point() else mask[:, 0] != 0
    if seen.shape[1] == 1:
        return seen[:, 0, n : n + T]
    return seen.diagonal(n, dim1=1, dim2=2)[:, :T]  # every token sees itself
