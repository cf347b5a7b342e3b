"""The body of a Hugging Face model: where it is, and what every layer that stands in its place shares.

The body is what makes hidden states of tokens: `model.model` of LlamaForCausalLM, `model.bert` of BertForMaskedLM. A
layer in its place sees what the model is given and what comes out before any head does, so it may put virtual tokens
before the text, and no head, label or loss ever learns of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.layer import AdapterLayer, bare_module, named_places

CACHES = ("cache", "past_key_values")  # transformers' names for it, the newer first
FILLED = "virtual_tokens_filled"  # how body layers tell those within them what they have put into the cache
HELD = "virtual_tokens_held"  # on a cache: how many of its first positions are virtual tokens, for blocks to read


@dataclass(frozen=True)
class Body:
    """Where a model's body is.

    Attributes:
        place: its bare name in the model; of an encoder-decoder, the encoder's.
        module: the bare module there.
        decoder_place: of an encoder-decoder, the decoder's bare name; else None.
        decoder: the bare decoder, or None.
    """

    place: str
    module: nn.Module
    decoder_place: str | None = None
    decoder: nn.Module | None = None


def find_body(model: nn.Module, method: str, *, root: bool = False) -> Body:
    """Return the body of a Hugging Face model, or of the only one inside a module.

    Args:
        model: the root, with or without adapters.
        method: what it is for, for the sentence.
        root: whether the root itself may be the body, since nothing is put in its place.

    Raises:
        TypeError: there is no such body, there are several, or it is the root itself and may not be.
    """
    places = {id(bare_module(module)): place for place, module in named_places(model)}
    whole = _language_model(model, method)
    config: Any = whole.config
    if config.get_text_config() is not config:
        raise TypeError(
            f"{method} goes to models of text alone; {type(whole).__name__} has parts beside its text model"
        )
    encoder, decoder = _side(whole, "get_encoder"), _side(whole, "get_decoder")
    if encoder is not None and decoder is not None and encoder is not decoder:
        return Body(places[id(encoder)], encoder, places[id(decoder)], decoder)
    found = bare_module(getattr(whole, str(whole.base_model_prefix), whole))
    if found is whole and encoder is not None:
        found = encoder  # T5EncoderModel, which only hands on
    while encoder is None and (inner := _side(found, "get_decoder")) is not None:
        found = inner  # OPTModel only hands on, and OPTForCausalLM goes round it
    if found is bare_module(model) and not root:
        raise TypeError(
            f"the model itself, a {type(found).__name__}, is the body that {method} would stand in the place of: "
            "put it into a module that calls it"
        )
    if "inputs_embeds" not in _parameters(found):
        raise TypeError(f"{method} needs a body that takes inputs_embeds; {type(found).__name__} does not")
    return Body(places[id(found)], found)


def embeddings_of(body: nn.Module, method: str) -> nn.Module:
    """Return the module that makes vectors [B, T, E] of token ids [B, T] in a body, adapters around it included.

    Raises:
        TypeError: the body has none.
    """
    found = None
    try:
        found = body.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        pass
    if not isinstance(found, nn.Module) or getattr(bare_module(found), "weight", torch.empty(0)).ndim != 2:
        raise TypeError(f"{method} needs a body with an embedding of tokens; {type(body).__name__} has none")
    return found


class StandIn(AdapterLayer):
    """An adapter layer that answers for its base: what it has not itself, it looks up there.

    A model asks its body for much more than a forward pass: `config`, `dtype`, `get_input_embeddings`, layers by name.
    """

    def __init__(self, base: nn.Module, *, adapter_name: str = "default") -> None:
        super().__init__(base, adapter_name=adapter_name)
        self.training = base.training

    def __getattr__(self, name: str) -> Any:
        """Return what the base has under this name."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None:
                raise
            return getattr(base, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Hand a module that is set from outside (new embeddings, say) to the bare module whose it is."""
        modules = self.__dict__.get("_modules", {})
        bare = bare_module(self) if "base" in modules else self
        if isinstance(value, nn.Module) and name not in modules and name in bare._modules:
            setattr(bare, name, value)
        else:
            super().__setattr__(name, value)


class BodyLayer(StandIn):
    """What stands in a body's place and adds to what it is given, by the names of the body's own arguments."""

    def __init__(self, base: nn.Module, *, adapter_name: str = "default") -> None:
        super().__init__(base, adapter_name=adapter_name)
        bare = bare_module(base)
        self.names_of_arguments = tuple(_parameters(bare))
        self.counts_real_tokens = "position_ids" in self.names_of_arguments and _counts_from_zero(bare)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the body returns, in its own form, changed where the adapter takes part.

        Raises:
            ValueError: the batch is one to which virtual tokens cannot be added; the sentence says why.
        """
        filled = kwargs.pop(FILLED, 0)
        if not self.takes_part:
            return self.base(*args, **kwargs, **self._told(filled))
        inputs = dict(zip(self.names_of_arguments, args, strict=False)) | kwargs
        as_dict = inputs.pop("return_dict", None)
        output = self.changed(inputs | {"return_dict": True}, filled)
        as_dict = getattr(bare_module(self).config, "return_dict", True) if as_dict is None else as_dict
        return output if as_dict else output.to_tuple()

    def changed(self, inputs: dict[str, Any], filled: int) -> Any:
        """Return the body's output, a mapping, with the adapter's part.

        Args:
            inputs: the body's arguments by name.
            filled: how many positions of the cache are virtual tokens of layers around this one, put there just now.
        """
        raise NotImplementedError

    def run(self, inputs: Mapping[str, Any], filled: int) -> Any:
        """Call the base, without arguments that are None: not every body has them all."""
        return self.base(**{name: value for name, value in inputs.items() if value is not None}, **self._told(filled))

    def _told(self, filled: int) -> dict[str, int]:
        return {FILLED: filled} if filled and isinstance(self.base, BodyLayer) else {}

    def cache_name(self, inputs: Mapping[str, Any]) -> str:
        """Return the name that the cache has among the body's arguments."""
        given = [name for name in CACHES if inputs.get(name) is not None]
        return given[0] if given else next((name for name in CACHES if name in self.names_of_arguments), CACHES[0])

    def positions(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Return the positions that are given, [B | 1, T], or those that generation would give; None where it has none.

        They are made of the mask in rows that start with padding: with virtual tokens before it, padding that is
        counted would stand between them and the text.
        """
        given, mask = inputs.get("position_ids"), inputs.get("attention_mask")
        if given is not None or not self.counts_real_tokens or not isinstance(mask, Tensor) or mask.ndim != 2:
            return given
        text = next(inputs[key] for key in ("input_ids", "inputs_embeds") if inputs.get(key) is not None)
        return positions_of(mask)[:, -text.shape[1] :]

    def past(self, inputs: dict[str, Any], filled: int) -> int:
        """Return how many positions of earlier calls the cache holds.

        Raises:
            ValueError: it is a cache of fixed size, in which there may be no room for virtual tokens.
        """
        inputs.pop("cache_position", None)  # older versions say it; left out, they count by themselves
        cache = inputs.get(self.cache_name(inputs))
        if cache is None:
            return 0
        if getattr(cache, "is_compileable", False):
            raise ValueError(
                f"{type(cache).__name__} is of a fixed size, in which virtual tokens are not counted: use a dynamic "
                "cache (cache_implementation=None)"
            )
        return int(cache.get_seq_length()) - filled


def widened_mask(mask: Any, n: int) -> Tensor | None:
    """Return an attention mask [B, S] with n ones before it, [B, n + S]; None stays None.

    Raises:
        ValueError: it is of another form.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        came = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"virtual tokens need the attention_mask as [B, S], 1 at real tokens and 0 at padding; got {came}"
        )
    return torch.cat([mask.new_ones(len(mask), n), mask], 1)


def positions_of(mask: Tensor) -> Tensor:
    """Return positions [B, S] by an attention mask [B, S]: in rows that start with padding only real tokens count."""
    count = mask.long().cumsum(1)
    plain = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask[:, :1] == 0, (count - 1).clamp(min=0), plain)


def check_not_packed(inputs: Mapping[str, Any]) -> None:
    """Raise where a row holds several documents: only the first would have the virtual tokens before it.

    Args:
        inputs: arguments of a body, of which position_ids [B, T], attention_mask [B, T] and cu_seq_lens_q are read.

    Raises:
        ValueError: the batch is packed, or its positions are of more than one kind.
    """
    positions, mask = inputs.get("position_ids"), inputs.get("attention_mask")
    packed = inputs.get("cu_seq_lens_q") is not None
    if positions is not None:
        if positions.ndim != 2:
            raise ValueError(f"virtual tokens need position_ids as [B, T]; got {list(positions.shape)}")
        breaks = positions[:, 1:] != positions[:, :-1] + 1
        if mask is not None:
            real = mask[:, -positions.shape[1] :].bool()
            breaks = breaks & real[:, 1:] & real[:, :-1]
        packed = packed or bool(breaks.any())
    if packed:
        raise ValueError(
            "the batch is packed (its position_ids start again within a row), and only the first document of a row "
            "would see the virtual tokens: give one document a row (collate_padded)"
        )


def _language_model(model: nn.Module, method: str) -> Any:
    """Return the outermost Hugging Face model, the only one at its height."""
    found: list[nn.Module] = []

    def walk(module: nn.Module) -> None:
        bare = bare_module(module)
        if hasattr(bare, "base_model_prefix") and hasattr(bare, "config"):
            if bare not in found:
                found.append(bare)
            return
        for child in bare.children():
            walk(child)

    walk(model)
    if len(found) != 1:
        names = ", ".join(type(module).__name__ for module in found) or "none"
        raise TypeError(
            f"{method} needs one Hugging Face model to stand in the body of; this {type(model).__name__} holds {names}"
        )
    return found[0]


def _side(whole: Any, getter: str) -> nn.Module | None:
    """Return a model's encoder or decoder where it is a part of its own that takes tokens."""
    find = getattr(whole, getter, None)
    side = find() if callable(find) else None
    if not isinstance(side, nn.Module) or bare_module(side) is whole:
        return None
    return bare_module(side) if "inputs_embeds" in _parameters(bare_module(side)) else None


def _counts_from_zero(bare: nn.Module) -> bool:
    """Return whether this is a decoder whose positions count from 0, and are not made of the mask by itself.

    RoBERTa's table of positions begins with a padding row, and OPT's is of a class that reads the mask.
    """
    tables = [m for name, m in bare.named_modules() if "position" in name and isinstance(m, nn.Embedding)]
    own = any(type(table) is not nn.Embedding or table.padding_idx is not None for table in tables)
    return not own and any(getattr(module, "is_causal", False) is True for module in bare.modules())


def _parameters(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(module.forward).parameters
