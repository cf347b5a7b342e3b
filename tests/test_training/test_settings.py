"""The settings are checked when they are made."""

import pytest

from llmtune.training.settings import LoopSettings


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, "exactly one of max_steps and epochs; got max_steps=None, epochs=None"),
        ({"max_steps": 3, "epochs": 2}, "exactly one of max_steps and epochs; got max_steps=3, epochs=2"),
        ({"max_steps": 0}, "max_steps must be a whole number of at least 1; got 0"),
        ({"epochs": True}, "epochs must be a whole number of at least 1; got True"),
        ({"epochs": 1.5}, "epochs must be a whole number of at least 1; got 1.5"),
        ({"max_steps": 1, "rows_per_step": -1}, "rows_per_step must be a whole number of at least 1; got -1"),
        ({"max_steps": 1, "rows_per_micro_batch": 0}, "rows_per_micro_batch must be a whole number"),
        ({"max_steps": 1, "learning_rate": -1e-4}, "learning_rate must be a number of at least 0; got -0.0001"),
        ({"max_steps": 1, "learning_rate": float("nan")}, "learning_rate must be a number of at least 0; got nan"),
        ({"max_steps": 1, "warmup_steps": 0.1}, "warmup_steps must be a whole number of at least 0; got 0.1"),
        ({"max_steps": 1, "clip_norm": 0.0}, "clip_norm must be above 0"),
        ({"max_steps": 1, "schedule": "linaer"}, "schedule must be one of linear, .*; got 'linaer'"),
        ({"max_steps": 1, "precision": "bfloat16"}, "precision must be .*; got 'bfloat16'"),
        ({"max_steps": 1, "seed": -1}, "seed must be a whole number of at least 0; got -1"),
        ({"max_steps": 1, "save_every": 5}, "save_every needs a folder"),
    ],
)
def test_a_setting_out_of_range_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        LoopSettings(**changed)


def test_settings_are_frozen():
    settings = LoopSettings(max_steps=3)
    with pytest.raises(AttributeError):
        settings.seed = 1
    assert hash(settings) == hash(LoopSettings(max_steps=3))


def test_the_folder_does_not_change_the_result_and_the_seed_does(tmp_path):
    plain = LoopSettings(max_steps=3).what_changes_the_result()
    assert LoopSettings(max_steps=3, folder=tmp_path, save_every=1, keep=7).what_changes_the_result() == plain
    assert LoopSettings(max_steps=3, seed=1).what_changes_the_result() != plain
