"""Virtual tokens before a text: vectors that are trained, and that only the body of a model sees.

    body([p_1 ... p_n, e(x_1) ... e(x_T)])   without the first n positions of what comes out

Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning" (2021), section 2. PEFT gives logits of n more
positions, and its labels are widened; here both stay as they were.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.body import BodyLayer, StandIn, check_not_packed, embeddings_of, widened_mask
from llmtune.adapters.prompt_encoder import PromptTable
from llmtune.adapters.virtual_tokens import KEY


class PromptLayer(BodyLayer):
    """A body that reads n virtual tokens before the text.

    Token ids become vectors by the body's own embedding, adapters on it included. The mask, the token types (0) and the
    positions (given or not: the virtual tokens' come first, all others go up by n) are widened. In generation the
    virtual tokens go into the cache with the first call; later ones only widen the mask and move the positions.

    What the body computes of its first position, BERT's `pooler_output`, is computed of the first virtual token, as in
    PEFT, whose classifiers read it there: so outputs equal PEFT's for the same file. Token type 0 in a model that looks
    types up among its words, GPT-2, is word 0; PEFT leaves such types out.

    Args:
        base: the body.
        source: makes the virtual tokens, [n, E]: a `PromptTable` or `PromptEncoder`.
        keep: leave the virtual positions in what comes out, for a decoder that attends to them (T5's encoder).
        adapter_name: the adapter the layer belongs to.
    """

    def __init__(
        self, base: nn.Module, source: PromptTable, *, keep: bool = False, adapter_name: str = "default"
    ) -> None:
        super().__init__(base, adapter_name=adapter_name)
        self.prompt_source = source.train(base.training)
        self.keep = keep

    def changed(self, inputs: dict[str, Any], filled: int) -> Any:
        """Return the body's output for the text with the virtual tokens; see `BodyLayer`."""
        n, past = self.prompt_source.tokens, self.past(inputs, filled)
        mask = widened_mask(inputs.get("attention_mask"), n)
        if past > 0:
            moved = _moved(self.positions(inputs), n)
            return self.run(inputs | {"attention_mask": mask, "position_ids": moved}, filled)
        check_not_packed(inputs)
        positions = self.positions(inputs)
        text, ids = inputs.get("inputs_embeds"), inputs.pop("input_ids", None)
        if text is None:
            text = embeddings_of(self.base, "a prompt")(ids)
        virtual = self.prompt_source().to(text.dtype)
        inputs["position_ids"] = widened_positions(positions, inputs.get("attention_mask"), n)
        types = inputs.get("token_type_ids")
        if types is not None:
            inputs["token_type_ids"] = torch.cat([types.new_zeros(len(types), n), types], 1)
        inputs["inputs_embeds"] = torch.cat([virtual.expand(len(text), -1, -1), text], 1)
        output = self.run(inputs | {"attention_mask": mask}, filled)
        return output if self.keep else without_first(output, n)

    def file_tensors(self, place: str) -> dict[str, Tensor]:
        """Return the virtual tokens [n, E], where an encoder makes them its output; see `AdapterLayer`."""
        return {KEY: self.prompt_source.flat()}

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        return f"adapter={self.adapter_name}, tokens={self.prompt_source.tokens}, active={self.active}"


class PromptMemory(StandIn):
    """A decoder that is told of the virtual tokens in its encoder's output: `encoder_attention_mask` is widened.

    Only where the mask is shorter than what it is for: an encoder's output that was computed without the virtual tokens
    stays as it is.

    Args:
        base: the decoder.
        tokens: n.
        adapter_name: the adapter the layer belongs to.
    """

    def __init__(self, base: nn.Module, tokens: int, *, adapter_name: str = "default") -> None:
        super().__init__(base, adapter_name=adapter_name)
        self.virtual_tokens = tokens

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the decoder returns."""
        mask, hidden = kwargs.get("encoder_attention_mask"), kwargs.get("encoder_hidden_states")
        if self.takes_part and isinstance(mask, Tensor) and isinstance(hidden, Tensor) and mask.ndim == 2:
            if hidden.shape[1] - mask.shape[1] >= self.virtual_tokens:
                kwargs["encoder_attention_mask"] = widened_mask(mask, self.virtual_tokens)
        return self.base(*args, **kwargs)

    def file_tensors(self, place: str) -> dict[str, Tensor]:
        """Return nothing; see `AdapterLayer`."""
        return {}


def widened_positions(positions: Tensor | None, mask: Tensor | None, n: int) -> Tensor | None:
    """Return positions [B, T] as [B, n + T]: the virtual tokens take over where the text began, which goes up by n.

    Args:
        positions: [B | 1, T], or None, which stays.
        mask: [B, S], the last T of it 0 at padding, whose positions mean nothing; or None.
        n: how many virtual tokens.
    """
    if positions is None:
        return None
    real = positions
    if mask is not None:
        positions = positions.expand(len(mask), -1)
        largest = positions.amax(1, keepdim=True).expand_as(positions)
        real = torch.where(mask[:, -positions.shape[1] :].bool(), positions, largest)
    first = real.amin(1, keepdim=True) + torch.arange(n, device=positions.device)
    return torch.cat([first.to(positions.dtype), positions + n], 1)


def without_first(output: Any, n: int) -> Any:
    """Return a body's output, a mapping, without the first n positions of its hidden states and of the queries that its
    attention weights are of."""
    found = {}
    for name, value in output.items():
        if name == "last_hidden_state":
            found[name] = value[:, n:]
        elif name == "hidden_states" and value is not None:
            found[name] = tuple(None if hidden is None else hidden[:, n:] for hidden in value)
        elif name == "attentions" and value is not None:
            found[name] = tuple(None if weights is None else weights[:, :, n:] for weights in value)
        else:
            found[name] = value
    return type(output)(**found)


def _moved(positions: Tensor | None, n: int) -> Tensor | None:
    return None if positions is None else positions + n
