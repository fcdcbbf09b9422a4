"""Optimisers and masks of the unlearning literature."""
