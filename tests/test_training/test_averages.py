"""Numbers of many steps as one."""

import pytest

from llmtune.training.averages import Averages


def test_each_number_as_its_meaning_asks():
    averages = Averages()
    averages.add(
        {
            "step": 3, "loss": 5.0, "kl": 1.0, "grad_norm": 2.0, "penalty": 1.0, "learning_rate": 0.5, "targets": 7,
            "tokens": 11, "seconds": 0.5, "flops_utilisation": 0.25, "tokens_per_second": 22.0, "peak_memory": 13,
            "eval_loss": 9.0, "note": "text",
        }
    )  # fmt: skip
    averages.add(
        {
            "step": 4, "loss": 2.0, "grad_norm": 4.0, "penalty": 4.0, "learning_rate": 0.25, "targets": 3,
            "tokens": 5, "seconds": 1.5, "flops_utilisation": 0.75, "tokens_per_second": 3.3, "peak_memory": 17,
        }
    )  # fmt: skip
    assert averages.steps == 2
    assert averages.take() == pytest.approx(
        {
            "loss": (5.0 * 7 + 2.0 * 3) / 10, "kl": 1.0, "grad_norm": 3.0, "penalty": 2.5, "learning_rate": 0.25,
            "tokens_per_second": 16 / 2.0, "flops_utilisation": (0.25 * 0.5 + 0.75 * 1.5) / 2, "peak_memory": 17,
        }
    )  # fmt: skip
    assert averages.take() == {}


def test_rows_of_a_step_of_ones_own():
    averages = Averages()
    for value in (2.0, 4.0):
        averages.add({"value": value})
    assert averages.take() == {"value": 3.0}
    averages.add({"loss": 2.0, "targets": 0, "tokens": 0, "seconds": 0.0})
    assert averages.take() == {}
