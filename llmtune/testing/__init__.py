"""The laws a part must keep, to run on ours and on your own, and tiny seeded models to run them with."""

from llmtune.errors import LawBroken
from llmtune.testing.adapters import check_adapter
from llmtune.testing.attention import check_attention
from llmtune.testing.close import assert_close
from llmtune.testing.invariance import check_causal, check_packing_invariant, check_padding_invariant
from llmtune.testing.kill import KillReport, check_killed
from llmtune.testing.loop import check_loop, uneven_rows
from llmtune.testing.losses import check_loss
from llmtune.testing.masks import check_mask
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.testing.penalties import check_penalty

__all__ = [
    "KillReport",
    "LawBroken",
    "assert_close",
    "check_adapter",
    "check_attention",
    "check_causal",
    "check_killed",
    "check_loop",
    "check_loss",
    "check_mask",
    "check_packing_invariant",
    "check_padding_invariant",
    "check_penalty",
    "tiny_bert",
    "tiny_gpt2",
    "tiny_llama",
    "tiny_t5",
    "uneven_rows",
]
