"""Data: text to rows, rows to packs and batches."""

from llmtune.data.chat import chat_examples
from llmtune.data.collate import collate_packed, collate_padded
from llmtune.data.masking import MaskedLMCollator
from llmtune.data.mixing import MixedBatches
from llmtune.data.packing import PackedDataset, pack
from llmtune.data.preferences import collate_preferences
from llmtune.data.replay import ReplayBuffer
from llmtune.data.row_files import load_rows, save_rows
from llmtune.data.rows import prompt_examples, read_rows, text_examples

__all__ = [
    "MaskedLMCollator",
    "MixedBatches",
    "PackedDataset",
    "ReplayBuffer",
    "chat_examples",
    "collate_packed",
    "collate_padded",
    "collate_preferences",
    "load_rows",
    "pack",
    "prompt_examples",
    "read_rows",
    "save_rows",
    "text_examples",
]
