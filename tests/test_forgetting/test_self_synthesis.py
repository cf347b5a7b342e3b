import math
import warnings

import pytest
import torch

from llmtune.adapters.attach import attach, detach
from llmtune.adapters.config import LoRA
from llmtune.data.collate import collate_padded
from llmtune.data.mixing import MixedBatches
from llmtune.forgetting.self_synthesis import draw, self_synthesised
from llmtune.losses.causal_lm import causal_lm_loss
from llmtune.testing.models import tiny_bert, tiny_gpt2, tiny_llama, tiny_t5
from llmtune.testing.small import moved

PROMPTS = [[5, 7, 11], [3], [13, 17, 19], [4, 6]]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def slowly(model, prompts, n, *, max_tokens, temperature=1.0, generator, end):
    """The formula without a cache or a batch: the whole text again for each token, class by class."""
    uniform = torch.rand(n, max_tokens, dtype=torch.float64, generator=generator)
    rows = []
    for row in range(n):
        prompt, written = list(prompts[row % len(prompts)]), []
        while len(written) < max_tokens and written[-1:] != [end]:
            if model.config.is_encoder_decoder:
                inputs = {"input_ids": [prompt], "decoder_input_ids": [[0, *written]]}
            else:
                inputs = {"input_ids": [prompt + written]}
            with torch.no_grad():
                output = model(**{name: torch.tensor(value) for name, value in inputs.items()}, use_cache=False)
            p = (output.logits[0, -1].double() / temperature).softmax(-1).tolist()
            total, u = 0.0, float(uniform[row, len(written)])
            token = -1
            while total <= u:
                token += 1
                total += p[token]
            written.append(token)
        rows.append((prompt, written))
    return rows


@pytest.mark.parametrize(("make", "end"), [(tiny_llama, 2), (tiny_gpt2, 2), (tiny_t5, 1)])
@pytest.mark.parametrize("temperature", [1.0, 1.8])
def test_equals_the_loop_without_a_cache(make, end, temperature):
    options = {"max_tokens": 9, "temperature": temperature}
    model = make()
    rows = self_synthesised(model, PROMPTS, 7, generator=seeded(), rows_per_batch=3, **options)
    for row, (prompt, written) in zip(
        rows, slowly(model, PROMPTS, 7, generator=seeded(), end=end, **options), strict=True
    ):
        if make is tiny_t5:
            assert row == {"input_ids": prompt, "labels": written}
        else:
            assert row == {"input_ids": prompt + written, "labels": [-100] * len(prompt) + written}


def test_it_is_a_function_of_the_generator_whatever_the_batch():
    made = [
        self_synthesised(tiny_llama(), PROMPTS, 11, max_tokens=6, generator=seeded(seed), rows_per_batch=size)
        for seed, size in ((0, 1), (0, 16), (1, 16))
    ]
    assert made[0] == made[1] != made[2]
    torch.manual_seed(0)
    own = self_synthesised(tiny_llama(), PROMPTS, 11, max_tokens=6)
    torch.manual_seed(0)
    assert own == self_synthesised(tiny_llama(), PROMPTS, 11, max_tokens=6)


def test_at_temperature_1_tokens_come_as_often_as_the_model_says():
    """The first token after one prompt, 4000 times: chi-square over those expected five times or more."""
    model, n = tiny_llama(), 4000
    rows = self_synthesised(model, [[5, 7]], n, max_tokens=1, generator=seeded(), rows_per_batch=4000)
    counts = torch.bincount(torch.tensor([row["labels"][-1] for row in rows]), minlength=97).double()
    with torch.no_grad():
        expected = n * model(torch.tensor([[5, 7]])).logits[0, -1].double().softmax(-1)
    often = expected >= 5
    statistic = float(((counts - expected)[often] ** 2 / expected[often]).sum())
    cells = int(often.sum())
    assert cells > 20
    assert statistic < cells * (1 - 2 / (9 * cells) + 3.72 * math.sqrt(2 / (9 * cells))) ** 3


def test_the_mean_loss_is_an_unbiased_estimate_of_the_cross_entropy():
    """One token: the mean of -log p_student over own samples is sum p_base (-log p_student), to 4 standard errors."""
    base, student, n = tiny_llama(), tiny_llama(1), 3000
    rows = self_synthesised(base, [[5, 7]], n, max_tokens=1, generator=seeded(), rows_per_batch=3000)
    with torch.no_grad():
        found = causal_lm_loss(student, collate_padded(rows)).item()
        p, log_q = (f(m(torch.tensor([[5, 7]])).logits[0, -1].double()) for f, m in (
            (lambda z: z.softmax(-1), base), (lambda z: z.log_softmax(-1), student),
        ))  # fmt: skip
    expected = float(-(p * log_q).sum())
    spread = float(((p * log_q**2).sum() - expected**2).sqrt())
    assert abs(found - expected) < 4 * spread / math.sqrt(n)


def test_draws_by_hand():
    logits = torch.tensor([0.2, 0.5, 0.3]).log().expand(6, 3)
    u = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1.0], dtype=torch.float64)
    assert draw(logits, u).tolist() == [0, 0, 1, 1, 2, 2]
    never = torch.tensor([[-torch.inf, 0.0, -torch.inf], [-torch.inf, 0.0, -torch.inf]])
    assert draw(never, torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist() == [1, 1]
    with pytest.raises(ValueError, match="the model's predictions are not finite"):
        draw(torch.tensor([[torch.nan, 0.0]]), torch.zeros(1, dtype=torch.float64))


def test_the_adapters_are_off_and_everything_is_as_before():
    model = tiny_gpt2(dropout=0.5)
    base = self_synthesised(model, PROMPTS, 5, max_tokens=6, generator=seeded())
    torch.manual_seed(0)
    attach(model, LoRA(rank=3, alpha=50))
    moved(model, scale=1.0).train()
    state = torch.get_rng_state()
    assert self_synthesised(model, PROMPTS, 5, max_tokens=6, generator=seeded()) == base
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    adapted = self_synthesised(model, PROMPTS, 5, max_tokens=6, generator=seeded(), teacher=["default"])
    assert adapted != base
    detach(model, "default")


def test_texts_end_at_an_end_token():
    rows = self_synthesised(tiny_llama(), [[1]], 40, max_tokens=12, end=range(40), generator=seeded())
    for row in rows:
        written = row["labels"][1:]
        assert all(token >= 40 for token in written[:-1])
        assert written[-1] < 40 or len(written) == 12
    assert len({len(row["labels"]) for row in rows}) > 2
    free = self_synthesised(tiny_llama(), [[1]], 3, max_tokens=12, end=(), generator=seeded())
    assert [len(row["labels"]) for row in free] == [13] * 3


def test_rows_mix_with_new_ones():
    rows = self_synthesised(tiny_llama(), PROMPTS, 9, max_tokens=7, generator=seeded())
    new = [{"input_ids": [3] * 8, "labels": [3] * 8}] * 6
    mixed = MixedBatches(new, rows, 0.3)
    assert abs(len(mixed.replayed) * 7 - 6 * 7 * 3 / 7) <= 3.5


def test_nothing_old_is_called():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        self_synthesised(tiny_llama(), [[1]], 1, max_tokens=3, generator=seeded())


def test_bad_input():
    model = tiny_llama()
    with pytest.raises(ValueError, match="BertForMaskedLM cannot write texts"):
        self_synthesised(tiny_bert(), [[1]], 1, max_tokens=3)
    for prompts in ([], [[]], [1, 2]):
        with pytest.raises(ValueError, match="prompts must be lists of token ids, one or more each"):
            self_synthesised(model, prompts, 1, max_tokens=3)
    with pytest.raises(ValueError, match="n must be 1 or more; got 0"):
        self_synthesised(model, [[1]], 0, max_tokens=3)
    with pytest.raises(ValueError, match="max_tokens must be 1 or more; got 0"):
        self_synthesised(model, [[1]], 1, max_tokens=0)
    with pytest.raises(ValueError, match="temperature must be a finite number larger than 0; got 0"):
        self_synthesised(model, [[1]], 1, max_tokens=3, temperature=0)
    for wrong in (97, -1):
        with pytest.raises(ValueError, match=f"prompts hold token {wrong}, and the model knows 0 to 96"):
            self_synthesised(model, [[1], [5, wrong]], 1, max_tokens=3)
    with pytest.raises(ValueError, match=r"texts of up to 129 tokens, the longest prompt's 2 and .* model's 128 pos"):
        self_synthesised(model, [[1], [5, 7]], 1, max_tokens=127)
    with pytest.raises(ValueError, match="no adapter"):
        self_synthesised(model, [[1]], 1, max_tokens=3, teacher=["default"])
