"""The experiments' machinery, small: every experiment runs end to end, and its figures are what they should be."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megassm.config.load import dump_config, load_config
from megassm.config.schema import Config
from megassm.cost import parameters, training_flops_per_token
from megassm.data.task import load_task
from megassm.errors import UserError
from megassm.eval.score import score
from megassm.eval.session import open_session
from megassm.model import build_model, losses_at
from megassm.run.journal import read_records
from tests.conftest import ROOT, SMALL
from tests.small_sets import small_task
from tools.experiments import peers, plain, runner, scaling
from tools.experiments.arms import Arm, Recipe
from tools.experiments.batches import Batches
from tools.experiments.definitions import EXPERIMENTS, FAMILY, LOOKUP, TEXT, Experiment
from tools.experiments.headline import ALONE, MIXED, SPECTRAL
from tools.experiments.headline import draw as draw_headline
from tools.experiments.lookup import LOOKUPS, examples
from tools.experiments.measure import BITS, Point, plain_points, position_points
from tools.experiments.online import HIGH, LOW, POLICIES, Reading, read
from tools.experiments.peers import build_peer, peer_parameters, peer_sizes, state_space_duality
from tools.experiments.plain import Pass, Training, drawn_passes, nested_passes, predicted, train_plain
from tools.experiments.results import CONCLUSION, Results, curves, half_width, joined, metrics, page, table, write
from tools.experiments.results import read as read_results
from tools.experiments.runner import Job, Options, run_experiment, workers
from tools.experiments.tiny import equal_width

SMALL_TASK = (
    "model.d_model=16", "model.num_channels=8", "model.d_ffn=32", "budget.budgets=[2,8]", "eval.budgets=[2,8]",
    "eval.sequences=4", "optim.warmup_steps=1", "train.batch_sequences=4", "train.micro_batch_sequences=4",
    "log.wandb=disabled", "log.peak_tflops=0.1",
)  # fmt: skip
SMALL_ARMS = {
    "cost": ("model.n_layers=4",),
    "scaling": ("train.steps=3", "optim.warmup_steps=1"),
}
"""Of experiments whose arms have a size or a length of their own."""
SMALL_FAMILY = ("model.mixer_heads=4", "model.ffn_elastic={knee_k: 4, below: 8, above: 0}")


def results(**points: list[list[float]]) -> Results:
    """Figures over K = 1, 2 by arm and seed."""
    by_arm = {
        arm: [[Point("loss", "", k, y) for k, y in zip((1, 2), values, strict=True)] for values in seeds]
        for arm, seeds in points.items()
    }
    return Results("x", "q", "c", "command", "K", {arm: [] for arm in points}, [0, 1, 2], {}, by_arm, "2026-01-01", {})


def test_intervals_are_students() -> None:
    found = results(a=[[1.0, 4.0], [2.0, 4.0], [3.0, 4.0]])
    (curve,) = curves(found, "loss")
    assert curve.mean == [2.0, 4.0]
    half = half_width(curve.y_SN)
    assert half is not None
    assert half[0] == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t of 97.5% with 2 degrees of freedom
    assert half[1] == 0.0


def test_differences_are_taken_seed_by_seed() -> None:
    text = table(results(a=[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]], b=[[1.5, 1.0], [2.5, 2.0], [3.5, 3.0]]), "loss")
    assert "| b | +0.5 ± 0 | +0 ± 0 |" in text  # though each mean is known to 2.5 only
    assert "| b | 2.5 ± 2.4841 | 2 ± 2.4841 |" in text


def test_a_conclusion_survives_the_next_run(tmp_path: Path) -> None:
    page, as_json, plot = write(results(a=[[1.0, 2.0]] * 3), tmp_path)
    assert page.read_text().endswith(f"{CONCLUSION}\nNot written yet.\n")
    page.write_text(page.read_text().replace("Not written yet.", "It falls."))
    write(results(a=[[5.0, 2.0]] * 3), tmp_path)
    assert "| a | 5 ± 0 | 2 ± 0 |" in page.read_text()
    assert page.read_text().endswith(f"{CONCLUSION}\nIt falls.\n")
    assert json.loads(as_json.read_text())["points"]["a"][0][0] == ["loss", "", 1, 5.0]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_arms_are_added_to_what_is_stored() -> None:
    """An arm of its own takes the place of the stored one whole, a model of one size its point of the sizes' curve."""

    def sizes(**by_k: float) -> list[list[Point]]:
        return [[Point(BITS, "", float(k[1:]), y) for k, y in by_k.items()]] * 3

    config = load_config(ROOT / FAMILY).model_dump(mode="json")

    def found(command: str, more: dict[str, list[list[Point]]], *sizes: str, **points: list[list[float]]) -> Results:
        arms = results(**points)
        known = {**arms.arms, **{size: [] for size in sizes}}
        return replace(arms, config=config, command=command, arms=known, points={**arms.points, **more})

    old = found("first", {"alone": sizes(k2=7.0, k4=8.0)}, "K=4", a=[[1.0, 2.0]] * 3, b=[[3.0, 4.0]] * 3)
    new = found("later", {"alone": sizes(k8=9.0, k4=1.0)}, "K=8", b=[[5.0, 6.0]] * 3, c=[[0.0, 0.0]] * 3)
    both = joined(old, new)
    assert list(both.arms) == ["a", "b", "K=4", "c", "K=8"]
    assert [point.y for point in both.points["b"][0]] == [5.0, 6.0]
    assert [(point.x, point.y) for point in both.points["alone"][2]] == [(2, 7.0), (4, 1.0), (8, 9.0)]
    assert [(part["command"], part["arms"]) for part in both.earlier] == [("first", ["a", "K=4"])]
    again = joined(both, found("last", {}, a=[[0.5, 0.5]] * 3))
    assert [(part["command"], part["arms"]) for part in again.earlier] == [
        ("first", ["K=4"]), ("later", ["b", "c", "K=8"])
    ]  # fmt: skip
    assert "```bash\nlater\n```\n\nMeasured 2026-01-01; : b; c; K=8.\n\n```bash\nlast\n```" in page(again)
    assert "```bash\nfirst\n```\n\nMeasured 2026-01-01; .\n\nSeeds 0, 1, 2." in page(old)
    with pytest.raises(UserError, match=r"x\.json.*seeds \[0, 1, 2\], not \[0\]"):
        joined(old, replace(new, seeds=[0]))
    changed = {**config, "train": {**config["train"], "steps": 6}}
    with pytest.raises(UserError, match=r"train\.steps 2000, not 6"):
        joined(old, replace(new, config=changed))
    earlier = {**config, "model": {name: value for name, value in config["model"].items() if name != "selective"}}
    assert joined(replace(old, config=earlier), new).points == both.points, "a knob that there was not yet"
    with pytest.raises(UserError, match="its configuration cannot be read today"):
        joined(replace(old, config={"data": {}}), new)


def test_hybrids_have_equal_parameters() -> None:
    experiment, counts = EXPERIMENTS["hybrids"], []
    config = experiment.configuration()
    for arm in experiment.arms(config):
        model = experiment.configuration(arm.overrides).model
        counts.append(parameters(model, model.num_channels))
    assert len(counts) == 4
    assert max(counts) / min(counts) < 1.005
    assert equal_width(config, "SSSS") == config.model.d_ffn


def test_a_token_by_token_budget_reads_what_the_model_reads(trained: Path) -> None:
    """At one K for all tokens it is the parallel form; with a choice, each row has its own."""
    session = open_session(trained, None, "cpu")
    model = session.model.eval()
    ids_BT = torch.from_numpy(session.validation(2)[0].ids_BT)

    def nll(k: int) -> torch.Tensor:
        with torch.no_grad():
            return losses_at(model, ids_BT, k)

    same = read(model, ids_BT, lambda entropy_B, _: entropy_B < 0, (2, 2))
    torch.testing.assert_close(same.nll_BL, nll(2), atol=2e-5, rtol=1e-4)
    assert same.mean_k == 2.0
    first_row = torch.arange(len(ids_BT)) == 0
    mixed = read(model, ids_BT, lambda entropy_B, _: first_row[: len(entropy_B)], (1, 8))
    torch.testing.assert_close(mixed.nll_BL[0], nll(8)[0], atol=2e-5, rtol=1e-4)
    positions = ids_BT.shape[1] - 1
    assert mixed.mean_k == pytest.approx((8 * positions + (8 + (positions - 1)) * (len(ids_BT) - 1)) / positions / 2)


def test_a_policy_takes_its_share() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = Reading(torch.rand(8, 500, generator=generator), torch.rand(8, 500, generator=generator), 2.0)
    for policy in POLICIES:
        choose = policy.choice(seen, 0.25, generator)
        share = torch.cat([choose(seen.entropy_BL[:, t], seen.nll_BL[:, t]) for t in range(500)]).float().mean()
        assert share == pytest.approx(0.25, abs=0.03)
    assert LOW < HIGH


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_arms_that_are_configurations(name: str) -> None:
    experiment = EXPERIMENTS[name]
    arms = experiment.arms(experiment.configuration())
    settings = [experiment.configuration(arm.overrides) for arm in arms]
    trainings = {(own.model_dump_json(), arm.basis) for own, arm in zip(settings, arms, strict=True)}
    assert len(trainings) == len(arms) >= 1
    assert experiment.question.endswith("?")


def test_another_file_has_its_own_size(tmp_path: Path) -> None:
    """And the experiment's question; the command line has the last word."""
    path = tmp_path / "mine.yaml"
    path.write_text(dump_config(load_config(ROOT / FAMILY, ("model.d_model=160", "data.path=mine"))), encoding="utf-8")
    config = EXPERIMENTS["hybrids"].configuration(("train.steps=7",), path)
    assert (config.model.d_model, config.model.seq_len, config.train.steps) == (160, 256, 7)
    assert EXPERIMENTS["hybrids"].configuration().model.d_model == 32
    assert EXPERIMENTS["needle"].configuration((), path).data.path == "data/needle-sizes"


def ends_of(experiment: Experiment, *own: str) -> Callable[[Config], list[Arm]]:
    """The first arm and the last, with further settings."""

    def arms(config: Config) -> list[Arm]:
        all_ = experiment.arms(config)
        return [arm._replace(overrides=(*arm.overrides, *own)) for arm in dict.fromkeys((all_[0], all_[-1]))]

    return arms


def test_a_family_has_equal_sizes() -> None:
    """Beside each size of the elastic model stand models of that many parameters."""
    experiment = EXPERIMENTS["family"]
    base = load_config(ROOT / experiment.config)
    sizes = {k: parameters(base.model, k) for k in base.eval_budgets()}
    whole = base.model.model_copy(update={"ffn_elastic": None})
    channels_only = {k: parameters(whole, k) for k in sizes}
    for arm in experiment.arms(base):
        model = load_config(ROOT / experiment.config, arm.overrides).model
        if arm.peer is not None:
            peer = build_peer(arm.peer, model, 0)
            largest = peer_sizes(arm.peer, model)[-1]
            count = peer_parameters(peer, largest)
            assert count == sum(parameter.numel() for parameter in peer.parameters())
        else:
            count = parameters(model, model.num_channels)
        named = re.search(r"K=(\d+)", arm.name)
        family = channels_only if "channels only" in arm.name else sizes
        wanted = family[int(named[1])] if named else sizes[max(sizes)]
        assert count == pytest.approx(wanted, rel=0.05 if arm.peer else 0.003), arm.name
    assert 8.2e6 / sizes[max(sizes)] > 40, "tokens a parameter"


def test_mamba2_is_the_published_layer() -> None:
    """The chunked form against the recurrence, and the layer against transformers' own."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, dtype=torch.float64, generator=generator)
    x_BLHP, input_BLN, output_BLN = draw(2, 150, 3, 4), draw(2, 150, 5), draw(2, 150, 5)
    log_decay_BLH = -draw(2, 150, 3).abs()
    state, expected = torch.zeros(2, 3, 5, 4, dtype=torch.float64), []
    for t in range(150):
        state = state * log_decay_BLH[:, t].exp()[..., None, None]
        state = state + torch.einsum("bn,bhp->bhnp", input_BLN[:, t], x_BLHP[:, t])
        expected.append(torch.einsum("bn,bhnp->bhp", output_BLN[:, t], state))
    found = state_space_duality(x_BLHP, log_decay_BLH, input_BLN, output_BLN)
    torch.testing.assert_close(found, torch.stack(expected, 1), atol=1e-11, rtol=0)

    transformers = pytest.importorskip("transformers")
    theirs_module = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    torch.manual_seed(0)
    ours = peers.Mamba2Mixer(24, 2)
    config = transformers.Mamba2Config(
        hidden_size=24, num_heads=ours.heads, head_dim=peers.HEAD_DIM, state_size=peers.STATE, expand=peers.EXPAND,
        conv_kernel=peers.TAPS, n_groups=1, chunk_size=32, time_step_limit=(0.0, math.inf),
    )  # fmt: skip
    theirs = theirs_module.Mamba2Mixer(config, 0)
    names = {"inputs.weight": "in_proj.weight", "conv.weight": "conv1d.weight", "conv.bias": "conv1d.bias",
             "step_bias_H": "dt_bias", "log_decay_H": "A_log", "skip_H": "D", "norm.weight": "norm.weight",
             "out.weight": "out_proj.weight"}  # fmt: skip
    theirs.load_state_dict({names[name]: value for name, value in ours.state_dict().items()})
    u_BLD = torch.randn(2, 70, 24)
    torch.testing.assert_close(ours(u_BLD), theirs(u_BLD), atol=2e-6, rtol=1e-5)


def test_an_early_exit_is_a_shallower_model() -> None:
    model = load_config(ROOT / "configs/family.yaml", ("model.pattern=A", "model.num_channels=1", "model.n_layers=3",
                                                       "budget.budgets=[1]", "eval.budgets=[1]")).model  # fmt: skip
    peer = build_peer("early_exit", model, 0)
    assert isinstance(peer, peers.EarlyExit)
    ids_BL = torch.randint(0, 257, (2, 9))
    shallow = build_model(model.model_copy(update={"n_layers": 2}), 0)
    kept = {name: value for name, value in peer.model.state_dict().items() if not name.startswith("blocks.2.")}
    shallow.load_state_dict(kept)
    torch.testing.assert_close(peer(ids_BL, 2), shallow(ids_BL, 1))
    torch.testing.assert_close(peer(ids_BL, 3), peer.model(ids_BL, 1))
    assert peer_parameters(peer, 2) == sum(parameter.numel() for parameter in shallow.parameters())


def test_the_plain_loop_trains_as_a_run_does(trained: Path, tmp_path: Path) -> None:
    """Same batches, budgets, rates, clipping and optimizer; documents apart."""
    config = load_config(trained / "config.yaml", (f"run.dir={tmp_path}",))
    (row,) = (row for row in read_records(trained) if row["step"] == config.train.steps)
    found = train_plain(config, None, torch.device("cpu"))
    assert {str(k): score.bits_per_byte for k, score in found.items()} == pytest.approx(row["valid"], rel=1e-4)


def test_the_plain_loop_goes_on_where_it_was(
    small_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, as if it had not been interrupted; what it was kept in goes with its end."""
    monkeypatch.setattr(plain, "KEPT_EVERY_S", -1.0)
    whole, torn = (small_config("train.steps=6", f"run.dir={tmp_path / name}") for name in ("whole", "torn"))
    drawn, device = drawn_passes(torn), torch.device("cpu")
    seen: list[int] = []

    def interrupted_once(step: int) -> tuple[Pass, ...]:
        seen.append(step)
        if seen == [0, 1, 2, 3, 4]:
            raise KeyboardInterrupt
        return drawn(step)

    with pytest.raises(KeyboardInterrupt):
        train_plain(torn, None, device, interrupted_once)
    assert [path.name for path in (tmp_path / "torn").iterdir()] == ["plain.pt"]
    found = train_plain(torn, None, device, interrupted_once)
    assert seen == [0, 1, 2, 3, 4, 4, 5]
    assert found == train_plain(whole, None, device)
    assert [path.name for path in (tmp_path / "torn").iterdir()] == ["plain.json"]


@pytest.mark.parametrize("knob", ["budget.distill_weight=0.5", "train.precision=bf16"])
def test_the_plain_loop_refuses_what_it_leaves_out(knob: str, small_config: Callable[..., Config]) -> None:
    with pytest.raises(UserError, match=f"{knob.replace('=', ' is ')}, and the plain loop knows .* without --device"):
        train_plain(small_config(knob), None, torch.device("cpu"))


@pytest.mark.parametrize("distill", [None, 0.0, 0.5])
def test_graphs_of_passes_are_the_update(distill: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU would capture, carried out at every replay: the same weights, from a few graphs."""
    own = ("budget.strategy=stratified", "budget.budgets=[1,2,4]", "train.micro_batch_sequences=1", "train.steps=12")
    config = load_config(ROOT / FAMILY, (*own, "data.path=x", "model.n_layers=1", "model.seq_len=32",
                                         "optim.warmup_steps=2", "train.batch_sequences=4"))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    ids_NBT = torch.randint(0, 257, (12, 4, 33), generator=generator)
    batches = Batches(ids_NBT, torch.rand((12, 4, 32), generator=generator) < 0.9)
    passes = drawn_passes(config) if distill is None else nested_passes(config, Recipe(((0.25, 1.0),), distill))
    captured: list[tuple[Pass, ...]] = []

    class Pretended(Training):
        def _graph(self, how: tuple[Pass, ...], work: Callable[[], None]) -> Any:
            captured.append(how)
            return SimpleNamespace(replay=work)

    found = []
    for kind in (Training, Pretended):
        model = build_model(config.model, 0)
        training = kind(model, config, batches, passes, partial(predicted, model))
        monkeypatch.setattr(training, "pool", None if kind is Training else object())
        training.run()
        found.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(found[1], found[0], atol=0, rtol=0)
    if distill:
        assert {len(how) for how in captured} == {2}, "the second pass learns from the first"
    else:
        assert {len(how) for how in captured} == {0, 1}
        assert len(set(captured)) <= 4 * 4 + 1, "a pass at a budget, and the step"


def test_a_recipe_is_paid_by_the_row(data_path: Path, tmp_path: Path, small_config: Callable[..., Config]) -> None:
    config = small_config("train.steps=3")
    recipe = Recipe(((0.25, 1.0), (0.5, 0.5)), distill=0.5)
    passes = nested_passes(config, recipe)
    for step in range(3):
        whole, quarter, half = passes(step)
        assert whole == (0, 4, 8, 1.0, 0.0)
        assert (quarter.first, quarter.last, half.first, half.last) == (0, 1, 1, 3)
        assert (quarter.weight, half.weight, half.distill) == (1.0, 0.5, 0.5)
        assert {quarter.k, half.k} <= {1, 2, 4}
    (cost,) = (
        point for point in plain_points(config, Arm("x", recipe=recipe), torch.device("cpu")) if "PF" in point.metric
    )
    flops = [training_flops_per_token(config.model, k, 64) for k in range(9)[1:]]
    paid = sum((part.last - part.first) * flops[part.k - 1] * 64 for step in range(3) for part in passes(step))
    assert cost.y == pytest.approx(paid / 1e15)


def test_accuracy_is_to_be_high(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        runner, "carry_out", lambda job: [Point("accuracy", "", 2, 1 - abs(math.log(job.config.optim.lr / 4e-3)))]
    )
    with ThreadPoolExecutor(1) as pool:
        found = run_experiment("recall", Options([0], tmp_path, arms=("taps",)), "command", pool)
        named = run_experiment("recall", Options([0], tmp_path, arms=("transformer", "K_max")), "command", pool)
    assert found.arms["transformer with taps"][-1] == "optim.lr=0.004"
    parts = ["K_max only", "K_max only, selective", "elastic hybrid (SA), K_max first", "hybrid (SA), K_max only"]
    assert list(named.arms) == [*parts, "transformer"], "whole names, or parts"


def test_what_is_measured_without_a_training_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[Path] = []

    def measured(run_dir: Path) -> list[Point]:
        seen.append(run_dir)
        return [Point("loss", "", 2, len(seen)), Point("loss", "x", 4, math.inf)]

    monkeypatch.setitem(EXPERIMENTS, "control", replace(EXPERIMENTS["control"], measure=measured))
    for seeds in ([0], [0, 1], [1, 0]):
        with ThreadPoolExecutor(1) as pool:
            found = run_experiment("control", Options(seeds, tmp_path, overrides=("data.path=x",)), "command", pool)
        assert found.points["controller"] == [[("loss", "", 2, 1 + seed), ("loss", "x", 4, math.inf)] for seed in seeds]
    assert len(seen) == 2


def test_every_arm_goes_on_at_its_best_rate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def measured(job: Job) -> list[Point]:
        best = {"hybrid (SA) alone": 8e-3, "Mamba-2": 4e-3}[job.arm.name]
        return [Point("loss", "", k, 1 + abs(math.log(job.config.optim.lr / best)) + job.seed) for k in (2, 4)]

    monkeypatch.setattr(runner, "carry_out", measured)
    options = Options([3, 4], tmp_path, arms=("SA) alone", "Mamba"), overrides=("data.path=x",))
    with ThreadPoolExecutor(1) as pool:
        found = run_experiment("family", options, "command", pool)
    rates = {arm: overrides[-1] for arm, overrides in found.arms.items()}
    assert rates == {"hybrid (SA) alone": "optim.lr=0.008", "Mamba-2": "optim.lr=0.004"}
    assert [points[0].y for points in found.points["Mamba-2"]] == [4, 5]
    with ThreadPoolExecutor(1) as pool, pytest.raises(UserError, match="no arm of family has nothing in its name"):
        run_experiment("family", replace(options, arms=("nothing",)), "command", pool)
    monkeypatch.delattr(runner, "carry_out")
    with ThreadPoolExecutor(1) as pool, pytest.raises(UserError, match=r"seeds \[3, 4\], not \[5\]; add"):
        run_experiment("family", replace(options, seeds=[5]), "command", pool, found)


@pytest.mark.long
@pytest.mark.ranks
def test_experiments_run(tmp_path: Path, data_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them with their first arm and their last, in one worker; trainings in common are made once."""
    runs = 0
    monkeypatch.setattr(scaling, "SHAPES", ((16, 1), (32, 1)))
    monkeypatch.setattr(scaling, "BYTES_PER_PARAMETER", (0, 1, 2))
    with workers(1) as pool:
        for name, experiment in EXPERIMENTS.items():
            arms = ends_of(experiment, *SMALL_ARMS.get(name, ()))
            monkeypatch.setitem(EXPERIMENTS, name, replace(experiment, arms=arms))
            text = experiment.config in (TEXT, FAMILY)
            own = SMALL if text else SMALL_TASK
            own += SMALL_FAMILY if experiment.config == FAMILY else ()
            data = data_path if text else small_task(name, Path(experiment.config).stem, tmp_path)
            options = Options([0], tmp_path / "runs", None, (*own, f"data.path={data}", "train.steps=3"), rates=())
            found = run_experiment(name, options, "command", pool)
            runs += len(found.arms)
            for path in write(found, tmp_path):
                assert path.stat().st_size > 0
            values = [point.y for by_seed in found.points.values() for points in by_seed for point in points]
            assert values
            assert all(math.isfinite(value) and value >= 0 for value in values)
            if experiment.trains and not text:
                assert BITS not in metrics(found), f"{name} is a task"
    assert len(list((tmp_path / "runs").iterdir())) == runs - 5 - 8, (
        "static_elastic, ablations, sampling, online share one; the families too; at this size deadline and control; "
        "the plain loop has one for its seven"
    )


def test_what_is_looked_up_is_in_the_set_trained_on(tmp_path: Path) -> None:
    """The commands of the README make the sets that the experiments are about, and every size fits them."""
    readme = (ROOT / "tools/experiments/README.md").read_text(encoding="utf-8")
    for name, lookup in LOOKUPS.items():
        config = EXPERIMENTS[name].configuration()
        assert f"make_task.py {lookup.arguments} --output {config.data.path} " in readme
        folder = small_task(name, "", tmp_path)
        task = load_task(folder / "task.json").task
        assert task == lookup.made.task(None)
        assert task.length == config.model.seq_len
        assert task.first_symbol + len(task.symbols) <= config.model.vocab_size
        for cell in lookup.cells:
            (batch,) = examples(cell.made, task, count=5)
            assert batch.mask_BL.sum(1).tolist() == [task.asked] * 5
            asked = batch.ids_BT[:, 1:][batch.mask_BL]
            assert bool((asked < len(task.answers)).all())


def test_models_that_look_up_have_equal_parameters() -> None:
    config = load_config(ROOT / LOOKUP)
    for arm in EXPERIMENTS["recall"].arms(config):
        model = load_config(ROOT / LOOKUP, arm.overrides).model
        wanted = parameters(config.model, config.model.num_channels)
        assert parameters(model, model.num_channels) == pytest.approx(wanted, rel=0.005), arm.name


def test_bits_by_position_are_those_of_the_parts(trained: Path) -> None:
    """The first trained length is the text's own beginning; all positions together are the score of the long text."""
    session = open_session(trained, None, "cpu")
    length = session.config.model.seq_len
    found = {(point.series, point.x): point.y for point in position_points(trained, 2)}
    assert {x for _, x in found} == {0.25, 0.5, 1, 2}
    assert {series for series, _ in found} == {f"K={k}, {way}" for k in (1, 2, 8) for way in ("continued", "windows")}
    batches = session.validation(max(1, session.config.eval.sequences // 2), 2 * length)
    beginnings = [batch.span(0, 2) for batch in batches]
    for k in (1, 8):
        whole = score(partial(losses_at, session.model), beginnings, k, session.token_bytes, session.device)
        bytes_L = sum((session.token_bytes[b.ids_BT[:, 1:]] * b.mask_BL).sum(0) for b in beginnings)
        quarter, half = length // 4, length // 2
        shares = [bytes_L[:quarter].sum(), bytes_L[quarter:half].sum(), bytes_L[half:].sum()]
        together = sum(share * found[f"K={k}, continued", x] for share, x in zip(shares, (0.25, 0.5, 1), strict=True))
        assert together / sum(shares) == pytest.approx(whole.bits_per_byte, rel=1e-4)
        assert found[f"K={k}, continued", 1] == pytest.approx(found[f"K={k}, windows", 1], rel=1e-4)


def test_the_readmes_headline_is_what_is_stored(tmp_path: Path) -> None:
    """The plot is drawn from the results, and the sentence under it has their figures."""
    kept = read_results(ROOT / "docs/results/family.json")
    assert draw_headline(kept).startswith(b"\x89PNG")
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (caption,) = re.findall(r"figures/family.png\)\n\n\*(.*?)\*\n", text, re.DOTALL)
    mean = {curve.label: curve.mean for curve in curves(kept, BITS)}
    caption = caption.replace("\n", " ")
    alone, elastic = mean[ALONE], mean[SPECTRAL]
    costs = [100 * (mine / single - 1) for mine, single in zip(elastic, alone, strict=True)]
    said = re.findall(r"(-?[\d.]+)%(?: bits per byte)? at (?:K = )?\d+", caption)
    assert [float(each) for each in said] == pytest.approx(costs, abs=0.06)
    transformers = mean["transformer with taps of each size"]
    behind, ahead = 100 * (elastic[-1] / transformers[-1] - 1), 100 * (1 - mean[MIXED][-1] / transformers[-1])
    assert f"{behind:.1f}% behind a transformer" in caption
    assert f"the hybrid {ahead:.1f}% ahead" in caption
    fewer = replace(kept, points={arm: seeds for arm, seeds in kept.points.items() if arm != "Mamba-2"})
    with pytest.raises(UserError, match="no curve 'Mamba-2'; run all arms"):
        draw_headline(fewer)
    (tmp_path / "x.json").write_text('{"name": 1}', encoding="utf-8")
    with pytest.raises(UserError, match="not the results of an experiment"):
        read_results(tmp_path / "x.json")
