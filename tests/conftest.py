"""Settings that every test shares: no downloads, one thread, a fixed seed."""

from __future__ import annotations

import os

# Before transformers, datasets or matplotlib are imported: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch

# The models are tiny: a second thread gains nothing, and on a busy machine waiting for it costs twenty-fold.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Start every test from the same random state, so that its result does not depend on its neighbours."""
    torch.manual_seed(0)
