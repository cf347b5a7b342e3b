"""The model and tokenizer a quickstart runs on: the embedded ones, or those in a user's folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmtune.losses.packed import document_leak

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def embedded_model() -> Path:
    """Return the folder of the model that travels with the package: a Llama of a million parameters and its tokenizer.

    It has read the documentation of the Python standard library and nothing else. Both load with
    `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`, without a network.

    Example:
        >>> embedded_model().name
        'embedded'
    """
    return Path(__file__).parent / "embedded"


def check_model_folder(folder: Path) -> None:
    """Raise where a folder does not hold a causal language model, by its configuration alone.

    Raises:
        ValueError: the folder or its config.json is missing or unreadable, or the model is of another kind.
    """
    if not folder.is_dir():
        raise ValueError(
            f"--model must be a folder with a Hugging Face causal language model; {folder} is no folder. "
            "(A name on the hub is not looked up: download the model first)"
        )
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"--model must be a folder with a Hugging Face model; {folder} has no config.json")
    try:
        kinds = json.loads(path.read_text(encoding="utf-8")).get("architectures") or []
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is no JSON object: {error}") from error
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    if not known.intersection(kinds):
        came = ", ".join(map(str, kinds)) or "nothing"
        raise ValueError(
            f"--model must be a causal language model (LlamaForCausalLM ...); {path} names {came} as its architecture"
        )


def context_length(folder: Path) -> int:
    """Return the longest text, in tokens, that the model in a folder is made for.

    Raises:
        ValueError: its configuration cannot be read.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a damaged file makes the reader raise many kinds of error
        raise ValueError(f"no configuration can be read from {folder}: {_first_line(error)}") from error
    return int(getattr(config, "max_position_embeddings", None) or sys.maxsize)


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in a model's folder.

    Raises:
        ValueError: it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise ValueError(f"no tokenizer can be read from {folder}: {_first_line(error)}") from error


def load_model(folder: Path) -> PreTrainedModel:
    """Return the causal language model in a folder, in float32 on the CPU, in eval mode.

    Where transformers' own attention would let packed documents see each other in this model, it gets the library's.

    Raises:
        ValueError: it cannot be read, the weight files lack some of its weights, or it cannot run packed documents.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    bar = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # a bar for each of some ten readings would hide what the job says
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # as above
        raise ValueError(f"no causal language model can be read from {folder}: {_first_line(error)}") from error
    finally:
        if bar:
            logging.enable_progress_bar()
    model, report = found
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"the weight files in {folder} lack {len(missing)} of the model's weights: {missing[0]} ...")
    if document_leak(model, torch.arange(2)) > 1e-4:
        from llmtune.integrations.transformers_attention import register

        register()
        model.set_attn_implementation("llmtune")
        if document_leak(model, torch.arange(2)) > 1e-4:
            raise ValueError(f"packed documents see each other in {type(model).__name__}, whichever attention it uses")
    return model.eval()


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
