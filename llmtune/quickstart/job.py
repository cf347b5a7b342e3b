"""The main job from the command line: tune a model in four ways, and show what each learns and what each forgets."""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import log
from pathlib import Path

import torch

from llmtune.errors import NonFiniteError, did_you_mean
from llmtune.quickstart.inputs import Inputs, cpython_inputs, row_inputs
from llmtune.quickstart.model import check_model_folder, context_length, embedded_model, load_model, load_tokenizer
from llmtune.quickstart.peak import start_peak
from llmtune.quickstart.report import table, write_files
from llmtune.quickstart.ways import EMBEDDED, OWN, WAYS, Sizes, measure, run_way

PROGRAM = "python -m llmtune.quickstart"
DEFAULT_OUT = Path("llmtune-quickstart")
PEAK_OF = {
    True: "Peak memory is the process's (VmHWM), set back before each way.",
    False: "Peak memory is the process's since it began: this system cannot set it back before each way.",
}


@dataclass(frozen=True)
class Job:
    """Everything a quickstart needs, checked.

    Attributes:
        model: folder of the model.
        inputs: the texts of both domains.
        sizes: of the runs.
        ways: keys of `WAYS`, in order.
        seed: of the data order and of LoRA's start.
        out: folder to write into; made when the job runs.
    """

    model: Path
    inputs: Inputs
    sizes: Sizes
    ways: tuple[str, ...]
    seed: int
    out: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: what stands behind the program's name; `sys.argv` unless given.

    Returns:
        The exit code: 0; 2 where the input is bad (one sentence on the standard error stream, nothing written); 1 where
        a way's training leaves the finite numbers.
    """
    options = command_line().parse_args(arguments)
    threads = torch.get_num_threads()
    if options.model is None:
        torch.set_num_threads(1)  # so small a model gains little by a second one, and loses much on busy cores
    try:
        return _work(options)
    finally:
        torch.set_num_threads(threads)


def _work(options: argparse.Namespace) -> int:
    began = time.perf_counter()
    try:
        job = prepare_job(options)
        if options.out is None and job.out != DEFAULT_OUT:
            print(f"{DEFAULT_OUT} holds files already: writing into {job.out}")
        before = measure_untuned(job)
    except (ValueError, FileNotFoundError, NonFiniteError) as error:
        print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        return 2
    try:
        run(job, before)
    except NonFiniteError as error:
        print(f"{PROGRAM}: error: {error}. Try a smaller --learning-rate", file=sys.stderr)
        return 1
    print(f"done in {time.perf_counter() - began:.0f} s")
    return 0


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Fine-tune a small language model in four ways, and show what each learns of a new domain and what "
        "it forgets of an old one. Without options: an embedded model that has read Python's documentation learns "
        "Python's source code, in about a minute, without a network.",
    )
    add = parser.add_argument
    add(
        "--model",
        type=Path,
        metavar="DIR",
        help="folder of a Hugging Face causal language model (default: the embedded one)",
    )
    add(
        "--data",
        type=Path,
        metavar="FILE",
        help='JSON lines to learn from, with "prompt" and "response", "instruction" and "output", "messages", or '
        '"text" (default: source code of the Python standard library)',
    )
    add("--rows", type=int, metavar="N", help="take the first N rows of --data (default: all)")
    add(
        "--steps",
        type=int,
        metavar="N",
        help="optimizer steps of each way (default: 24, with --model 12; with --data one pass over its rows)",
    )
    add(
        "--learning-rate",
        type=float,
        metavar="X",
        help="peak learning rate with LoRA; full fine-tuning takes a tenth of it",
    )
    add("--ways", default=",".join(WAYS), metavar="LIST", help="which ways, with commas (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the data order and of LoRA's start (default: %(default)s)")
    add("--out", type=Path, metavar="DIR", help=f"folder to write into (default: ./{DEFAULT_OUT}, or the first of "
        f"{DEFAULT_OUT}-2, -3 ... that is free)")  # fmt: skip
    return parser


def prepare_job(options: argparse.Namespace) -> Job:
    """Check everything that can be wrong with the input, read the texts, and return the job; nothing is written.

    Raises:
        ValueError: an option, the model's folder, the data, or the folder to write into is not usable.
        FileNotFoundError: the standard library's source files are not on this machine.
    """
    for name, least in (("rows", 1), ("steps", 1), ("seed", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name} must be {least} or more; got {value}")
    if options.rows is not None and options.data is None:
        raise ValueError(f"--rows {options.rows} chooses rows of a file: give the file with --data")
    if options.learning_rate is not None and not 0 < options.learning_rate < float("inf"):
        raise ValueError(f"--learning-rate must be a number above 0; got {options.learning_rate}")
    ways = chosen_ways(options.ways)
    out = free_folder(options.out)
    folder = embedded_model() if options.model is None else options.model
    check_model_folder(folder)
    tokenizer = load_tokenizer(folder)
    sizes = EMBEDDED if options.model is None else OWN
    sizes = replace(
        sizes,
        steps=options.steps or (sizes.steps if options.data is None else None),
        learning_rate=options.learning_rate or sizes.learning_rate,
        max_tokens=min(sizes.max_tokens, context_length(folder)),
    )
    if options.data is None:
        inputs = cpython_inputs(tokenizer, max_tokens=sizes.max_tokens, measured=sizes.measured, fisher=sizes.fisher)
    else:
        inputs = row_inputs(
            tokenizer, options.data, rows=options.rows, max_tokens=sizes.max_tokens, measured=sizes.measured,
            fisher=sizes.fisher,
        )  # fmt: skip
    return Job(folder, inputs, sizes, ways, options.seed, out)


def chosen_ways(text: str) -> tuple[str, ...]:
    """Return the ways named in a list with commas, each once, in the order of `WAYS`.

    Raises:
        ValueError: a name is no way (says which is near), or there is none.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in WAYS:
            raise ValueError(f'--ways takes {", ".join(WAYS)}; got "{name}".{did_you_mean(name, WAYS)}')
    if not names:
        raise ValueError(f"--ways must name at least one of {', '.join(WAYS)}; got {text!r}")
    return tuple(way for way in WAYS if way in names)


def free_folder(wanted: Path | None) -> Path:
    """Return the folder to write into: one that does not exist or is empty, so that nothing is overwritten.

    Args:
        wanted: the folder asked for; None for the default one, or the first numbered one that is free.

    Raises:
        ValueError: the folder asked for holds something, or is a file, or cannot be written.
    """
    if wanted is None:
        wanted = next(path for path in _numbered(DEFAULT_OUT) if _is_free(path))
    elif not _is_free(wanted):
        what = "holds files already" if wanted.is_dir() else "is no folder"
        raise ValueError(f"--out must be a new or empty folder, so that nothing is overwritten; {wanted} {what}")
    there = next(path for path in (wanted, *wanted.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write into {wanted}: {there} is {'not writable' if there.is_dir() else 'no folder'}")
    return wanted


def measure_untuned(job: Job) -> tuple[float, float]:
    """Say what is about to run, and return the perplexities of the untuned model: (new domain, old domain).

    Raises:
        ValueError: the model cannot be read.
        NonFiniteError: it predicts NaN.
    """
    model = load_model(job.model)
    count = sum(p.numel() for p in model.parameters())
    print(f"model:      {type(model).__name__} of {count:,} parameters, in {job.model}")
    for line in job.inputs.described:
        print(line)
    steps = job.sizes.steps_over(job.inputs.new)
    size = job.sizes.rows_per_step
    print(f"each way:   {steps} steps of {size} packs, the same ones in the same order, from the same weights")
    return measure(model, job.inputs)


def run(job: Job, before: tuple[float, float]) -> None:
    """Run the ways, print the table, and write what there is to keep.

    Args:
        job: what to do.
        before: perplexities of the untuned model (new, old).
    """
    job.out.mkdir(parents=True, exist_ok=True)
    peak_of = PEAK_OF[start_peak()]
    results = []
    for way in job.ways:
        print(f"{WAYS[way]} ...", flush=True)
        results.append(
            run_way(
                way,
                job.model,
                job.inputs,
                job.sizes,
                before=before,
                seed=job.seed,
                out=job.out,
                bar=sys.stderr.isatty(),
            )
        )
        losses = [log(perplexity) for perplexity in results[-1].new]
        print(f"    held-out loss of the new domain {losses[0]:.3f} -> {losses[1]:.3f}", flush=True)
    print(f"\n{table(results)}\n")
    print("Perplexities are per token, on held-out texts. Seconds are without measuring them. " + peak_of)
    for line in write_files(results, job.out):
        print(line)


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    yield from (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))


def _is_free(path: Path) -> bool:
    return not os.path.lexists(path) or (path.is_dir() and not any(path.iterdir()))
