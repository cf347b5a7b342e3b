"""Prefixes: n keys and values for every attention layer, that every query of a text sees before the text's own.

    softmax(q [P_k; K]^T / sqrt(D)) [P_v; V]     the text's positions go up by n, as if n tokens had come before

Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation" (2021), section 4.2. The prefix goes through
transformers' own cache, whatever computes the attention ("llmtune" too): it is from the cache that a model makes its
masks and positions, so they are right for every backend without being mended for each. Under gradient checkpointing
transformers takes the cache away from the layers (and may warn of it), after masks and positions have been made: there
each attention layer is handed its part of the prefix once more, and training is the same as without. PEFT refuses
gradient checkpointing.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from llmtune.adapters.autocast import autocast_dtype, no_autocast
from llmtune.adapters.body import CACHES, HELD, BodyLayer, StandIn, check_not_packed, widened_mask
from llmtune.adapters.layer import bare_module, named_places
from llmtune.adapters.virtual_tokens import KEY


class PrefixTable(nn.Module):
    """The prefixes of all layers, in PEFT's layout: a row a virtual token, in it layer by layer the key and the value.

    With a projection a network makes the rows of smaller ones: W_2 tanh(W_1 e), [K D, F] and [F, 2 K D L], each with a
    bias. A layer's part is computed by itself, so that checkpointing computes no more than it needs.

    Args:
        tokens: n.
        layers: L.
        heads: K, key/value heads.
        size: D, of a head.
        hidden: F, the projection's width, or None for no projection.
        every_second: deal the pairs out as PEFT does to the decoder of an encoder-decoder; see `pair`.
        dtype: of the parameters.
        device: of the parameters.

    Attributes:
        table: [n, 2 K D L], or with a projection [n, K D]; standard normal draws.
    """

    def __init__(
        self, *, tokens: int, layers: int, heads: int, size: int, hidden: int | None, every_second: bool,
        dtype: torch.dtype, device: torch.device,
    ) -> None:  # fmt: skip
        super().__init__()
        self.layers, self.heads, self.size, self.every_second = layers, heads, size, every_second
        width = heads * size
        whole = 2 * width * layers
        start = torch.randn(tokens, whole if hidden is None else width)
        self.table = nn.Parameter(start.to(device=device, dtype=dtype))
        self.first = self.second = None
        if hidden is not None:
            self.first = nn.Linear(width, hidden, device=device, dtype=dtype)
            self.second = nn.Linear(hidden, whole, device=device, dtype=dtype)

    @property
    def tokens(self) -> int:
        """n."""
        return len(self.table)

    def pair(self, layer: int) -> tuple[Tensor, Tensor]:
        """Return a layer's keys and values, each [1, K, n, D].

        In the decoder of an encoder-decoder layer i has the pair 2 i mod L: PEFT deals out pairs to every layer's
        attention to itself and to the encoder in turn, going through the table twice, and drops the latter.
        """
        at = (2 * layer) % self.layers if self.every_second else layer
        rows = self._part(at).unflatten(1, (2, self.heads, self.size))  # [n, 2, K, D]
        key, value = rows.permute(1, 2, 0, 3)[:, None]
        return key, value

    def flat(self) -> Tensor:
        """Return what a file holds, [n, 2 K D L]; without a projection the table itself, so that loading may write."""
        if self.first is None:
            return self.table
        with torch.no_grad():
            return torch.cat([self._part(layer) for layer in range(self.layers)], 1)

    def _part(self, layer: int) -> Tensor:
        width = 2 * self.heads * self.size
        part = slice(layer * width, (layer + 1) * width)
        if self.first is None or self.second is None:
            return self.table[:, part]
        with no_autocast(self.table.device):  # so that a file holds what was trained
            hidden = torch.tanh(self.first(self.table))
            return F.linear(hidden, self.second.weight[part], self.second.bias[part])


class PrefixLayer(BodyLayer):
    """A body whose cache holds a prefix for every layer before it reads a text.

    A cache that comes empty is filled, and without one a cache is made; one that holds something already has the prefix
    from an earlier call. Mask and given positions are widened and moved in every call.

    Args:
        base: the body; of an encoder-decoder, its decoder.
        table: the prefixes.
        adapter_name: the adapter the layer belongs to.
    """

    def __init__(self, base: nn.Module, table: PrefixTable, *, adapter_name: str = "default") -> None:
        super().__init__(base, adapter_name=adapter_name)
        self.prefix_table = table.train(base.training)

    def changed(self, inputs: dict[str, Any], filled: int) -> Any:
        """Return the body's output for the text after the prefix; see `BodyLayer`."""
        n, past = self.prefix_table.tokens, self.past(inputs, filled)
        mask, positions = widened_mask(inputs.get("attention_mask"), n), self.positions(inputs)
        if past <= 0:
            check_not_packed(inputs)
        inputs["attention_mask"] = mask
        inputs["position_ids"] = None if positions is None else positions + n
        if past > 0:
            return self.run(inputs, filled)
        name = self.cache_name(inputs)
        given = inputs.get(name)
        text = next(inputs[key] for key in ("input_ids", "inputs_embeds") if inputs.get(key) is not None)
        cache = self._new_cache() if given is None else given
        self._fill(cache, len(text), text.device.type)
        setattr(cache, HELD, filled + n)
        output = self.run(inputs | {name: cache}, filled + n)
        if given is None and not self._wants_cache(inputs) and output.get(name) is not None:
            output = type(output)(**{key: value for key, value in output.items() if key != name})
        return output

    def _fill(self, cache: Any, B: int, device: str) -> None:
        own = getattr(cache, "self_attention_cache", cache)
        dtype = current_dtype(self, device)
        for layer in range(self.prefix_table.layers):
            key, value = self.prefix_table.pair(layer)
            own.update(key.expand(B, -1, -1, -1).to(dtype), value.expand(B, -1, -1, -1).to(dtype), layer)

    def _new_cache(self) -> Any:
        from transformers import DynamicCache, EncoderDecoderCache

        config: Any = bare_module(self).config
        both = "encoder_hidden_states" in self.names_of_arguments and config.is_encoder_decoder
        return EncoderDecoderCache(DynamicCache(), DynamicCache()) if both else DynamicCache()

    def _wants_cache(self, inputs: dict[str, Any]) -> bool:
        asked = inputs.get("use_cache")
        return bool(getattr(bare_module(self).config, "use_cache", False) if asked is None else asked)

    def file_tensors(self, place: str) -> dict[str, Tensor]:
        """Return the prefixes [n, 2 K D L], where a network makes them its output; see `AdapterLayer`."""
        return {KEY: self.prefix_table.flat()}

    def extra_repr(self) -> str:
        """Return what `print(model)` shows of the layer."""
        return f"adapter={self.adapter_name}, tokens={self.prefix_table.tokens}, active={self.active}"


class PrefixAttention(StandIn):
    """An attention layer that is handed its prefix where it has been given no cache: under gradient checkpointing.

    Args:
        base: the attention layer.
        table: the prefixes, which belong to the `PrefixLayer` around the body.
        layer: which of them.
        adapter_name: the adapter the layer belongs to.
    """

    def __init__(self, base: nn.Module, table: PrefixTable, layer: int, *, adapter_name: str = "default") -> None:
        super().__init__(base, adapter_name=adapter_name)
        self.shared_table = (table,)  # in a tuple, so that its parameters are the other layer's alone
        self.prefix_layer = layer
        arguments = list(inspect.signature(bare_module(base).forward).parameters)
        self.cache_argument = next(name for name in CACHES if name in arguments)
        self.cache_index = arguments.index(self.cache_argument)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the attention layer returns."""
        positional = len(args) > self.cache_index
        cache = args[self.cache_index] if positional else kwargs.get(self.cache_argument)
        if self.takes_part and (cache is None or isinstance(cache, _Prefix)):
            cache = _Prefix(*self.shared_table[0].pair(self.prefix_layer), cache)
            if positional:
                args = (*args[: self.cache_index], cache, *args[self.cache_index + 1 :])
            else:
                kwargs[self.cache_argument] = cache
        return self.base(*args, **kwargs)

    def file_tensors(self, place: str) -> dict[str, Tensor]:
        """Return nothing; see `AdapterLayer`."""
        return {}


class _Prefix:
    """What an attention layer takes for a cache: it puts a prefix before the keys and values, and keeps nothing."""

    def __init__(self, key: Tensor, value: Tensor, before: _Prefix | None) -> None:
        self.key, self.value, self.before = key, value, before

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.key.shape[2] + (0 if self.before is None else self.before.get_seq_length())

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        key, value = (part.expand(len(keys), -1, -1, -1).to(keys.dtype) for part in (self.key, self.value))
        keys, values = torch.cat([key, keys], 2), torch.cat([value, values], 2)
        return (keys, values) if self.before is None else self.before.update(keys, values, layer_idx)


def current_dtype(body: Any, device: str) -> torch.dtype:
    """Return the dtype that a body's keys and values have at the moment: autocast's, or the body's own."""
    dtype: torch.dtype = body.dtype
    return autocast_dtype(torch.device(device)) or dtype


def own_attention(body: nn.Module) -> dict[str, tuple[int, nn.Module]]:
    """Return the layers of a body in which a text attends to itself, as {name within the body: (index, bare layer)}.

    They are called attention, have a `layer_idx` and take a cache; of nested ones the innermost counts, and none that
    attends to an encoder.

    Args:
        body: the bare body.
    """
    found = {
        name: module
        for name, outer in named_places(body)
        if name and isinstance(getattr(module := bare_module(outer), "layer_idx", None), int)
        if "attention" in type(module).__name__.lower()
        if any(cache in inspect.signature(module.forward).parameters for cache in CACHES)
    }
    return {
        name: (module.layer_idx, module)  # type: ignore[misc]
        for name, module in found.items()
        if not any(other.startswith(name + ".") for other in found)
        and not any(word in f"{name} {type(module).__name__}".lower() for word in ("cross", "encdec", "encoder_att"))
        and not getattr(module, "is_cross_attention", False)
    }
