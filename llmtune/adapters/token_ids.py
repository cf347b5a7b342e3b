"""Ids of tokens to train, as a record is given them, checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence


def check_tokens(tokens: Sequence[int]) -> None:
    """Check the ids of tokens to train.

    Raises:
        ValueError: there are none, one is negative, or one comes twice.
        TypeError: one is no whole number, or they are no list.
    """
    if isinstance(tokens, str) or not isinstance(tokens, Sequence):
        raise TypeError(f"the tokens to train must be a list of token ids; got {tokens!r}")
    if not tokens:
        raise ValueError("there is no token to train: give the ids of new or rare tokens")
    for token in tokens:
        if not isinstance(token, int) or isinstance(token, bool):
            raise TypeError(f"a token to train must be given by its id, a whole number; got {token!r}")
        if token < 0:
            raise ValueError(f"the id of a token to train must be 0 or more; got {token}")
    token, times = Counter(tokens).most_common(1)[0]
    if times > 1:
        raise ValueError(f"token {token} is named {times} times among the tokens to train: name it once")


def read_tokens(tokens: Sequence[int] | Mapping[str, Sequence[int]]) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    """Return tokens to train beside something else, checked and as copies: none, ids, or ids by the ends of names.

    Raises:
        ValueError, TypeError: as `check_tokens`.
    """
    if isinstance(tokens, Mapping):
        for ids in tokens.values():
            check_tokens(ids)
        return {str(end): tuple(ids) for end, ids in tokens.items()}
    if isinstance(tokens, str) or not isinstance(tokens, Sequence) or len(tokens) > 0:
        check_tokens(tokens)
    return tuple(tokens)
