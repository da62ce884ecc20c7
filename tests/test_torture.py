"""A run that is killed and started again, also on other ranks, is the run that nobody disturbed."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.torture import Plan, compare, torture


@pytest.mark.long
@pytest.mark.ranks
def test_two_kills_and_another_mesh(tmp_path: Path, data_path: Path) -> None:
    lives, summary = torture(tmp_path, data_path, Plan(kills=2, steps=120, same_mesh=1, seed=1))
    assert all(life.named for life in lives)
    assert summary["steps_equal_bit_for_bit"] >= 5, "a checkpoint was continued"
    assert summary["ends_with_a_cause"] == 3
    assert summary["last_loss"] < summary["first_loss"] - 0.3


def test_a_seam_and_a_difference_are_found() -> None:
    row = {"loss": 1.0, "bits_per_byte": 1.0, "grad_norm": 1.0, "k_micro": [1], "lr": 0.1, "tokens": 8}
    calm = [row | {"step": step} for step in (1, 2)]
    assert compare(calm, calm, 2)["largest_difference_of_loss"] == 0
    for broken in (calm[:1], [calm[0], calm[0]], [calm[0], calm[1] | {"loss": 1.1}]):
        with pytest.raises(ValueError, match=r"seam|differs by 0\.1"):
            compare(calm, broken, 1)
    with pytest.raises(ValueError, match="differ though the mesh was the same"):
        compare(calm, [calm[0], calm[1] | {"lr": 0.2}], 2)
