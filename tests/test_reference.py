"""docs/configuration.md is the schema's, knob by knob, and a printed configuration is one that runs."""

from __future__ import annotations

from pathlib import Path

from megassm.config.load import load_config
from megassm.config.reference import reference, related_knobs
from megassm.config.schema import Config
from tests.conftest import ROOT, run_python


def test_the_page_is_the_schemas() -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    assert page == reference(), "run python tools/config_reference.py"
    knobs = [f"{section}.{name}" for section, field in Config.model_fields.items()
             for name in field.annotation.model_fields]  # type: ignore[union-attr]  # fmt: skip
    for knob in knobs:
        assert f"| `{knob}` |" in page
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    assert all(line.split(" | ")[3] for line in rows), "every knob says what it means"


def test_types_defaults_and_ranges() -> None:
    rows = {line.split("`")[1]: line for line in reference().splitlines() if line.startswith("| `")}
    assert "| text not empty | *required* |" in rows["run.dir"]
    assert "| integer from 0 to 2^53 | `0` |" in rows["run.seed"]
    assert "| number from 0 to 1 | `0.1` | Final" in rows["optim.min_lr_ratio"]
    assert "| number > 0 | `0.0003` |" in rows["optim.lr"]
    assert "| `0`, `1`, `2`, `3` | `1` |" in rows["parallel.zero_stage"]
    assert "or `null` | `null` |" in rows["model.ffn_elastic"]
    assert "multiple of 8 | *required* |" in rows["model.ffn_elastic.below"]
    assert "`train.micro_batch_sequences`" in rows["train.batch_sequences"].split(" | ")[-1]


def test_what_a_knob_is_checked_with_are_knobs() -> None:
    related = related_knobs()
    assert related["model.num_channels"]
    for knob, others in related.items():
        for name in (knob, *others):
            section, key = name.split(".")
            assert key in Config.model_fields[section].annotation.model_fields, name  # type: ignore[union-attr]


def test_print_config_is_a_configuration_and_starts_nothing(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done = run_python("launch/pretrain.py", "--config", "configs/tiny.yaml", "--print-config", f"run.dir={run_dir}",
                      "train.steps=7", "data.path=nowhere")  # fmt: skip
    printed = tmp_path / "printed.yaml"
    printed.write_text(done.stdout, encoding="utf-8")
    config = load_config(printed)
    assert config == load_config(
        ROOT / "configs/tiny.yaml", (f"run.dir={run_dir}", "train.steps=7", "data.path=nowhere")
    )
    assert config.train.steps == 7
    assert not run_dir.exists()
    wrong = run_python(
        "launch/pretrain.py", "--config", "configs/tiny.yaml", "--print-config", "train.steps=no", check=False
    )
    assert (wrong.returncode, wrong.stdout) == (2, "")
    assert "train.steps" in wrong.stderr
