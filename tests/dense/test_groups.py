"""A partition covers every neuron once; its file says what it is; what is none is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.dense.conftest import make_groups
from uoe_peft.dense import NeuronGroups


def test_each_neuron_is_in_one_group_and_groups_have_one_size() -> None:
    groups = NeuronGroups.random({0: 48, 4: 60}, 6, seed=1)
    for layer_idx, size in ((0, 48), (4, 60)):
        order = groups.order(layer_idx)
        assert order.shape == (6, size // 6)
        assert sorted(order.flatten().tolist()) == list(range(size))
        for group, neurons in enumerate(order.tolist()):
            assert neurons == sorted(neurons)
            assert {int(groups.by_layer[layer_idx][neuron]) for neuron in neurons} == {group}


def test_a_draw_depends_on_the_seed() -> None:
    first, again, other = (NeuronGroups.random({0: 48}, 6, seed=seed).by_layer[0].tolist() for seed in (1, 1, 2))
    assert first == again != other


def test_the_file_gives_back_every_group(tmp_path: Path) -> None:
    groups = make_groups()
    groups.save(tmp_path / "a.safetensors")
    loaded = NeuronGroups.load(tmp_path / "a.safetensors")
    assert loaded.num_groups == 6 and list(loaded.by_layer) == [0, 1, 2]
    assert all(torch.equal(loaded.by_layer[i], groups.by_layer[i]) for i in range(3))
    assert [loaded.fingerprint(i) for i in range(3)] == [groups.fingerprint(i) for i in range(3)]
    assert (tmp_path / "a.safetensors").stat().st_size < 3 * 48 * 4 + 400


def test_fingerprints_differ_where_groups_do() -> None:
    assert len({make_groups(seed=seed).fingerprint(i) for seed in range(2) for i in range(3)}) == 6


def test_numpy_integers_are_integers() -> None:
    groups = NeuronGroups.random({np.int64(0): np.int64(48)}, np.int64(6))  # type: ignore[dict-item,arg-type]
    assert groups.order(0).shape == (6, 8)


@pytest.mark.parametrize(
    ("by_layer", "num_groups", "message"),
    [
        ({}, 2, "name no layer"),
        ({0: torch.tensor([0, 1])}, 1, "at least 2, got 1"),
        ({0: torch.tensor([0, 1, 1, 1])}, 2, r"sizes \{0: 1, 1: 3\}"),
        ({0: torch.tensor([0, 0, 1, 1])}, 3, r"sizes \{0: 2, 1: 2\}; expected 3"),
        ({0: torch.tensor([0, 1, 2, 2])}, 2, "expected 2 groups"),
        ({0: torch.tensor([-1, 1, 1, 0])}, 2, r"sizes \{-1: 1"),
        ({0: torch.tensor([0, 2**31 - 1])}, 2, "2147483647: 1"),
        ({0: torch.tensor([0.0, 1.0])}, 2, "float32"),
        ({0: torch.tensor([[0, 1]])}, 2, r"shape \(1, 2\)"),
        ({3: torch.tensor([], dtype=torch.int64)}, 2, r"layer 3 have shape \(0,\)"),
    ],
)
def test_what_is_no_partition_is_refused(by_layer: dict[int, torch.Tensor], num_groups: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NeuronGroups(by_layer, num_groups)


def test_a_number_that_does_not_divide_the_neurons_names_some_that_do() -> None:
    with pytest.raises(ValueError, match=r"48 neurons of layer 2 .* 7 groups .* use one of \[2, 3, 4, 6, 8"):
        NeuronGroups.random({2: 48}, 7)


def test_a_missing_file_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match=r"NeuronGroups\.save"):
        NeuronGroups.load(path)
    save_file({"layers.0": torch.tensor([0, 1])}, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="format 'pt'"):
        NeuronGroups.load(path)
    save_file({"layers.0": torch.tensor([0, 1])}, path, metadata={"format": "uoe_peft.neuron_groups/2"})
    with pytest.raises(ValueError, match="neuron_groups/2"):
        NeuronGroups.load(path)


@pytest.mark.parametrize(
    ("name", "metadata", "message"),
    [
        ("weight", {"num_groups": "2"}, "'weight'"),
        ("layers.a", {"num_groups": "2"}, "'layers.a'"),
        ("layers.0", {}, "no number of groups"),
        ("layers.0", {"num_groups": "3"}, "expected 3 groups"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, metadata: dict[str, str], message: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({name: torch.tensor([0, 1])}, path, metadata={"format": "uoe_peft.neuron_groups/1", **metadata})
    with pytest.raises(ValueError, match=message) as raised:
        NeuronGroups.load(path)
    assert str(path) in str(raised.value)


def test_a_file_that_was_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    make_groups().save(path)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="no readable safetensors file"):
        NeuronGroups.load(path)
