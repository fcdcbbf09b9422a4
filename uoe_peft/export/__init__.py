"""The unlearned expert as an artefact: merged into a checkpoint on disk, or as plain LoRA that loads without UOE."""

from uoe_peft.export.merge import CheckpointEdit, merge_checkpoint, unmerge_checkpoint

__all__ = ["CheckpointEdit", "merge_checkpoint", "unmerge_checkpoint"]
