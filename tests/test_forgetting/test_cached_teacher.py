import pytest
import torch
from references import (
    CASES,
    CLASSES,
    OF_TOKENS,
    ROWS,
    assert_same_gradients,
    cross_entropies,
    divergence,
    gradients,
    logits_at_targets,
)

from llmtune.data.collate import collate_packed, collate_padded
from llmtune.data.mixing import MixedBatches
from llmtune.data.packing import pack
from llmtune.data.row_files import load_rows, save_rows
from llmtune.forgetting.cached_teacher import with_teacher
from llmtune.forgetting.distill_from_cache import DistillFromCache
from llmtune.forgetting.distill_to_model import DistillToModel
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.losses.classification import classification_loss
from llmtune.testing.close import assert_close
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama
from llmtune.training import LoopSettings, TrainingLoop


def cached(case, *, k=97, temperature=1.0, seed=1):
    """Return (student, rows with predictions of the model of another seed, collate, loss)."""
    make, rows, collate, loss = CASES[case]
    options = {} if case == "classifier" else {"k": k, "temperature": temperature}
    return make(), with_teacher(rows, make(seed), rows_per_batch=2, **options), collate, loss


@pytest.mark.parametrize("case", OF_TOKENS)
def test_what_is_kept_are_the_largest_log_probabilities_where_a_target_is(case):
    make, rows, _, loss = CASES[case]
    teacher = make(1)
    kept = with_teacher(rows, teacher, k=5, temperature=1.7, rows_per_batch=3)
    for row, plain in zip(kept, rows, strict=True):
        assert {name: row[name] for name in plain} == plain
        batch = collate_padded([plain])
        with torch.no_grad():
            logits, _ = logits_at_targets(teacher, batch, loss)
        values, indices = (logits / 1.7).log_softmax(-1).topk(5)
        there = row["teacher_indices"][:, 0] != -1
        labels = torch.as_tensor(plain["labels"])
        where = labels != -100
        if loss is causal_lm_loss:
            where[0] = False
        assert torch.equal(there, where)
        assert_close(row["teacher_logprobs"][there].double(), values, rtol=1e-4)
        assert torch.equal(row["teacher_indices"][there].long(), indices)
        assert row["teacher_temperature"][there].unique().tolist() == [pytest.approx(1.7)]
        assert row["teacher_logprobs"].dtype == torch.float32


@pytest.mark.parametrize("case", OF_TOKENS)
def test_with_all_classes_kept_it_is_distillation_to_the_model(case):
    student, rows, collate, loss = cached(case, temperature=2.0)
    options = {"strength": 0.7, "temperature": 2.0}
    total, parts = DistillFromCache(loss, **options)(student, collate(rows))
    found = gradients(student, total)
    other, theirs = DistillToModel(CASES[case][0](1), loss, **options)(student, collate(CASES[case][1]))
    assert_close(parts["distillation"], theirs["distillation"], rtol=1e-4)
    assert_same_gradients(found, gradients(student, other))
    assert DistillFromCache(loss, **options).count_targets(collate(rows)) == loss.count_targets(collate(CASES[case][1]))


@pytest.mark.parametrize("case", OF_TOKENS)
def test_a_bucket_holds_the_rest(case):
    student, rows, collate, loss = cached(case, k=3)
    batch = collate(rows)
    _, parts = DistillFromCache(loss, strength=1.0)(student, batch)
    with torch.no_grad():
        ours, theirs = (logits_at_targets(m, batch, loss)[0].softmax(-1) for m in (student, CASES[case][0](1)))
    order = theirs.argsort(-1, descending=True)
    q, p = (
        torch.cat([x[:, :3], x[:, 3:].sum(-1, keepdim=True)], -1)
        for x in (ours.gather(1, order), theirs.gather(1, order))
    )
    assert_close(parts["distillation"].double(), (p * (p / q).log()).sum(-1).mean(), rtol=1e-3)


def test_no_shuffle_can_part_a_row_from_its_predictions():
    """The teacher's own loss of its own predictions is 0 in any order, batch and packing; of others' it is not."""
    teacher = tiny_llama(1)
    rows = with_teacher(ROWS, teacher, k=97)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(3)).tolist()
    loss = DistillFromCache(strength=1.0)
    for collate in (collate_packed, collate_padded):
        for some in (order, order[:2], order[3:]):
            assert loss(teacher, collate([rows[at] for at in some]))[1]["distillation"].item() < 1e-6
    swapped = []
    for row in rows:
        there, moved = row["teacher_indices"][:, 0] >= 0, dict(row)
        for name in ("teacher_logprobs", "teacher_indices"):
            moved[name] = row[name].clone()
            moved[name][there] = row[name][there].roll(1, 0)
        swapped.append(moved)
    assert loss(teacher, collate_padded(swapped))[1]["distillation"].item() > 1e-3


def test_the_same_whatever_the_batch_size_and_the_side_of_the_padding():
    student = tiny_llama()
    kept = [with_teacher(ROWS, tiny_llama(1), k=4, rows_per_batch=size) for size in (1, 5)]
    values = [DistillFromCache(strength=1.0)(student, collate_packed(rows))[0].item() for rows in kept]
    values += [
        DistillFromCache(strength=1.0)(student, collate_padded(kept[0], side=side, pad_to_multiple_of=8))[0].item()
        for side in ("left", "right")
    ]
    assert values == pytest.approx([values[0]] * 4, rel=1e-5)


def test_packs_keep_their_documents_apart():
    whole = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in ROWS]
    kept, single = with_teacher(pack(whole, 40), tiny_llama(1), k=7), with_teacher(whole, tiny_llama(1), k=7)
    assert len(kept) < len(single)
    student, loss = tiny_llama(), DistillFromCache(strength=1.0)
    assert_close(loss(student, collate_packed(kept))[0], loss(student, collate_packed(single))[0], rtol=1e-5)


def test_logits_are_never_all_held(monkeypatch):
    from llmtune.losses import chunked

    monkeypatch.setitem(chunked.CHUNK_BYTES, "cpu", 1)
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.ndim == 2 and out.shape[1] == 97:
                largest.append(out.shape[0])
            return out

    long = [{"input_ids": list(range(3, 83)), "labels": list(range(3, 83))}] * 3
    with Watch():
        rows = with_teacher(long, tiny_llama(1), k=4)
        made = max(largest)
        largest.clear()
        DistillFromCache(strength=1.0)(tiny_llama(), collate_packed(rows))[0].backward()
    assert 0 < made <= 64
    assert 0 < max(largest) <= 97  # the head's own weight is [97, 28], its gradient of rows at most 64


def test_the_teacher_runs_in_eval_mode_and_leaves_no_trace():
    teacher = tiny_gpt2(1, dropout=0.5).train()
    state = torch.get_rng_state()
    one, other = with_teacher(ROWS, teacher, k=3), with_teacher(ROWS, tiny_gpt2(1), k=3)
    assert torch.equal(state, torch.get_rng_state())
    assert teacher.training
    assert all(torch.equal(a["teacher_logprobs"], b["teacher_logprobs"]) for a, b in zip(one, other, strict=True))


def test_rows_without_predictions_count_0_and_batches_add_up():
    student, rows, _, loss = cached("llama packed", k=6)
    mixed = MixedBatches(ROWS[:3], rows[3:], 0.4)
    everything = [mixed[at] for at in range(len(mixed))]
    distill = DistillFromCache(loss, strength=0.7)
    for collate in (collate_packed, collate_padded):
        batch = collate(everything)
        whole, parts = distill(student, batch)
        alone = collate([row for row in everything if row["teacher_indices"].max() >= 0])
        share = distill.count_targets(alone) / distill.count_targets(batch)
        _, theirs = distill(student, alone)
        assert_close(parts["distillation"], theirs["distillation"] * share, rtol=1e-5)
        total = sum(distill(student, collate([row]))[0] * distill.count_targets(collate([row])) for row in everything)
        assert_close((total / distill.count_targets(batch)).detach(), whole.detach(), rtol=1e-5)
    new, parts = distill(student, collate_packed(everything[:3]))
    assert parts["distillation"].item() == 0.0
    assert new.item() == pytest.approx(causal_lm_loss(student, collate_packed(ROWS[:3])).item(), rel=1e-6)
    new.backward()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_classifier_that_has_grown_is_held_on_its_old_classes(temperature):
    """Learning without forgetting: the old model knew 3 classes, another 5, and the head now has 7."""
    student, rows = tiny_bert(labels=7), [*with_teacher(CLASSES, tiny_bert(1, labels=3))]
    rows[2:4] = with_teacher(CLASSES[2:4], tiny_bert(2, labels=5))
    batch = collate_padded(rows)
    total, parts = DistillFromCache(classification_loss, strength=0.7, temperature=temperature)(student, batch)
    found = gradients(student, total)
    ours, targets = logits_at_targets(student, batch, classification_loss)
    expected = 0.0
    for at, row in enumerate(row for row in rows if row["labels"] != -100):
        known = row["teacher_logits"].double()
        expected = expected + divergence(ours[at, : len(known)], known, temperature)
    whole = cross_entropies(ours, targets).mean() + 0.7 * expected / len(targets)
    assert_close(parts["distillation"].double(), expected.detach() / len(targets), rtol=1e-5)
    assert_same_gradients(found, gradients(student, whole.float()))


def test_saved_and_loaded_the_loss_is_the_same_to_the_bit(tmp_path):
    for case in ("llama packed", "classifier"):
        student, rows, collate, loss = cached(case, k=4)
        save_rows(rows, tmp_path / "rows.safetensors")
        loaded = load_rows(tmp_path / "rows.safetensors")
        values = [DistillFromCache(loss, strength=1.0)(student, collate(some))[0].item() for some in (rows, loaded)]
        assert values[0] == values[1]


@pytest.mark.parametrize("case", ["llama packed", "classifier"])
def test_in_the_loop(case):
    student, rows, collate, loss = cached(case, k=4)
    settings = LoopSettings(max_steps=3, rows_per_step=4, rows_per_micro_batch=2, learning_rate=1e-2, progress=False)
    mixed = MixedBatches(CASES[case][1], rows, 0.5)
    distill = DistillFromCache(loss, strength=2.0)
    history = TrainingLoop(student, mixed, settings=settings, collate=collate, loss=distill).fit()
    assert history[0]["loss"] == pytest.approx(history[0]["task_loss"] + 2.0 * history[0]["distillation"], rel=1e-5)
    assert max(row["distillation"] for row in history) > 0


def test_under_autocast_in_bfloat16():
    student, rows, collate, loss = cached("llama packed", k=4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = DistillFromCache(loss, strength=0.5)(student, collate(rows))
    assert total.dtype == torch.float32
    total.backward()


def test_bad_input():
    teacher, classifier = tiny_llama(1), tiny_bert(labels=3)
    with pytest.raises(ValueError, match="k is needed for a language model"):
        with_teacher(ROWS, teacher)
    with pytest.raises(ValueError, match="k and temperature are for language models"):
        with_teacher(CLASSES, classifier, k=3)
    with pytest.raises(ValueError, match="k and temperature are for language models"):
        with_teacher(CLASSES, classifier, temperature=2.0)
    with pytest.raises(ValueError, match="k must be between 1 and the vocabulary's size 97; got 98"):
        with_teacher(ROWS, teacher, k=98)
    with pytest.raises(ValueError, match="rows_per_batch must be 1 or more; got 0"):
        with_teacher(ROWS, teacher, k=3, rows_per_batch=0)
    with pytest.raises(ValueError, match="temperature must be a finite number larger than 0; got 0"):
        with_teacher(ROWS, teacher, k=3, temperature=0.0)
    with pytest.raises(ValueError, match="keeping a teacher's predictions needs integer labels"):
        with_teacher([{"input_ids": [3, 4]}], teacher, k=3)
    loss, rows = DistillFromCache(strength=1.0), with_teacher(ROWS, teacher, k=3)
    with pytest.raises(ValueError, match=r"needs teacher_logprobs, .* and it has no field of a teacher: make its rows"):
        loss(tiny_llama(), collate_padded(ROWS))
    with pytest.raises(ValueError, match="needs teacher_logits for this model, and it has teacher_indices"):
        DistillFromCache(classification_loss, strength=1.0)(
            classifier, collate_padded([{**r, "labels": 1} for r in rows])
        )
    with pytest.raises(ValueError, match="made at temperature 1, and the loss has temperature 2"):
        DistillFromCache(strength=1.0, temperature=2.0)(tiny_llama(), collate_padded(rows))
    batch = collate_padded(with_teacher(CLASSES, tiny_bert(labels=5)))
    with pytest.raises(ValueError, match="teacher_logits are of 5 classes, and the model has only 3"):
        DistillFromCache(classification_loss, strength=1.0)(classifier, batch)
    batch = {**collate_padded(rows), "teacher_temperature": torch.ones(2, 3)}
    with pytest.raises(ValueError, match=r"teacher_temperature \[2, 3\] does not fit labels"):
        loss(tiny_llama(), batch)
    with pytest.raises(
        ValueError, match=r'"teacher_logprobs" must keep as many classes a place .* make all with one k'
    ):
        collate_padded([rows[0], with_teacher(ROWS[:1], teacher, k=4)[0]])
    with pytest.raises(ValueError, match=r'field "teacher_logits" must have one value a token to be packed'):
        collate_packed([{"input_ids": [3], "teacher_logits": torch.ones(3)}])


@pytest.mark.parametrize("k", [None, 3])
def test_a_teacher_whose_logits_are_nan_is_refused(k):
    teacher = tiny_bert(labels=3) if k is None else tiny_llama()
    with torch.no_grad():
        next(teacher.parameters()).fill_(torch.nan)
    with pytest.raises(ValueError, match="the teacher's predictions for row 0 are not finite"):
        with_teacher(CLASSES if k is None else ROWS, teacher, k=k)
