"""Suites: which columns become which questions, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from uoe_peft.evaluation import (
    QuestionSet,
    Suite,
    load_option_files,
    muse_suite,
    option_set,
    plain_suite,
    rwku_suite,
    suites,
    tofu_suite,
)
from uoe_peft.testbed import FORGET_TOPIC, as_prompt, load_facts, load_refusals

ROWS = Dataset.from_list([{"prompt": "a", "completion": " b", "topic": "x"}])


@pytest.fixture
def tofu(tmp_path: Path) -> Path:
    for name in ("forget05", "retain", "real_authors", "world_facts"):
        row: dict[str, Any] = {"question": f"{name}?", "answer": "yes", "perturbed_answer": ["no", "maybe"]}
        if name in ("forget05", "retain"):
            row["paraphrased_answer"] = "indeed"
        (tmp_path / f"{name}_perturbed.json").write_text(json.dumps(row) + "\n")
    return tmp_path


def test_tofu_has_four_sets(tofu: Path) -> None:
    suite = tofu_suite(tofu, "forget05")
    assert [(part.name, part.role, part.utility) for part in suite.sets] == [
        ("forget", "forget", False),
        ("retain", "retain", True),
        ("real_authors", "retain", True),
        ("world_facts", "retain", True),
    ]
    assert suite.sets[0].rows[0] == {
        "prompt": "Question: forget05?\nAnswer:",
        "completion": " yes",
        "paraphrased_completion": " indeed",
        "perturbed_completions": [" no", " maybe"],
    }
    assert "paraphrased_completion" not in suite.sets[3].rows.column_names


def test_a_missing_split_of_tofu_is_named(tofu: Path) -> None:
    with pytest.raises(ValueError, match=r"has no forget10_perturbed\.json; it has \['forget05_perturbed\.json'"):
        tofu_suite(tofu, "forget10")
    with pytest.raises(ValueError, match="split must be"):
        tofu_suite(tofu, "forget20")  # type: ignore[arg-type]
    (tofu / "retain_perturbed.json").write_text('{"question": "q", "answer": "a"}\n')
    with pytest.raises(ValueError, match=r"line 1 of .*retain_perturbed\.json lacks \['perturbed_answer'\]"):
        tofu_suite(tofu, "forget05")


def test_rwku_and_muse_by_their_columns() -> None:
    asked = Dataset.from_list([{"query": "who", "answer": "me", "subject": "s", "level": "2"}])
    rwku = rwku_suite({"forget_level2": asked}, {"neighbor_level2": asked})
    assert rwku.sets[0].rows[0]["prompt"] == "who"
    assert rwku.sets[0].rows[0]["completion"] == " me"
    assert rwku.sets[1].by == ("subject", "level")
    text = Dataset.from_list([{"text": "never seen"}])
    known = Dataset.from_list([{"question": "q", "answer": "a"}])
    verbatim = Dataset.from_list([{"prompt": "begin", "gt": "end"}])
    muse = muse_suite({"verbmem": verbatim, "leak": text}, {"knowmem": known}, {"holdout": text})
    assert [part.role for part in muse.sets] == ["forget", "forget", "retain", "holdout"]
    assert muse.sets[0].rows[0] == {"prompt": "begin", "completion": " end"}
    with pytest.raises(ValueError, match="set 'x' needs 'query' or 'prompt'"):
        rwku_suite({"x": known.rename_column("question", "ask")}, {})


def test_options_from_csv_files(tmp_path: Path) -> None:
    (tmp_path / "anatomy_test.csv").write_text('question,A,B,C,D,answer\n"Which?",None,1,two,"x, y",2\n')
    (tmp_path / "us_law_test.csv").write_text('question,A,B,C,D,answer\nWho?,a,b,c,d,0\n"Is "x," so?",a,b,c,d,1\n')
    part = option_set(load_option_files(tmp_path), by=("subject",))
    assert part.rows[0] == {
        "subject": "anatomy",
        "prompt": "Which?\nA. None\nB. 1\nC. two\nD. x, y\nAnswer:",
        "options": [" A", " B", " C", " D"],
        "label": 2,
    }
    assert part.rows[1]["subject"] == "us_law"
    assert len(part.rows) == 2  # what falls into too many fields is left out
    with pytest.raises(ValueError, match="has no CSV files"):
        load_option_files(tmp_path / "nothing")


def test_options_from_lists_and_letters() -> None:
    part = option_set(Dataset.from_list([{"question": "q", "choices": ["x", "y", "z"], "answer": "B"}]), role="forget")
    assert part.rows[0]["label"] == 1
    assert part.role == "forget"
    with pytest.raises(ValueError, match="answer must be 0 to 1 or its letter, got 2"):
        option_set(Dataset.from_list([{"question": "q", "choices": ["x", "y"], "answer": 2}]))
    with pytest.raises(ValueError, match="two options or more"):
        option_set(Dataset.from_list([{"question": "q", "A": "x", "answer": 0}]))


def test_the_testbed_keeps_neighbours_apart_and_holds_out_new_subjects() -> None:
    suite = suites.testbed_suite(num_holdout_subjects=3)
    known = {*load_facts()["subject"], *load_refusals()["subject"]}
    assert len(suite.sets[3].rows) == 30
    assert not known & set(suite.sets[3].rows["subject"])
    assert FORGET_TOPIC not in suite.sets[2].rows["topic"]
    learned = {as_prompt(question) for fact in load_facts([FORGET_TOPIC]) for question in fact["phrasings"]}
    plain, reworded = (set(part.rows["prompt"]) for part in suite.sets[:2])
    assert len(plain) == 200 and len(reworded) == 60
    assert plain <= learned and not reworded & learned
    assert reworded < set(suite.sets[0].rows["paraphrased_prompt"])


def test_what_makes_no_suite_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a set of role 'retain'"):
        Suite("s", (QuestionSet("a", ROWS, "forget"),))
    with pytest.raises(ValueError, match="different names"):
        Suite("s", (QuestionSet("a", ROWS, "forget"), QuestionSet("a", ROWS, "retain")))
    with pytest.raises(ValueError, match=r"has no columns \['author'\] to score by; it has"):
        QuestionSet("a", ROWS, "forget", by=("author",))
    with pytest.raises(ValueError, match="role of set 'a' must be"):
        QuestionSet("a", ROWS, "kept")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no set has the columns \['author'\]"):
        plain_suite(ROWS, ROWS, by=("author",))
    assert plain_suite(ROWS, ROWS.remove_columns("topic"), by=("topic",)).sets[1].by == ()
