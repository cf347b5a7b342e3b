"""Files from strangers: each is refused in one sentence, and none of them runs anything or leads out of its folder."""

import ast
import hashlib
import json
import os
import pickle
import struct
import sys
import threading
from pathlib import Path

import pytest
import torch

from llmtune.adapters import LoRA, attach
from llmtune.adapters.files import load, save
from llmtune.errors import CheckpointError
from llmtune.testing.models import tiny_llama
from llmtune.training.checkpoint import newest_valid, write_checkpoint
from llmtune.training.checkpoint_folder import list_checkpoints
from llmtune.training.checkpoint_read import read_checkpoint, verify_checkpoint

ROOT = Path(__file__).parents[2]
NAMES = ("tensors.safetensors", "state.json", "manifest.json")
TENSORS, STATE, MANIFEST = NAMES


class Payload:
    """What unpickles by making a folder."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


class Scene:
    """A run of two checkpoints, the newer of which a stranger has had in hand.

    Attributes:
        path: the newer checkpoint.
        marker: what exists once a payload has run.
        outside: a file beside the run whose content no reader may see.
    """

    def __init__(self, folder):
        self.run, self.marker, self.outside = folder / "run", folder / "marker", folder / "outside"
        for step in (1, 2):
            state = {"step": step, "a": torch.arange(7.0), "b": {"c": torch.ones(3)}, "x": 0.5}
            self.path = write_checkpoint(self.run, step, state, keep=2, files=self.files)
        self.outside.write_bytes(b"secret")

    @staticmethod
    def files(folder):
        (folder / "adapter").mkdir()
        (folder / "adapter" / "config.json").write_text("{}")

    def pickled(self):
        return pickle.dumps(Payload(self.marker))

    def zipped(self):
        """A file as torch.save writes it, with a payload."""
        path = self.outside.with_name("zip")
        torch.save({"a": torch.ones(3), "b": Payload(self.marker)}, path)
        return path.read_bytes()

    def put(self, name, content):
        """Replace a file, with a manifest that agrees."""
        (self.path / name).write_bytes(content)
        self.entry(name, size=len(content), sha256=hashlib.sha256(content).hexdigest())

    def entry(self, name, **entry):
        """Change or add a manifest's entry."""
        manifest = json.loads((self.path / MANIFEST).read_text())
        manifest["files"][name] = manifest["files"].get(name, {}) | entry
        (self.path / MANIFEST).write_text(json.dumps(manifest))

    def outside_entry(self, name):
        """Have the manifest name a file, with the size and hash of the one outside."""
        self.entry(name, size=6, sha256=hashlib.sha256(b"secret").hexdigest())

    def state(self, text):
        self.put(STATE, text.encode())

    def marks(self, **changed):
        values = json.loads((self.path / STATE).read_text())
        self.state(json.dumps(values | changed))

    def state_of_a_list(self):
        self.state(json.dumps([json.loads((self.path / STATE).read_text())]))

    def tensors(self, header, data=b"\0" * 40, length=None):
        header = header if isinstance(header, bytes) else json.dumps(header).encode()
        self.put(TENSORS, struct.pack("<Q", len(header) if length is None else length) + header + data)


def tensor(start, end, shape=(7,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def link(path, target):
    path.unlink() if path.is_file() else os.rename(path, path.with_name("moved"))
    path.symlink_to(target)


def link_out(scene):
    content = (scene.path / STATE).read_bytes()
    scene.outside.write_bytes(content)
    link(scene.path / STATE, scene.outside)


def link_the_folder(scene):
    moved = scene.outside.with_name("elsewhere")
    scene.path.rename(moved)
    scene.path.symlink_to(moved)


def link_a_parent(scene):
    moved = scene.outside.with_name("elsewhere")
    (scene.path / "adapter").rename(moved)
    (scene.path / "adapter").symlink_to(moved)


def named_pipe(scene):
    (scene.path / STATE).unlink()
    os.mkfifo(scene.path / STATE)


def named_pipe_of_that_size(scene):
    scene.entry("pipe", size=0, sha256=hashlib.sha256(b"").hexdigest())
    os.mkfifo(scene.path / "pipe")


def folder_for_a_file(scene):
    (scene.path / STATE).unlink()
    (scene.path / STATE).mkdir()


def device(scene):
    scene.entry("zero", size=0, sha256=hashlib.sha256(b"").hexdigest())
    (scene.path / "zero").symlink_to("/dev/zero")


def twice(scene):
    text = (scene.path / MANIFEST).read_text()
    (scene.path / MANIFEST).write_text(text.replace('"format": 1', '"format": 1, "format": 1'))


def manifest(text):
    return lambda scene: (scene.path / MANIFEST).write_text(text)


DEEP = "[" * 100_000 + "]" * 100_000
DIGEST = "0" * 64

REFUSED = {
    "a pickle for tensors": (lambda s: s.put(TENSORS, s.pickled()), "tensors.safetensors cannot be read: Safetensor"),
    "a zip of torch.save for tensors": (lambda s: s.put(TENSORS, s.zipped()), "tensors.safetensors cannot be read"),
    "a pickle for the state": (lambda s: s.put(STATE, s.pickled()), "state.json is damaged: that is no JSON"),
    "a pickle for the manifest": (lambda s: (s.path / MANIFEST).write_bytes(s.pickled()), "manifest.json is damaged"),
    "a header of 2^63 bytes": (lambda s: s.tensors({}, length=1 << 63), "header too large"),
    "a header longer than the file": (lambda s: s.tensors({}, length=1000), "tensors.safetensors cannot be read"),
    "a header that is no JSON": (lambda s: s.tensors(b"{" + b'"a":' * 50), "invalid JSON in header"),
    "a header nested deep": (lambda s: s.tensors(DEEP.encode()), "invalid JSON in header"),
    "a header of 20 000 entries": (
        lambda s: s.tensors({str(i): tensor(0, 0, (0,)) for i in range(20_000)}, b""), "is not in the file of tensors",
    ),
    "tensors that overlap": (lambda s: s.tensors({"a": tensor(0, 28), "b.c": tensor(12, 40)}), "invalid offset"),
    "a tensor beyond the end": (lambda s: s.tensors({"a": tensor(0, 1 << 40, (1 << 38,))}), "tensors.safetensors c"),
    "a shape that overflows": (lambda s: s.tensors({"a": tensor(0, 40, (1 << 62, 1 << 62))}), "overflow"),
    "a shape of 2^64": (lambda s: s.tensors({"a": tensor(0, 0, (0, 2**64 - 1))}, b""), "tensors.safetensors cannot"),
    "an unknown dtype": (lambda s: s.tensors({"a": tensor(0, 28, dtype="EVIL")}), "invalid JSON in header"),
    "an absolute path": (lambda s: s.outside_entry(str(s.outside)), "only plain paths inside the folder are read"),
    "a path upwards": (lambda s: s.outside_entry("../../outside"), "only plain paths inside the folder are read"),
    "a path down and up": (lambda s: s.outside_entry("adapter/../../../outside"), "only plain paths inside"),
    "a path with a dot": (lambda s: s.outside_entry("./state.json"), "only plain paths inside the folder are read"),
    "a path with two slashes": (lambda s: s.outside_entry("adapter//config.json"), "only plain paths inside"),
    "a path with backslashes": (lambda s: s.outside_entry("..\\..\\outside"), "only plain paths inside the folder"),
    "a path with a drive": (lambda s: s.outside_entry("C:outside"), "only plain paths inside the folder are read"),
    "an empty path": (lambda s: s.outside_entry(""), "only plain paths inside the folder are read"),
    "a path with a zero byte": (lambda s: s.outside_entry("state.json\0"), "only plain paths inside the folder are"),
    "a path that writes to the terminal": (lambda s: s.outside_entry("\x1b[2Jx"), r"only plain paths inside"),
    "a path of half a character": (lambda s: s.outside_entry("\ud800"), "only plain paths inside the folder are read"),
    "a path of a megabyte": (lambda s: s.outside_entry("x" * (1 << 20)), "File name too long"),
    "a link out of the folder": (link_out, "state.json is missing, or is no regular file"),
    "a folder that is a link out": (link_a_parent, "adapter is missing, or is a link or no folder"),
    "a checkpoint that is a link": (link_the_folder, "step-00000002 is missing, or is a link or no folder"),
    "a link to a device": (device, "zero is missing, or is no regular file"),
    "a pipe nobody writes to": (named_pipe, "state.json is missing, or is no regular file"),
    "a pipe of the size expected": (named_pipe_of_that_size, "pipe is missing, or is no regular file"),
    "a folder for a file": (folder_for_a_file, "state.json is missing, or is no regular file"),
    "a file inside a file": (lambda s: s.outside_entry("state.json/x"), "state.json is missing, or is a link or no f"),
    "no file of tensors": (manifest('{"format": 1, "files": {}}'), "must describe tensors.safetensors, state.json"),
    "a manifest that names itself": (lambda s: s.outside_entry(MANIFEST), "state.json and not itself"),
    "a manifest of a list": (manifest("[1, 2]"), 'must be an object of "format" and "files"'),
    "a manifest of files in a list": (manifest('{"format": 1, "files": []}'), 'must be an object of "format"'),
    "a later format": (manifest('{"format": 2, "files": {}}'), "is of format 2; this version reads 1"),
    "a format that is true": (manifest('{"format": true, "files": {}}'), "is of format True; this version reads 1"),
    "a manifest nested deep": (manifest(DEEP), "manifest.json is damaged: the JSON is nested too deeply"),
    "a manifest of 17 MB": (manifest(" " * 17_000_000), r"JSON of 16777217 bytes is more than the 16777216 allowed"),
    "a manifest in UTF-16": (lambda s: (s.path / MANIFEST).write_bytes("{}".encode("utf-16")), "that is no JSON"),
    "a key twice": (twice, "has the key 'format' twice in one object"),
    **{
        f"a size of {size!r}": (lambda s, size=size: s.entry(STATE, size=size), "must give 'state.json' a \"size\"")
        for size in (1 << 63, -1, 2.0, True, "12", None, [1])
    },
    "a size of 2^62": (lambda s: s.entry(STATE, size=1 << 62), r"it has \d+ bytes and must have 4611686018427387904"),
    "a size of NaN": (lambda s: s.entry(STATE, size=float("nan")), "the JSON holds NaN, which is no JSON"),
    "a size of 5000 digits": (
        lambda s: (s.path / MANIFEST).write_text('{"format": 1, "files": ' + "9" * 5000 + "}"), "manifest.json is dam",
    ),
    **{
        f"a hash of {sha!r:.12}": (lambda s, sha=sha: s.entry(STATE, sha256=sha), "must give 'state.json' .*sha256")
        for sha in (7, None, [], "0" * 63, "0" * 63 + "G", DIGEST + "\n", "\u0660" * 64)
    },
    "an entry with more in it": (lambda s: s.entry(STATE, run="x"), "must give 'state.json' a \"size\""),
    "a state nested deep": (lambda s: s.state('{"a": ' + DEEP + "}"), "state.json is damaged: the JSON is nested too"),
    "a state nested 200 deep": (lambda s: s.state('{"a": ' + "[" * 200 + "]" * 200 + "}"), "nested more than 100 deep"),
    "a state of a list": (Scene.state_of_a_list, "state.json must hold an object; it holds a list"),
    "a state with Infinity": (lambda s: s.marks(x=float("inf")), "the JSON holds Infinity, which is no JSON"),
    "a state with 1e999": (
        lambda s: s.state((s.path / STATE).read_text().replace("0.5", "1e999")), "x is a number that is not finite",
    ),
    "a state with a key twice": (lambda s: s.state('{"a": 1, "a": 2}'), "has the key 'a' twice in one object"),
    "a mark of a tensor that is not there": (
        lambda s: s.marks(y={"__tensor__": "z"}), "y is to be the tensor 'z', which is not in the file of tensors",
    ),
    "a mark of a tensor twice": (
        lambda s: s.marks(y={"__tensor__": "a"}), "y is to be the tensor 'a', which is named twice",
    ),
    "a mark in a mark": (lambda s: s.marks(a={"__tensor__": {"__tensor__": "a"}}), "a holds a mark of the file format"),
    "a mark beside something": (lambda s: s.marks(a={"__tensor__": "a", "b": 1}), "a holds a mark of the file format"),
    "a mark of a number that is none": (lambda s: s.marks(y={"__float__": "1"}), "y is to be the number '1'"),
    "a tensor that no mark names": (lambda s: s.marks(a=1), "the tensor 'a' stands nowhere in the state"),
}  # fmt: skip


def in_time(call, *arguments):
    """Return what a call returns or raises; where it takes longer than a minute it waits for something."""
    result = []

    def run():
        try:
            result.append(call(*arguments))
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)
    assert result, "it waits for ever"
    return result[0]


@pytest.mark.parametrize("case", REFUSED)
def test_a_strangers_checkpoint_is_refused_in_one_sentence(tmp_path, case):
    change, sentence = REFUSED[case]
    scene = Scene(tmp_path)
    change(scene)
    refused = in_time(read_checkpoint, scene.path)
    with pytest.raises(CheckpointError, match=sentence):
        raise refused
    assert "\n" not in str(refused)
    assert "secret" not in str(refused)
    assert str(refused).isprintable()
    path, state, reasons = in_time(newest_valid, scene.run)
    assert (path.name, state["step"], reasons) == ("step-00000001", 1, [str(refused)])
    assert isinstance(in_time(verify_checkpoint, scene.path), CheckpointError | None)
    assert not scene.marker.exists()


def test_the_payload_would_have_run(tmp_path):
    pickle.loads(Scene(tmp_path).pickled())
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "training_args.bin", "rng_state.pth", "adapter/pytorch_model.bin"])
def test_a_pickle_that_lies_beside_is_not_read(tmp_path, name):
    scene = Scene(tmp_path)
    (scene.path / name).write_bytes(scene.pickled())
    assert read_checkpoint(scene.path)["step"] == 2
    scene.put(name, scene.zipped())  # named in the manifest it is hashed, and that is all
    assert newest_valid(scene.run)[1]["step"] == 2
    assert not scene.marker.exists()


@pytest.mark.parametrize(
    "name",
    ["step-0000009", "step-000000009", "step-00000009 ", "Step-00000009", "step-" + 7 * "\u0660" + "\u0669",
     "step-00000009\n", "step--0000009", "step-" + "9" * 30, ".tmp-step-00000009", "step-00000009.bak"],
)  # fmt: skip
def test_what_is_not_named_as_we_name_is_no_checkpoint(tmp_path, name):
    scene = Scene(tmp_path)
    scene.path.rename(scene.run / name)
    assert [path.name for path in list_checkpoints(scene.run)] == ["step-00000001"]
    path, _, reasons = newest_valid(scene.run)
    assert (path.name, reasons) == ("step-00000001", [])


@pytest.mark.parametrize("name", ["step-00000001/../../x", "../x", "/x"])
def test_a_step_is_a_number(tmp_path, name):
    with pytest.raises(ValueError, match="step must be a whole number"):
        write_checkpoint(tmp_path / "run", name, {}, keep=1)
    assert list(tmp_path.iterdir()) == []


# Adapters, which people take from strangers far more often.


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    model = tiny_llama()
    attach(model, LoRA(rank=3, alpha=5))
    return save(model, tmp_path_factory.mktemp("adapter"))


class Adapter(Scene):
    """A saved adapter in a stranger's hands."""

    def __init__(self, folder, saved):
        self.path, self.marker, self.outside = folder / "adapter", folder / "marker", folder / "outside"
        self.path.mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (self.path / name).write_bytes((saved / name).read_bytes())
        self.outside.write_bytes((saved / "adapter_model.safetensors").read_bytes())

    def config(self, **changed):
        path = self.path / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))

    def weights(self, content, name="adapter_model.safetensors"):
        (self.path / "adapter_model.safetensors").unlink()
        (self.path / name).write_bytes(content)


def shards(scene):
    index = {"weight_map": {"base_model.model.lm_head.lora_A.weight": "../outside"}}
    scene.weights(json.dumps(index).encode(), "adapter_model.safetensors.index.json")


STRANGE_ADAPTERS = {
    "a pickle named safetensors": (lambda s: s.weights(s.pickled()), ValueError, "is damaged, or no file of tensors"),
    "a zip of torch.save": (lambda s: s.weights(s.zipped()), ValueError, "is damaged, or no file of tensors"),
    "adapter_model.bin": (
        lambda s: s.weights(s.zipped(), "adapter_model.bin"), FileNotFoundError, "a pickle: allow_bin=True reads its",
    ),
    "a bare pickle, .bin": (
        lambda s: s.weights(s.pickled(), "adapter_model.bin"), FileNotFoundError, "a pickle: allow_bin=True reads its",
    ),
    "shards that lead out": (shards, FileNotFoundError, "holds no adapter_model.safetensors"),
    "a method that is a module": (lambda s: s.config(peft_type="evil.module"), ValueError, '"peft_type" is \'evil.mod'),
    "a class of ours by its path": (
        lambda s: s.config(peft_type="LLMTUNE", method="os.system"), ValueError, "is 'os.system'|is 'LLMTUNE'",
    ),
    "an option that names a module": (
        lambda s: s.config(corda_config={"module": "evil"}), ValueError, "corda_config=.* is not offered here",
    ),
    "a configuration nested deep": (
        lambda s: (s.path / "adapter_config.json").write_text(DEEP), ValueError, "adapter_config.json is no JSON",
    ),
    "a configuration of a list": (
        lambda s: (s.path / "adapter_config.json").write_text("[]"), ValueError, "is no adapter configuration",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STRANGE_ADAPTERS)
def test_a_strangers_adapter_is_refused_in_one_sentence(tmp_path, adapter, case):
    change, error, sentence = STRANGE_ADAPTERS[case]
    scene = Adapter(tmp_path, adapter)
    change(scene)
    model = tiny_llama()
    with pytest.raises(error, match=sentence):
        load(model, scene.path)
    assert not scene.marker.exists()
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", ["zipped", "pickled"])
def test_a_pickle_that_was_asked_for_still_runs_nothing(tmp_path, adapter, kind):
    scene = Adapter(tmp_path, adapter)
    scene.weights(getattr(scene, kind)(), "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin is damaged, or no file of tensors"):
        load(tiny_llama(), scene.path, allow_bin=True)
    assert not scene.marker.exists()


def test_the_modules_that_an_adapter_names_are_not_imported(tmp_path, adapter, monkeypatch):
    scene = Adapter(tmp_path, adapter)
    (tmp_path / "evil_module.py").write_text(f"import os\nos.mkdir({str(scene.marker)!r})\nclass Evil: pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    scene.config(
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil_module"}, task_type=None,
        base_model_name_or_path="../../outside", revision="evil_module", megatron_core="evil_module",
    )  # fmt: skip
    assert load(tiny_llama(), scene.path).loaded == 28
    assert "evil_module" not in sys.modules
    assert not scene.marker.exists()
    import evil_module

    assert evil_module.Evil
    assert scene.marker.exists()


# What in the library's own code could run a stranger's file, with the reason for each place that there is.

PICKLES = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
RUNS = {"eval", "exec", "compile", "__import__"}
ALLOWED = {
    ("llmtune/__init__.py", "import_module"): "the library's own parts, by a table in the file",
    ("llmtune/integrations/transformers_support.py", "import_module"): "the module of a class that is loaded already",
    ("llmtune/adapters/tensor_file.py", "pickle"): "the error that torch raises for a damaged file, nothing else",
    ("llmtune/adapters/tensor_file.py", "torch.load"): "an adapter's .bin, with allow_bin=True, by weights_only=True",
}


def suspicious(tree):
    """Yield what could run or unpickle something: by its name, wherever it stands in the code."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in PICKLES)
        elif isinstance(node, ast.ImportFrom):
            found = [(node.module or "").split(".")[0], *(alias.name for alias in node.names)]
            yield from (name for name in found if name in PICKLES)
        elif isinstance(node, ast.Attribute) and node.attr in ("load", "import_module"):
            of = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr == "import_module" or of in ("torch", "np", "numpy"):
                yield node.attr if node.attr == "import_module" else f"{of}.load"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id in RUNS or node.func.id == "import_module":
                yield node.func.id
        elif isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "allow_all_kernels"):
            yield node.arg
        elif isinstance(node, ast.Constant) and node.value in ("trust_remote_code", "allow_all_kernels"):
            yield node.value


def test_nothing_else_in_the_library_could_run_a_file():
    found = {
        (path.relative_to(ROOT).as_posix(), name)
        for path in sorted((ROOT / "llmtune").rglob("*.py"))
        for name in suspicious(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found == set(ALLOWED)
    texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / "llmtune").rglob("*.py")}
    loads = [line.strip() for text in texts.values() for line in text.splitlines() if "torch.load(" in line]
    assert len(loads) == 1
    assert "weights_only=True" in loads[0]
    assert [path.name for path, text in texts.items() if "trust_remote_code" in text] == []


@pytest.mark.parametrize(
    ("code", "name"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("import torch\ntorch.load('x')", "torch.load"),
        ("read = np.load", "np.load"),
        ("eval('1')", "eval"),
        ("exec(text)", "exec"),
        ("import_module(name)", "import_module"),
        ("f(trust_remote_code=True)", "trust_remote_code"),
        ("f(**{'trust_remote_code': True})", "trust_remote_code"),
    ],
)
def test_a_seeded_danger_is_seen(code, name):
    assert list(suspicious(ast.parse(code))) == [name]


def test_what_looks_alike_is_none():
    assert list(suspicious(ast.parse("model.eval()\nast.literal_eval(x)\nadapters.load(m, f)\njson.load(f)"))) == []
