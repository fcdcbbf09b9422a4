import pytest
import torch

from uoe_peft.data import collate, collate_groups

EXAMPLES = [
    {"input_ids": [11, 12, 13], "labels": [-100, 12, 13]},
    {"input_ids": [21], "labels": [21]},
]


def test_padding_never_counts():
    batch = collate(EXAMPLES, pad_token_id=9)
    assert batch["input_ids"].tolist() == [[11, 12, 13], [21, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 12, 13], [21, -100, -100]]


def test_left_padding_and_multiples():
    batch = collate(EXAMPLES, pad_token_id=9, padding_side="left", pad_to_multiple_of=4)
    assert batch["input_ids"].tolist() == [[9, 11, 12, 13], [9, 9, 9, 21]]
    assert batch["labels"].tolist() == [[-100, -100, 12, 13], [-100, -100, -100, 21]]


def test_rows_without_labels_count_in_full():
    assert collate([{"input_ids": [5, 6]}], pad_token_id=0)["labels"].tolist() == [[5, 6]]


def test_groups_are_padded_each_on_its_own():
    rows = [
        {"forget": {**EXAMPLES[0], "id": 2**62 + 1, "index": 4, "seed": 50}, "retain": {**EXAMPLES[1], "index": 0}},
        {"forget": {**EXAMPLES[1], "id": 8, "index": 2, "seed": 51}, "retain": {**EXAMPLES[1], "index": 7}},
    ]
    batches = collate_groups(rows, pad_token_id=9)
    assert batches["forget"]["input_ids"].shape == (2, 3)
    assert batches["retain"]["input_ids"].shape == (2, 1)
    torch.testing.assert_close(batches["retain"]["index"], torch.tensor([0, 7]))
    torch.testing.assert_close(batches["forget"]["seed"], torch.tensor([50, 51]))
    assert batches["forget"]["id"].tolist() == [2**62 + 1, 8]
    assert not {"id", "seed"} & {*batches["retain"]}


@pytest.mark.parametrize(
    ("examples", "side", "message"),
    [
        ([], "right", "empty list"),
        (EXAMPLES, "both", "padding_side"),
        ([{"input_ids": [1, 2], "labels": [1]}], "right", "2 input_ids but 1 labels"),
    ],
)
def test_bad_batches_are_refused(examples, side, message):
    with pytest.raises(ValueError, match=message):
        collate(examples, pad_token_id=0, padding_side=side)


def test_no_rows_no_groups():
    with pytest.raises(ValueError, match="empty list"):
        collate_groups([], pad_token_id=0)
