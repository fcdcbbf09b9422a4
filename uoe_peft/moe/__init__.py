"""The only place that knows model architectures: blocks, routing decisions, parts of the layers."""

from uoe_peft.moe.blocks import MoEBlock, find_moe_blocks
from uoe_peft.moe.experts import ExpertStorage, ListedExperts, RoutedTokens, is_quantised, plain, unwrap

__all__ = [
    "ExpertStorage",
    "ListedExperts",
    "MoEBlock",
    "RoutedTokens",
    "find_moe_blocks",
    "is_quantised",
    "plain",
    "unwrap",
]
