"""ZeRO 0-3 on two ranks and one process: the same losses, norms and weights, with budgets that change every step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megassm.budget import budget_at
from megassm.config import Config
from megassm.data.dataset import open_dataset
from megassm.data.stream import TokenStream
from megassm.eval.score import Score
from megassm.model import build_model
from megassm.optim import learning_rate
from megassm.parallel.engine import Engine, deepspeed_config
from megassm.parallel.world import gather_rows, join_world, leave_world
from megassm.train import stream_plan
from tests.ranks import run_on_ranks

Make = Callable[..., Config]
STEPS = 6
HYBRID = (
    "model.pattern=SA",
    "budget.strategy=uniform",
    "train.batch_sequences=8",
    f"train.steps={STEPS}",
    "optim.grad_clip=0.3",
)


def curves(configs: list[Config]) -> list[dict[str, list[float]]]:
    """For each configuration in turn: loss and gradient norm of every step, and the weights' checksums at the end."""
    world = join_world("cpu", 60)
    try:
        results = []
        for config in configs:
            engine = Engine(build_model(config.model, 0, config.train.recompute), config, world)
            stream = TokenStream(open_dataset(config).train, stream_plan(config, world))
            losses, norms = [], []
            for step in range(config.train.steps):
                parts = []
                for micro_step in range(engine.micro_steps):
                    batch = stream.micro_batch(step, micro_step)
                    ids_BT, mask_BL = torch.from_numpy(batch.ids_BT), torch.from_numpy(batch.mask_BL)
                    nll_BL = engine.losses(ids_BT, budget_at(config, step, micro_step))
                    engine.backward(nll_BL, mask_BL)
                    parts.append(((nll_BL.detach() * mask_BL).sum().item(), float(mask_BL.sum()), 0.0))
                norms.append(engine.update(learning_rate(config.optim, config.train, step)))
                losses.append(Score.total(gather_rows(Score.total(parts), world)).loss)
            weights = engine.whole_weights()
            sums = [float(w.double().abs().sum()) for w in weights.values()]
            results.append({"losses": losses, "norms": norms, "weights": sums})
        return results
    finally:
        leave_world()


@pytest.mark.ranks
def test_stages_and_ranks_agree(small_config: Make) -> None:
    variants = [(f"parallel.zero_stage={stage}", *HYBRID) for stage in range(4)]
    variants.append(("parallel.zero_stage=3", "train.recompute=true", *HYBRID))
    alone = run_on_ranks(1, curves, [small_config(*v, "train.micro_batch_sequences=4") for v in variants])[0]
    together = run_on_ranks(2, curves, [small_config(*v, world_size=2) for v in variants])
    truth = alone[0]
    assert truth["losses"][-1] < truth["losses"][0], "nothing was learned, so nothing was tested"
    for curve in [*alone[1:], *together[0]]:
        assert curve["losses"] == pytest.approx(truth["losses"], abs=1e-5)
        assert curve["norms"] == pytest.approx(truth["norms"], rel=1e-4)
        assert curve["weights"] == pytest.approx(truth["weights"], rel=1e-5)
    for mine, other in zip(*together, strict=True):
        assert mine["losses"] == other["losses"]


@pytest.mark.ranks
def test_bf16_stays_close_to_fp32(small_config: Make) -> None:
    variants = [HYBRID] + [(f"parallel.zero_stage={s}", "train.precision=bf16", *HYBRID) for s in (1, 2, 3)]
    truth, *rounded = run_on_ranks(2, curves, [small_config(*v, world_size=2) for v in variants])[0]
    for curve in rounded:
        assert curve["losses"] == pytest.approx(truth["losses"], abs=0.03)
        assert curve["losses"] != truth["losses"]


def disagree(config: Config) -> str:
    """Trains with another seed on rank 1, so with other budgets; returns what the guard says."""
    import os

    from megassm import train
    from megassm.metrics import Journal

    rank = int(os.environ["RANK"])
    own = config.model_copy(update={"run": config.run.model_copy(update={"seed": rank, "dir": config.run.dir})})
    world = join_world("cpu", 60)
    try:
        Path(config.run.dir).mkdir(exist_ok=True)
        run = train.set_up(own, open_dataset(own), world)
        assert isinstance(run.journal, Journal) is (rank == 0)
        train.train(run)
    except ValueError as error:
        return str(error)
    finally:
        leave_world()
    return "nobody noticed"


@pytest.mark.ranks
def test_ranks_with_different_budgets_stop_with_a_clear_message(small_config: Make) -> None:
    config = small_config("budget.strategy=uniform", "parallel.zero_stage=2", world_size=2)
    for message in run_on_ranks(2, disagree, config):
        assert "the ranks drew different budgets K (rank 0: " in message
        assert "start all ranks with the same --config" in message


def test_deepspeed_dict_is_derived(small_config: Make) -> None:
    config = small_config("train.batch_sequences=16", "train.precision=bf16", "optim.grad_clip=null", world_size=2)
    derived = deepspeed_config(config, data_ranks=2)
    assert derived["train_batch_size"] == 16
    assert derived["gradient_accumulation_steps"] == 4
    assert derived["bf16"] == {"enabled": True}
    assert derived["gradient_clipping"] == 0.0
    assert derived["zero_optimization"]["stage"] == 1
