"""The processes of a run: who takes which micro-batch, and how gradients and numbers are summed over all.

Every process makes all micro-batches of a step, so each knows the targets of all without asking, and a subclass that
adds batches of its own needs no thought for processes. Each then computes its share, every `world`-th. Gradients are
summed once a step by torch's collectives, whatever the model was called through and however often: a subclass may call
it twice, not at all, or by `functional_call`. Parameters sharded by `fully_shard` are summed by torch's own engine.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from llmtune.errors import CheckpointError
from llmtune.modules import is_fsdp
from llmtune.training.memory import is_out_of_memory
from llmtune.training.randomness import fixed_randomness, seed_everything
from llmtune.training.sharding import (
    check_spread,
    check_unchanged,
    data_dimensions,
    give_up_gathered,
    is_dtensor,
    is_sharded,
    send_from_main,
    sum_over_shards,
)
from llmtune.types import Batch

BUCKET_BYTES = 64 * 2**20


def join_processes(backend: str | None = None) -> torch.device:
    """Join the processes that `torchrun` started and return this one's device; call it first in the script.

    Without torchrun there is nothing to join: the device is the accelerator if there is one, else the CPU. At the end
    of the program the process group is destroyed, without which torch's gloo sometimes aborts there.

    Args:
        backend: of `torch.distributed`; the default is that of the device: "nccl" for CUDA, "gloo" for the CPU.

    Raises:
        ValueError: torchrun is to start processes again (`--max-restarts`) and could not; says what to set.
    """
    check_restarts()
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None:
        device = torch.device("cpu")
    else:
        local = int(os.environ.get("LOCAL_RANK", 0)) % torch.accelerator.device_count()
        device = torch.device(accelerator.type, local)
        torch.accelerator.set_device_index(local)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not distributed.is_initialized():
        named = backend or (distributed.get_default_backend_for_device(device) if accelerator is not None else "gloo")
        distributed.init_process_group(named, device_id=device if accelerator is not None else None)
        atexit.register(_leave_processes)
    return device


def _leave_processes() -> None:
    """Destroy the process group; after an error only gloo's: NCCL would wait for those that are gone."""
    failed = getattr(sys, "last_value", None) is not None
    if distributed.is_initialized() and (not failed or distributed.get_backend() == "gloo"):
        distributed.destroy_process_group()
    time.sleep(0.05)  # a sharded model may keep gloo's threads alive: lets them drop their last tensors while they can


def check_restarts() -> None:
    """Raise ValueError where torchrun would start the processes again in such a way that they cannot meet."""
    restarts, shared = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0"), os.environ.get("TORCHELASTIC_USE_AGENT_STORE")
    if restarts != "0" and shared == "True":
        raise ValueError(
            f"with --max-restarts={restarts} torchrun keeps the addresses of processes that are gone, and those it "
            "starts again cannot meet: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 before torchrun"
        )


class Ranks:
    """The processes that train one model together; one alone where `torch.distributed` has not been started.

    Attributes:
        rank: which share of the data this process takes, from 0.
        world: into how many shares the data goes. (Processes that hold parts of one tensor-parallel model take the same
            share.)
        main: whether this is the process that prints and writes.
        sharded: whether parameters are spread over the processes, so that all must run equally many forward passes.
    """

    def __init__(self, model: nn.Module) -> None:
        self.processes, number = 1, 0
        if distributed.is_available() and distributed.is_initialized():
            self.processes, number = distributed.get_world_size(), distributed.get_rank()
        self.main = number == 0
        self.sharded = is_sharded(model)
        self.rank, self.world = number, self.processes
        self._summed_each_time: list[nn.Parameter] = []
        if self.processes > 1:
            check_spread(model)
        if self.processes > 1 and self.sharded:
            self.rank, self.world = data_dimensions(model)
            sum_over_shards(model)

    def exchange(self, value: Any) -> list[Any]:
        """Return every process's value, in order of the processes."""
        if self.processes == 1:
            return [value]
        values: list[Any] = [None] * self.processes
        distributed.all_gather_object(values, value)
        return values

    def in_main(self, work: Callable[[], Any]) -> Any:
        """Let the main process do some work, and return in all of them what it gave.

        Raises:
            Exception: what the work raised, in the main process.
            CheckpointError: the same sentence in the others.
        """
        result: Any = None
        problem: Exception | None = None
        if self.main:
            try:
                result = work()
            except Exception as error:  # told to the other processes first, which wait
                problem = error
        result, told = self.exchange((result, problem and f"in the main process: {problem}"))[0]
        if problem is not None:
            raise problem
        if told:
            raise CheckpointError(told)
        return result

    def places(self, count: int) -> list[tuple[int, bool]]:
        """Return which of `count` places this process takes, as (place, True), equally many for every process.

        Where there are too few, (last place, False) is added. It counts for nothing; where the model is sharded it must
        be run all the same, for the others' sake.
        """
        mine = [(place, True) for place in range(self.rank, count, self.world)]
        return mine + [(count - 1, False)] * (-(-count // self.world) - len(mine))

    def shares(self, value: Any) -> list[Any]:
        """Return the value of one process for each share of the data."""
        return list(dict(self.exchange((self.rank, value))).values())

    def share(self, batches: Sequence[Batch], counts: Sequence[int]) -> Iterator[tuple[Batch, int]]:
        """Yield this process's share of a step: batches that have targets, with the number of their targets.

        Of a tensor-parallel model, transformers sums the gradient of some whole parameters (Qwen3's norms) over
        processes after every backward pass, and with it what earlier passes left there: so that is put aside between
        two, and back after the last.
        """
        real = [(batch, count) for batch, count in zip(batches, counts, strict=True) if count]
        aside: dict[nn.Parameter, Tensor] = {}
        for place, here in self.places(len(real)):
            if here or self.sharded:
                batch, count = real[place]
                yield batch, count if here else 0
                for parameter in self._summed_each_time:
                    if parameter.grad is not None:
                        aside[parameter] = aside[parameter] + parameter.grad if parameter in aside else parameter.grad
                        parameter.grad = None
        for parameter, gradient in aside.items():
            parameter.grad = gradient

    @contextmanager
    def together(self, model: nn.Module, metrics: dict[str, Any]) -> Iterator[None]:
        """Run the block, in which each process computes its share, then sum gradients and metrics over all.

        Inside the block each process draws at random by itself, outside all draw the same.

        Raises:
            Exception: what the block raised, in the process in which it did.
            torch.OutOfMemoryError: another process has run out of memory.
            RuntimeError: another process has failed; the sentence says which, and by what. (Where the model is sharded
                the others cannot hear it: they wait for that process within the model, until torchrun ends them.)
        """
        if self.processes == 1:
            yield
            return
        failure: Exception | None = None
        self.settle(model)
        own = list(model.parameters())
        if self.sharded and not is_fsdp(model):
            self._summed_each_time = [p for p in own if p.requires_grad and not is_dtensor(p)]
        try:
            with drawn_apart(self.rank):
                yield
        except Exception as error:  # told to the other processes first, which wait
            if self.sharded:
                raise
            failure = error
        if self.sharded:
            self.settle(model)
            check_unchanged(model, own)
        trained = [parameter for parameter in own if parameter.requires_grad]
        numbers = {name: float(value) for name, value in metrics.items()} if failure is None else {}
        said = self.exchange((_told(failure), self.rank, numbers, [p.grad is not None for p in trained]))
        try:
            _raise_together(failure, [told for told, *_ in said])
        finally:
            failure = None  # its traceback holds this frame, and the graph that found no memory with it
        metrics.clear()
        for share in {rank: numbers for _, rank, numbers, _ in said}.values():  # tensor-parallel parts count once
            for name, value in share.items():
                metrics[name] = metrics.get(name, 0.0) + value
        someone = [any(found) for found in zip(*(found for *_, found in said), strict=True)]
        here = [p for p, has in zip(trained, someone, strict=True) if has and not is_dtensor(p)]
        sum_gradients(here, copies=self.processes // self.world)

    def settle(self, model: nn.Module) -> None:
        """Leave each process of a sharded model with its own shards alone.

        A forward pass without a backward pass leaves some parameters gathered: what an optimizer, a checkpoint or the
        next pass then finds in the model are not the shards, and an update makes them stale.
        """
        if self.sharded:
            give_up_gathered(model)

    def start_equal(self, model: nn.Module) -> None:
        """Give every process the main one's weights.

        Raises:
            ValueError: the processes have models of different parameters.
        """
        if self.processes == 1:
            return
        shape = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]
        if len(set(self.exchange(hashlib.sha256(repr(shape).encode()).hexdigest()))) > 1:
            raise ValueError(
                "the processes have different models: names, shapes, dtypes and what is trained must be the same in "
                "all of them. Build the model in the same way in each process"
            )
        send_from_main(tensor for tensor in (*model.parameters(), *model.buffers()) if not is_dtensor(tensor))


@contextmanager
def drawn_apart(rank: int) -> Iterator[None]:
    """Let processes that draw the same at random draw each its own in the block, and the same again after it."""
    key = int(torch.randint(2**62, ()))
    with fixed_randomness():
        seed_everything(key, "process", rank)
        yield


def _told(failure: Exception | None) -> str | None:
    """Return what the others hear of a failure; "" of one of memory, after which all go on together."""
    return None if failure is None else "" if is_out_of_memory(failure) else f"{type(failure).__name__}: {failure}"


def _raise_together(failure: Exception | None, told: Sequence[str | None]) -> None:
    """Raise in every process where one of them failed: its own failure, or one that tells of another's."""
    worse = [number for number, sentence in enumerate(told) if sentence]
    if failure is not None and (not worse or not is_out_of_memory(failure)):
        raise failure
    if worse:
        raise RuntimeError(f"process {worse[0]} of {len(told)} failed: {told[worse[0]]}")
    if "" in told:
        raise torch.OutOfMemoryError(f"process {told.index('')} of {len(told)} ran out of memory")


def sum_gradients(parameters: Sequence[nn.Parameter], *, copies: int = 1) -> None:
    """Sum `.grad` over all processes, in buckets; a process without one adds nothing.

    Args:
        parameters: the same in every process, each with a gradient in at least one of them.
        copies: how many processes hold the same gradient, where a model is spread over some.
    """
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    bucket: list[Tensor] = []
    size = 0
    for gradient in sorted((p.grad for p in parameters if p.grad is not None), key=lambda g: str(g.dtype)):
        if bucket and (bucket[0].dtype != gradient.dtype or size + gradient.nbytes > BUCKET_BYTES):
            _sum_bucket(bucket, copies)
            bucket, size = [], 0
        bucket.append(gradient)
        size += gradient.nbytes
    if bucket:
        _sum_bucket(bucket, copies)


def _sum_bucket(gradients: list[Tensor], copies: int) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    if copies > 1:
        flat /= copies
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])
