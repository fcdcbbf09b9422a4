"""What tokens of a set feed an edited slice: second moments, the projection and the ridge solution made of them."""

from uoe_peft.moments.measure import measure_moments
from uoe_peft.moments.moments import ROUTER, Moments, SliceMoments, SliceName
from uoe_peft.moments.projection import retain_projection, surviving_share
from uoe_peft.moments.ridge import ridge_delta, steering_change

__all__ = [
    "ROUTER",
    "Moments",
    "SliceMoments",
    "SliceName",
    "measure_moments",
    "retain_projection",
    "ridge_delta",
    "steering_change",
    "surviving_share",
]
