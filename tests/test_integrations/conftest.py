"""What several files here need."""

import pytest

from llmtune.integrations import transformers_attention


@pytest.fixture
def calls(monkeypatch):
    """How often attention was computed here."""
    seen = []
    attend = transformers_attention.scaled_dot_product_attention

    def spy(*args, **knobs):
        seen.append(knobs["mask"])
        return attend(*args, **knobs)

    monkeypatch.setattr(transformers_attention, "scaled_dot_product_attention", spy)
    return seen
