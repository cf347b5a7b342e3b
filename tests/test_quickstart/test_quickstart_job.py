"""The main job: what it writes, what it says, and what it refuses before any work."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from llmtune.adapters import LoRA, attach, detach, files
from llmtune.adapters.attach import adapter_names
from llmtune.quickstart import embedded_model, inputs, job, peak, report, ways
from llmtune.quickstart.inputs import row_inputs
from llmtune.quickstart.model import load_model, load_tokenizer
from llmtune.training import History

ROWS = [
    {"prompt": f"What is {number} plus {number}?", "response": f"The sum of the two is {2 * number}."}
    for number in range(11)
]
TINY = {"measured": 2, "fisher": 2, "steps": 3, "rows_per_step": 2}


@pytest.fixture(autouse=True)
def little_text(monkeypatch):
    """Enough of CPython's texts to run on."""
    monkeypatch.setattr(inputs, "NEW_CHARACTERS", 60_000)
    monkeypatch.setattr(inputs, "OLD_CHARACTERS", 60_000)


def write_rows(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A very short run of all four ways: (its folder, what it printed)."""
    out = tmp_path_factory.mktemp("quickstart") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "EMBEDDED", replace(job.EMBEDDED, **TINY))
        patch.setattr(inputs, "NEW_CHARACTERS", 60_000)
        patch.setattr(inputs, "OLD_CHARACTERS", 60_000)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            assert job.main(["--out", str(out)]) == 0
    return out, printed.getvalue()


def test_the_table_has_its_columns_and_a_line_for_each_way(finished):
    out, printed = finished
    lines = printed.splitlines()
    head = next(index for index, line in enumerate(lines) if line.startswith("way "))
    for column in (
        "new: before",
        "new: after",
        "old: before",
        "old: after",
        "trainable parameters",
        "seconds",
        "peak MiB",
    ):
        assert column in lines[head]
    titles = [line.split("  ")[0] for line in lines[head + 2 : head + 6]]
    assert titles == ["full fine-tuning", "LoRA", "LoRA + DistillToBase", "LoRA + EWC"]
    with (out / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["way"] for row in rows] == titles
    for row in rows:
        assert float(row["new: after"]) < float(row["new: before"])
        assert float(row["seconds"]) > 0
        assert 50 < float(row["peak MiB"]) < 4000
    assert len({row["new: before"] for row in rows}) == len({row["old: before"] for row in rows}) == 1
    trained = [int(row["trainable parameters"]) for row in rows]
    assert trained[0] > 5 * trained[1]
    assert trained[1] == trained[2] == trained[3]


def test_everything_is_where_the_job_says(finished):
    out, printed = finished
    names = [f"history-{way}.csv" for way in ways.WAYS]
    names += ["table.csv", "learning.png", "forgetting.png", "adapter-lora", "adapter-distill", "adapter-ewc"]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    for name in names:
        assert str(out / name) in printed
    for name in ("learning.png", "forgetting.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_every_way_starts_from_the_same_weights_and_sees_the_same_data(finished):
    out, _ = finished
    histories = {}
    for way in ways.WAYS:
        with (out / f"history-{way}.csv").open(newline="") as file:
            histories[way] = list(csv.DictReader(file))
    first = {way: float(rows[0].get("task_loss") or rows[0]["loss"]) for way, rows in histories.items()}
    assert max(first.values()) - min(first.values()) < 1e-5 * first["full"]
    for name in ("step", "tokens", "targets"):
        assert len({tuple(row[name] for row in rows) for rows in histories.values()}) == 1
    assert all(len(rows) == TINY["steps"] for rows in histories.values())
    rates = {way: float(rows[-1]["learning_rate"]) for way, rows in histories.items()}
    assert rates["full"] == pytest.approx(rates["lora"] / 10)
    assert "penalty" in histories["ewc"][0]
    assert "distillation" in histories["distill"][0]


def test_peft_loads_each_adapter_and_gives_the_same_logits(finished):
    from peft import PeftModel

    out, _ = finished
    ids = load_tokenizer(embedded_model())("The value of the expression is returned.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        bare = load_model(embedded_model())(input_ids=ids).logits
    for way in ("lora", "distill", "ewc"):
        ours = load_model(embedded_model())
        files.load(ours, out / f"adapter-{way}")
        theirs = PeftModel.from_pretrained(load_model(embedded_model()), out / f"adapter-{way}").eval()
        with torch.no_grad():
            wanted, got = ours.eval()(input_ids=ids).logits, theirs(input_ids=ids).logits
        assert float((wanted - got).abs().max()) <= 1e-5 * float(wanted.abs().max())
        assert float((wanted - bare).abs().max()) > 1e-2


def test_the_job_says_what_it_found_about_its_adapters(finished):
    _, printed = finished
    assert printed.count("loaded again 0.0e+00, merged ") == 3


def test_an_adapter_that_does_not_come_back_is_an_error(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(embedded_model())
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    sizes = replace(job.EMBEDDED, **TINY)
    found = row_inputs(tokenizer, data, rows=None, max_tokens=64, measured=2, fisher=2)

    def load_badly(model, folder):
        report = files.load(model, folder)
        with torch.no_grad():
            next(p for name, p in model.named_parameters() if "lora_b" in name).mul_(1.001)
        return report

    monkeypatch.setattr(ways, "load", load_badly)
    with pytest.raises(RuntimeError, match="does not give back the tuned model"):
        ways.run_way("lora", embedded_model(), found, sizes, before=(1.0, 1.0), seed=0, out=tmp_path, bar=False)


def test_the_check_ends_with_a_plain_merged_model_and_notices_a_wrong_merge(tmp_path, monkeypatch):
    ids = torch.tensor([[5, 7, 11, 13]])
    for wrong in (False, True):
        model = load_model(embedded_model())
        attach(model, LoRA(rank=4, alpha=8))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_b" in name:
                    parameter.add_(0.01)
        if wrong:
            monkeypatch.setattr(ways, "merge", lambda model, **_: detach(model))
            with pytest.raises(RuntimeError, match="does not give back the tuned model"):
                ways.save_and_check(model, embedded_model(), tmp_path / "wrong", {"input_ids": ids})
        else:
            ways.save_and_check(model, embedded_model(), tmp_path / "right", {"input_ids": ids})
            assert adapter_names(model) == []
            assert not any("lora" in name for name, _ in model.named_modules())


def test_own_rows_with_the_embedded_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "EMBEDDED", replace(job.EMBEDDED, **TINY))
    data = write_rows(tmp_path / "rows.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    arguments = ["--data", str(data), "--rows", "9", "--steps", "2", "--ways", "lora,full"]
    assert job.main(arguments) == 0
    printed = capsys.readouterr().out
    assert f"9 rows of {data}, 1 of them held out" in printed
    assert "2 steps of 2 packs" in printed
    assert printed.index("full fine-tuning ...") < printed.index("LoRA ...")
    assert (tmp_path / "llmtune-quickstart" / "adapter-lora" / "adapter_config.json").is_file()
    assert job.main(arguments) == 0
    assert "llmtune-quickstart holds files already: writing into llmtune-quickstart-2" in capsys.readouterr().out
    assert (tmp_path / "llmtune-quickstart-2" / "table.csv").is_file()


def test_without_matplotlib_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    result = ways.Result("full", (9.0, 5.0), (3.0, 4.0), 7, 1.0, 2**20, History([{"step": 1, "loss": 2.0}]), None, "")
    lines = report.write_files([result], tmp_path)
    assert [line for line in lines if "matplotlib is not installed" in line] == [lines[2]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history-full.csv", "table.csv"]


@pytest.mark.parametrize(
    ("rows", "learned"),
    [
        (ROWS, "The sum of the two is"),
        ([{"instruction": "Add.", "input": "2 and 3", "output": "Five."}] * 9, "Five."),
        ([{"text": "Words enough to learn from."}] * 9, "ords enough to learn from."),
    ],
)
def test_every_form_of_rows_becomes_labels(tmp_path, rows, learned):
    tokenizer = load_tokenizer(embedded_model())
    data = write_rows(tmp_path / "rows.jsonl", rows)
    found = row_inputs(tokenizer, data, rows=None, max_tokens=64, measured=2, fisher=2)
    assert len(found.old) == len(found.old_held_out) == 2
    labels = found.new[0]["labels"]
    assert learned in tokenizer.decode(labels[labels != -100])
    assert "What is" not in tokenizer.decode(labels[labels != -100])


def test_a_chat_template_is_used_where_there_is_one(tmp_path):
    tokenizer = load_tokenizer(embedded_model())
    data = write_rows(
        tmp_path / "rows.jsonl",
        [
            *ROWS[:8],
            {"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Hello to you."}]},
        ],
    )
    with pytest.raises(ValueError, match="no chat template"):
        row_inputs(tokenizer, data, rows=None, max_tokens=64, measured=2, fisher=2)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    found = row_inputs(tokenizer, data, rows=None, max_tokens=64, measured=2, fisher=2)
    text = "".join(tokenizer.decode(found.new[index]["input_ids"]) for index in range(len(found.new)))
    assert text.count("<user>") == text.count("<assistant>") == 8


def test_rows_that_are_too_long_are_counted(tmp_path):
    rows = [*ROWS, {"prompt": "Say it often.", "response": "again " * 200}]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    tokenizer = load_tokenizer(embedded_model())
    found = row_inputs(tokenizer, data, rows=None, max_tokens=64, measured=2, fisher=2)
    assert "(1 rows of more than 64 tokens left out)" in found.described[0]


def bad_folder(tmp_path: Path, **config) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


BAD = {
    "no such folder": (lambda p: ["--model", str(p / "nothing")], "must be a folder .* is no folder"),
    "no configuration": (lambda p: ["--model", str(bad_folder(p))], "has no config.json"),
    "an encoder": (
        lambda p: ["--model", str(bad_folder(p, model_type="bert", architectures=["BertForMaskedLM"]))],
        "must be a causal language model .* names BertForMaskedLM",
    ),
    "no tokenizer": (
        lambda p: ["--model", str(bad_folder(p, model_type="llama", architectures=["LlamaForCausalLM"]))],
        "no tokenizer can be read from",
    ),
    "no such file": (lambda p: ["--data", str(p / "rows.jsonl")], r"rows\.jsonl cannot be read: No such file"),
    "an empty file": (lambda p: ["--data", str(write_rows(p / "rows.jsonl", []))], r"rows\.jsonl holds no rows"),
    "no fields": (
        lambda p: ["--data", str(write_rows(p / "rows.jsonl", [*ROWS, {"prompt": "Why?"}]))],
        r'rows\.jsonl, line 12: field "response" is missing',
    ),
    "one row": (lambda p: ["--data", str(write_rows(p / "rows.jsonl", ROWS)), "--rows", "1"], "at least 2 rows"),
    "no rows": (
        lambda p: ["--data", str(write_rows(p / "rows.jsonl", ROWS)), "--rows", "0"],
        "--rows must be 1 or more",
    ),
    "rows without a file": (lambda p: ["--rows", "5"], "give the file with --data"),
    "no steps": (lambda p: ["--steps", "0"], "--steps must be 1 or more; got 0"),
    "no seed": (lambda p: ["--seed", "-1"], "--seed must be 0 or more; got -1"),
    "no rate": (lambda p: ["--learning-rate", "nan"], "--learning-rate must be a number above 0; got nan"),
    "no such way": (lambda p: ["--ways", "lora,distil"], r'got "distil"\. Did you mean "distill"'),
    "no way": (lambda p: ["--ways", ","], "--ways must name at least one"),
    "a used folder": (lambda p: ["--out", str(p)], "--out must be a new or empty folder"),
    "a file to write into": (lambda p: ["--out", str(p / "keep.txt")], r"keep\.txt is no folder"),
    "a folder under a file": (lambda p: ["--out", str(p / "keep.txt" / "out")], r"keep\.txt is no folder"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence_before_any_work(name, tmp_path, monkeypatch, capsys):
    (tmp_path / "keep.txt").write_text("kept")
    monkeypatch.chdir(tmp_path)
    arguments, sentence = BAD[name]
    given = arguments(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert job.main(given) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert len(shown.err.splitlines()) == 1
    assert re.search(sentence, shown.err)
    assert sorted(tmp_path.rglob("*")) == before


def test_damaged_weights_get_one_sentence(tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    for path in embedded_model().iterdir():
        (folder / path.name).write_bytes(
            path.read_bytes()[:5000] if path.suffix == ".safetensors" else path.read_bytes()
        )
    assert job.main(["--model", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "no causal language model can be read from" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems keep no mark that can be set back")
def test_peak_memory_counts_what_was_held_since_it_was_set_back():
    if not peak.start_peak():
        pytest.skip("this system does not let a process set its mark back")
    before = peak.read_peak()
    block = torch.ones(40_000_000)
    held = peak.read_peak()
    assert 150e6 < held - before < 250e6
    del block
    assert peak.read_peak() > held - 10e6  # the system counts pages in bunches
    peak.start_peak()
    assert peak.read_peak() < held - 100e6


@pytest.mark.slow
def test_the_whole_job_learns_and_shows_forgetting(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "llmtune.quickstart", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "out" / "table.csv").open(newline="") as file:
        rows = {
            row["way"]: {name: float(value) for name, value in row.items() if name != "way"}
            for row in csv.DictReader(file)
        }
    for row in rows.values():
        assert row["new: after"] < row["new: before"] / 10
        assert row["old: after"] > row["old: before"]
    for protected in ("LoRA + DistillToBase", "LoRA + EWC"):
        assert rows[protected]["old: after"] < rows["LoRA"]["old: after"]
