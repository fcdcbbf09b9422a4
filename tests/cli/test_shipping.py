"""`merge`, `unmerge`, `export` and `inspect` from the shell."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.export.conftest import adapted, save_base, tensors
from tests.families import build
from uoe_peft.cli import main


def test_an_adapter_is_inspected_merged_taken_out_and_exported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_base(build("qwen2_moe"), tmp_path / "base")
    model = adapted(build("qwen2_moe"), provenance={"forgets": "a made-up town"})
    model.save_pretrained(tmp_path / "adapter")
    capsys.readouterr()

    main(["inspect", "--adapter", str(tmp_path / "adapter")])
    shown = capsys.readouterr().out
    deltas = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    down = deltas["base_model.model.model.layers.2.mlp.experts.uoe_delta.down_proj"]
    gate = deltas["base_model.model.model.layers.2.mlp.gate.uoe_delta.weight"]
    rows = [line.split() for line in shown.splitlines()]
    assert ["2", "4", "24", f"{float(down[1].norm()):.4g}", "32×24", "down_proj"] in rows
    assert ["2", "router", "6", f"{float(gate[0].norm()):.4g}", "6×32", "weight"] in rows
    assert "a made-up town" in shown

    paths = ["--base", str(base), "--adapter", str(tmp_path / "adapter")]
    merged, backup = str(tmp_path / "merged"), str(tmp_path / "backup")
    main(["merge", *paths, "--output", merged, "--dry_run", "true"])
    assert "bytes to write" in capsys.readouterr().out and not Path(merged).exists()
    main(["merge", *paths, "--output", merged, "--backup", backup, "--link", "false"])
    assert "7 tensors" in capsys.readouterr().out
    main(["unmerge", "--merged", merged, "--backup", backup, "--output", str(tmp_path / "restored")])
    before, between, after = (tensors(tmp_path / name) for name in ("base", "merged", "restored"))
    assert all(before[name].equal(after[name]) for name in before)
    assert sum(not before[name].equal(between[name]) for name in before) == 7
    main(["export", *paths, "--output", str(tmp_path / "lora"), "--rank", "5"])
    assert "relative error 0." in capsys.readouterr().out
    assert "r" in (tmp_path / "lora" / "adapter_config.json").read_text()
