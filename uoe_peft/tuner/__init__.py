"""The PEFT method: configuration, deltas, layers, model. Importing this package registers UOE with PEFT."""

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method


def _add_peft_type(name: str) -> None:
    """Make `name` a real member of PEFT's enum: PEFT has no hook for methods that live outside its own tree."""
    if name in PeftType.__members__:
        return
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    type.__setattr__(PeftType, name, member)


_add_peft_type("UOE")

# The configuration reads the enum member, so it must exist before these imports.
from uoe_peft.tuner.card import write_card, write_cards_on_saving  # noqa: E402
from uoe_peft.tuner.config import UOEConfig  # noqa: E402
from uoe_peft.tuner.layer import UOEExpertsLayer, UOELinearLayer  # noqa: E402
from uoe_peft.tuner.merging import UOELayer  # noqa: E402
from uoe_peft.tuner.model import UOEModel  # noqa: E402
from uoe_peft.tuner.router import UOERouterLayer  # noqa: E402

if PeftType("UOE") not in PEFT_TYPE_TO_CONFIG_MAPPING:
    register_peft_method(name="uoe", config_cls=UOEConfig, model_cls=UOEModel, prefix=UOEModel.prefix)

write_cards_on_saving(UOEModel)

__all__ = [
    "UOEConfig",
    "UOEExpertsLayer",
    "UOELayer",
    "UOELinearLayer",
    "UOEModel",
    "UOERouterLayer",
    "write_card",
]
