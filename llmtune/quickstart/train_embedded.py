"""Train the quickstart's embedded model anew: `python -m llmtune.quickstart.train_embedded`.

A Llama of a million parameters and its tokenizer, a byte-level BPE, learn the prose of the standard library that comes
with the running CPython (`corpus.prose`, training side). One command, seeded; it prints the loss as it goes and, at the
end, the perplexity on the held-out side.

The model in the package was trained on CPython 3.11.7 with the settings below and OMP_NUM_THREADS=1: about 12 minutes
of one core of a shared 2-core x86 machine. Its held-out perplexity is 30 a token (counting words alone: 546). Another
CPython has slightly other texts, and another processor other roundings, so that a rebuilt model is as good but not the
same to the bit.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from math import exp
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmtune.quickstart.corpus import prose
from llmtune.quickstart.model import embedded_model
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|endoftext|>"
VOCABULARY = 1536
WINDOW = 256  # tokens in a row of training
STEPS, ROWS_PER_STEP, LEARNING_RATE = 2400, 8, 6e-3


class Windows(Sequence[Mapping[str, Tensor]]):
    """Rows of `length` tokens of one long stream, starting every `stride` tokens.

    Args:
        stream: [n] token ids.
        length: tokens in a row.
        stride: tokens between the starts of two rows; below `length` the rows overlap, so that a token is met at
            several places.
    """

    def __init__(self, stream: Tensor, *, length: int, stride: int) -> None:
        self.stream, self.length, self.stride = stream, length, stride

    def __len__(self) -> int:
        return max((len(self.stream) - self.length) // self.stride + 1, 0)

    def __getitem__(self, index: Any) -> Any:
        ids = self.stream[index * self.stride : index * self.stride + self.length]
        return {"input_ids": ids, "labels": ids}


class Pretraining(TrainingLoop):
    """The loop with a shorter memory of squared gradients, as small models trained fast want it."""

    def configure_optimizer(self) -> tuple[torch.optim.Optimizer, Any]:
        """Return AdamW with betas (0.9, 0.95), and the settings' schedule."""
        optimizer, scheduler = super().configure_optimizer()
        for group in optimizer.param_groups:
            group["betas"] = (0.9, 0.95)
        return optimizer, scheduler


def train_tokenizer(texts: Iterable[str], *, vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer learned from `texts`, with one special token that ends a text.

    Args:
        texts: documents.
        vocabulary: tokens in all, the 256 bytes and the special token included.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, clean_up_tokenization_spaces=False
    )


def untrained(vocabulary: int, *, seed: int) -> LlamaForCausalLM:
    """Return the embedded model's architecture with weights drawn from `seed`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=WINDOW, tie_word_embeddings=True, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def stream(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Tensor:
    """Return all texts as one [n] stream of token ids, with the end token before, between and behind them."""
    ids = [tokenizer.eos_token_id]
    for text in texts:
        ids += [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    return torch.tensor(ids)


def stacked(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return rows of one length as a batch, [B, T] each."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def train(*, steps: int, seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, float]:
    """Train tokenizer and model and return (model in float32, tokenizer, held-out perplexity a token).

    Args:
        steps: optimizer steps.
        seed: of the weights and the data order.
    """
    corpus = prose()
    tokenizer = train_tokenizer(corpus.train)
    model = untrained(len(tokenizer), seed=seed)
    settings = LoopSettings(
        max_steps=steps, rows_per_step=ROWS_PER_STEP, learning_rate=LEARNING_RATE, schedule="cosine",
        warmup_steps=min(60, steps // 4), weight_decay=0.1, seed=seed, eval_every=max(steps // 4, 1),
    )  # fmt: skip
    loop = Pretraining(
        model,
        Windows(stream(tokenizer, corpus.train), length=WINDOW, stride=WINDOW // 4),
        eval_data=Windows(stream(tokenizer, corpus.held_out), length=WINDOW, stride=WINDOW),
        settings=settings,
        collate=stacked,
    )
    history = loop.fit()
    return model, tokenizer, exp(history[-1]["eval_loss"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, save in bfloat16, and print where and how good; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m llmtune.quickstart.train_embedded", description="Train the embedded model."
    )
    parser.add_argument(
        "--out", type=Path, default=embedded_model(), help="folder to write into (default: the package's)"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and data order (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps must be 1 or more; got {options.steps}")
    model, tokenizer, perplexity = train(steps=options.steps, seed=options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    model.bfloat16().save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    size = sum(path.stat().st_size for path in options.out.iterdir() if path.is_file())
    print(f"held-out perplexity {perplexity:.2f}; {size / 1e6:.2f} MB in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
