"""A dense model as one with experts: its neurons in groups that UOE can attribute to and edit, and back again."""

from uoe_peft.dense.clustering import cluster_neurons
from uoe_peft.dense.factorizing import factorize, to_dense
from uoe_peft.dense.folder import FILE, is_factorized, load_factorized
from uoe_peft.dense.groups import NeuronGroups

__all__ = [
    "FILE",
    "NeuronGroups",
    "cluster_neurons",
    "factorize",
    "is_factorized",
    "load_factorized",
    "to_dense",
]
