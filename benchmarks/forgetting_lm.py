"""What a language model loses by learning one thing: SmolLM2 on school mathematics, or on translating into German.

    python benchmarks/forgetting_lm.py --models MODELS --data DATA [--tasks gsm8k multi30k] [--methods full ...]
        [--seeds 0] [--minutes 60] [--jobs 2]
    python benchmarks/forgetting_lm.py ... --write

Each method at a few strengths or rates. A point is what was learned, by how much the loss of held-out answers fell
below the base's, in nats a token; and what was lost, on WikiText-2, of which no method has seen the test part: the rise
of the perplexity and KL(base || tuned) a token. Full fine-tuning is also scored on its way ("early stopping") and on
the line back to the base ("WiSE-FT").

One JSON file a run in results/forgetting-lm/; a run that is there is not repeated. `--models`: a folder that holds
smollm2-135m-instruct (huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct). `--data`: a folder of gsm8k
(github.com/openai/grade-school-math: train.jsonl, test.jsonl), multi30k (github.com/multi30k/dataset, English and
German: train.jsonl, test_2016_flickr.jsonl) and wikitext2 (valid.txt, test.txt of WikiText-2).
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, add_run_options, run_jobs
from forgetting_frontier import write_frontier
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from llmtune.adapters import LoRA, attach, interpolated
from llmtune.data import MixedBatches, chat_examples, collate_padded
from llmtune.forgetting import (
    EWC,
    DistillToBase,
    DistillToModel,
    anchor_of,
    diagonal_fisher,
    retention,
    self_synthesised,
)
from llmtune.losses import causal_lm_loss
from llmtune.modules import eval_mode
from llmtune.regularizers import L2SP
from llmtune.training import LoopSettings, TrainingLoop
from llmtune.types import Batch, Callback
from llmtune.weights import interpolate

FOLDER = RESULTS / "forgetting-lm"
STEPS, ROWS = 40, {"gsm8k": 4, "multi30k": 8}
HELD = {"gsm8k": 32, "multi30k": 96}  # held-out rows
PART, PARTS = 256, 10  # tokens of a piece of WikiText-2, and how many pieces are scored
SYNTHESISED, LENGTH = 160, 64  # rows that the model writes itself, and their tokens
STARTS = ((0,), (1,))  # the tokens that begin a document and a conversation: from them the model writes
STOPS = (10, 20)  # the steps at which full fine-tuning is looked at on its way
LINE = (0.25, 0.5, 0.75)  # the places on the line from base to tuned

Rows = list[dict[str, list[int]]]


@dataclasses.dataclass(frozen=True)
class Job:
    """Which run."""

    task: str
    method: str
    value: float  # the method's rate or strength
    seed: int

    @property
    def file(self) -> str:
        """The name of the run's file."""
        return f"{self.task}-{self.method}-{self.value:g}-{self.seed}.json".replace(" ", "_")


FULL, LORA = 3e-5, 5e-4  # the rates of the methods below that say nothing of it
METHODS: dict[str, tuple[float, ...]] = {
    "full": (1e-5, 3e-5, 1e-4),
    "LoRA": (2e-4, 1e-3),
    "L2-SP": (0.1, 1.0),
    "EWC": (1e2, 1e4),
    "distillation": (0.3, 1.0),
    "LoRA and distillation": (0.3, 1.0),
    "own texts": (0.2, 0.5),
    "WikiText replay": (0.2, 0.5),
}


def run(job: Job, models: Path, data: Path) -> dict[str, Any]:
    """Train, and return what was learned and what was lost at each place that was looked at."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    began = time.process_time()
    tokenizer = AutoTokenizer.from_pretrained(models / "smollm2-135m-instruct")
    torch.manual_seed(job.seed)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(models / "smollm2-135m-instruct", dtype=torch.float32)
    base = copy.deepcopy(model).requires_grad_(False).eval()
    train, held = task_rows(tokenizer, data, job.task)
    look = Look(
        base,
        [collate_padded(held[i : i + 8]) for i in range(0, len(held), 8)],
        [collate_padded(piece) for piece in text_rows(tokenizer, data / "wikitext2" / "test.txt")[:PARTS]],
    )
    options = arrange(job, model, base, train, lambda: text_rows(tokenizer, data / "wikitext2" / "valid.txt"))
    points: list[dict[str, Any]] = []
    if job.method == "full":
        options["callbacks"] = [Stops(lambda step: points.append(look(model, "early stopping", step)))]
    settings = LoopSettings(
        max_steps=STEPS, rows_per_step=ROWS[job.task], learning_rate=options.pop("rate"), warmup_steps=STEPS // 10,
        precision="bf16", seed=job.seed, progress=False,
    )  # fmt: skip
    TrainingLoop(model, options.pop("rows"), settings=settings, collate=collate_padded, **options).fit()
    points.append(look(model, job.method, job.value))
    if job.method == "full":
        ends = [{name: tensor.clone() for name, tensor in one.state_dict().items()} for one in (base, model)]
        for alpha in LINE:
            model.load_state_dict(interpolate(*ends, alpha))
            points.append(look(model, "WiSE-FT", alpha))
    if job.method == "LoRA":
        for alpha in LINE:
            with interpolated(model, alpha):
                points.append(look(model, "LoRA, scaled", alpha))
    return {**dataclasses.asdict(job), "base_loss": look.start, "seconds": round(time.process_time() - began, 1),
            "points": points}  # fmt: skip


def arrange(job: Job, model: nn.Module, base: nn.Module, train: Rows, text: Callable[[], list[Rows]]) -> dict[str, Any]:
    """Give the model what the method needs, and return what the loop takes: its rate, rows, loss and penalties."""
    adapter, value = job.method.startswith("LoRA"), job.value
    found: dict[str, Any] = {"rate": value if job.method in ("full", "LoRA") else LORA if adapter else FULL}
    found |= {"rows": train, "loss": causal_lm_loss, "penalties": ()}
    if adapter:
        attach(model, LoRA(rank=16, alpha=32, targets="all-linear"))
    if job.method == "L2-SP":
        found["penalties"] = (L2SP(model, value),)
    if job.method == "distillation":
        found["loss"] = DistillToModel(base, causal_lm_loss, strength=value)
    if job.method == "LoRA and distillation":
        found["loss"] = DistillToBase(causal_lm_loss, strength=value)
    if job.method in ("own texts", "EWC"):
        draw = torch.Generator().manual_seed(job.seed)
        written = self_synthesised(base, STARTS, SYNTHESISED, max_tokens=LENGTH, generator=draw)
        if job.method == "own texts":
            found["rows"] = MixedBatches(train, written, ratio=value, seed=job.seed)
        else:
            batches = [collate_padded(written[i : i + 4]) for i in range(0, 64, 4)]
            fisher = diagonal_fisher(model, batches, kind="empirical")
            found["penalties"] = (EWC(fisher, anchor_of(model), value),)
    if job.method == "WikiText replay":
        found["rows"] = MixedBatches(train, [row for piece in text() for row in piece], ratio=value, seed=job.seed)
    return found


class Stops(Callback):
    """Calls a function after some steps."""

    def __init__(self, then: Callable[[int], None]) -> None:
        self.then = then

    def on_step_end(self, loop: TrainingLoop, metrics: dict[str, Any]) -> None:
        """Look, where it is time."""
        if loop.step in STOPS:
            self.then(loop.step)


class Look:
    """Measures a model against the base: held-out answers of the task, and text that it was not trained on."""

    def __init__(self, base: nn.Module, held: list[Batch], text: list[Batch]) -> None:
        self.base, self.held, self.text = base, held, text
        self.start = self._loss(base)

    def __call__(self, model: nn.Module, name: str, value: float) -> dict[str, Any]:
        """Return a point, by its name and its strength."""
        kept = retention(model, self.text, base=self.base)  # in float32: rounding would hide small divergences
        wanted = ("perplexity", "base_perplexity", "kl_to_base", "greedy_agreement", "delta_norm")
        return {"name": name, "value": value, "loss": self._loss(model), **{key: kept[key] for key in wanted}}

    def _loss(self, model: nn.Module) -> float:
        total, count = 0.0, 0
        with eval_mode(model), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for batch in self.held:
                targets = causal_lm_loss.count_targets(batch)
                total += float(causal_lm_loss(model, batch)) * targets
                count += targets
        return total / count


def task_rows(tokenizer: Any, data: Path, task: str) -> tuple[Rows, Rows]:
    """Return the training and the held-out rows of a task, as conversations of one turn."""
    ask, answer, test = {
        "gsm8k": ("question", "answer", "test"),
        "multi30k": ("en", "de", "test_2016_flickr"),
    }[task]
    order = "Translate into German: " if task == "multi30k" else ""
    count = {"train": STEPS * ROWS[task], test: HELD[task]}
    found = []
    for part in ("train", test):
        lines = (data / task / f"{part}.jsonl").read_text(encoding="utf-8").splitlines()[: count[part]]
        talks = [[{"role": "user", "content": order + row[ask]}, {"role": "assistant", "content": row[answer]}]
                 for row in map(json.loads, lines)]  # fmt: skip
        found.append(chat_examples(tokenizer, talks))
    return found[0], found[1]


def text_rows(tokenizer: Any, path: Path) -> list[Rows]:
    """Return a text cut into pieces of PART tokens, one row each."""
    ids = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    pieces = [ids[i : i + PART] for i in range(0, len(ids) - PART, PART)]
    return [[{"input_ids": piece, "labels": piece}] for piece in pieces]


def jobs(options: argparse.Namespace) -> Iterable[Job]:
    """Yield the runs that are asked for and not there."""
    for seed in options.seeds:
        for task in options.tasks:
            for method in options.methods:
                for value in METHODS[method]:
                    if not (FOLDER / (job := Job(task, method, value, seed)).file).is_file():
                        yield job


def keep(job: Job, found: Mapping[str, Any]) -> None:
    """Write a run's file."""
    (FOLDER / job.file).write_text(json.dumps(found) + "\n", encoding="utf-8")
    own = next(point for point in found["points"] if point["name"] == job.method)
    print(
        job.file, round(found["base_loss"] - own["loss"], 3), round(own["kl_to_base"], 4), found["seconds"], flush=True
    )


def main() -> int:
    """Run what is missing; print a line a run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add_run_options(parser)
    parser.add_argument("--tasks", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    if options.write:
        write_frontier(FOLDER, options.tasks)
        return 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    one = partial(run, models=options.models, data=options.data)
    run_jobs(jobs(options), one, keep, minutes=options.minutes, processes=options.jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
