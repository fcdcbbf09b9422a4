"""What an optimiser step computes: forward passes, losses, the reference, the anchor."""
