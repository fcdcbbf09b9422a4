"""Stages that read and write adapters and checkpoints; no model runs."""
