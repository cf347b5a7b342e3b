import pytest
import torch
from safetensors.torch import save_file

from llmtune.data.row_files import load_rows, save_rows


def test_rows_come_back_bit_for_bit(tmp_path):
    g = torch.Generator().manual_seed(0)
    rows = [
        {"input_ids": [3] * n, "labels": n, "x": torch.randn(n, 2, generator=g), "half": torch.randn(3).bfloat16()}
        for n in (5, 1, 0, 7)
    ]
    save_rows(rows, tmp_path / "rows.safetensors")
    found = load_rows(tmp_path / "rows.safetensors")
    assert [list(row) for row in found] == [list(row) for row in rows]
    for one, other in zip(found, rows, strict=True):
        for name, value in other.items():
            assert one[name].dtype == torch.as_tensor(value).dtype or name == "input_ids"
            assert torch.equal(one[name], torch.as_tensor(value, dtype=one[name].dtype))
    assert [path.name for path in tmp_path.iterdir()] == ["rows.safetensors"]


def test_bad_input(tmp_path):
    path = tmp_path / "rows"
    with pytest.raises(ValueError, match="there are no rows to save"):
        save_rows([], path)
    with pytest.raises(ValueError, match='need the same fields; "b" is in only one of rows 0 and 1'):
        save_rows([{"a": 1}, {"a": 1, "b": 2}], path)
    with pytest.raises(ValueError, match=r'row 0: field "a" holds no numbers: .* Leave it out'):
        save_rows([{"a": "text"}], path)
    with pytest.raises(ValueError, match=r'row 1: field "a" must be of one kind .* torch.float32 \[1\] here and'):
        save_rows([{"a": [1]}, {"a": [1.5]}], path)
    assert not path.exists()
    with pytest.raises(FileNotFoundError, match="there is no file of rows"):
        load_rows(path)
    save_file({"a": torch.ones(2)}, path)
    with pytest.raises(ValueError, match="is no file of rows: save_rows has not written it"):
        load_rows(path)
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="is damaged, or no file of tensors"):
        load_rows(path)
