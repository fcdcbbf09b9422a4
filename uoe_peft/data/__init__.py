"""Forget and retain sets -> tokenised examples -> paired batches."""

from uoe_peft.data.alternatives import load_idk_answers, tokenize_with_alternatives
from uoe_peft.data.collation import Batch, UnlearningCollator, collate, collate_groups
from uoe_peft.data.pairing import PairedDataset, retain_index
from uoe_peft.data.tokenization import tokenize_dataset
from uoe_peft.losses import IGNORE_INDEX

__all__ = [
    "IGNORE_INDEX",
    "Batch",
    "PairedDataset",
    "UnlearningCollator",
    "collate",
    "collate_groups",
    "load_idk_answers",
    "retain_index",
    "tokenize_dataset",
    "tokenize_with_alternatives",
]
