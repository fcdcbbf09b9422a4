"""A checkpoint's files in safetensors format: which there are, what their headers say, and reading a part of one."""

from uoe_peft.checkpoints.folders import why_not_writable
from uoe_peft.checkpoints.record import read_record
from uoe_peft.checkpoints.tensor_file import StoredTensor, TensorFile, as_bytes, opened, read_bytes, torch_dtype
from uoe_peft.checkpoints.weight_map import INDEX, SINGLE, read_weight_map, shard_path

__all__ = [
    "INDEX",
    "SINGLE",
    "StoredTensor",
    "TensorFile",
    "as_bytes",
    "opened",
    "read_bytes",
    "read_record",
    "read_weight_map",
    "shard_path",
    "torch_dtype",
    "why_not_writable",
]
