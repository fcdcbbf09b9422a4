"""The choice among strengths: on curves that are known in closed form."""

import math

import pytest

from uoe_peft.training import UnlearningConfig
from uoe_peft.training.strength.choice import choose_scale
from uoe_peft.training.strength.validation import NoValidationRows, drawn, split_retain, validation_rows


def choose(measure, goal, *, limit=None, share=0.95):
    return choose_scale(measure, goal=goal, metric="accuracy", forget_limit=limit, retain_share=share)


def falling(scale):
    """Forgetting saturates early, damage grows late."""
    return {"forget": math.exp(-5 * scale), "retain": 0.8 * (1 - 0.4 * scale**2)}


def test_the_greatest_strength_that_keeps_enough():
    exact = math.sqrt(0.05 / 0.4)
    choice = choose(falling, "retain")
    assert exact - 1 / 32 <= choice.scale <= exact
    assert choice.meets_goal
    assert choice.retain_kept == pytest.approx(1 - 0.4 * choice.scale**2)
    assert choice.forget_left == math.exp(-5 * choice.scale)


def test_the_least_strength_that_forgets_enough():
    exact = math.log(1 / 0.3) / 5
    choice = choose(falling, "forget", limit=0.3)
    assert exact <= choice.scale <= exact + 1 / 32
    assert choice.curve[choice.scale] == falling(choice.scale)
    assert list(choice.curve) == sorted(choice.curve) and {0.0, 1.0} <= set(choice.curve)


def test_after_relearning_more_is_needed():
    def measure(scale):
        return {**falling(scale), "forget_relearned": math.exp(-3 * scale)}

    exact = math.log(1 / 0.3) / 3
    assert exact <= choose(measure, "forget", limit=0.3).scale <= exact + 1 / 32


@pytest.mark.parametrize(("goal", "limit"), [("forget", 0.001), ("retain", None), ("forget", 1.0)])
def test_where_no_strength_will_do_everything_stays_as_trained(goal, limit):
    """Not even all of it forgets enough; any of it is too much; nothing of it is needed."""

    def measure(scale):
        return falling(scale) if goal == "forget" else {"forget": 0.1, "retain": 1.0 if scale == 0 else 0.5}

    choice = choose(measure, goal, limit=limit)
    assert choice.scale == 1 and not choice.meets_goal
    assert "stays as trained" in choice.summary()


def test_each_scale_is_measured_once():
    seen = []

    def measure(scale):
        seen.append(scale)
        return falling(scale)

    choose(measure, "retain")
    assert len(seen) == len(set(seen)) == 8


def test_what_is_said_holds_both_limits_and_the_price():
    summary = choose(falling, "forget", limit=0.3).summary()
    for said in ("limit 0.3", "asked for 95.0%", "base 1.000", "as trained 0.007", "relearning"):
        assert said in summary
    full = choose(lambda scale: {"forget": 1 - scale, "retain": 0.5}, "retain").summary()
    assert "relearning" not in full and "100.0% of the base's" in full and "no limit was named" in full


def test_the_log_has_the_curve_and_the_choice():
    *tried, chosen = choose(falling, "retain").logs()
    for record in tried:
        scale = record["calibration_scale"]
        assert record == {
            "calibration_scale": scale,
            "calibration_forget": math.exp(-5 * scale),
            "calibration_retain": 0.8 * (1 - 0.4 * scale**2),
        }
    assert chosen["strength_meets_goal"] == 1 and 0.3 < chosen["strength_scale"] < 0.36


def test_a_measure_that_is_not_a_number():
    with pytest.raises(ValueError, match="not a number"):
        choose(lambda scale: {"forget": 0.0, "retain": 1.0 if scale == 0 else math.nan}, "retain")


# ---- Options ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibrate": True}, "calibrate must be one of"),
        ({"calibrate": 0}, "calibrate must be one of"),
        ({"calibrate": "forget"}, "needs calibrate_forget_limit"),
        ({"calibrate_forget_limit": 30}, r"\[0, 1\]"),
        ({"calibrate_forget_limit": math.nan}, r"\[0, 1\]"),
        ({"calibrate_retain_share": 0}, r"\(0, 1\]"),
        ({"calibrate_max_rows": 1}, "at least 2"),
        ({"calibrate_metric": "rouge"}, "calibrate_metric must be one of"),
        ({"calibrate_against": "relearning", "offload_prefix": True}, "choose one"),
    ],
)
def test_options_out_of_range(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        UnlearningConfig(output_dir=str(tmp_path), use_cpu=True, **options)


@pytest.mark.parametrize(
    ("options", "goal"),
    [
        ({}, "retain"),
        ({"calibrate_forget_limit": 0.2}, "forget"),
        ({"calibrate": "retain", "calibrate_forget_limit": 0.2}, "retain"),
        ({"calibrate": False, "calibrate_forget_limit": 0.2}, None),
    ],
)
def test_the_goal(options, goal, tmp_path):
    assert UnlearningConfig(output_dir=str(tmp_path), use_cpu=True, **options).calibration_goal == goal


# ---- Rows ----


@pytest.fixture
def args(tmp_path):
    return lambda **options: UnlearningConfig(output_dir=str(tmp_path), use_cpu=True, **options)


def numbers(size):
    from datasets import Dataset

    return Dataset.from_dict({"text": [str(i) for i in range(size)]})


@pytest.mark.parametrize(("size", "aside"), [(79, 0), (80, 8), (333, 33), (2000, 64)])
def test_a_tenth_is_set_aside_and_training_reads_the_rest(size, aside, args):
    left, held = split_retain(numbers(size), args())
    apart = [] if held is None else list(held["text"])
    assert len(apart) == aside and len(set(apart)) == aside
    assert sorted([*apart, *left["text"]], key=int) == [str(i) for i in range(size)]


def test_the_draw_follows_the_seed(args):
    first, same, other = (list(split_retain(numbers(100), args(seed=seed))[1]["text"]) for seed in (1, 1, 2))
    assert first == same != other
    assert first != [str(i) for i in range(10)]


def test_a_retain_set_that_training_does_not_read_is_not_split(args):
    left, held = split_retain(numbers(100), args(retain_loss="none", calibrate_max_rows=30))
    assert len(left) == 100 and len(held) == 30


def test_evaluated_rows_are_taken_first(args):
    left, held = split_retain(numbers(100), args(), {"retain": numbers(5)})
    assert len(left) == 100 and held is None
    rows = validation_rows(numbers(90), None, args(), {"retain": numbers(5), "other": numbers(3)})
    assert set(rows) == {"forget", "retain"} and len(rows["retain"]) == 5 and len(rows["forget"]) == 64


def test_too_few_rows_are_an_error_only_where_they_were_asked_for(args):
    with pytest.raises(NoValidationRows, match="it has 20 rows"):
        split_retain(numbers(20), args(calibrate="retain"))
    with pytest.raises(NoValidationRows, match="too few retain rows"):
        validation_rows(numbers(20), None, args())
    assert set(validation_rows(numbers(20), None, args(calibrate_forget_limit=0.1))) == {"forget"}
    with pytest.raises(NoValidationRows, match="two forget rows"):
        validation_rows(numbers(1), numbers(9), args(calibrate_against="relearning"))


def test_a_draw_is_a_partition():
    chosen, others = drawn(11, 4, seed=0)
    assert len(chosen) == 4 and sorted(chosen + others) == list(range(11))
    assert drawn(3, 64, seed=0) == ([0, 1, 2], [])
