"""The recipes that `overfitting.py` compares: each a few settings, all made of the library's parts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import torch
from overfitting_data import Classifier, Data, encoder, features
from torch import nn
from transformers import AutoModelForSequenceClassification, get_scheduler

from llmtune.adapters import LoRA, attach
from llmtune.data import collate_padded
from llmtune.losses import ClassificationLoss, SupervisedContrastiveLoss
from llmtune.optim import parameter_groups
from llmtune.regularizers import (
    L2SP,
    ChildTuning,
    DecoupledL2SP,
    Flooding,
    FreeLBLoss,
    MixupLoss,
    RDropLoss,
    SmartLoss,
    linear_probe,
    mixout_model,
    nearest_mean_head,
    neftune,
    noisy_start,
    stochastic_depth,
    token_noise,
)
from llmtune.training import AverageWeights, LoopSettings, SharpnessAware, TrainingLoop
from llmtune.types import Batch, Callback, LossFunction

STEPS = {"trec6": 120, "tweeteval_emotion": 120, "banking77": 240, "clinc150": 300}
ROWS = {"trec6": 16, "tweeteval_emotion": 16, "banking77": 32, "clinc150": 32}
VOCABULARY, SPECIAL = 30522, tuple(range(999))  # BERT's first 999 tokens are special or unused


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way of training. A field at its default is a part that is left out."""

    rate: float = 3e-4
    pooler: bool = False  # AutoModelForSequenceClassification as it comes: first token, its pooler
    head: str = "random"  # or "means", "probe": where the head starts
    frozen: bool = False  # train nothing: the head as it starts
    refit: bool = False  # after training, put a probe of the trained encoder in the head's place
    together: int = 0  # so many rows of a class beside each other in every step; 0: rows as they come
    head_rate: float | None = None
    layer_decay: float | None = None
    weight_decay: float = 0.01
    steps: float = 1.0  # in the data set's
    smoothing: float = 0.0
    r_drop: float = 0.0
    contrast: float = 0.0
    temperature: float = 0.3
    mixup: float = 0.0
    smart: float = 0.0
    freelb: float = 0.0
    flood: float = 0.0
    average: float = 0.0  # from this share of the steps on
    l2sp: float = 0.0
    l2sp_penalty: float = 0.0
    child: float = 0.0
    mixout: float = 0.0
    neftune: float = 0.0
    depth: float = 0.0
    tokens: float = 0.0
    noisy_start: float = 0.0
    sharpness: float = 0.0
    lora: int = 0

    def loss(self) -> LossFunction:
        """Return what the loop learns by."""
        plain = ClassificationLoss(label_smoothing=self.smoothing)
        if self.r_drop:
            return RDropLoss(plain, alpha=self.r_drop)
        if self.contrast:
            return SupervisedContrastiveLoss(weight=self.contrast, temperature=self.temperature)
        if self.mixup:
            return MixupLoss(alpha=self.mixup)
        if self.smart:
            return SmartLoss(plain, strength=self.smart, epsilon=1e-2)
        if self.freelb:
            return FreeLBLoss(plain, epsilon=self.freelb, step_size=self.freelb / 2, steps=2)
        return plain

    def callbacks(self, model: nn.Module, steps: int) -> list[Callback]:
        """Return what acts between the loop's parts."""
        found: list[Callback] = []
        if self.flood:
            found.append(Flooding(self.flood))
        if self.l2sp:
            anchor = {n: p.detach() for n, p in model.named_parameters() if not n.startswith("classifier")}
            found.append(DecoupledL2SP(anchor, self.l2sp))
        if self.child:
            found.append(ChildTuning(self.child))
        if self.average:
            found.append(AverageWeights(None, start=round(self.average * steps)))
        return found

    @contextmanager
    def around(self, model: nn.Module) -> Iterator[None]:
        """Run the training inside of what changes the model for its length."""
        with ExitStack() as stack:
            if self.mixout:
                stack.enter_context(mixout_model(model, self.mixout))
            if self.neftune:
                stack.enter_context(neftune(model, self.neftune))
            if self.depth:
                stack.enter_context(stochastic_depth(model, self.depth))
            yield


class Loop(TrainingLoop):
    """The loop with rates by depth and for the head, and noise on tokens where the recipe has it."""

    recipe: Recipe

    def configure_optimizer(self) -> tuple[torch.optim.Optimizer, Any]:
        """Return AdamW over the recipe's groups, and warm-up with linear decay."""
        groups = parameter_groups(
            self.model, learning_rate=self.recipe.rate, weight_decay=self.recipe.weight_decay,
            layer_decay=self.recipe.layer_decay, head_rate=self.recipe.head_rate,
        )  # fmt: skip
        optimizer = torch.optim.AdamW(groups, fused=True)
        return optimizer, get_scheduler("linear", optimizer, self.settings.warmup_steps, self.total_steps)

    def row_indices(self, step: int) -> list[int]:
        """Return the rows of a step: as they come, or some of each of a few classes."""
        if not self.recipe.together:
            return super().row_indices(step)
        draw, rows = Random(f"{self.settings.seed} {step}"), self.settings.rows_per_step
        places: dict[int, list[int]] = {}
        for place, row in enumerate(self.train_data):
            places.setdefault(row["labels"], []).append(place)
        taken: list[int] = []
        while len(taken) < rows:  # fewer classes than the step has room for come more than once
            for label in draw.sample(sorted(places), min(len(places), -(-rows // self.recipe.together))):
                taken += draw.sample(places[label], min(self.recipe.together, len(places[label])))
        return taken[:rows]

    def prepare_batch(self, batch: Batch) -> Batch:
        """Return the batch, with some tokens replaced."""
        batch = super().prepare_batch(batch)
        if self.recipe.tokens:
            ids, mask = batch["input_ids"], batch["attention_mask"]
            noisy = token_noise(ids, mask, self.recipe.tokens, vocabulary=VOCABULARY, special_tokens=SPECIAL)
            batch = {**batch, "input_ids": noisy}
        return batch


class SharpnessAwareLoop(SharpnessAware, Loop):
    """The same by SAM."""


def make_model(models: Path, recipe: Recipe, data: Data, seed: int, device: str) -> nn.Module:
    """Return the model on its device, with its head as the recipe starts it."""
    torch.manual_seed(seed)
    if recipe.pooler:
        bare: nn.Module = AutoModelForSequenceClassification.from_pretrained(
            models / "minilm-l6-v2", num_labels=data.classes, dtype=torch.float32
        )
        return bare.to(device)
    model = Classifier(encoder(models), data.classes).to(device)
    if recipe.head != "random":
        vectors, labels = features(model.encoder, data.train)
        if recipe.head == "means":
            weight, bias = nearest_mean_head(vectors, labels, distance="cosine", temperature=0.05)
        else:
            weight, bias = linear_probe(vectors, labels)
        model.classifier.load_state_dict({"weight": weight, "bias": bias})
    return model


def train(models: Path, name: str, recipe: Recipe, data: Data, seed: int, device: str = "cpu") -> nn.Module:
    """Return the model, trained; in bfloat16 autocast on a CPU, in float32 on a GPU."""
    model = make_model(models, recipe, data, seed, device)
    if recipe.frozen:
        return model
    if recipe.lora:
        attach(model, LoRA(rank=recipe.lora, alpha=2 * recipe.lora, train_modules=["classifier"]))
    if recipe.noisy_start:
        noisy_start(model.encoder, recipe.noisy_start)
    steps = round(STEPS[name] * recipe.steps)
    coupled = recipe.contrast or recipe.mixup  # rows that are compared or mixed must be in one micro-batch
    settings = LoopSettings(
        max_steps=steps, rows_per_step=ROWS[name],
        rows_per_micro_batch=ROWS[name] if coupled or device != "cpu" else 16,
        learning_rate=recipe.rate, warmup_steps=steps // 10, precision="bf16" if device == "cpu" else "float32",
        seed=seed, progress=False,
    )  # fmt: skip
    kind = SharpnessAwareLoop if recipe.sharpness else Loop
    penalties = [L2SP(model, recipe.l2sp_penalty)] if recipe.l2sp_penalty else []
    loop = kind(
        model, data.train, settings=settings, collate=collate_padded, loss=recipe.loss(), penalties=penalties,
        callbacks=recipe.callbacks(model, steps),
    )  # fmt: skip
    loop.recipe = recipe
    if recipe.sharpness:
        loop.rho = recipe.sharpness
    with recipe.around(model):
        loop.fit()
    if recipe.refit:
        weight, bias = linear_probe(*features(model.encoder, data.train))
        model.classifier.load_state_dict({"weight": weight, "bias": bias})
    return model


PARTS: dict[str, Recipe] = {  # each by itself on plain fine-tuning
    "nothing": Recipe(),  # plain once more, with other dropout masks where it ran on another device: how far noise goes
    "label smoothing": Recipe(smoothing=0.1),
    "R-Drop": Recipe(r_drop=1.0),
    "contrast": Recipe(contrast=0.5),
    "contrast, strong": Recipe(contrast=0.9, temperature=0.1),
    "mixup": Recipe(mixup=0.4),
    "SMART": Recipe(smart=1.0),
    "FreeLB": Recipe(freelb=0.5),
    "SAM": Recipe(sharpness=0.05),
    "flooding": Recipe(flood=0.05),
    "mean of last weights": Recipe(average=0.5),
    "L2-SP, decoupled": Recipe(l2sp=10.0),
    "Child-Tuning": Recipe(child=0.3),
    "mixout": Recipe(mixout=0.5),
    "NEFTune": Recipe(neftune=5.0),
    "stochastic depth": Recipe(depth=0.1),
    "token noise": Recipe(tokens=0.1),
    "noisy start": Recipe(noisy_start=0.15),
    "layer decay": Recipe(layer_decay=0.8),
    "head at its own rate": Recipe(head_rate=1e-3),
    "head from class means": Recipe(head="means"),
    "head from a probe": Recipe(head="probe"),
    "LoRA": Recipe(lora=8),
}
RECIPES: dict[str, Recipe] = {
    "plain": Recipe(),
    "plain, own pooler": Recipe(pooler=True),
    "probe alone": Recipe(head="probe", frozen=True),
    "class means alone": Recipe(head="means", frozen=True),
    "recipe": Recipe(),
    **PARTS,
}
CHOICE = Path(__file__).parent / "results" / "overfitting-choice.json"


def recipe_for(title: str, name: str) -> Recipe:
    """Return the recipe for a data set, with what `overfitting_choose.py` found on rows held out for that."""
    chosen: dict[str, Any] = json.loads(CHOICE.read_text(encoding="utf-8"))["chosen"]
    rates = chosen["rates"][name]
    recipe = replace(RECIPES[title], rate=rates.get(title, rates["plain"]))
    if title == "LoRA":
        recipe = replace(recipe, rate=10 * recipe.rate)
    return replace(recipe, **chosen["parts"]) if title == "recipe" else recipe
