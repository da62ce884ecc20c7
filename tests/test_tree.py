"""Messages to the first rank and back: each rank's once, in order, whatever the number of ranks."""

from __future__ import annotations

import pytest
import torch.distributed as dist

from megassm.parallel.world import from_first, gather_at_first, leave_world
from tests.ranks import run_on_ranks


def exchanged(rounds: int) -> list[tuple[list[list[float]] | None, list[float]]]:
    dist.init_process_group("gloo")
    try:
        rank, found = dist.get_rank(), []
        for number in range(rounds):
            rows = gather_at_first([rank + number, -0.5 * rank, float("inf")])
            answer = None if rows is None else [sum(row[0] for row in rows), 2.0**53]
            found.append((rows, from_first(answer, 2)))
    finally:
        leave_world()
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("size", [1, 3, 5])
def test_the_first_rank_hears_all_and_all_hear_it(size: int) -> None:
    first, *others = run_on_ranks(size, exchanged, 2)
    for number in range(2):
        rows, answer = first[number]
        assert rows == [[rank + number, -0.5 * rank, float("inf")] for rank in range(size)]
        assert answer == [sum(range(size)) + number * size, 2.0**53]
        assert all(other[number] == (None, answer) for other in others)
