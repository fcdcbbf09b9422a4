"""The unlearned expert as an artefact: merged into a checkpoint on disk, or as plain LoRA that loads without UOE."""

from uoe_peft.export.inspection import AdapterDescription, describe_adapter
from uoe_peft.export.lora import LoraExport, export_lora
from uoe_peft.export.merge import CheckpointEdit, merge_checkpoint, unmerge_checkpoint

__all__ = [
    "AdapterDescription",
    "CheckpointEdit",
    "LoraExport",
    "describe_adapter",
    "export_lora",
    "merge_checkpoint",
    "unmerge_checkpoint",
]
