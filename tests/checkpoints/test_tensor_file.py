"""What a header says, and rows of a tensor, against safetensors' own reader."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from uoe_peft.checkpoints import TensorFile, as_bytes, opened, read_bytes, torch_dtype

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    stack = torch.randn(3, 5, 7)
    tensors = {str(dtype).removeprefix("torch."): (stack * 9).to(dtype) for dtype in DTYPES}
    save_file({**tensors, "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4)}, tmp_path / "x", {"made": "up"})
    return tmp_path / "x"


def test_headers_say_what_safetensors_reads(path: Path) -> None:
    file, whole = TensorFile(path), load_file(path)
    assert file.metadata == {"made": "up"} and file.tensors.keys() == whole.keys()
    with path.open("rb") as raw, safe_open(path, "pt") as theirs:
        for name, stored in file.tensors.items():
            assert (stored.dtype, list(stored.shape)) == (
                theirs.get_slice(name).get_dtype(),
                theirs.get_slice(name).get_shape(),
            )
            assert torch_dtype(stored.dtype, name=name) == whole[name].dtype
            assert stored.is_precise == (whole[name].is_floating_point() and whole[name].element_size() > 1)
            assert read_bytes(raw, stored.start, stored.stop - stored.start) == bytes(as_bytes(whole[name]))


@pytest.mark.parametrize("rows", [None, range(0), range(2, 9), range(14, 15), range(1, 15, 3)])
@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_rows_are_those_of_the_tensor_as_a_matrix(name: str, rows: range | None, path: Path) -> None:
    wanted = load_file(path)[name].view(15, 7)
    assert torch.equal(TensorFile(path).read_rows(name, rows), wanted if rows is None else wanted[list(rows)])


@pytest.mark.parametrize("name", ["float8_e4m3fn", "int8", "bool"])
def test_numbers_that_cannot_be_computed_with_are_refused(name: str, path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name} in .* is stored as .*; expected one of F64, F32, BF16, F16"):
        TensorFile(path).read_rows(name)


@pytest.mark.parametrize("broken", [b"", b"\xff" * 100, "cut", "grown", "no file"])
def test_files_that_are_not_whole_are_refused(broken: bytes | str, path: Path) -> None:
    whole = path.read_bytes()
    if broken == "no file":
        path.unlink()
    else:
        path.write_bytes({"cut": whole[:-1], "grown": whole + b"\0"}.get(str(broken), bytes(str(broken), "latin")))
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        TensorFile(path)
    with pytest.raises(ValueError, match="download or save it again"), opened(path):
        pass


def test_a_file_that_is_cut_off_while_it_is_read(path: Path) -> None:
    file = TensorFile(path)
    assert file.tensors  # the header is read once
    path.write_bytes(path.read_bytes()[:900])
    with pytest.raises(ValueError, match="it has been cut off while it was read"):
        file.read_rows("float64")


def test_a_dtype_that_pytorch_has_not() -> None:
    with pytest.raises(ValueError, match="w is stored as F4; expected one of F64"):
        torch_dtype("F4", name="w")
