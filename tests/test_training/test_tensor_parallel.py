"""Models that transformers has spread over processes, by tensor, expert and data parallelism, train as one."""

import pytest
import torch
from ranks_cases import ROWS, gone_through, off, weights, with_lora
from ranks_worker import run

from llmtune.testing.loop import uneven_rows
from llmtune.testing.models import tiny_llama
from llmtune.training.loop import TrainingLoop
from llmtune.training.settings import LoopSettings

WAYS = {
    "tp": (2, {"tp_plan": "auto", "tp_size": 2}),
    "fsdp": (2, {"fsdp_size": 2}),
    "hybrid": (4, {"fsdp_size": 2, "dp_replicate_size": 2}),
    "tp fsdp": (4, {"tp_size": 2, "fsdp_size": 2}),
    "tp twice": (4, {"tp_size": 2, "dp_replicate_size": 2}),
    "ep fsdp": (2, {"fsdp_size": 2, "ep_size": 2}),
    "ep tp": (2, {"tp_size": 2, "ep_size": 2}),
    "ep tp fsdp": (4, {"tp_size": 2, "fsdp_size": 2, "ep_size": 2}),
}


def qwen3():
    """Norms over the heads of each process: their gradient is summed by transformers."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=97, hidden_size=28, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=14, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config)


def mixture():
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        vocab_size=97, hidden_size=28, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=14, num_experts=4, num_experts_per_tok=2, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2, pad_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(config)


MODELS = {"llama": tiny_llama, "qwen3": qwen3, "mixture": mixture}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, build in MODELS.items():
        build().save_pretrained(folder / name)
    return folder


def loaded(path, spread):
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = DistributedConfig(**spread) if spread else None
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, distributed_config=config)


def loop_of(model, **more):
    run = {"max_steps": 4, "rows_per_step": 8, "rows_per_micro_batch": 2, "learning_rate": 1e-3, "progress": False,
           "eval_every": 2} | more  # fmt: skip
    return TrainingLoop(model, ROWS, settings=LoopSettings(**run), eval_data=uneven_rows(5))


def spread_out(rank, path, spread, lora):
    model = loaded(path, spread)
    return gone_through(loop_of(with_lora(model) if lora else model))


def compare(names, way, saved, folder, *, lora=False):
    world, spread = WAYS[way]
    for name in names:
        wanted = spread_out(0, saved / name, None, lora)
        found = run(world, spread_out, saved / name, spread, lora, folder=folder)
        for gradient, after, history in found:
            assert off(gradient, wanted[0]) < 2e-6, name
            assert off(after, wanted[1]) < 1e-5, name
            for row, other in zip(history, wanted[2], strict=True):
                assert row == pytest.approx(other, rel=2e-5), name
            assert history == found[0][2]


@pytest.mark.parametrize(("way", "names"), [("tp", ["qwen3"]), ("fsdp", ["llama"])])
def test_spread_by_transformers(way, names, saved, tmp_path):
    compare(names, way, saved, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "names"),
    [("tp", ["llama", "mixture"]), ("fsdp", ["qwen3", "mixture"]), ("hybrid", ["llama", "qwen3"]),
     ("tp fsdp", ["llama", "qwen3"]), ("tp twice", ["llama"]), ("ep fsdp", ["mixture"]), ("ep tp", ["mixture"]),
     ("ep tp fsdp", ["mixture"])],
)  # fmt: skip
def test_more_ways_of_spreading(way, names, saved, tmp_path):
    compare(names, way, saved, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fsdp", "hybrid"])
def test_lora_on_what_transformers_has_sharded(way, saved, tmp_path):
    compare(["llama"], way, saved, tmp_path, lora=True)


def part(rank, path, spread, folder, steps):
    """Train up to `steps` of six, and return the weights."""
    loop = loop_of(loaded(path, spread), folder=folder, save_every=2, max_steps=6)

    class Leave(Exception):
        pass

    taken = loop.training_step

    def stopping(batches):
        if loop.step == steps:
            raise Leave
        return taken(batches)

    loop.training_step = stopping
    try:
        loop.fit(resume=True)
    except Leave:
        return None
    return weights(loop.model)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [("tp", None), (None, "tp"), ("tp", "fsdp"), ("tp fsdp", "tp")])
def test_a_tensor_parallel_run_goes_on_otherwise(first, then, saved, tmp_path):
    def go(way, *arguments):
        if way is None:
            return part(0, saved / "llama", None, *arguments)
        world, spread = WAYS[way]
        return run(world, part, saved / "llama", spread, *arguments, folder=tmp_path)[0]

    wanted = part(0, saved / "llama", None, tmp_path / "whole", 6)
    go(first, tmp_path / "run", 5)
    assert off(go(then, tmp_path / "run", 6), wanted) < 1e-5


def refused(rank, path):
    said = []
    for work in (
        lambda: loop_of(with_lora(loaded(path, {"tp_size": 2}))),
        lambda: loop_of(loaded(path, {"pp_size": 2})),
        lambda: loop_of(loaded(path, {"tp_size": 2}), precision="fp16"),
    ):
        with pytest.raises(ValueError, match=r"spread|stages|sharded") as caught:
            work()
        said.append(str(caught.value))
    return said


def test_what_cannot_be_is_refused(saved, tmp_path):
    for adapters, stages, half in run(2, refused, saved / "llama", folder=tmp_path):
        assert adapters.startswith(
            'adapter "default" stands on model.layers.0.self_attn.q_proj, a tensor-parallel layer'
        )
        assert stages.startswith("the model is cut into 2 pipeline stages, which the loop cannot train")
        assert half.startswith("a sharded model cannot be trained in fp16")
