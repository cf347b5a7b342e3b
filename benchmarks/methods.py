"""Which method of adapting for which model: parameters, bytes, time and measured quality, on one real task each.

    python benchmarks/methods.py --models MODELS --data DATA [--tasks encoder decoder pair] [--methods lora ia3 ...]
        [--parts quality time] [--seeds 0 1 2] [--runs runs/methods] [--pairs 5] [--threads 2] [--write]

encoder: TREC's questions, six classes, on MiniLM-L6 with a new classifier; accuracy on 250 test questions.
decoder: Alpaca's rows on SmolLM2-135M-Instruct; loss per token on rows held out.
pair:    English words, spelled by a transliteration model that has only ever read Arabic; share spelled right.

Every method runs at the learning rates of `method_table.py`, half a decade apart; the rate is chosen by rows held
out for that, on the first seed, and the figure is that of the test rows. One JSON file a run in `--runs`; a run that is
there is not repeated. `--write` puts the summary into results/methods.json.

time: an optimizer step of the method and one of LoRA, in turns, on the same rows; the median of the ratios.

`--models` holds folders minilm-l6-v2 (huggingface.co/sentence-transformers/all-MiniLM-L6-v2), smollm2-135m-instruct
(huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct) and aren-transliteration (the model of CTranslate2's tests).
`--data` holds trec6 (Li and Roth's questions), alpaca_en_demo (Stanford Alpaca's rows) and multi30k (its English
captions), as JSONL files.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, report, table
from method_table import METHODS, Method
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification, AutoTokenizer

from llmtune.adapters import attach, save
from llmtune.data import chat_examples, collate_padded
from llmtune.losses import causal_lm_loss, classification_loss, sequence_to_sequence_loss
from llmtune.optim import parameter_groups
from llmtune.training import LoopSettings, TrainingLoop
from llmtune.types import LossFunction

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Task:
    """One real task: how to make the model, its rows, what counts, and which way is better."""

    make: Callable[[], nn.Module]
    train: Rows
    choose: Rows
    test: Rows
    score: Callable[[nn.Module, Rows], float]
    better: Callable[[float, float], bool]
    loss: LossFunction
    steps: int
    rows_per_step: int


def lines(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def encoder(models: Path, data: Path) -> Task:
    """TREC on MiniLM."""
    folder = models / "minilm-l6-v2"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, test = lines(data / "trec6/train.jsonl"), lines(data / "trec6/test.jsonl")
    names = sorted({row["label"] for row in train})
    random.Random(0).shuffle(train)

    def rows(some: Rows) -> Rows:
        return [
            {"input_ids": tokenizer(row["text"], truncation=True, max_length=64)["input_ids"],
             "labels": names.index(row["label"])}
            for row in some
        ]  # fmt: skip

    def make() -> nn.Module:
        torch.manual_seed(0)
        return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(names))

    return Task(
        make, rows(train[:480]), rows(train[480:730]), rows(test[:250]), accuracy, float.__gt__, classification_loss,
        90, 16,
    )  # fmt: skip


@torch.no_grad()
def accuracy(model: nn.Module, rows: Rows) -> float:
    """Return the share of rows whose class is found."""
    model.eval()
    right = 0
    for start in range(0, len(rows), 50):
        batch = collate_padded(rows[start : start + 50])
        labels = batch.pop("labels")
        right += int((model(**batch).logits.argmax(-1) == labels).sum())
    return right / len(rows)


def decoder(models: Path, data: Path) -> Task:
    """Alpaca on SmolLM2."""
    folder = models / "smollm2-135m-instruct"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    conversations = [
        [{"role": "user", "content": f"{row['instruction']}\n{row.get('input') or ''}".strip()},
         {"role": "assistant", "content": row["output"]}]
        for row in lines(data / "alpaca_en_demo/train.jsonl")
        if row["output"].strip()
    ]  # fmt: skip
    rows = [row for row in chat_examples(tokenizer, conversations) if len(row["input_ids"]) <= 128][:374]

    def make() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    return Task(
        make, rows[:120], rows[280:300], rows[320:360], causal_loss, float.__lt__, causal_lm_loss, 30, 4
    )  # fmt: skip


@torch.no_grad()
def causal_loss(model: nn.Module, rows: Rows) -> float:
    """Return the mean loss over all labelled tokens of the rows."""
    model.eval()
    total, count = 0.0, 0
    for start in range(0, len(rows), 8):
        batch = collate_padded(rows[start : start + 8])
        found = causal_lm_loss.count_targets(batch)
        total, count = total + float(causal_lm_loss(model, batch)) * found, count + found
    return total / count


def pair(models: Path, data: Path) -> Task:
    """English words, letters in and letters out, on a model that reads Arabic."""
    folder = models / "aren-transliteration"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    captions = " ".join(row["en"] for row in lines(data / "multi30k/train.jsonl")).lower()
    letters = "".join(c if c.isascii() and c.isalpha() else " " for c in captions)
    words = sorted({word for word in letters.split() if 3 <= len(word) <= 9})
    random.Random(0).shuffle(words)
    rows = []
    for word in words[:1700]:
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        rows.append({"input_ids": ids, "labels": [*ids, tokenizer.eos_token_id]})

    def make() -> nn.Module:
        return AutoModelForSeq2SeqLM.from_pretrained(folder)

    return Task(
        make, rows[:1200], rows[1200:1450], rows[1450:1700], spelled, float.__gt__, sequence_to_sequence_loss, 400, 32
    )  # fmt: skip


@torch.no_grad()
def spelled(model: nn.Module, rows: Rows) -> float:
    """Return the share of words that come out whole, decoded greedily."""
    model.eval()
    right = 0
    for start in range(0, len(rows), 125):
        some = rows[start : start + 125]
        batch = collate_padded(some)
        out = model.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=12, num_beams=1,
            do_sample=False,
        )  # fmt: skip
        for row, ids in zip(some, out.tolist(), strict=True):
            right += ids[1 : len(row["labels"]) + 1] == list(row["labels"])
    return right / len(rows)


TASKS: dict[str, Callable[[Path, Path], Task]] = {"encoder": encoder, "decoder": decoder, "pair": pair}


class Loop(TrainingLoop):
    """The loop, with B at a rate of its own where the method is LoRA+."""

    lora_plus_ratio: float | None = None

    def configure_optimizer(self) -> tuple[torch.optim.Optimizer, Any]:
        """Return AdamW and the loop's schedule."""
        if self.lora_plus_ratio is None:
            return super().configure_optimizer()
        from transformers import get_scheduler

        rate = self.settings.learning_rate
        groups = parameter_groups(self.model, learning_rate=rate, lora_plus_ratio=self.lora_plus_ratio)
        optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
        return optimizer, get_scheduler("linear", optimizer, 0, self.total_steps)


def loop_of(task: Task, method: Method, place: str, rate: float, seed: int) -> tuple[Loop, bool]:
    """Return a loop over a new model with the method on it, and whether there is an adapter."""
    model = task.make()
    torch.manual_seed(seed)
    record = method.record(place, task.steps)
    if record is not None:
        attach(model, record)
    settings = LoopSettings(
        max_steps=task.steps, rows_per_step=task.rows_per_step, learning_rate=rate, seed=seed, progress=False,
        warmup_steps=task.steps // 10,
    )  # fmt: skip
    callbacks, penalties = method.extras(record)
    loop = Loop(
        model, task.train, settings=settings, collate=collate_padded, loss=task.loss, callbacks=callbacks,
        penalties=penalties,
    )  # fmt: skip
    loop.lora_plus_ratio = method.lora_plus_ratio
    return loop, record is not None


def run(task: Task, method: Method, place: str, rate: float, seed: int) -> dict[str, Any]:
    """Train once and return what came of it."""
    bare = task.make()
    total, start = sum(parameter.numel() for parameter in bare.parameters()), task.score(bare, task.test)
    del bare
    loop, adapted = loop_of(task, method, place, rate, seed)
    model, size = loop.model, None
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    loop.fit()
    if adapted:
        with tempfile.TemporaryDirectory() as folder:
            size = (save(model, folder) / "adapter_model.safetensors").stat().st_size
    return {
        "rate": rate, "seed": seed, "start": start, "chosen_by": task.score(model, task.choose),
        "test": task.score(model, task.test), "trained": trained, "total": total, "file_bytes": size,
    }  # fmt: skip


def step_time(task: Task, place: str, name: str, options: argparse.Namespace) -> float:
    """Return how long a step of the method takes, in steps of LoRA: the median over pairs, measured in turns."""
    path = options.runs / f"time-{place}-{name}.json"
    if not path.is_file():
        loops = [loop_of(task, METHODS[method], place, 1e-4, 0)[0] for method in (name, "lora")]
        seconds: list[list[float]] = [[], []]
        for pair in range(options.pairs + 1):
            for which in (0, 1) if pair % 2 else (1, 0):
                batches = loops[which].micro_batches(pair)
                began = time.perf_counter()
                loops[which].training_step(batches)
                seconds[which].append(time.perf_counter() - began)
        path.write_text(json.dumps([seconds[0][1:], seconds[1][1:]]), encoding="utf-8")  # the first is for warming up
    own, of_lora = json.loads(path.read_text(encoding="utf-8"))
    return statistics.median(a / b for a, b in zip(own, of_lora, strict=True))


def main() -> int:
    """Run what is missing and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=list(METHODS))
    parser.add_argument("--parts", nargs="+", choices=("quality", "time"), default=["quality", "time"])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.runs.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for place in options.tasks:
        task = TASKS[place](options.models, options.data)
        results[place] = {}
        for name in options.methods:
            found = best_of(task, METHODS[name], place, name, options)
            if found is not None:
                if "time" in options.parts:
                    found["time"] = step_time(task, place, name, options)
                results[place][name] = found
        print(place)
        print(summary(results[place]))
    report("methods", results, path=RESULTS / "methods.json" if options.write else None)
    return 0


def best_of(task: Task, method: Method, place: str, name: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """Return a method's runs at its best rate: every rate on the first seed, the other seeds at the best of them."""
    if not method.rates[place]:
        return None

    def once(rate: float, seed: int) -> dict[str, Any]:
        path = options.runs / f"{place}-{name}-{rate:g}-{seed}.json"
        if not path.is_file():
            path.write_text(json.dumps(run(task, method, place, rate, seed)), encoding="utf-8")
            print(path.stem, path.read_text(encoding="utf-8"), file=sys.stderr, flush=True)
        read: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return read

    tried = [once(rate, options.seeds[0]) for rate in method.rates[place]]
    best = tried[0]
    for other in tried[1:]:
        best = other if task.better(other["chosen_by"], best["chosen_by"]) else best
    runs = [best, *(once(best["rate"], seed) for seed in options.seeds[1:])]
    return {
        "rate": best["rate"], "tests": [one["test"] for one in runs], "start": best["start"],
        "trained": best["trained"], "total": best["total"], "file_bytes": best["file_bytes"],
    }  # fmt: skip


def summary(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of one task."""
    rows = []
    for name, one in found.items():
        spread = f" ({min(one['tests']):.3f} to {max(one['tests']):.3f})" if len(one["tests"]) > 1 else ""
        size = "" if one["file_bytes"] is None else f"{one['file_bytes'] / 1024:,.0f}"
        rows.append([
            name, f"{one['trained']:,}", f"{100 * one['trained'] / one['total']:.2f}", size,
            f"{one['time']:.2f}" if "time" in one else "", f"{one['rate']:g}",
            f"{statistics.mean(one['tests']):.3f}{spread}",
        ])  # fmt: skip
    start = next(iter(found.values()))["start"] if found else float("nan")
    header = ("method", "trained", "% of all", "file, KiB", "time of LoRA's", "rate", f"test (start {start:.3f})")
    return table(rows, header=header)


if __name__ == "__main__":
    sys.exit(main())
