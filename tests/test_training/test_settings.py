"""The settings are checked when they are made."""

import dataclasses
import json

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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"clip_norm": "1"}, "clip_norm must be above 0, or None to measure without clipping; got '1'"),
        ({"clip_norm": True}, "clip_norm must be above 0"),
        ({"clip_norm": float("nan")}, "clip_norm must be above 0"),
        ({"spike_factor": 1.0}, r"spike_factor must be above 1, or None to look at none; got 1\.0"),
        ({"spike_factor": "3"}, "spike_factor must be above 1"),
        ({"on_bad_step": "ignore"}, 'on_bad_step must be "raise" or "skip"; got \'ignore\''),
        ({"learning_rate": True}, "learning_rate must be a number of at least 0; got True"),
        ({"weight_decay": "0.1"}, r"weight_decay must be a number of at least 0; got '0\.1'"),
        ({"fused": "yes"}, "fused must be True or False, or None; got 'yes'"),
        ({"activation_checkpointing": 1}, "activation_checkpointing must be True or False; got 1"),
        ({"save_frozen": None}, "save_frozen must be True or False; got None"),
        ({"background_save": "no"}, "background_save must be True or False; got 'no'"),
        ({"progress": 0}, "progress must be True or False; got 0"),
        ({"compile": 1}, "compile must be True, False or the name of a backend; got 1"),
        ({"compile": None}, "compile must be True, False or the name of a backend; got None"),
        ({"data_workers": -1}, "data_workers must be a whole number of at least 0; got -1"),
        ({"schedule_options": [1]}, r"schedule_options must be a dict of names to numbers or texts; got \[1\]"),
        ({"schedule_options": {"a": (1, 2)}}, "schedule_options must be a dict of names to numbers or texts"),
        ({"folder": 7}, "folder must be a path, or None to write nothing; got 7"),
        ({"folder": ""}, "folder must be a path, or None to write nothing; got ''"),
        ({"schedule": None}, "schedule must be one of linear"),
        ({"precision": None}, "precision must be"),
        ({"keep": 0}, "keep must be a whole number of at least 1; got 0"),
    ],
)
def test_what_is_of_another_kind_is_named(changed, message):
    with pytest.raises(ValueError, match=message):
        LoopSettings(max_steps=1, **changed)


def test_a_relative_folder_is_taken_from_where_the_settings_are_made(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    settings, home = LoopSettings(max_steps=1, folder="run"), LoopSettings(max_steps=1, folder="~/run")
    monkeypatch.chdir(tmp_path / "there")
    assert settings.folder == tmp_path / "here" / "run"
    assert home.folder == tmp_path / "home" / "run"
    assert dataclasses.replace(settings, seed=1).folder == settings.folder


def test_options_cannot_be_changed_from_outside():
    options = {"num_cycles": 2}
    settings = LoopSettings(max_steps=1, schedule="cosine_with_restarts", schedule_options=options)
    options["num_cycles"] = 3
    assert settings.schedule_options == {"num_cycles": 2}


def test_what_changes_the_result_is_json():
    settings = LoopSettings(max_steps=1, schedule="cosine_with_restarts", schedule_options={"num_cycles": 2})
    changes = settings.what_changes_the_result()
    assert json.loads(json.dumps(changes)) == changes
