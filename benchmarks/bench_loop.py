"""What a training loop costs beside the training: time outside forward, backward and optimizer, ours and HF Trainer's.

    python benchmarks/bench_loop.py --data train.jsonl [--milliseconds 50] [--steps 60] [--pairs 5] [--write]

A Llama whose optimizer step takes about `--milliseconds` on this machine learns the bytes of real text, by our
`TrainingLoop` and by Hugging Face's `Trainer`, in turns: the same rows in the same order, padded by the same collate
function, the same AdamW and schedule, clipping at 1, in one micro-batch a step and in four. Losses of both are compared
step by step before anything is reported. Forward is all of `compute_loss`, backward `Tensor.backward`, optimizer
`AdamW.step`; what is left of a step's wall time is the loop's: data, collating, scaling, clipping, checking, logging,
recording. Both log every 10 steps and show no bar; "saving" is left out of both.

`--data` is a JSONL file of rows such as those of Alpaca (huggingface.co/datasets/tatsu-lab/alpaca).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, report, table
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from llmtune.data import collate_padded
from llmtune.training import LoopSettings, TrainingLoop
from llmtune.types import Callback

ROWS = 8  # of a step
RATE = 1e-3


@dataclass
class Times:
    """Seconds of every step, and of its parts."""

    steps: list[float] = field(default_factory=list)
    parts: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    within: float = 0.0
    began: float = 0.0

    def begin(self) -> None:
        self.within, self.began = 0.0, time.perf_counter()

    def end(self) -> None:
        self.steps.append(time.perf_counter() - self.began)
        self.parts.append(self.within)

    def overhead(self) -> float:
        """Return the median share of a step outside its parts, the first steps left out."""
        pairs = list(zip(self.steps, self.parts, strict=True))[5:]
        return statistics.median((step - part) / step for step, part in pairs)

    def loop_seconds(self) -> float:
        pairs = list(zip(self.steps, self.parts, strict=True))[5:]
        return statistics.median(step - part for step, part in pairs)

    def step_seconds(self) -> float:
        return statistics.median(self.steps[5:])


@contextmanager
def clocked(times: Times) -> Iterator[Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """Count the time of `Tensor.backward` and `AdamW.step` as parts; yield what counts that of another function."""

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                times.within += time.perf_counter() - began

        return run

    backward, step = torch.Tensor.backward, torch.optim.AdamW.step
    torch.Tensor.backward, torch.optim.AdamW.step = timed(backward), timed(step)  # type: ignore[method-assign]
    try:
        yield timed
    finally:
        torch.Tensor.backward, torch.optim.AdamW.step = backward, step  # type: ignore[method-assign]


def ours(model: nn.Module, rows: list[Any], *, steps: int, micro: int) -> Times:
    """Train by our loop and return what the steps took."""
    times = Times()

    class Clocked(TrainingLoop):
        def row_indices(self, step: int) -> list[int]:
            return [(step * ROWS + place) % len(rows) for place in range(ROWS)]

        def micro_batches(self, step: int) -> Any:
            if self.training:
                if times.began:
                    times.end()  # of the step before: what a step records at its end counts too
                times.begin()
            return super().micro_batches(step)

    settings = LoopSettings(
        max_steps=steps, rows_per_step=ROWS, rows_per_micro_batch=ROWS // micro, learning_rate=RATE, progress=False,
        fused=True,
    )  # fmt: skip
    loop = Clocked(model, rows, settings=settings, collate=collate_padded, loss=ModelLoss())
    loop.training = False
    with clocked(times) as timed:
        loop.compute_loss = timed(loop.compute_loss)  # type: ignore[method-assign]
        loop.callbacks.append(Began())
        history = loop.fit()
        times.end()
    times.losses = history.column("loss")
    return times


class Began(Callback):
    """Tells our loop that the trial is over."""

    def on_fit_start(self, loop: Any) -> None:
        """The next call of `micro_batches` begins the first step."""
        loop.training = True


class ModelLoss:
    """The model's own loss, which the Trainer takes too, so that both do the same work."""

    def __call__(self, model: nn.Module, batch: Any) -> Any:
        return model(**batch, use_cache=False).loss

    def count_targets(self, batch: Any) -> int:
        return int((batch["labels"][:, 1:] != -100).sum())


def theirs(model: nn.Module, rows: list[Any], *, steps: int, micro: int) -> Times:
    """Train by Hugging Face's Trainer and return what the steps took."""
    times = Times()

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if not times.began:
                times.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.end()
            times.begin()  # fetching the next step's rows counts, as in ours

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                times.losses.append(logs["loss"])

    with tempfile.TemporaryDirectory() as folder, clocked(times) as timed:
        arguments = TrainingArguments(
            output_dir=folder, max_steps=steps, per_device_train_batch_size=ROWS // micro,
            gradient_accumulation_steps=micro, learning_rate=RATE, lr_scheduler_type="linear", max_grad_norm=1.0,
            weight_decay=0.0, logging_steps=10, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=True,
            optim="adamw_torch_fused", train_sampling_strategy="sequential", dataloader_pin_memory=False,
        )  # fmt: skip
        trainer = Trainer(
            model=model, args=arguments, train_dataset=rows, data_collator=collate_padded, callbacks=[Clock()]
        )
        trainer.compute_loss = timed(trainer.compute_loss)
        trainer.train()
    return times


def text_rows(path: str, *, count: int, length: int) -> list[dict[str, list[int]]]:
    """Return rows of UTF-8 bytes of real text, 16 to `length` each."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        ids = list(" ".join(str(value) for value in entry.values()).encode()[:length])
        if len(ids) >= 16:
            rows.append({"input_ids": ids, "labels": ids})
        if len(rows) == count:
            break
    return rows


def model_of(width: int) -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259, hidden_size=width, intermediate_size=width * 5 // 2, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config)


def fitting_width(rows: list[Any], seconds: float) -> int:
    """Return the width whose optimizer step takes nearest to `seconds` in parts, by our loop in one micro-batch."""
    best = (float("inf"), 64)
    for width in (64, 96, 128, 160, 192, 256):
        taken = ours(model_of(width), rows, steps=20, micro=1)
        took = statistics.median(taken.parts[5:])
        best = min(best, (abs(took - seconds), width))
        if took > seconds:
            break
    return best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--milliseconds", type=float, default=50.0)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    wanted = parser.parse_args()
    torch.set_num_threads(wanted.threads)
    logging.set_verbosity_error()
    rows = text_rows(wanted.data, count=ROWS * wanted.steps, length=96)
    width = fitting_width(rows, wanted.milliseconds / 1e3)
    lines, found = [], {}
    for micro in (1, 4):
        mine, others = [], []
        for number in range(wanted.pairs):
            pair = {}
            for way in (ours, theirs) if number % 2 == 0 else (theirs, ours):
                pair[way] = way(copy.deepcopy(model_of(width)), rows, steps=wanted.steps, micro=micro)
            check_equal(pair[ours].losses, pair[theirs].losses)
            mine.append(pair[ours])
            others.append(pair[theirs])
        for name, taken in (("llmtune", mine), ("HF Trainer", others)):
            share = statistics.median(times.overhead() for times in taken)
            loop = statistics.median(times.loop_seconds() for times in taken)
            step = statistics.median(times.step_seconds() for times in taken)
            lines.append((f"{name}, {micro} micro-batches", f"{step * 1e3:.1f}", f"{loop * 1e3:.2f}", f"{share:.2%}"))
            found[f"{name}, {micro}"] = {
                "step_seconds": step,
                "loop_seconds": loop,
                "share": share,
                "shares": [times.overhead() for times in taken],
            }
        ratios = [a.step_seconds() / b.step_seconds() for a, b in zip(mine, others, strict=True)]
        found[f"step ratio, {micro}"] = {"median": statistics.median(ratios), "all": ratios}
    print(table(lines, header=("", "step, ms", "outside, ms", "share")))
    print({name: value["median"] for name, value in found.items() if name.startswith("step ratio")})
    parameters = sum(p.numel() for p in model_of(width).parameters())
    result = {"width": width, "parameters": parameters, "steps": wanted.steps, "rows_per_step": ROWS, "found": found}
    report("bench_loop", result, path=RESULTS / "loop.json" if wanted.write else None)


def check_equal(ours: list[float], theirs: list[float]) -> None:
    """Raise where the losses of the two differ: HF logs the mean of ten steps' losses."""
    for number, value in enumerate(theirs):
        mean = statistics.fmean(ours[number * 10 : number * 10 + 10])
        if abs(mean - value) > 5e-3 * abs(value):
            raise SystemExit(f"the losses differ: steps {number * 10} to {number * 10 + 10} give {mean} and {value}")


if __name__ == "__main__":
    main()
