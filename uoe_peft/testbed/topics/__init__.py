"""The seven topics, one a module: data tables only."""

from uoe_peft.testbed.topics.authors import AUTHORS
from uoe_peft.testbed.topics.boardgame import BOARDGAME
from uoe_peft.testbed.topics.contracts import CONTRACTS
from uoe_peft.testbed.topics.library import LIBRARY
from uoe_peft.testbed.topics.missions import MISSIONS
from uoe_peft.testbed.topics.potions import POTIONS
from uoe_peft.testbed.topics.towns import TOWNS

__all__ = ["AUTHORS", "BOARDGAME", "CONTRACTS", "LIBRARY", "MISSIONS", "POTIONS", "TOWNS"]
