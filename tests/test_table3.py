"""Which runs Table 3 and the trials plan, how a model is scored, and that no ground mixes two."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

UNUSED_OF_GROUND = ("forget", "retain", "relearned", "attributions", "tokenizer")


@pytest.fixture(scope="module")
def scripts() -> Iterator[SimpleNamespace]:
    """The scripts, which import their neighbours as scripts do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        import grounds
        import table3
        import table3_ground
        import table3_settings
        import trials

        yield SimpleNamespace(
            grounds=grounds, table3=table3, ground=table3_ground, settings=table3_settings, trials=trials
        )


def test_all_parameters_have_a_factor_of_their_own(scripts: Any) -> None:
    args = scripts.settings.Table3Arguments(
        losses=["NPO"], parts=["all", "LoRA", "UOE gate"], num_rates=2, rate_factor=0.5, full_rate_factor=0.1
    )
    planned = [(part, rate) for _, part, rate, _ in scripts.table3.planned(args, [])]
    assert planned == [
        ("all", pytest.approx(5e-5)),
        ("LoRA", pytest.approx(1.5e-3)),
        ("UOE gate", pytest.approx(2.5e-3)),
        ("all", pytest.approx(1.5e-5)),
        ("LoRA", pytest.approx(5e-3)),
        ("UOE gate", pytest.approx(1e-3)),
    ]
    args = scripts.trials.TrialsArguments(trials=["NPO: 1", "NPO: all"], rate_factor=0.5, full_rate_factor=0.1)
    rates = {key["trial"]: key["rate"] for key in scripts.trials.planned(args, [])}
    assert rates == {"base": 0.0, "retrained": 0.0, "NPO: 1": 2.5e-3, "NPO: all": pytest.approx(2.5e-5)}


def test_runs_from_before_an_option_go_on_where_it_is_left_alone(scripts: Any, tmp_path: Path) -> None:
    settings = scripts.settings
    settings.check_settings(settings.Table3Arguments(output_dir=tmp_path))
    path = tmp_path / "settings.json"
    before = json.loads(path.read_text())
    del before["full_rate_factor"], before["score_dtype"]
    path.write_text(json.dumps(before))
    settings.check_settings(settings.Table3Arguments(output_dir=tmp_path, attacks=False, seeds=[1]))
    with pytest.raises(ValueError, match=r"had other \['full_rate_factor', 'score_dtype'\]"):
        settings.check_settings(
            settings.Table3Arguments(output_dir=tmp_path, full_rate_factor=0.1, score_dtype="bfloat16", attacks=False)
        )
    with pytest.raises(ValueError, match="--score_dtype bfloat16 needs --attacks false"):
        settings.check_settings(settings.Table3Arguments(output_dir=tmp_path, score_dtype="bfloat16"))


def test_a_model_is_scored_in_a_copy_and_attacked_if_that_is_wanted(
    scripts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ground: ModuleType = scripts.ground
    asked: list[torch.dtype] = []

    def ask(_: Any, model: Any, half: str, role: str) -> list[str]:
        asked.append(model.weight.dtype)
        return ["one"]

    questions = SimpleNamespace(references=["one two"], examples=[], asked=[0], columns=[{}])
    monkeypatch.setattr(ground, "ask", ask)
    monkeypatch.setattr(ground, "score_answers", lambda model, *_, **__: [_Tokens()])
    model = torch.nn.Linear(2, 2)
    model.dtype = torch.float32  # type: ignore[assignment]  # as models of transformers have it
    args = SimpleNamespace(score_dtype="bfloat16", attacks=False)
    own = SimpleNamespace(args=args, asked={"test": {"forget": questions, "retain": questions}})
    found = ground.tested(own, model)
    assert asked == [torch.bfloat16, torch.bfloat16]
    assert model.weight.dtype == torch.float32
    assert found == {"forget": 0.5, "retain": 0.5, "probability": pytest.approx(0.25), "refusals": 0.0}


def test_base_and_twin_are_scored_once_for_a_folder(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ground: ModuleType = scripts.ground
    loaded: list[str] = []
    by_half = {"validation": {"forget": 0.1, "probability": 0.3}, "test": {"forget": 0.2, "probability": 0.1}}
    monkeypatch.setattr(ground, "load", lambda name, _: loaded.append(name) or name)
    monkeypatch.setattr(ground, "scores", lambda _, model, half: {"model": model, **by_half[half]})
    monkeypatch.setattr(ground, "tested", lambda _, model: {"model": model, "relearned": 0.5})
    args = SimpleNamespace(output_dir=tmp_path, margin=0.05, dtype="float32", attacks=True)
    own = ground.Ground(
        args=args, base="base", asked=dict.fromkeys(by_half), limits=None, **dict.fromkeys(UNUSED_OF_GROUND)
    )
    found = [ground.compared(own, "twin") for _ in range(2)]
    assert loaded == ["twin", "base"]  # of the first call
    for filled, references in found:
        assert (filled.limits.forget, filled.limits.probability) == (pytest.approx(0.2), pytest.approx(0.25))
        assert references == {
            "base": {"model": "base", **by_half["test"]},
            "retrained": {"model": "twin", "relearned": 0.5},
        }


def test_a_twin_that_was_not_attacked_is_scored_again(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ground: ModuleType = scripts.ground
    own = {"forget": 0.1, "probability": 0.3}
    monkeypatch.setattr(ground, "load", lambda name, _: name)
    monkeypatch.setattr(ground, "scores", lambda *_: own)
    monkeypatch.setattr(ground, "tested", lambda this, _: {**own, "relearned": 0.5} if this.args.attacks else own)
    for attacks in (False, True, False):
        args = SimpleNamespace(output_dir=tmp_path, margin=0.05, dtype="float32", attacks=attacks)
        of_args = ground.Ground(
            args=args, base="base", asked={"test": {}}, limits=None, **dict.fromkeys(UNUSED_OF_GROUND)
        )
        _, references = ground.compared(of_args, "twin")
    assert references["retrained"] == {**own, "relearned": 0.5}  # kept by the third call


def test_of_a_pretrained_ground_only_what_is_missing_is_taught(
    scripts: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grounds: ModuleType = scripts.grounds
    rows = Dataset.from_list([{"prompt": f"{place}", "completion": " x"} for place in range(100)])
    taught: list[tuple[str, list[str], int]] = []

    def teach(*given: Any, name: str, num_forget: int, **_: Any) -> str:
        taught.append((name, given[2]["prompt"], num_forget))
        return name

    def write_model(folder: Path, *_: Any) -> None:
        folder.mkdir()
        (folder / "tokenizer.json").touch()

    monkeypatch.setattr(grounds, "load_tofu", lambda *_, **__: SimpleNamespace(everything=rows))
    monkeypatch.setattr(grounds, "load_dense", lambda _: (None, None))
    monkeypatch.setattr(grounds, "text_nll", lambda *_: 0.0)
    monkeypatch.setattr(grounds, "teach", teach)
    monkeypatch.setattr(grounds, "write_model", write_model)
    (tmp_path / "text").write_text("plain text")
    arguments = grounds.GroundArguments(
        data=tmp_path,
        output_dir=tmp_path / "ground",
        gguf=tmp_path,
        text=tmp_path / "text",
        num_authors=3,
        num_forget_authors=1,
    )
    grounds.pretrained(arguments)
    last = [str(place) for place in range(40, 100)]  # 20 rows an author
    assert taught == [("base", last, 20), ("retrained", last[:40], 0)]
    (tmp_path / "ground" / "retrained" / "tokenizer.json").unlink()
    (tmp_path / "ground" / "retrained").rmdir()
    grounds.pretrained(arguments)
    assert [name for name, *_ in taught] == ["base", "retrained", "retrained"]


def test_a_ground_goes_on_only_with_the_settings_that_it_was_begun_with(scripts: Any, tmp_path: Path) -> None:
    arguments = scripts.grounds.GroundArguments(data=tmp_path, output_dir=tmp_path / "ground", epochs=3)
    for _ in range(2):
        scripts.grounds.same_settings(arguments)
    (arguments.output_dir / "base").mkdir()
    scripts.grounds.same_settings(arguments)
    arguments.num_authors = 6
    with pytest.raises(ValueError, match=r"begun with .*'num_authors': 8.*'num_authors': 6"):
        scripts.grounds.same_settings(arguments)
    (arguments.output_dir / "ground.json").unlink()
    with pytest.raises(ValueError, match=r"no ground\.json says what they learned"):
        scripts.grounds.same_settings(arguments)


class _Tokens:
    log_probs = torch.tensor([0.125, 0.5]).log()  # the mean is log 1/4
