"""Parameters spread over processes: put there by `fully_shard`, gathered for a checkpoint, spread again from one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from llmtune.adapters.layer import AdapterLayer
from llmtune.errors import did_you_mean
from llmtune.modules import is_fsdp

SPLITS_DATA = ("dp", "dp_replicate", "dp_shard", "fsdp", "replicate", "shard")
SPLITS_MODEL = ("tp", "ep")


def shard(model: nn.Module, *, blocks: str | type[nn.Module] | None = None, mesh: Any = None) -> nn.Module:
    """Spread the model's parameters over all processes with torch's `fully_shard` (FSDP2), and return the model.

    Each block (a transformer layer) is gathered while it runs and given up afterwards; what is outside blocks, or
    shared with what is outside, stays gathered during a step. Every process gets the main one's weights. Call it after
    adapters have been attached and before the loop is made. The model stays the object it was; its parameters become
    `DTensor`s.

    Args:
        model: the same in every process, on this process's device.
        blocks: the class of the blocks, or its name; the default is what the Hugging Face model says may not be split
            (`_no_split_modules`).
        mesh: a `DeviceMesh` for `fully_shard`; the default is one over all processes.

    Raises:
        ValueError: there is no process group; or the model has no such block, or says nothing of its blocks.
    """
    from torch.distributed.fsdp import fully_shard

    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise ValueError(
            "sharding needs several processes: start the script by torchrun and call join_processes() first"
        )
    if blocks is None:
        names = set(getattr(model, "_no_split_modules", None) or ())
        if not names:
            raise ValueError(f"{type(model).__name__} does not name its blocks: give blocks=, their class or its name")
    else:
        names = {blocks if isinstance(blocks, str) else blocks.__name__}
    found = [module for module in model.modules() if type(module).__name__ in names and module is not model]
    if not found:
        kinds = {type(module).__name__ for module in model.modules()}
        near = did_you_mean(sorted(names)[0], kinds)
        raise ValueError(f"no module of {type(model).__name__} is a {' or '.join(sorted(names))}.{near}")
    send_from_main((*model.parameters(), *model.buffers()))
    options = {} if mesh is None else {"mesh": mesh}
    for module in _by_themselves(found, model):
        fully_shard(module, **options)
    fully_shard(model, **options)
    return model


def _by_themselves(blocks: Sequence[nn.Module], model: nn.Module) -> list[nn.Module]:
    """Return the blocks that share no parameter with the rest of the model, as an embedding does with a tied head."""
    places = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    inside = [Counter(id(p) for module in block.modules() for p in module._parameters.values()) for block in blocks]
    none = id(None)
    return [
        b for b, own in zip(blocks, inside, strict=True) if all(places[k] == n for k, n in own.items() if k != none)
    ]


def send_from_main(tensors: Iterable[Tensor]) -> None:
    """Give every process the main one's values, in place; tensors without values (on the meta device) stay so."""
    with torch.no_grad():
        for tensor in tensors:
            if not tensor.is_meta:
                dense = tensor.detach().contiguous()
                torch.distributed.broadcast(dense, src=0)
                if dense.data_ptr() != tensor.data_ptr():
                    tensor.copy_(dense)


def is_dtensor(tensor: Any) -> bool:
    """Return whether a tensor is spread over processes."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "full_tensor")


def is_sharded(model: nn.Module) -> bool:
    """Return whether any parameter of the model is spread over processes."""
    return any(is_dtensor(parameter) for parameter in model.parameters())


def data_dimensions(model: nn.Module) -> tuple[int, int]:
    """Return (which, of how many) share of the data this process takes where the model is spread over processes.

    Raises:
        ValueError: the mesh does not reach all processes, so that some would train a model of their own; or the name of
            one of its dimensions does not say whether it splits the data or the model.
    """
    meshes: list[Any] = [getattr(p, "device_mesh", None) for p in model.parameters() if is_dtensor(p)]
    mesh = max(meshes, key=lambda mesh: (not set(mesh.mesh_dim_names or ()) & {"ep", "efsdp"}, mesh.ndim))
    world = torch.distributed.get_world_size()
    if mesh.size() != world:
        raise ValueError(
            f"the model is spread over {mesh.size()} of {world} processes, and nothing would keep its copies equal: "
            "use a mesh over all of them, with a data-parallel dimension that fully_shard was given"
        )
    rank, count = 0, 1
    for dimension, splits in enumerate(_splits_data(model, mesh)):
        if splits:
            rank = rank * mesh.size(dimension) + mesh.get_local_rank(dimension)
            count *= mesh.size(dimension)
    return rank, count


def _splits_data(model: nn.Module, mesh: Any) -> list[bool]:
    """Return for each dimension of the mesh whether it splits the data; else it splits the model."""
    names = mesh.mesh_dim_names
    if names is None or mesh.ndim == 1:  # one kind of parallelism: FSDP's, or a tensor-parallel one
        return [is_fsdp(model)] * mesh.ndim
    unknown = [name for name in names if name not in SPLITS_DATA and name not in SPLITS_MODEL]
    if unknown:
        raise ValueError(
            f'the mesh has a dimension "{unknown[0]}": name those that split the data one of '
            f"{', '.join(SPLITS_DATA)}, and those that split the model one of {', '.join(SPLITS_MODEL)}"
        )
    return [name in SPLITS_DATA for name in names]


def check_spread(model: nn.Module) -> None:
    """Raise ValueError where the way in which the model is spread over processes cannot be trained."""
    asked = getattr(getattr(model, "config", None), "distributed_config", None)
    stages = getattr(asked, "pp_size", 1) or 1
    if stages > 1:
        raise ValueError(
            f"the model is cut into {stages} pipeline stages, which the loop cannot train: load it with "
            "DistributedConfig(fsdp_size=...) or tp_size=..."
        )
    for name, module in model.named_modules():
        if not isinstance(module, AdapterLayer):
            continue
        for parameter in module.base._parameters.values():
            if is_dtensor(parameter) and not all(_splits_data(model, getattr(parameter, "device_mesh", None))):
                raise ValueError(
                    f'adapter "{module.adapter_name}" stands on {name}, a tensor-parallel layer of which each process '
                    "has a part: spread a model with adapters by FSDP (shard, or DistributedConfig(fsdp_size=...))"
                )


def sum_over_shards(model: nn.Module) -> None:
    """Let FSDP sum gradients over processes where it would take their mean; the loop has scaled each already."""
    for module in model.modules():
        if is_fsdp(module):
            fsdp: Any = module
            fsdp.set_gradient_divide_factor(1.0)
            fsdp.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def give_up_gathered(model: nn.Module) -> None:
    """Let FSDP give up what it holds gathered, so that the model's parameters are its shards."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    for module in model.modules():
        if is_fsdp(module):
            fsdp: Any = module
            fsdp.reshard()


def check_unchanged(model: nn.Module, own: Sequence[nn.Parameter]) -> None:
    """Raise ValueError where the model's parameters are not its `own` of before: FSDP has lost track of them."""
    now = list(model.parameters())
    if len(now) != len(own) or any(one is not other for one, other in zip(now, own, strict=True)):
        raise ValueError(
            "a sharded model cannot be called with other parameters than its own (torch.func.functional_call): "
            "FSDP runs it with its own all the same. Train it data-parallel, without shard()"
        )


def whole(tensor: Any) -> Tensor:
    """Return a tensor that may be spread over processes as one; call it in all of them."""
    return tensor.detach().full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()


def gathered(state: Any, *, keep: bool) -> Any:
    """Return nested state with every tensor that is spread over processes whole, on the CPU; call it in all of them.

    Args:
        state: nested dicts and lists.
        keep: False gives empty tensors in their place, for the processes that do not write.
    """
    if is_dtensor(state):
        whole = state.detach().full_tensor()
        return whole.cpu() if keep else torch.empty(0)
    if isinstance(state, Mapping):
        return {key: gathered(value, keep=keep) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [gathered(value, keep=keep) for value in state]
    return state


def spread_like(value: Tensor, like: Tensor) -> Tensor:
    """Return a whole tensor spread as `like` is, where `like` is spread and of the same shape; else as it stands."""
    if not is_dtensor(like) or value.shape != like.shape or is_dtensor(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    kin: Any = like
    return distribute_tensor(value.to(kin.device), kin.device_mesh, kin.placements, src_data_rank=None)
