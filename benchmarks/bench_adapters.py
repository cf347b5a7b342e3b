"""What adapters cost against PEFT's: memory kept for the backward pass, a training step, attaching, loading, merging.

    python benchmarks/bench_adapters.py --model smollm2-135m-instruct --data train.jsonl
        [--parts bytes steps attach merge] [--pairs 7] [--threads 2] [--write]

bytes: two Llama layers (512 wide, bfloat16 base, 512 tokens): the storages that autograd holds once the forward pass is
    over, and those that go through hooks on saved tensors during it; parameters left out of both.
steps: an optimizer step (forward, backward, AdamW) on `--model` and on a Llama of 8 layers, 512 wide: LoRA and DoRA of
    rank 16 on every linear layer, ours and PEFT's, and full fine-tuning; same batch, attention, head and loss
    (ours, for all: it holds no table of logits, whose allocation takes now more, now less).
attach: LoRA on the 252 linear layers of a Llama of 36 layers; saving it, and loading it onto a bare model.
merge: a bfloat16 base with a moved adapter: how far merging moves the logits, and how many merged weights are the
    rounded sum.

`--model` is a folder such as SmolLM2-135M-Instruct's (huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), `--data` a
JSONL file of Alpaca's rows (instruction, input, output). Losses of both sides are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
from common import RESULTS, report, table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from llmtune.adapters import DoRA, LoRA, adapter_parameters, attach, load, merge, save
from llmtune.losses import causal_lm_loss

RANK, ALPHA = 16, 32
Make = Callable[[], nn.Module]


def llama(layers: int, width: int = 512, vocabulary: int = 8192, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a Llama with random weights: `width` wide, heads of 64, 1408 / 512 * width in the feed-forward part."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), num_key_value_heads=max(1, width // 64), use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype)


def ours(model: nn.Module, *, dora: bool = False, dropout: float = 0.0) -> nn.Module:
    """Return the model with our adapter on every linear layer but the head."""
    attach(model, (DoRA if dora else LoRA)(rank=RANK, alpha=ALPHA, dropout=dropout))
    return model


def theirs(model: nn.Module, *, dora: bool = False, dropout: float = 0.0) -> nn.Module:
    """Return the model with PEFT's, by PEFT's defaults."""
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=dropout, use_dora=dora, target_modules="all-linear"
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, config)


def kept_bytes(model: nn.Module, hidden: Tensor) -> int:
    """Return the bytes of all storages that autograd keeps for the backward pass, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    found: dict[int, tuple[Tensor, int]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (tensor, storage.nbytes())  # held, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(inputs_embeds=hidden).last_hidden_state
    assert out.requires_grad
    return sum(size for _, size in found.values())


def held_bytes(out: Tensor, model: nn.Module) -> int:
    """Return the bytes of all storages that the graph behind `out` holds once the forward pass is over.

    Less than `kept_bytes` where a part of the graph is dropped before the pass ends, as the norm in PEFT's DoRA.
    """
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    sizes: dict[int, int] = {}
    seen: set[Any] = set()
    nodes: list[Any] = [out.grad_fn]

    def count(saved: Any) -> None:
        for tensor in saved if isinstance(saved, tuple | list) else [saved]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in own:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()

    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for name in dir(node):
            if name.startswith("_saved_") or name == "saved_tensors":
                count(getattr(node, name))
        nodes += [behind for behind, _ in node.next_functions]
    return sum(sizes.values())


def bytes_kept() -> dict[str, Any]:
    """Compare what is kept for the backward pass."""
    hidden = torch.randn(1, 512, 512, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found: dict[str, Any] = {}
    rows = []
    for name, options, wanted in (
        ("LoRA", {}, 0.605), ("LoRA, dropout 0.1", {"dropout": 0.1}, 0.43), ("DoRA", {"dora": True}, 0.34),
    ):  # fmt: skip
        sizes, handed = [], []
        for adapt in (ours, theirs):
            model = adapt(llama(2, dtype=torch.bfloat16), **options).train()
            inner = model.get_base_model() if isinstance(model, peft.PeftModel) else model
            handed.append(kept_bytes(inner.model, hidden))
            sizes.append(held_bytes(inner.model(inputs_embeds=hidden).last_hidden_state, inner.model))
        share, share_handed = sizes[0] / sizes[1], handed[0] / handed[1]
        found[name] = {
            "ours": sizes[0], "theirs": sizes[1], "share": share, "ours_through_hooks": handed[0],
            "theirs_through_hooks": handed[1], "share_through_hooks": share_handed, "to_reach": wanted,
            "reached": share <= wanted, "reached_through_hooks": share_handed <= wanted,
        }  # fmt: skip
        rows.append([
            name, *(f"{size / 2**20:.1f}" for size in sizes), f"{share:.3f}",
            *(f"{size / 2**20:.1f}" for size in handed), f"{share_handed:.3f}", wanted,
        ])  # fmt: skip
    header = ("held for the backward pass", "ours, MiB", "PEFT", "share", "through hooks: ours", "PEFT", "share",
              "to reach")  # fmt: skip
    print(table(rows, header=header))
    return found


def batch_of(folder: str, data: str, tokens: int, length: int) -> dict[str, Tensor]:
    """Return rows of real tokens, documents end to end, as both sides get it: nothing is padded."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids: list[int] = []
    for line in Path(data).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        ids += tokenizer(" ".join(str(row.get(k) or "") for k in ("instruction", "input", "output")))["input_ids"]
        if len(ids) >= tokens:
            break
    row_ids = torch.tensor(ids[:tokens]).view(-1, length)
    return {"input_ids": row_ids, "labels": row_ids}


def stepper(model: nn.Module, batch: dict[str, Tensor], rate: float) -> Callable[[], tuple[float, float]]:
    """Return a function that takes one optimizer step and says (loss, seconds)."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)

    def step() -> tuple[float, float]:
        began = time.perf_counter()
        loss = causal_lm_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach()), time.perf_counter() - began

    return step


def steps(make: Make, batch: dict[str, Tensor], pairs: int) -> dict[str, Any]:
    """Compare steps, all kinds in turns; figures are medians of ratios within a round."""
    base = make()
    kinds: dict[str, nn.Module] = {
        "LoRA": ours(copy.deepcopy(base)), "LoRA, PEFT": theirs(copy.deepcopy(base)),
        "DoRA": ours(copy.deepcopy(base), dora=True), "DoRA, PEFT": theirs(copy.deepcopy(base), dora=True),
        "all weights": base.requires_grad_(True),
    }  # fmt: skip
    runs = {name: stepper(model, batch, 1e-5) for name, model in kinds.items()}
    first = {name: run()[0] for name, run in runs.items()}  # also the warm-up; every kind starts from the same model
    spread = max(first.values()) - min(first.values())
    if not spread <= 1e-4 * first["LoRA"]:
        raise RuntimeError(f"the losses of the first step differ: {first}")
    taken: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for number in range(pairs):
        for name in order if number % 2 else order[::-1]:
            taken[name].append(runs[name]()[1])

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(taken[a], taken[b], strict=True))

    wanted = {("LoRA", "LoRA, PEFT"): 0.85, ("LoRA", "all weights"): 0.65, ("DoRA", "LoRA"): 1.15}
    others = [("LoRA, PEFT", "all weights"), ("DoRA, PEFT", "LoRA, PEFT"), ("DoRA", "DoRA, PEFT")]
    found: dict[str, Any] = {
        "seconds": {name: statistics.median(times) for name, times in taken.items()}, "rounds": pairs,
        "rows, tokens": list(batch["input_ids"].shape), "first_losses": first, "ratios": {},
    }  # fmt: skip
    rows = []
    for pair in (*wanted, *others):
        limit = wanted.get(pair)
        found["ratios"][" / ".join(pair)] = {"ratio": ratio(*pair), "to_reach": limit}
        rows.append([" / ".join(pair), f"{ratio(*pair):.3f}", "" if limit is None else limit])
    print(", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in found["seconds"].items()))
    print(table(rows, header=("step", "ratio", "at most")))
    return found


def timed(work: Callable[[], Any]) -> float:
    """Return the seconds that one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def attaching(pairs: int) -> dict[str, Any]:
    """Time attaching to 252 linear layers, saving and loading, each on a fresh model."""
    found: dict[str, list[float]] = {name: [] for name in ("attach", "attach, PEFT", "load", "load, PEFT")}
    base = llama(36, width=64, vocabulary=97)
    with tempfile.TemporaryDirectory() as folder:
        save(ours(copy.deepcopy(base)), folder)
        for _ in range(pairs):
            fresh = [copy.deepcopy(base) for _ in range(4)]
            found["attach"].append(timed(lambda: ours(fresh[0])))  # noqa: B023
            found["attach, PEFT"].append(timed(lambda: theirs(fresh[1])))  # noqa: B023
            found["load"].append(timed(lambda: load(fresh[2], folder)))  # noqa: B023
            found["load, PEFT"].append(timed(lambda: peft.PeftModel.from_pretrained(fresh[3], folder)))  # noqa: B023
    medians = {name: statistics.median(times) for name, times in found.items()}
    wanted = {"attach": 0.15, "load": 0.1}
    rows = [[name, f"{seconds:.3f}", wanted.get(name, "")] for name, seconds in medians.items()]
    print(table(rows, header=("252 linear layers", "seconds", "at most")))
    return {"seconds": medians, "to_reach": wanted, "rounds": pairs}


def merging() -> dict[str, Any]:
    """Compare how far merging into bfloat16 moves the logits, and whether each merged weight is the rounded sum."""
    model = llama(2, dtype=torch.bfloat16)
    bare = copy.deepcopy(model)
    ours(model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapter_parameters(model).values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save(model, folder)
        other = peft.PeftModel.from_pretrained(copy.deepcopy(bare), folder)
        layer = model.model.layers[0].mlp.down_proj
        change = layer.scaling * layer.lora_b.double() @ layer.lora_a.double()
        exact = (layer.weight.double() + change).to(torch.bfloat16)
        ids = torch.randint(0, 8192, (1, 256), generator=generator)
        found: dict[str, Any] = {}
        for name, side, fold, weight in (
            ("ours", model, lambda: merge(model), lambda: layer.weight),
            ("theirs", other, other.merge_adapter, lambda: other.model.model.layers[0].mlp.down_proj.base_layer.weight),
        ):
            before = side.eval()(input_ids=ids).logits
            fold()
            moved = float((side(input_ids=ids).logits - before).abs().max())
            found[name] = {"logits_moved": moved, "rounded_sums": float((weight() == exact).double().mean())}
    rows = [[name, f"{x['logits_moved']:.4f}", f"{100 * x['rounded_sums']:.3f} %"] for name, x in found.items()]
    print(table(rows, header=("merged into bfloat16", "logits moved by", "weights that are the rounded sum")))
    return found


def main() -> None:
    """Measure, print tables and the JSON line, and write the result where asked."""
    parser = argparse.ArgumentParser(description="Measure adapters against PEFT's.")
    parser.add_argument("--parts", nargs="+", choices=("bytes", "steps", "attach", "merge"),
                        default=["bytes", "steps", "attach", "merge"])  # fmt: skip
    parser.add_argument("--model", help="a folder with a causal language model, for the steps")
    parser.add_argument("--data", help="a JSONL file of Alpaca's rows, for the steps")
    parser.add_argument("--tokens", type=int, default=1024, help="of a batch")
    parser.add_argument("--length", type=int, default=128, help="tokens of a row")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/adapters.json")
    options = parser.parse_args()
    if "steps" in options.parts and not (options.model and options.data):
        parser.error("the steps need --model and --data")
    if options.pairs < 5:
        parser.error(f"--pairs must be at least 5; got {options.pairs}")
    torch.set_num_threads(options.threads)
    result: dict[str, Any] = {"rank": RANK}
    if "bytes" in options.parts:
        result["bytes"] = bytes_kept()
    if "steps" in options.parts:
        batch = batch_of(options.model, options.data, options.tokens, options.length)
        small = {name: ids % 8192 for name, ids in batch.items()}
        result["steps, 8 layers of 512"] = steps(lambda: llama(8), small, options.pairs)
        result["steps, the model"] = steps(
            lambda: AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32), batch, options.pairs
        )
    if "attach" in options.parts:
        result["attach"] = attaching(options.pairs)
    if "merge" in options.parts:
        result["merge"] = merging()
    report("adapters", result, path=RESULTS / "adapters.json" if options.write else None)


if __name__ == "__main__":
    sys.exit(main())
