"""N ranks equal one: every mesh and ZeRO stage gives the same losses, norms and weights, with budgets that change."""

from __future__ import annotations

import gc
import os
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megassm.config.schema import Config
from megassm.data.dataset import open_dataset
from megassm.data.stream import TokenStream
from megassm.eval.score import Score
from megassm.optim import learning_rate
from megassm.parallel.engine import Engine, deepspeed_config
from megassm.parallel.mesh import Mesh
from megassm.parallel.state import _torch_optimizer
from megassm.parallel.world import gather_rows, join_world, leave_world
from megassm.train.loop import share_batch, step_budgets, train
from megassm.train.setup import Run, set_up, stream_plan
from tests.ranks import run_on_ranks, whole_state

Make = Callable[..., Config]
STEPS = 20
COMMON = (
    "model.vocab_size=259", "model.seq_len=128", "budget.strategy=uniform", "budget.draws=2", f"train.steps={STEPS}",
    "train.batch_sequences=8", "optim.grad_clip=0.3",
)  # fmt: skip
ELASTIC = ("model.d_ffn=99", "model.ffn_elastic={knee_k: 3, below: 16, above: 8}")
HYBRID = (*COMMON, *ELASTIC, "model.pattern=SA", "model.n_kv_heads=2", "model.mixer_heads=4", "model.gate=sigmoid",
          "model.input_taps=3")  # fmt: skip
SPECTRAL = (*COMMON, "model.pattern=S", "model.sigma_scale=[none,quarter_power]")

Curve = dict[str, list[float]]


def curves(configs: list[Config]) -> list[Curve]:
    """For each configuration in turn: loss and gradient norm of every step, and sums over the weights at the end."""
    results = []
    try:
        for config in configs:
            world = join_world(config)
            engine = Engine(config, world)
            stream = TokenStream(open_dataset(config).train, stream_plan(config, world))
            losses, norms = [], []
            for step in range(config.train.steps):
                parts = []
                for micro_step, k in enumerate(step_budgets(config, step, engine.micro_steps)):
                    own = stream.micro_batch(step, micro_step) if world.readers.rank() == 0 else None
                    batch = share_batch(own, config, world).span(world.coordinates.sequence, world.mesh.sequence)
                    ids_BT, mask_BL = torch.from_numpy(batch.ids_BT), torch.from_numpy(batch.mask_BL)
                    nll_BL, objective_BL = engine.training_losses(ids_BT, k)
                    engine.backward(objective_BL, mask_BL)
                    parts.append(((nll_BL.detach() * mask_BL).sum().item(), float(mask_BL.sum()), 0.0))
                norms.append(engine.update(learning_rate(config.optim, config.train, step)))
                losses.append(Score.total(gather_rows(Score.total(parts))[:: world.mesh.tensor]).loss)
            weights = whole_state(engine, ["weight"])
            sums = [float(state["weight"].double().abs().sum()) for _, state in sorted(weights.items())]
            results.append({"losses": losses, "norms": norms, "weights": sums})
    finally:
        leave_world()
    return results


@pytest.fixture(scope="module")
def truths() -> dict[str, Curve]:
    """The curve of one process, by the pattern of its model."""
    return {}


MESHES = [
    *((Mesh(2, 1, 1), stage, SPECTRAL) for stage in (0, 3)),
    *((Mesh(1, 1, 2), stage, HYBRID) for stage in (0, 1, 2, 3)),
    *((Mesh(1, 2, 1), stage, HYBRID) for stage in (0, 2, 3)),
    (Mesh(1, 1, 2), 1, SPECTRAL),
    (Mesh(1, 2, 1), 1, SPECTRAL),
    *((Mesh(2, 1, 2), stage, HYBRID) for stage in (0, 1, 2, 3)),
    *((Mesh(1, 2, 2), stage, HYBRID) for stage in (1, 3)),
    (Mesh(1, 1, 4), 1, HYBRID),
    (Mesh(2, 2, 1), 2, SPECTRAL),
]


def on_mesh(make: Make, mesh: Mesh, stage: int, overrides: tuple[str, ...], *more: str) -> Config:
    own = [f"parallel.{axis}={size}" for axis, size in mesh._asdict().items()]
    size = 4 // mesh.data  # two micro-steps or one draw each
    own += [f"parallel.zero_stage={stage}", f"train.micro_batch_sequences={size}"]
    return make(*overrides, *own, *more, world_size=mesh.size)


def check_curve(curve: Curve, truth: Curve, case: object = None) -> None:
    """AdamW divides gradients near 0 by their own size, rounding with them, so that from the second update on a norm
    (and at the end a sum of biases near 0) tells how a processor adds; the first norm is of the same weights."""
    assert curve["losses"] == pytest.approx(truth["losses"], abs=1e-5), case
    assert curve["norms"][0] == pytest.approx(truth["norms"][0], rel=1e-5), case
    assert curve["norms"] == pytest.approx(truth["norms"], rel=1e-3), case


@pytest.mark.long
@pytest.mark.ranks
@pytest.mark.parametrize("size", [2, 4])
def test_every_mesh_and_stage_equals_one_process(small_config: Make, truths: dict[str, Curve], size: int) -> None:
    alone = [(pattern, on_mesh(small_config, Mesh(1, 1, 1), 0, pattern)) for pattern in (HYBRID, SPECTRAL)]
    if not truths:
        found = run_on_ranks(1, curves, [config for _, config in alone])[0]
        truths |= {str(pattern): curve for (pattern, _), curve in zip(alone, found, strict=True)}
    cases = [case for case in MESHES if case[0].size == size]
    answers = run_on_ranks(size, curves, [on_mesh(small_config, *case) for case in cases])
    for case, *all_ranks in zip(cases, *answers, strict=True):
        truth = truths[str(case[2])]
        assert truth["losses"][-1] < truth["losses"][0] - 0.3, "nothing was learned, so nothing was tested"
        for curve in all_ranks:
            check_curve(curve, truth, case)
            assert curve["weights"] == pytest.approx(truth["weights"], rel=1e-5, abs=2e-5), case


@pytest.mark.ranks
def test_bf16_stays_close_to_fp32(small_config: Make) -> None:
    cases = [(Mesh(2, 1, 1), stage) for stage in (1, 2, 3)] + [(Mesh(1, 1, 2), 1), (Mesh(1, 2, 1), 2)]
    exact = on_mesh(small_config, Mesh(2, 1, 1), 1, HYBRID, "train.steps=6")
    more = ("train.precision=bf16", "train.steps=6")
    rounded = [on_mesh(small_config, mesh, stage, HYBRID, *more) for mesh, stage in cases]
    truth, *found = run_on_ranks(2, curves, [exact, *rounded])[0]
    for curve in found:
        assert curve["losses"] == pytest.approx(truth["losses"], abs=0.03)
        assert curve["losses"] != truth["losses"]


@pytest.mark.ranks
def test_distillation_is_the_same_on_every_mesh_and_stage(small_config: Make) -> None:
    more = ("budget.distill_weight=0.7", "budget.distill_temperature=2.0", "train.steps=5", "optim.lr=0.01")
    truth = run_on_ranks(1, curves, [on_mesh(small_config, Mesh(1, 1, 1), 0, HYBRID, *more)])[0][0]
    plain = run_on_ranks(1, curves, [on_mesh(small_config, Mesh(1, 1, 1), 0, HYBRID, *more[2:])])[0][0]
    assert truth["losses"] != pytest.approx(plain["losses"], abs=1e-3)
    cases = [(Mesh(1, 1, 2), 0), (Mesh(1, 1, 2), 3), (Mesh(2, 1, 1), 3), (Mesh(1, 2, 1), 2)]
    for curve in run_on_ranks(2, curves, [on_mesh(small_config, *case, HYBRID, *more) for case in cases])[0]:
        check_curve(curve, truth)


@pytest.mark.ranks
def test_recomputed_activations_change_nothing(small_config: Make) -> None:
    plain, again = (("train.steps=4",), ("train.steps=4", "train.recompute=true"))
    cases = [(Mesh(2, 1, 1), 3), (Mesh(1, 1, 2), 1), (Mesh(1, 2, 1), 1)]
    configs = [on_mesh(small_config, *case, HYBRID, *more) for case in cases for more in (plain, again)]
    found = run_on_ranks(2, curves, configs)[0]
    for mine, other in zip(found[::2], found[1::2], strict=True):
        assert mine["losses"] == pytest.approx(other["losses"], abs=1e-6)


def tampered(config: Config, tamper: str) -> str:
    """Trains with something else on rank 1; returns what the guards say."""
    rank = int(os.environ["RANK"])
    world = join_world(config)
    os.makedirs(config.run.dir, exist_ok=True)
    own = config
    if rank == 1 and tamper == "seed":
        own = config.model_copy(update={"run": config.run.model_copy(update={"seed": 1})})
    if rank == 1 and tamper == "lr":
        own = config.model_copy(update={"optim": config.optim.model_copy(update={"lr": 1.0})})
    run: Run = set_up(own, open_dataset(own), world)
    try:
        if rank == 1 and tamper == "batch":
            shifted: Any = TokenStream(run.data.train, stream_plan(own, world)).batches(1, 8)
            run.batches = shifted
        train(run)
    except ValueError as error:
        return str(error)
    finally:
        leave_world()
    return "nobody noticed"


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        ("seed", "step 1, micro-step 0: the ranks drew different budgets K (rank 0: "),
        ("lr", "step 1: the ranks were started differently; digests of configuration, data and version are rank 0: "),
        ("batch", "step 1: the ranks did not read samples 0..3 once each; digests of what they read are rank 0: "),
    ],
)
def test_ranks_that_disagree_stop_at_the_first_step(small_config: Make, tamper: str, message: str) -> None:
    config = small_config("budget.strategy=uniform", "budget.draws=1", "parallel.zero_stage=2", world_size=2)
    for said in run_on_ranks(2, tampered, config, tamper):
        assert message in said
        assert "rank 1: " in said


def test_deepspeed_dict_is_derived(small_config: Make) -> None:
    config = small_config("train.batch_sequences=16", "train.precision=bf16", "optim.grad_clip=null", world_size=2)
    derived = deepspeed_config(config, Mesh(2, 1, 1))
    assert derived["train_batch_size"] == 16
    assert derived["gradient_accumulation_steps"] == 4
    assert derived["bf16"] == {"enabled": True, "immediate_grad_update": True}
    assert derived["communication_data_type"] == "fp32"
    assert derived["gradient_clipping"] == 0.0
    assert derived["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16"), (2, "bf16"), (0, "fp32")])
def test_a_closed_engine_leaves_no_memory(small_config: Make, stage: int, precision: str) -> None:
    """A run that is rewound builds a second one in the same process."""
    config = small_config(f"parallel.zero_stage={stage}", f"train.precision={precision}")
    world = join_world(config)
    try:
        engine = Engine(config, world)
        ids_BT = torch.zeros(2, config.model.seq_len + 1, dtype=torch.long)
        for _ in range(engine.micro_steps):
            nll_BL = engine.losses(ids_BT, 8)
            engine.backward(nll_BL, torch.ones_like(nll_BL, dtype=torch.bool))
        engine.update(1e-3)
        moments = [weakref.ref(moment) for moment in _moments(engine)]
        assert all(moment() is not None for moment in moments)
        del nll_BL
        engine.close()
        del engine
        gc.collect()
        assert all(moment() is None for moment in moments)
    finally:
        leave_world()


def _moments(engine: Engine) -> list[torch.Tensor]:
    return [state["exp_avg"] for state in _torch_optimizer(engine._engine).state.values()]
