"""What a person sees of a run: a banner, a bar, a closing line."""

from __future__ import annotations

from typing import Any

import torch

from llmtune.training.memory import peak_memory
from llmtune.types import Callback


class Progress(Callback):
    """Print what is about to run, a tqdm bar while it runs, and what it came to."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._tokens = 0
        self._seconds = 0.0

    def on_fit_start(self, loop: Any) -> None:
        """Print the banner and open the bar."""
        from tqdm.auto import tqdm

        self._tokens, self._seconds = 0, 0.0
        print(banner(loop))
        self._bar = tqdm(total=loop.total_steps, initial=loop.step, unit="step", dynamic_ncols=True)

    def on_step_end(self, loop: Any, metrics: dict[str, Any]) -> None:
        """Move the bar on, with the loss and the gradient's norm now and then."""
        self._tokens += metrics["tokens"]
        self._seconds += metrics["seconds"]
        if loop.step % loop.settings.log_every == 0 or loop.step == loop.total_steps:
            speed = self._tokens / max(self._seconds, 1e-9)
            self._bar.set_postfix_str(", ".join([*_shown(metrics), f"{speed:,.0f} tokens/s"]), refresh=False)
        self._bar.update(1)

    def on_eval_end(self, loop: Any, metrics: dict[str, float]) -> None:
        """Write the evaluation's means over the bar."""
        shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith("eval_"))
        self._bar.write(f"step {loop.step}: {shown}")

    def on_fit_end(self, loop: Any) -> None:
        """Close the bar and print the closing line."""
        self._bar.close()
        speed = self._tokens / max(self._seconds, 1e-9)
        losses = [row["loss"] for row in loop.history if "loss" in row]
        fell = f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, " if losses else ""
        print(
            f"{loop.step} steps done: {fell}{speed:,.0f} real tokens/s, peak memory {peak_memory() / 2**20:,.0f} MiB"
            + (f", saved in {loop.settings.folder}" if loop.settings.folder is not None else "")
        )

    def on_exception(self, loop: Any, error: BaseException) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()


def _shown(metrics: dict[str, Any]) -> list[str]:
    names = (("loss", "loss"), ("gradient", "grad_norm"))
    return [f"{label} {metrics[name]:.4g}" for label, name in names if name in metrics]


def banner(loop: Any) -> str:
    """Return the two lines that say what is about to run."""
    parameters = list(loop.model.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    total = sum(p.numel() for p in parameters)
    dtypes = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
    settings = loop.settings
    attention = getattr(getattr(loop.model, "config", None), "_attn_implementation", None)
    resumed = f" from step {loop.step}" if loop.step else ""
    return (
        f"Training {type(loop.model).__name__}{resumed}: {loop.total_steps} steps of {settings.rows_per_step} rows, "
        + (f"{len(loop.train_data)} rows in all\n" if loop.stream is None else "from a stream\n")
        + f"  trainable params: {trained:,} || all params: {total:,} || trainable%: {100 * trained / total:.4f} | "
        f"{dtypes}, precision {settings.precision}, on {loop.device} ({torch.get_num_threads()} threads)"
        + (f", attention {attention}" if attention else "")
    )
