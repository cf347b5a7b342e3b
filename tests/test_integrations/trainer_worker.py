"""One of two processes of a Trainer, started by torchrun: `torchrun ... trainer_worker.py FOLDER`."""

import sys
from pathlib import Path

import torch
from trainers import arguments, in_double, texts
from transformers import Trainer

from llmtune.data.collate import collate_padded
from llmtune.integrations import trainer_loss, with_loss
from llmtune.losses import causal_lm_loss
from llmtune.regularizers import L2SP, FreeLBLoss
from llmtune.testing.models import tiny_gpt2, tiny_llama

CLIMB = FreeLBLoss(epsilon=0.5, step_size=0.2, start=0.0)


def holes():
    rows = texts()
    for index in (2, 5):  # the last micro-batch of one process, the first of the other
        rows[index] = {**rows[index], "labels": [-100] * len(rows[index]["labels"])}
    return rows


def l2sp(model):
    return [L2SP({name: parameter.detach() + 0.3 for name, parameter in model.named_parameters()}, 0.1)]


CASES = {  # (loss, model, rows, with a penalty)
    "mean": (causal_lm_loss, tiny_gpt2, texts, False),
    "several passes": (CLIMB, tiny_llama, texts, False),
    "holes": (causal_lm_loss, tiny_llama, holes, False),
    "penalty": (causal_lm_loss, tiny_llama, texts, True),
    "of logits": (causal_lm_loss, tiny_llama, texts, False),
}


def run(name, accumulation, folder, world=1):
    """Return (weights, what was logged, the evaluation's loss) after three steps of four rows."""
    loss, make, rows, penalised = CASES[name]
    model, kind, function = in_double(make()), Trainer, None
    if name == "of logits":
        function = trainer_loss(loss, model)
    else:
        kind = with_loss(Trainer, loss, penalties=l2sp(model) if penalised else ())
    options = {"per_device_train_batch_size": 4 // accumulation // world, "per_device_eval_batch_size": 3}
    trainer = kind(
        model, arguments(folder, accumulation, **options), train_dataset=rows(), eval_dataset=rows(),
        data_collator=collate_padded, compute_loss_func=function,
    )  # fmt: skip
    trainer.train()
    logged = [{k: v for k, v in row.items() if k != "grad_norm"} for row in trainer.state.log_history if "loss" in row]
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    return weights, logged, trainer.evaluate()["eval_loss"]


def refused(folder):
    """Return the sentences of a step in which one process has no target, and of an option without effect."""
    rows = [row if index % 2 else {**row, "labels": [-100] * len(row["labels"])} for index, row in enumerate(texts())]
    sentences = []
    for data, options in ((rows, {}), (texts(), {"average_tokens_across_devices": False})):
        try:
            settings = arguments(folder, 2, per_device_train_batch_size=1, **options)
            kind = with_loss(Trainer, causal_lm_loss)
            kind(tiny_llama(), settings, train_dataset=data, data_collator=collate_padded).train()
        except ValueError as error:
            sentences.append(str(error))
    return sentences


def main():
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    made = {(name, n): run(name, n, folder / "run", 2) for name in CASES for n in (1, 2)}
    made["refused"] = refused(folder / "run")
    torch.save(made, folder / f"{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
