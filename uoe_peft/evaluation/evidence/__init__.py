"""Evidence beside the answers: where tokens are routed, and what the adapter costs."""

from uoe_peft.evaluation.evidence.cost import CostClock, adapter_cost, changed_cost
from uoe_peft.evaluation.evidence.routing import LayerShift, RoutingRecord, has_routed_experts, routing_shifts

__all__ = [
    "CostClock",
    "LayerShift",
    "RoutingRecord",
    "adapter_cost",
    "changed_cost",
    "has_routed_experts",
    "routing_shifts",
]
