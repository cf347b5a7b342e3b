import re

import pytest
import torch
from torch.nn import functional as F

from llmtune.regularizers.mixing import Pairs, mixup, mixup_loss, mixup_pairs
from llmtune.testing.close import assert_close


def test_shares_are_drawn_from_the_beta_distribution_row_by_row():
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)), whatever the alpha; no two rows share one."""
    for alpha in (0.05, 0.4, 1.0, 8.0):
        shares = mixup_pairs(torch.zeros(40009, dtype=torch.long), alpha=alpha).weights.double()
        assert bool(((shares >= 0) & (shares <= 1)).all())
        assert shares.mean().item() == pytest.approx(0.5, abs=0.01)
        assert shares.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.05)
    assert len(set(mixup_pairs(torch.zeros(11, dtype=torch.long), alpha=1.0).weights.tolist())) == 11


def test_partners_are_other_labelled_rows_each_once():
    targets = torch.tensor([3, -100, 0, 1, -100, 2, 0])
    for _ in range(20):
        pairs = mixup_pairs(targets, alpha=0.4)
        labelled = targets != -100
        rows = torch.arange(7)
        assert sorted(pairs.partners[labelled].tolist()) == rows[labelled].tolist()
        assert bool((pairs.partners[labelled] != rows[labelled]).all())
        assert pairs.partners[~labelled].tolist() == [1, 4]
        assert pairs.weights[~labelled].tolist() == [1.0, 1.0]


def test_draws_come_from_torchs_state_or_the_generator():
    targets = torch.arange(13)
    torch.manual_seed(3)
    first = mixup_pairs(targets, alpha=0.4)
    torch.manual_seed(3)
    again = mixup_pairs(targets, alpha=0.4)
    assert torch.equal(first.weights, again.weights)
    assert torch.equal(first.partners, again.partners)
    before = torch.get_rng_state()
    one, other = (mixup_pairs(targets, alpha=0.4, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one.weights, other.weights)
    assert torch.equal(one.partners, other.partners)
    assert torch.equal(before, torch.get_rng_state())


def test_the_mixture_and_its_padding():
    x = torch.randn(3, 5, 2, dtype=torch.float64)
    pairs = Pairs(torch.tensor([0.75, 0.5, 1.0]), torch.tensor([1, 2, 0]))
    assert_close(mixup(x, pairs)[0], 0.75 * x[0] + 0.25 * x[1])
    real = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [0, 1, 1, 1, 1]]).bool()
    expected = torch.stack([0.75 * x[0], 0.5 * x[1], x[2]])
    expected[0, :3] += 0.25 * x[1, :3]
    expected[0, 2:] -= 0.75 * x[0, 2:]
    expected[1, 1:] += 0.5 * x[2, 1:]
    expected[1, 3:] -= 0.5 * x[1, 3:]
    expected[2, 0] = 0
    x[~real] = torch.nan
    assert_close(mixup(x, pairs, real=real), expected)
    assert mixup(torch.zeros(3, 2, dtype=torch.bfloat16), pairs).dtype == torch.bfloat16


def test_the_loss_is_the_cross_entropy_with_mixed_targets():
    """Torch's own cross-entropy takes probabilities as targets."""
    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    targets = torch.tensor([3, -100, 0, 1, -100, 2, 0])
    pairs = mixup_pairs(targets, alpha=1.0)
    labelled = targets != -100
    hot = F.one_hot(targets.clamp(min=0), 5).double()
    soft = pairs.weights.double()[:, None] * hot + (1 - pairs.weights.double())[:, None] * hot[pairs.partners]
    assert_close(mixup_loss(logits, targets, pairs), F.cross_entropy(logits[labelled], soft[labelled]), rtol=1e-10)
    assert torch.autograd.gradcheck(lambda z: mixup_loss(z, targets, pairs), logits)
    with torch.no_grad():
        spoilt = logits.clone()
        spoilt[~labelled] = torch.nan
        assert mixup_loss(spoilt, targets, pairs).item() == mixup_loss(logits, targets, pairs).item()


def test_share_1_is_the_plain_loss():
    logits, targets = torch.randn(3, 5), torch.tensor([4, 0, 2])
    pairs = Pairs(torch.ones(3), torch.tensor([1, 2, 0]))
    assert_close(mixup_loss(logits, targets, pairs), F.cross_entropy(logits, targets), rtol=1e-6)


def test_bad_inputs():
    targets, logits = torch.tensor([0, 1, 2]), torch.zeros(3, 5)
    pairs = mixup_pairs(targets, alpha=1.0)
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"alpha must be a finite number larger than 0; got {alpha}"):
            mixup_pairs(targets, alpha=alpha)
    with pytest.raises(ValueError, match=re.escape("targets must be [B], one class a row; got [3, 2]")):
        mixup_pairs(torch.zeros(3, 2), alpha=1.0)
    for alone in (torch.tensor([1]), torch.tensor([1, -100, -100])):
        with pytest.raises(
            ValueError, match=f"mixup needs two rows or more with a label in a batch; got 1 of {len(alone)}"
        ):
            mixup_pairs(alone, alpha=1.0)
    with pytest.raises(ValueError, match=re.escape("expected logits [B, C], targets [B] and 3 rows")):
        mixup_loss(logits[:2], targets[:2], pairs)
    with pytest.raises(ValueError, match="target 1 is 7"):
        mixup_loss(logits, torch.tensor([0, 7, 2]), pairs)
    with pytest.raises(ValueError, match="a labelled row can only be mixed with a labelled row"):
        mixup_loss(logits, torch.tensor([0, -100, 2]), pairs)
    with pytest.raises(ValueError, match=re.escape("expected 3 rows, and real of the first two dimensions")):
        mixup(logits[:2], pairs)
