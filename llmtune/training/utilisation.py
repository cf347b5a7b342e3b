"""How much of what the machine can do a run makes use of."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.modules import unwrap
from llmtune.training.checks import loss_and_parts
from llmtune.training.memory import peak_memory
from llmtune.training.sums import real_tokens
from llmtune.training.untouched import untouched
from llmtune.types import Callback

SIZES = {"cpu": (256, 512, 1024, 2048), "other": (2048, 4096, 8192)}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def matmul_ceiling(device: torch.device | str, dtype: torch.dtype, *, seconds: float = 0.6) -> float:
    """Return the most floating-point operations a second that square matrix products reach on a device, measured.

    It is the best of several sizes, a product of n x n matrices counted as 2 n^3. What the device's maker promises is
    more; what this measures can be reached.

    Args:
        device: where to multiply.
        dtype: of the matrices.
        seconds: about how long to measure; a size that would take longer than what is left is not tried.

    Returns:
        FLOP/s.
    """
    device = torch.device(device)
    best, end = 0.0, time.perf_counter() + seconds
    generator = torch.Generator(device).manual_seed(0)  # of its own: the run's random state stays
    for size in SIZES.get(device.type, SIZES["other"]):
        flops = 2.0 * size**3
        left = end - time.perf_counter()
        if best and 3 * flops / best > left:
            break
        one, other = (
            torch.randn(size, size, device=device, generator=generator, dtype=torch.float32).to(dtype) for _ in "ab"
        )
        _timed(one, other, 1)  # the first product of a size sets up what the later ones use
        repeats = 1
        while True:
            took = _timed(one, other, repeats)
            best = max(best, flops * repeats / took)
            if took > 0.05 or time.perf_counter() + 3 * took > end:
                break
            repeats *= 2
    return best


def _timed(one: Tensor, other: Tensor, repeats: int) -> float:
    _wait(one.device)
    began = time.perf_counter()
    with torch.no_grad():
        for _ in range(repeats):
            one @ other
    _wait(one.device)
    return max(time.perf_counter() - began, 1e-9)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def count_flops(loss: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Return the floating-point operations of a forward pass and of the backward pass to `parameters`.

    Counted by `torch.utils.flop_counter.FlopCounterMode`: matrix products, convolutions and torch's own attention (a
    causal one in full, though kernels leave half of it out). Recomputed activations count again. It does not see:
    elementwise work, norms and softmax; kernels of other libraries (flash-attn, bitsandbytes, Triton), unless they
    have registered a formula; what runs inside a compiled function, so that the model is run uncompiled here; the
    optimizer. No gradient is left in `.grad`.

    Args:
        loss: computes a scalar that carries a gradient.
        parameters: what is trained, any shapes; those that require no gradient are passed over.

    Example:
        >>> weight = torch.ones(5, 3, requires_grad=True)
        >>> count_flops(lambda: (torch.ones(7, 3) @ weight.T).sum(), [weight])  # two products of 2 * 7 * 3 * 5
        420
    """
    from torch.utils.flop_counter import FlopCounterMode

    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    counter = FlopCounterMode(display=False, custom_mapping=_attention_on_cpu())
    whole: Any = _Whole()  # torch's own tracker hooks gradients, and fails where a leaf enters a module
    counter.mod_tracker = whole
    compiled = "torch._dynamo" in sys.modules  # else nothing is, and loading it takes a second
    with torch.compiler.set_stance("force_eager") if compiled else nullcontext(), counter:
        torch.autograd.grad(loss(), wanted, allow_unused=True)
    torch.clear_autocast_cache()  # casts that belong to a graph which is gone
    return counter.get_total_flops()


class _Whole:
    """Stands where the counter keeps track of the module it is in: everything is counted as one."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _attention_on_cpu() -> dict[Any, Callable[..., int]]:
    """Return formulas for the CPU's attention kernel, which torch's table leaves out: as for those of a GPU."""

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        batch, heads, length, size = query
        return 2 * batch * heads * length * key[2] * (size + value[3])

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        batch, heads, length, size = query  # scores anew, and the gradients of scores, query, key and value
        return 2 * batch * heads * length * key[2] * (3 * size + 2 * value[3])

    ops = torch.ops.aten
    return {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


class Utilisation(Callback):
    """Add "tokens_per_second", "flops_utilisation" and "peak_memory" to every step's metrics.

    At the start of the run it measures `matmul_ceiling` in the run's precision, for under a second, and counts the
    operations of one forward and backward pass over the first micro-batch (`count_flops` says what that does not see),
    which leaves random state, modes, buffers and gradients as they were. Then

        flops_utilisation = operations per real token * real tokens of the step / seconds / ceiling

    from 0 to about 1. It takes every step to be like the first micro-batch: where lengths differ much, it is rough.
    Work on padding counts as work. Under several processes the tokens are those of all, and so is the ceiling.

    Attributes:
        ceiling: FLOP/s of one process's device.
        flops_per_token: operations of a real token, forward and backward.

    Raises:
        ValueError: at the start of the run, where batches have no "input_ids", by which tokens are counted.
    """

    ceiling: float = 0.0
    flops_per_token: float = 0.0

    def on_fit_start(self, loop: Any) -> None:
        """Measure the ceiling and count.

        Raises:
            ValueError: the batches have no tokens to count by.
        """
        if loop.step >= loop.total_steps:
            return
        model = unwrap(loop.model)
        with untouched(model, training=True):
            batch = loop.micro_batches(loop.step)[0]
            tokens = real_tokens(batch)
            if not tokens:
                raise ValueError(
                    f'Utilisation counts by tokens, and the batches have no "input_ids": they have {", ".join(batch)}'
                )
            batch = loop.prepare_batch(batch)

            def loss() -> Tensor:
                return loss_and_parts(loop.compute_loss(model, batch))[0]

            lower = DTYPES.get(loop.settings.precision)
            with torch.autocast(loop.device.type, dtype=lower or torch.bfloat16, enabled=lower is not None):
                self.flops_per_token = count_flops(loss, model.parameters()) / tokens
        processes = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
        self.ceiling = matmul_ceiling(loop.device, lower or _main_dtype(model))
        self._whole_ceiling = self.ceiling * processes

    def on_step_end(self, loop: Any, metrics: dict[str, Any]) -> None:
        """Add the three numbers."""
        speed = metrics["tokens"] / max(metrics["seconds"], 1e-9)
        metrics["tokens_per_second"] = speed
        metrics["flops_utilisation"] = self.flops_per_token * speed / self._whole_ceiling
        metrics["peak_memory"] = peak_memory()


def _main_dtype(model: nn.Module) -> torch.dtype:
    """Return the floating dtype in which most of the weights are."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype])
