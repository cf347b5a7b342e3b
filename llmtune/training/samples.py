"""Read what the model writes while it is trained."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmtune.errors import LlmtuneWarning
from llmtune.modules import unwrap
from llmtune.training.untouched import untouched
from llmtune.types import Callback


class GenerateSamples(Callback):
    """Let the model go on from each prompt, greedily, after each evaluation or every so many steps.

    What it writes is printed and appended to `samples.jsonl` in the run's folder, one object a line: "step", "prompt",
    "text". The run is the same with it and without it: random state, modes, buffers and configuration are put back.
    Where generating fails (out of memory, say), a warning says so once and training goes on.

    Args:
        prompts: strings, which need a tokenizer, or lists of token ids. A string is taken as it is: apply a chat
            template yourself. For an encoder-decoder a prompt is the encoder's input.
        tokenizer: what reads strings and writes text; the default is the loop's. Without one, ids are shown.
        max_new_tokens: the most tokens to write after a prompt; at least 1.
        every: optimizer steps between samples; None is after each evaluation.

    Raises:
        TypeError: a prompt is neither a string nor a list of ids; or, at the start of the run, the model cannot
            generate.
        ValueError: there is no prompt, or an empty one; a number is out of its range; or, at the start of the run, a
            string has no tokenizer, or no evaluation will come.
    """

    def __init__(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        tokenizer: Any = None,
        max_new_tokens: int = 32,
        every: int | None = None,
    ) -> None:
        if isinstance(prompts, str) or not prompts or not all(len(prompt) for prompt in prompts):
            raise ValueError(f"prompts must be a list of one or more prompts, none of them empty; got {prompts!r}")
        for prompt in prompts:
            if not isinstance(prompt, str) and not all(isinstance(token, int) for token in prompt):
                raise TypeError(f"a prompt must be a string or a list of token ids; got {prompt!r}")
        for name, value in (("max_new_tokens", max_new_tokens), ("every", every)):
            if name == "every" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
        self.prompts, self.tokenizer = list(prompts), tokenizer
        self.max_new_tokens, self.every = max_new_tokens, every
        self._warned = False

    def on_fit_start(self, loop: Any) -> None:
        """Check that there is what it takes; drop samples of beyond the step a resumed run goes on from.

        Raises:
            TypeError: the model cannot generate.
            ValueError: a string has no tokenizer, or no evaluation will come.
        """
        model = unwrap(loop.model)
        if not callable(getattr(model, "generate", None)) or not getattr(model, "can_generate", lambda: True)():
            raise TypeError(
                f"GenerateSamples needs a model that can generate; {type(model).__name__} cannot: leave it out"
            )
        if self._tokenizer(loop) is None and any(isinstance(prompt, str) for prompt in self.prompts):
            raise ValueError("prompts that are strings need a tokenizer: give GenerateSamples(..., tokenizer=...)")
        if self.every is None and loop.eval_data is None:
            raise ValueError("samples come after evaluations, and there will be none: give every=, or eval_data")
        self._warned = False
        path = _file(loop)
        if path is not None and path.exists() and loop.ranks.main:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            _replace(path, [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= loop.step])

    def on_step_end(self, loop: Any, metrics: dict[str, Any]) -> None:
        """Write samples where it is time."""
        if self.every is not None and loop.step % self.every == 0:
            self._write(loop)

    def on_eval_end(self, loop: Any, metrics: dict[str, float]) -> None:
        """Write samples."""
        if self.every is None:
            self._write(loop)

    def _tokenizer(self, loop: Any) -> Any:
        return self.tokenizer if self.tokenizer is not None else getattr(loop, "tokenizer", None)

    def _write(self, loop: Any) -> None:
        try:
            texts = self._texts(loop)
            if loop.ranks.main:
                _show(loop, list(zip(map(_shown, self.prompts), texts, strict=True)))
        except Exception as error:  # a look at the model must not cost the run
            if not self._warned:
                self._warned = True
                warnings.warn(
                    f"samples at step {loop.step} failed and training goes on: {type(error).__name__}: {error}",
                    LlmtuneWarning,
                    stacklevel=2,
                )

    def _texts(self, loop: Any) -> list[str]:
        tokenizer, texts = self._tokenizer(loop), []
        for prompt in self.prompts:
            ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
            new = greedy(unwrap(loop.model), ids, max_new_tokens=self.max_new_tokens, device=loop.device)
            texts.append(_shown(new) if tokenizer is None else tokenizer.decode(new, skip_special_tokens=True))
        return texts


def greedy(model: nn.Module, ids: Sequence[int], *, max_new_tokens: int, device: torch.device) -> list[int]:
    """Return the ids a model writes after `ids`, taking the likeliest each time, and leave the model as it was.

    Args:
        model: a transformers model that can generate, a decoder or an encoder-decoder.
        ids: the prompt.
        max_new_tokens: where to end, unless the model ends before.
        device: where the model is.
    """
    prompt = torch.tensor([list(ids)], device=device)
    settings: Any = model.generation_config
    padding = settings.pad_token_id if settings.pad_token_id is not None else settings.eos_token_id
    with untouched(model, training=False), torch.no_grad():
        generate: Any = model.generate
        out = generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=max_new_tokens, do_sample=False,
            num_beams=1, num_return_sequences=1, return_dict_in_generate=False, use_cache=True, temperature=None,
            top_p=None, top_k=None, pad_token_id=padding[0] if isinstance(padding, list) else padding,
        )[0].tolist()  # fmt: skip
    encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))
    return out[1:] if encoder_decoder else out[len(ids) :]


def _shown(prompt: str | Sequence[int]) -> str:
    return prompt if isinstance(prompt, str) else " ".join(map(str, prompt))


def _file(loop: Any) -> Path | None:
    return None if loop.settings.folder is None else Path(loop.settings.folder) / "samples.jsonl"


def _show(loop: Any, samples: list[tuple[str, str]]) -> None:
    from tqdm.auto import tqdm

    for prompt, text in samples:
        tqdm.write(f"step {loop.step}: {prompt!r} -> {text!r}")  # above the bar, where there is one
    path = _file(loop)
    if path is not None:
        lines = [json.dumps({"step": loop.step, "prompt": prompt, "text": text}) + "\n" for prompt, text in samples]
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))


def _replace(path: Path, lines: list[str]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)
