"""The colours of every picture: what a colour means does not change from one picture to the next."""

FORGET = "#c8374b"
RETAIN = "#2f6db5"

BASE = "#7f93ab"
UNLEARNED = FORGET  # the model that training gave
CALIBRATED = "#c98a1b"
RETRAINED = "#2e6f57"
OTHERS = ("#7a4fa3", "#20877e", "#8a5a3b", "#5b6b2f", "#b04a8f")  # further sets or models, in no order

MARK = "#f08c00"  # frames: to be seen on any cell of a heat map
AFFINITY = "Blues"  # matplotlib's names of colour scales: of values from 0 up
SIGNED_AFFINITY = "RdBu_r"  # and of values of either sign
