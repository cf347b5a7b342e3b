"""Models, switches and callbacks under two processes, data-parallel and sharded: as under one."""

import json

import pytest
import torch
from ranks_cases import ROWS, off, weights
from ranks_worker import run
from torch import nn

from llmtune.adapters import LoRA, NewTokens, attach, load, save
from llmtune.data.collate import collate_packed, collate_padded
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.classification import classification_loss
from llmtune.losses.masked_lm import masked_lm_loss
from llmtune.losses.sequence_to_sequence import sequence_to_sequence_loss
from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.training.best import KeepBest
from llmtune.training.early_stopping import EarlyStopping
from llmtune.training.loop import TrainingLoop
from llmtune.training.samples import GenerateSamples
from llmtune.training.settings import LoopSettings
from llmtune.training.sharding import shard


def adapted(model, config):
    torch.manual_seed(0)
    attach(model, config)
    return model


def lora(**more):
    return LoRA(rank=3, alpha=6, **more)


class Counting:
    """A stream of the rows, round and round."""

    def __init__(self):
        self.place = 0

    def __iter__(self):
        while self.place < len(ROWS):
            self.place += 1
            yield ROWS[self.place - 1]
        self.place = 0

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


CLASSES = [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(ROWS)]
LLAMA = {"model": tiny_llama}
CASES = {
    "gpt2": {"model": tiny_gpt2},  # tied, Conv1D
    "bert": {"model": tiny_bert, "loss": masked_lm_loss, "collate": collate_padded},  # tied to its embeddings
    "classes": {"model": lambda: tiny_bert(labels=3), "loss": classification_loss, "collate": collate_padded,
                "rows": CLASSES},
    "t5": {"model": tiny_t5, "loss": sequence_to_sequence_loss, "collate": collate_padded},
    "half": {"model": lambda: adapted(tiny_llama().to(torch.bfloat16), lora())},
    "head": {"model": lambda: adapted(tiny_llama(), lora(targets=["q_proj", "lm_head"]))},
    "modules": {"model": lambda: adapted(tiny_llama(), lora(train_modules=["lm_head", "embed_tokens"]))},
    "tokens": {"model": lambda: adapted(tiny_llama(), NewTokens(tokens=[5, 7]))},
    "checkpointing": LLAMA | {"settings": {"activation_checkpointing": True}},
    "workers": LLAMA | {"settings": {"data_workers": 2}},
    "background": LLAMA | {"settings": {"background_save": True, "save_every": 2}, "folder": True},
    "stopping": LLAMA | {"settings": {"learning_rate": 0.1}, "watch": lambda: [EarlyStopping(patience=1)]},
    "best": LLAMA | {"settings": {"learning_rate": 0.1}, "watch": lambda: [KeepBest()]},
    "best kept": LLAMA | {"settings": {"learning_rate": 0.1}, "watch": lambda: [KeepBest()], "folder": True},
    "samples": LLAMA | {"watch": lambda: [GenerateSamples([[5, 6, 7]], max_new_tokens=5)], "folder": True},
    "stream": LLAMA | {"rows": Counting},
    "compile": LLAMA | {"settings": {"compile": "aot_eager", "max_steps": 3}},
}  # fmt: skip
FAST = ["bert", "modules", "best kept", "samples", "stream"]
SLOW = sorted(CASES.keys() - set(FAST))


def trained(rank, name, sharded, folder):
    """Return the weights, the history and why the run ended."""
    case = CASES[name]
    model = case["model"]()
    if sharded:
        shard(model)
    rows = case.get("rows", ROWS)
    settings = LoopSettings(**{
        "max_steps": 6, "rows_per_step": 8, "rows_per_micro_batch": 2, "learning_rate": 1e-3, "progress": False,
        "eval_every": 1, "folder": folder / name if "folder" in case else None,
    } | case.get("settings", {}))  # fmt: skip
    loop = TrainingLoop(
        model, rows if isinstance(rows, list) else rows(), settings=settings, callbacks=case.get("watch", list)(),
        collate=case.get("collate", collate_packed), loss=case.get("loss", causal_lm_loss),
        eval_data=CLASSES[:5] if rows is CLASSES else uneven_rows(5, seed=7),
    )  # fmt: skip
    history = [{key: value for key, value in row.items() if key != "seconds"} for row in loop.fit()]
    return without_key_biases(weights(model)), history, loop.stopped


def without_key_biases(found):
    """Leave out what no gradient reaches but rounding, which AdamW makes as large as any: the bias of keys."""
    return {n: t for n, t in found.items() if not n.endswith(("key.bias", "c_attn.bias"))}


def all_trained(rank, names, sharded, folder):
    return {name: trained(rank, name, sharded, folder) for name in names}


def compare(names, sharded, folder):
    alone = {name: trained(0, name, False, folder / "alone") for name in names}
    found = run(2, all_trained, names, sharded, folder / "together", folder=folder)
    for name in names:
        wanted, history, why = alone[name]
        for together in found:
            after, rows, stopped = together[name]
            assert off(after, wanted) < 1e-5, name
            assert len(rows) == len(history), name
            for row, other in zip(rows, history, strict=True):
                assert row == pytest.approx(other, rel=2e-5), name
            assert stopped.split(" ", 4)[:4] == why.split(" ", 4)[:4], name
        assert off(found[1][name][0], found[0][name][0]) == 0, name
    if "stopping" in names:
        assert alone["stopping"][2].startswith("eval_loss got no better")
        assert len(alone["stopping"][1]) < 6
    if "best kept" in names:
        kept = alone["best kept"][1]
        assert min(kept, key=lambda row: row["eval_loss"])["step"] < 6
    if "samples" in names:
        wrote = [json.loads(line) for line in (folder / "together" / "samples" / "samples.jsonl").open()]
        assert wrote == [json.loads(line) for line in (folder / "alone" / "samples" / "samples.jsonl").open()]
        assert len(wrote) == 6
    if "background" in names:
        assert sorted(path.name for path in (folder / "together" / "background").glob("step-*")) == [
            "step-00000004", "step-00000006"]  # fmt: skip


@pytest.mark.parametrize("sharded", [False, True])
def test_models_and_callbacks(sharded, tmp_path):
    compare(FAST, sharded, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True])
def test_more_models_and_switches(sharded, tmp_path):
    compare(SLOW, sharded, tmp_path)


def written(rank, folder):
    model = shard(adapted(tiny_llama(), lora()))
    TrainingLoop(model, ROWS, settings=LoopSettings(max_steps=2, learning_rate=1e-2, progress=False)).fit()
    save(model, folder)
    return weights(model)


def test_an_adapter_of_a_sharded_model_is_written_whole(tmp_path):
    found, _ = run(2, written, tmp_path / "adapter", folder=tmp_path)
    model = tiny_llama()
    load(model, tmp_path / "adapter")
    mine = dict(model.named_parameters())
    trained = {name: tensor for name, tensor in found.items() if "lora" in name}
    assert off({name: mine[name].detach() for name in trained}, trained) == 0
    assert any(tensor.abs().sum() > 0 for name, tensor in trained.items() if "lora_b" in name.lower())


class TwoBlocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Sequential(nn.Linear(3, 5), nn.Tanh()), nn.Sequential(nn.Linear(5, 3), nn.Tanh())

    def forward(self, x):
        return self.two(self.one(x))


def refused(rank):
    said = []
    for arguments in ({}, {"blocks": "Sequentail"}):
        with pytest.raises(ValueError, match=r"Block|Sequentail") as caught:
            shard(TwoBlocks(), **arguments)
        said.append(str(caught.value))
    model = shard(TwoBlocks(), blocks=nn.Sequential)
    return said, [type(module).__name__ for module in model.children()]


def test_shard_says_what_it_needs(tmp_path):
    for (first, second), kinds in run(2, refused, folder=tmp_path):
        assert first == "TwoBlocks does not name its blocks: give blocks=, their class or its name"
        assert second.startswith("no module of TwoBlocks is a Sequentail.")
        assert "Sequential" in second
        assert kinds == ["FSDPSequential"] * 2
    with pytest.raises(ValueError, match="sharding needs several processes: start the script by torchrun"):
        shard(tiny_llama())
