"""Forget batches -> affinity per (layer, expert) -> ExpertAttribution."""

from uoe_peft.attribution.attribute import attribute_experts
from uoe_peft.attribution.attribution import ExpertAttribution
from uoe_peft.attribution.confidence import Confidence
from uoe_peft.attribution.expert_use import ExpertUse
from uoe_peft.attribution.summary import AttributionWarning, GeneralistExpertWarning, UnidentifiedExpertWarning

__all__ = [
    "AttributionWarning",
    "Confidence",
    "ExpertAttribution",
    "ExpertUse",
    "GeneralistExpertWarning",
    "UnidentifiedExpertWarning",
    "attribute_experts",
]
