"""The only place that knows model architectures: blocks, routing decisions, parts of the layers."""

from uoe_peft.moe.blocks import MoEBlock, find_moe_blocks
from uoe_peft.moe.experts import ListedExperts, expert_storage, unwrap
from uoe_peft.moe.storage import ExpertStorage, RoutedTokens, is_quantised, plain, substituted

__all__ = [
    "ExpertStorage",
    "ListedExperts",
    "MoEBlock",
    "RoutedTokens",
    "expert_storage",
    "find_moe_blocks",
    "is_quantised",
    "plain",
    "substituted",
    "unwrap",
]
