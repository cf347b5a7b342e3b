"""What a model and its training keep in memory, counted from the tensors as they lie there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from llmtune.adapters.quantized import quantization_state, quantized_kind
from llmtune.adapters.report import Shown
from llmtune.modules import check_module


@dataclass(frozen=True)
class MemorySummary(Shown):
    """Bytes of a model and of its training by AdamW; activations are not among them.

    Attributes:
        frozen: of parameters that are not trained and of buffers, by how they are stored: "float32", "nf4", "int8".
        quantization: of the scales and tables that quantised weights need beside them.
        trained: of parameters that require a gradient.
        gradients: of theirs, once there is one for each.
        moments: of AdamW's two moments, which have the parameters' dtype.
    """

    frozen: Mapping[str, int]
    quantization: int
    trained: int
    gradients: int
    moments: int

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(self.frozen.values()) + self.quantization + self.trained + self.gradients + self.moments

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {_shown(size)}" for kind, size in self.frozen.items()) or "none"
        rows = {
            "frozen": (sum(self.frozen.values()), f" ({kinds})"), "quantization": (self.quantization, ""),
            "trained": (self.trained, ""), "gradients": (self.gradients, ""), "AdamW's moments": (self.moments, ""),
            "total": (self.total, ""),
        }  # fmt: skip
        return "\n".join(f"{name:<16}{_shown(size):>12}{more}" for name, (size, more) in rows.items())


def memory_summary(model: nn.Module) -> MemorySummary:
    """Return the bytes that a model's weights take as they are stored, and those that training it by AdamW adds.

    Full fine-tuning, LoRA and QLoRA are counted alike: what requires a gradient is trained, the rest is frozen. Weights
    that are tied are counted once. On the meta device it says what the model would take.

    Args:
        model: any module, with or without adapters and quantised layers.

    Example:
        >>> from llmtune.adapters import LoRA, attach
        >>> from llmtune.testing.models import tiny_llama
        >>> model = tiny_llama()
        >>> report = attach(model, LoRA(rank=4, alpha=8, targets=["q_proj"]))
        >>> print(memory_summary(model))
        frozen              82.9 KiB (float32 82.9 KiB)
        quantization             0 B
        trained              2.6 KiB
        gradients            2.6 KiB
        AdamW's moments      5.2 KiB
        total               93.4 KiB
    """
    check_module(model)
    seen: set[tuple[int, int]] = set()
    frozen: dict[str, int] = {}
    quantization = trained = 0
    for module in model.modules():
        kind = quantized_kind(module)
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is None or not _new(tensor, seen):
                continue
            if tensor.requires_grad:
                trained += tensor.nbytes
            else:
                is_weight = kind is not None and tensor is module._parameters.get("weight")
                stored = str(kind) if is_weight else str(tensor.dtype).removeprefix("torch.")
                frozen[stored] = frozen.get(stored, 0) + tensor.nbytes
        quantization += sum(tensor.nbytes for tensor in quantization_state(module) if _new(tensor, seen))
    return MemorySummary(frozen, quantization, trained, trained, 2 * trained)


def _new(tensor: Tensor, seen: set[tuple[int, int]]) -> bool:
    """Note a tensor by where it lies, and return whether it had not been seen there."""
    key = (tensor.untyped_storage().data_ptr() or id(tensor), int(tensor.storage_offset()))
    if key in seen:
        return False
    seen.add(key)
    return True


def _shown(size: int) -> str:
    amount = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if amount < 1024 or unit == "GiB":
            break
        amount /= 1024
    return f"{size} B" if unit == "B" else f"{amount:.1f} {unit}"
