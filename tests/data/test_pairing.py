from collections import Counter

import pytest
from datasets import Dataset
from torch.utils.data import DataLoader

from uoe_peft.data import PairedDataset, retain_index


def token_rows(size: int) -> Dataset:
    rows = [[i] for i in range(size)]
    return Dataset.from_dict({"input_ids": rows, "labels": rows, "id": [10 * i for i in range(size)]})


def test_every_retain_example_comes_up_equally_often():
    for num_forget, num_retain in [(5, 13), (13, 5), (7, 7)]:
        counts = Counter(
            retain_index(i, epoch=e, num_forget=num_forget, num_retain=num_retain, seed=3)
            for e in range(4)
            for i in range(num_forget)
        )
        uses = [counts[i] for i in range(num_retain)]
        assert max(uses) - min(uses) <= 1
        assert sum(uses) == 4 * num_forget


def test_pairs_change_with_epoch_and_seed_only():
    def pairs(epoch: int, seed: int) -> list[int]:
        return [retain_index(i, epoch=epoch, num_forget=11, num_retain=11, seed=seed) for i in range(11)]

    assert pairs(0, 1) == pairs(0, 1)
    assert pairs(0, 1) != pairs(1, 1)
    assert pairs(0, 1) != pairs(0, 2)


def test_outside_the_forget_set():
    with pytest.raises(IndexError, match="use 0 to 4"):
        retain_index(5, epoch=0, num_forget=5, num_retain=3, seed=0)


def test_rows_carry_their_index_and_follow_the_epoch():
    paired = PairedDataset(token_rows(4), token_rows(9), seed=1, extra={"idk": token_rows(4)})
    assert len(paired) == 4
    first = [paired[i]["retain"]["index"] for i in range(4)]
    paired.set_epoch(1)
    second = [paired[i]["retain"]["index"] for i in range(4)]
    assert not set(first) & set(second)  # eight different ones of nine: one pass is not over yet
    row = paired[2]
    assert (row["forget"]["index"], row["idk"]["index"]) == (2, 2)
    assert row["retain"]["input_ids"] == [row["retain"]["index"]]


def test_each_forget_example_has_a_seed_of_its_own_in_each_epoch():
    def seeds(seed: int, epoch: int) -> list[int]:
        paired = PairedDataset(token_rows(4), token_rows(9), seed=seed)
        paired.set_epoch(epoch)
        return [paired[i]["forget"]["seed"] for i in range(4)]

    assert seeds(1, 0) == seeds(1, 0)
    assert len({*seeds(1, 0), *seeds(1, 1), *seeds(2, 0)}) == 12


def test_what_is_drawn_for_an_example_does_not_depend_on_its_place():
    rows = token_rows(4)
    there = PairedDataset(rows, seed=1)
    turned = PairedDataset(rows.select([3, 1, 0, 2]), seed=1)
    assert [turned[i]["forget"]["seed"] for i in range(4)] == [there[i]["forget"]["seed"] for i in (3, 1, 0, 2)]


def test_without_a_retain_set():
    assert set(PairedDataset(token_rows(2))[0]) == {"forget"}


def test_workers_that_outlive_an_epoch_see_the_new_one():
    paired = PairedDataset(token_rows(4), token_rows(9), seed=1)
    loader = DataLoader(
        paired,
        batch_size=None,
        num_workers=1,
        persistent_workers=True,
        multiprocessing_context="fork",
    )
    for epoch in (0, 1):
        paired.set_epoch(epoch)
        seen = [row["retain"]["index"] for row in loader]
        assert seen == [paired[i]["retain"]["index"] for i in range(4)]


def test_misaligned_and_empty_sets_are_refused():
    with pytest.raises(ValueError, match="'idk' set has 3 rows, the forget set 4"):
        PairedDataset(token_rows(4), extra={"idk": token_rows(3)})
    with pytest.raises(ValueError, match="at least one example"):
        PairedDataset(token_rows(4), token_rows(0))
