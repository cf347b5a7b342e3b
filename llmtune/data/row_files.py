"""Rows in one file of tensors: what a teacher or a model has made once is not made again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtune.types import Rows

FORMAT = "llmtune rows"
SHAPES = "/shapes"  # behind a field's name: the shapes of its values, one a row


def save_rows(rows: Rows, path: str | Path) -> None:
    """Write rows into one safetensors file; `load_rows` gives them back bit for bit, as tensors.

    Each field is one tensor, the rows' values behind each other, and the rows' shapes. The file is complete or not
    there: it is written beside its place and then moved.

    Args:
        rows: dicts of numbers, lists of numbers, or tensors, all with the same fields; of one field, all of one type.
        path: the file.

    Raises:
        ValueError: there are no rows, they have different fields, or a field has no numbers, or numbers of two types or
            dimensions. Names row and field.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_rows([{"input_ids": [5, 7], "labels": 1}, {"input_ids": [9], "labels": 0}], folder + "/rows")
        ...     rows = load_rows(folder + "/rows")
        >>> rows[0]["input_ids"].tolist(), rows[1]["labels"].item()
        ([5, 7], 0)
    """
    from safetensors.torch import save_file

    if len(rows) == 0:
        raise ValueError("there are no rows to save")
    path, fields = Path(path), list(rows[0])
    values: dict[str, list[Tensor]] = {name: [] for name in fields}
    for index in range(len(rows)):
        row = rows[index]
        if other := sorted(set(row) ^ set(fields)):
            raise ValueError(
                f'all rows of a file need the same fields; "{other[0]}" is in only one of rows 0 and {index}'
            )
        for name in fields:
            values[name].append(_tensor(row, name, index, values[name]))
    tensors = {}
    for name, parts in values.items():
        tensors[name] = torch.cat([part.flatten() for part in parts])
        tensors[name + SHAPES] = torch.tensor([list(part.shape) for part in parts]).reshape(len(parts), parts[0].ndim)
    unfinished = path.with_name(path.name + ".unfinished")
    save_file(tensors, unfinished, metadata={"format": FORMAT, "rows": str(len(rows)), "fields": "\n".join(fields)})
    os.replace(unfinished, path)


def load_rows(path: str | Path) -> list[dict[str, Tensor]]:
    """Return the rows of a file that `save_rows` has written.

    Args:
        path: the file.

    Returns:
        Rows of tensors, of the shapes they had: a list of n numbers is [n], a number is a scalar.

    Raises:
        ValueError: the file is damaged, or not one of rows.
        FileNotFoundError: there is no such file.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of rows {path}")
    try:
        with safe_open(path, framework="pt") as file:
            told = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no file of tensors: {error}") from error
    if told.get("format") != FORMAT:
        raise ValueError(f"{path} is no file of rows: save_rows has not written it")
    rows: list[dict[str, Tensor]] = [{} for _ in range(int(told["rows"]))]
    for name in told["fields"].split("\n"):
        shapes = tensors[name + SHAPES]
        sizes = shapes.prod(1).tolist() if shapes.shape[1] else [1] * len(rows)
        for row, part, shape in zip(rows, tensors[name].split(sizes), shapes.tolist(), strict=True):
            row[name] = part.reshape(shape).clone()
    return rows


def _tensor(row: Mapping[str, Any], name: str, index: int, before: list[Tensor]) -> Tensor:
    try:
        value = torch.as_tensor(row[name]).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f'row {index}: field "{name}" holds no numbers: {error}. Leave it out') from error
    if before and value.numel() == 0 and not isinstance(row[name], Tensor):
        value = value.to(before[0].dtype)  # an empty list does not say what it is of
    if before and (value.dtype, value.ndim) != (before[0].dtype, before[0].ndim):
        raise ValueError(
            f'row {index}: field "{name}" must be of one kind in all rows; it is {value.dtype} {[*value.shape]} here '
            f"and {before[0].dtype} {[*before[0].shape]} in row 0"
        )
    return value
