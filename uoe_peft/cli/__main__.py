"""`python -m uoe_peft.cli` is `uoe-peft`."""

from uoe_peft.cli import main

main()
