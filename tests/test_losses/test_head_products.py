"""The products of a head with a few rows, by oneDNN where it serves and by torch's own where not."""

import pytest
import torch

from llmtune.losses import head_products as products
from llmtune.losses.head_products import add_head_gradient, gradient_into, logits_into

N, E, V = 13, 7, 1103  # more columns than a piece of the head's gradient


def operands(dtype):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(N, 2 * E, generator=generator).to(dtype)[:, ::2]  # strided, as a slice of a model's states is
    weight = torch.randn(V, E, generator=generator).to(dtype)
    gradient = torch.randn(N, V, generator=generator).to(dtype)
    return hidden, weight, gradient


def off(got, expected):
    return float((got.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("fewest", [1, N + 1])
@pytest.mark.parametrize("piece", [1, 4 * N * 101, 8 * 2**20])
def test_products_are_those_of_float64(dtype, onednn, piece, fewest, monkeypatch):
    monkeypatch.setattr(products, "FEWEST_FOR_ONEDNN", fewest)
    if not onednn:
        monkeypatch.setattr(products, "_onednn_linear", lambda rows: None)
    monkeypatch.setattr(products, "PIECE_BYTES", piece)
    hidden, weight, gradient = operands(dtype)
    allowed = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 6e-3}[dtype]
    h, w, g = hidden.double(), weight.double(), gradient.double()
    assert off(logits_into(torch.full((N, V), torch.nan, dtype=dtype), hidden, weight), h @ w.T) < allowed
    made = gradient_into(torch.full((N, E), torch.nan, dtype=dtype), gradient, weight, 0.3)
    assert off(made, 0.3 * g @ w) < allowed
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    d_weight = torch.full((V, E), torch.nan, dtype=wide)
    add_head_gradient(d_weight, gradient, hidden, 0.3, first=True)
    assert off(d_weight, 0.3 * g.T @ h) < allowed
    add_head_gradient(d_weight, gradient, hidden, 0.7, first=False)
    assert off(d_weight, g.T @ h) < allowed


def test_onednn_serves_where_it_is_there(monkeypatch):
    hidden, _, _ = operands(torch.float32)
    if not torch.backends.mkldnn.is_available():
        pytest.skip("this torch was built without oneDNN")
    assert products._onednn_linear(hidden) is not None
    assert products._onednn_linear(hidden.double()) is None
    assert products._onednn_linear(hidden[:0]) is None
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert products._onednn_linear(hidden) is None


def test_no_rows():
    _, weight, gradient = operands(torch.float32)
    hidden = torch.empty(0, E)
    assert logits_into(torch.empty(0, V), hidden, weight).shape == (0, V)
    assert gradient_into(torch.empty(0, E), gradient[:0], weight, 1.0).shape == (0, E)
