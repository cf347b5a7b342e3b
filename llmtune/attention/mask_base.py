"""What every mask can do, and the intersection that `&` makes."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtune.attention.key_ranges import keys_between

_MEANING = {"B": "rows in the batch", "H": "query heads", "T": "queries", "S": "keys"}


@dataclass(frozen=True, eq=False)
class Mask:
    """Which query may attend to which key. A mask of your own needs `dense`, and `fixed_sizes` where it fits only some.

    Masks are frozen, and join with `&`.
    """

    def dense(self, T: int, S: int, *, device: torch.device | str | None = None) -> Tensor:
        """Return the mask as a table.

        Args:
            T: number of queries.
            S: number of keys.
            device: where to make it; a mask that holds a tensor stays on that tensor's device.

        Returns:
            Bool, True where query t may attend to key s: [T, S] where all rows of the batch share it, else
            [B | 1, H | 1, T, S].

        Raises:
            ValueError: the mask does not fit T queries and S keys.
        """
        raise NotImplementedError(f"{type(self).__name__} has no dense(T, S)")

    def tile(self, queries: range, keys: range, T: int, S: int, *, device: torch.device | str | None = None) -> Tensor:
        """Return a part of the table: dense(T, S)[..., queries, keys].

        Our masks make it without the rest of the table. This one, for masks that know only `dense`, cuts it out.

        Args:
            queries: of step 1, within 0 ... T; may be empty.
            keys: of step 1, within 0 ... S; may be empty.
            T: number of queries.
            S: number of keys.
            device: as in `dense`.

        Returns:
            Bool [t, s] or [B | 1, H | 1, t, s], with t = len(queries) and s = len(keys).
        """
        return self.dense(T, S, device=device)[..., queries.start : queries.stop, keys.start : keys.stop]

    def span(self, queries: range, T: int, S: int) -> range:
        """Return keys outside of which none of these queries sees any, in any row and head: backends skip the others.

        It may be wider than needed, never narrower, and reads no tensor that it has read before. Here: all keys.
        """
        return range(S)

    def sees_all(self, queries: range, keys: range, T: int, S: int) -> bool:
        """Return True only if each of these queries sees all of these keys in every row and head: no tile is needed.

        It may be False where that holds, and reads no tensor that it has read before. Here: False.
        """
        return False

    def fixed_sizes(self) -> dict[str, int]:
        """Return the sizes this mask is made for, under the letters B, H, T, S; sizes it leaves free are absent."""
        return {}

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors this mask holds, of any shape; they must be on the device of the queries."""
        return ()

    def versions(self) -> tuple[int, ...] | None:
        """Return how often each of the tensors has been changed in place: what was made of others is out of date.

        None where nobody counts (a tensor made under `inference_mode`): nothing made of it is kept.
        """
        tensors = self.tensors()
        return None if any(x.is_inference() for x in tensors) else tuple(x._version for x in tensors)

    def fit(self, T: int, S: int) -> None:
        """Check that the mask fits T queries and S keys.

        Raises:
            ValueError: it does not; the sentence has both numbers.
        """
        self._compare({"T": T, "S": S})

    def check(self, *, B: int, H: int, T: int, S: int, device: torch.device) -> None:
        """Check that the mask fits [B, H, T, D] queries and [B, K, S, D] keys on `device`.

        Raises:
            ValueError: it does not; the sentence has both numbers, or both devices.
        """
        self.fit(T, S)
        self._compare({"B": B, "H": H})
        for tensor in self.tensors():
            if tensor.device != device:
                raise ValueError(
                    f"the mask {type(self).__name__} is on {tensor.device}, the query on {device}: move one of them"
                )

    def _compare(self, sizes: dict[str, int]) -> None:
        for letter, wanted in self.fixed_sizes().items():
            if letter in sizes and sizes[letter] != wanted:
                raise ValueError(
                    f"the mask {type(self).__name__} is made for {wanted} {_MEANING[letter]} ({letter}), "
                    f"but the inputs have {sizes[letter]}"
                )

    def additive(self, T: int, S: int, *, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Return the mask as numbers to add to the scores, made once and kept for the layers that share this mask.

        A row without any key gets zeros, so that no kernel meets a row of -inf; its result is to be dropped.

        Args:
            T: number of queries.
            S: number of keys.
            dtype: of the numbers: the query's.
            device: where they are needed.

        Returns:
            (values, seen): values as `dense`, but 1 in place of any size but S along which they repeat; 0 where a query
            may attend and -inf where not. seen is None where every query has a key, else bool, the shape of values with
            S = 1, False at the rows without a key.
        """
        # A traced graph may neither read values nor leave tensors behind; on the meta device there are none to read.
        traced = torch.compiler.is_compiling() or torch.device(device).type == "meta"
        versions = None if traced else self.versions()
        key = (T, S, dtype, device, versions)
        kept = self.__dict__.get("_kept")
        if versions is not None and kept is not None and kept[0] == key:
            return kept[1]
        if not traced and torch.is_inference_mode_enabled():  # what is made here may be needed for training later on
            with torch.inference_mode(False):
                return self.additive(T, S, dtype=dtype, device=device)
        allowed = self.dense(T, S, device=device)
        for dim in range(allowed.ndim - 1):
            if (
                allowed.stride(dim) == 0 and allowed.shape[dim] > 1
            ):  # repeated, as padding is for every query: once is enough
                allowed = allowed.narrow(dim, 0, 1)
        seen = allowed.any(dim=-1, keepdim=True)
        values = torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill_(seen & ~allowed, float("-inf"))
        if traced:
            return values, seen
        made = (values, None if bool(seen.all()) else seen)
        if versions is not None:
            object.__setattr__(self, "_kept", (key, made))  # not part of what the mask says: the record stays frozen
        return made

    def __and__(self, other: Mask) -> Mask:
        """Return the mask that allows what both allow."""
        if not isinstance(other, Mask):
            raise TypeError(
                f"a mask joins with a mask, got {type(other).__name__}: wrap a boolean tensor in Dense(...)"
            )
        return Intersection((*_parts(self), *_parts(other)))


@dataclass(frozen=True, eq=False)
class Intersection(Mask):
    """What all `parts` allow. Made by `a & b`, which flattens.

    Raises:
        ValueError: two parts are made for different sizes.
    """

    parts: tuple[Mask, ...]

    def __post_init__(self) -> None:
        sizes: dict[str, int] = {}
        for part in self.parts:
            for letter, size in part.fixed_sizes().items():
                if sizes.setdefault(letter, size) != size:
                    raise ValueError(
                        f"cannot join masks of different sizes: {type(part).__name__} is made for {size} "
                        f"{_MEANING[letter]} ({letter}), a part before it for {sizes[letter]}"
                    )

    def fixed_sizes(self) -> dict[str, int]:
        """Return the sizes fixed by any part."""
        return {letter: size for part in self.parts for letter, size in part.fixed_sizes().items()}

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors of all parts, of any shape."""
        return tuple(tensor for part in self.parts for tensor in part.tensors())

    def fit(self, T: int, S: int) -> None:
        """See `Mask.fit`."""
        for part in self.parts:
            part.fit(T, S)

    def dense(self, T: int, S: int, *, device: torch.device | str | None = None) -> Tensor:
        """Return bool [T, S] or [B | 1, H | 1, T, S]. See `Mask.dense`."""
        return functools.reduce(torch.logical_and, (part.dense(T, S, device=device) for part in self.parts))

    def tile(self, queries: range, keys: range, T: int, S: int, *, device: torch.device | str | None = None) -> Tensor:
        """Return bool [t, s] or [B | 1, H | 1, t, s]. See `Mask.tile`."""
        tiles = (part.tile(queries, keys, T, S, device=device) for part in self.parts)
        return functools.reduce(torch.logical_and, tiles)

    def span(self, queries: range, T: int, S: int) -> range:
        """Return the keys within the spans of all parts. See `Mask.span`."""
        spans = [part.span(queries, T, S) for part in self.parts]
        return keys_between(max(span.start for span in spans), min(span.stop for span in spans), S)

    def sees_all(self, queries: range, keys: range, T: int, S: int) -> bool:
        """Return whether every part says so. See `Mask.sees_all`."""
        return all(part.sees_all(queries, keys, T, S) for part in self.parts)


def _parts(mask: Mask) -> tuple[Mask, ...]:
    return mask.parts if isinstance(mask, Intersection) else (mask,)
