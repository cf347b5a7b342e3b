"""How much of what the machine can do a run makes use of."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.modules import unwrap
from llmtune.training.checks import loss_and_parts
from llmtune.training.flops import count_flops
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
