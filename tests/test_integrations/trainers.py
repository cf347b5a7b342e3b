"""What the tests of the Trainer share: rows, a quiet Trainer that takes them in order, and an independent reference."""

from __future__ import annotations

import copy

import torch
from transformers import TrainingArguments

from llmtune import forgetting, losses, regularizers
from llmtune.adapters import LoRA, attach
from llmtune.data import collate_preferences
from llmtune.data.collate import collate_padded
from llmtune.data.mixing import MixedBatches
from llmtune.losses import CausalLMLoss, ClassificationLoss, MaskedLMLoss, SequenceToSequenceLoss
from llmtune.testing.models import VOCABULARY, tiny_bert, tiny_gpt2, tiny_llama, tiny_t5

RATE = 0.05
ROWS = 12


def texts(*, first=True):
    """Rows of 4 to 15 tokens with ever more labels, so that each micro-batch has another number of targets."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(ROWS):
        ids = torch.randint(3, VOCABULARY, (4 + (7 * index) % 12,), generator=generator)
        labels = torch.where(torch.rand(len(ids), generator=generator) < 0.2 + 0.06 * index, ids, -100)
        labels[-1], labels[0] = ids[-1], ids[0] if first else -100
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return rows


def classes():
    return [{**row, "labels": -100 if index in (1, 5) else index % 3} for index, row in enumerate(texts())]


def translations():
    return [{**row, "labels": row["input_ids"][: 2 + (5 * index) % 7]} for index, row in enumerate(texts())]


def of_decoder(rows):
    """As `DataCollatorForSeq2Seq` with a model does: T5's decoder begins with token 0."""
    batch = collate_padded(rows)
    shifted = batch["labels"].roll(1, 1).masked_fill(batch["labels"].roll(1, 1) == -100, 0)
    shifted[:, 0] = 0
    return {**batch, "decoder_input_ids": shifted}


def arguments(folder, accumulation=1, **options):
    given = {
        "output_dir": str(folder), "per_device_train_batch_size": 4 // accumulation, "learning_rate": RATE,
        "gradient_accumulation_steps": accumulation, "max_steps": 3, "optim": "sgd", "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "train_sampling_strategy": "sequential", "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "remove_unused_columns": False,
        "per_device_eval_batch_size": 5,
    }  # fmt: skip
    return TrainingArguments(**{**given, **options})


def trained(kind, model, rows, folder, accumulation=1, *, collate=collate_padded, compute_loss_func=None, **options):
    """Return a Trainer of the kind after its steps, four rows each, in order."""
    trainer = kind(
        model, arguments(folder, accumulation, **options), train_dataset=rows, data_collator=collate,
        compute_loss_func=compute_loss_func,
    )  # fmt: skip
    trainer.train()
    return trainer


def in_double(model):
    return copy.deepcopy(model).double()


def reference(model, rows, *, shift, smoothing=0.0, z=0.0, steps=3):
    """Return the model after steps of plain gradient descent, row by row: the sum over targets by their number."""
    model = copy.deepcopy(model).train()
    for step in range(steps):
        total, count = 0.0, 0
        for row in rows[4 * step : 4 * step + 4]:
            batch = of_decoder([row]) if model.config.is_encoder_decoder else collate_padded([row])
            labels = batch.pop("labels")
            logits = model(**batch).logits
            if shift:
                logits, labels = logits[:, :-1], labels[:, 1:]
            for scores, label in zip(logits.reshape(-1, logits.shape[-1]), labels.flatten().tolist(), strict=True):
                if label != -100:
                    log_p = scores - scores.exp().sum().log()
                    total = total - (1 - smoothing) * log_p[label] - smoothing * log_p.mean()
                    total = total + z * scores.exp().sum().log() ** 2
                    count += 1
        model.zero_grad()
        (total / count).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
    return model


def off(one, other):
    """Return how far two models' weights are apart, as a share of the second's norm."""
    ours, theirs = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (one, other))
    return float((ours - theirs).norm() / theirs.norm())


MODELS = {
    "llama": (tiny_llama, texts, collate_padded),
    "gpt2": (tiny_gpt2, texts, collate_padded),
    "bert": (tiny_bert, texts, collate_padded),
    "classifier": (lambda: tiny_bert(labels=3), classes, collate_padded),
    "t5": (tiny_t5, translations, of_decoder),
}
LOSSES = {
    "llama": (CausalLMLoss(label_smoothing=0.3, z_loss=0.01), {"shift": True, "smoothing": 0.3, "z": 0.01}),
    "gpt2": (CausalLMLoss(label_smoothing=0.3), {"shift": True, "smoothing": 0.3}),
    "bert": (MaskedLMLoss(label_smoothing=0.3, z_loss=0.01), {"shift": False, "smoothing": 0.3, "z": 0.01}),
    "classifier": (ClassificationLoss(label_smoothing=0.3), {"shift": False, "smoothing": 0.3}),
    "t5": (SequenceToSequenceLoss(label_smoothing=0.3), {"shift": False, "smoothing": 0.3}),
}


def pairs():
    rows = []
    for row in texts():
        ids = row["input_ids"]
        rows.append({"prompt": ids[:2], "chosen": ids[2:], "rejected": ids[3:][::-1], "reference_chosen": -9.0,
                     "reference_rejected": -8.0})  # fmt: skip
    return rows


def with_lora(make):
    model = make()
    attach(model, LoRA(rank=2, alpha=4))
    return model


def drops():
    return tiny_gpt2(dropout=0.1)


def kept_texts():
    """Rows in turns without and with a teacher's predictions."""
    rows = texts()
    kept = forgetting.with_teacher(rows[6:], tiny_llama(1), k=5)
    mixed = MixedBatches(rows[:6], kept, 0.5, unit=lambda row: 1)
    return [mixed[at] for pair in range(6) for at in (pair, pair + 6)]


TEXT, CLASS, SEQ = MODELS["llama"][1:], MODELS["classifier"][1:], (MODELS["t5"][1], collate_padded)
NUDGE = {"epsilon": 0.5, "step_size": 0.2}
# every exported class of losses: (a loss, a model, rows, collate)
EXPORTED = {
    "CausalLMLoss": (CausalLMLoss(z_loss=0.1), tiny_llama, *TEXT),
    "ClassificationLoss": (ClassificationLoss(), MODELS["classifier"][0], *CLASS),
    "ConfidencePenaltyLoss": (losses.ConfidencePenaltyLoss(strength=0.1), tiny_llama, *TEXT),
    "DERLoss": (forgetting.DERLoss(alpha=0.5, beta=0.5), tiny_llama, kept_texts, collate_padded),
    "DPOLoss": (losses.DPOLoss(), tiny_llama, pairs, collate_preferences),
    "DistillFromCache": (forgetting.DistillFromCache(strength=1.0), tiny_llama, kept_texts, collate_padded),
    "DistillToBase": (forgetting.DistillToBase(strength=1.0), lambda: with_lora(tiny_llama), *TEXT),
    "DistillToModel": (forgetting.DistillToModel(tiny_llama(1), strength=1.0), tiny_llama, *TEXT),
    "FeatureDistillationLoss": (losses.FeatureDistillationLoss(tiny_llama(1), strength=1.0), tiny_llama, *TEXT),
    "FocalLoss": (losses.FocalLoss(), MODELS["classifier"][0], *CLASS),
    "OwnClassesLoss": (losses.OwnClassesLoss((0, 1)), MODELS["classifier"][0], *CLASS),
    "FreeLBLoss": (regularizers.FreeLBLoss(**NUDGE), tiny_llama, *TEXT),
    "MaskedLMLoss": (MaskedLMLoss(), tiny_bert, *TEXT),
    "MixupLoss": (regularizers.MixupLoss(alpha=0.4), MODELS["classifier"][0], *CLASS),
    "PrototypicalLoss": (losses.PrototypicalLoss(), MODELS["classifier"][0], *CLASS),
    "RDropLoss": (regularizers.RDropLoss(alpha=1.0), drops, *TEXT),
    "SequenceToSequenceLoss": (SequenceToSequenceLoss(), tiny_t5, *SEQ),
    "SmartLoss": (regularizers.SmartLoss(strength=1.0, epsilon=0.1), tiny_llama, *TEXT),
    "SupervisedContrastiveLoss": (losses.SupervisedContrastiveLoss(weight=0.5), MODELS["classifier"][0], *CLASS),
}
