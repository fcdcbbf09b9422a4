"""A checkpoint on disk, run layer by layer: a model that does not fit into memory goes where a model goes."""

from uoe_peft.streaming.model import StreamedModel

__all__ = ["StreamedModel"]
