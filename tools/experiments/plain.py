"""Trains the models of an experiment in a plain loop of one process, on a CPU or a GPU.

The same batches in the same order as `megassm.train`, the same AdamW with the same groups, learning rate and clipping,
and the same budgets. On CUDA an update is one graph for each K that it can draw, or, of several passes, one for each of
them and one for the step, so that models of a few hundred thousand parameters take a millisecond a pass; the matrix
products are in TF32, the validation is in float32. What is measured is kept in the run directory, and until then, every
few minutes, where the training is: one that was interrupted goes on from there.
"""

from __future__ import annotations

import io
import json
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megassm.config.schema import Config
from megassm.data.dataset import Dataset, open_dataset
from megassm.data.stream import validation_batches
from megassm.errors import UserError
from megassm.eval.score import Score, score
from megassm.files import write_atomically
from megassm.model import LanguageModel, build_model
from megassm.ops.documents import document_numbers
from megassm.optim import LR_FACTOR, build_optimizer, learning_rate
from megassm.train.loop import step_budgets
from tools.experiments.arms import Recipe
from tools.experiments.bases import Basis, use_basis
from tools.experiments.batches import Batches, read_batches, stream_plan
from tools.experiments.peers import Peer, build_peer, peer_sizes

MEASURED = "plain.json"
STATE = "plain.pt"
KEPT_EVERY_S = 300.0
FULL_SHARE = 0.5


class Pass(NamedTuple):
    """A forward and backward pass of an update: rows `first` to `last` of the batch at budget k."""

    first: int
    last: int
    k: int
    weight: float
    """Of the pass's mean loss in what is minimised."""
    distill: float = 0.0
    """Share of that loss which is the divergence from the first pass's prediction; that pass has all rows."""


Passes = Callable[[int], tuple[Pass, ...]]
"""Of update `step`, from 0."""


Predicted = tuple[Tensor, Tensor]
"""Logits (B, L, V), and negative log-likelihood in nats (B, L)."""


def train_plain(
    config: Config,
    peer: Peer | None,
    device: torch.device,
    passes: Passes | None = None,
    basis: Basis | None = None,
) -> dict[int, Score]:
    """Validation scores by budget (by size k of a peer); trained if that is not done yet.

    Raises:
        UserError: the configuration asks for what only an ordinary run does.
    """
    _check(config)
    path = Path(config.run.dir) / MEASURED
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        data = open_dataset(config)
        if peer is None:
            model = build_model(config.model, config.run.seed)
            if basis is not None:
                use_basis(model, basis)
            net: nn.Module = model
            sizes = list(config.eval_budgets())
        else:
            net, sizes = build_peer(peer, config.model, config.run.seed), peer_sizes(peer, config.model)
        net.to(device)
        if passes is None:
            passes = drawn_passes(config) if peer is None else peer_passes(config, sizes)
        predict = partial(predicted, net, document_end=data.document_end(config))
        Training(net, config, read_batches(data, config, device), passes, predict).run()
        found = _validated(net, config, data, sizes, predict)
        write_atomically(path, json.dumps(found).encode())
        path.with_name(STATE).unlink(missing_ok=True)
    return {int(k): Score(*values) for k, values in json.loads(path.read_bytes()).items()}


def _check(config: Config) -> None:
    for name, value, only in (
        ("budget.distill_weight", config.budget.distill_weight, 0.0),
        ("train.precision", config.train.precision, "fp32"),
    ):
        if value != only:
            raise UserError(f"{name} is {value}, and the plain loop knows {only} alone: train without --device")


def drawn_passes(config: Config) -> Passes:
    """As the configuration's `budget` says."""
    rows, micro_steps = config.train.micro_batch_sequences, config.micro_steps(1)

    def passes(step: int) -> tuple[Pass, ...]:
        budgets = step_budgets(config, step, micro_steps)
        return tuple(Pass(i * rows, (i + 1) * rows, k, 1 / micro_steps) for i, k in enumerate(budgets))

    return passes


def nested_passes(config: Config, recipe: Recipe) -> Passes:
    """The whole batch at K_max, then `recipe.extras` of its rows, each at a smaller budget of the list."""
    rows, smaller = config.train.batch_sequences, config.listed_budgets()[:-1]

    def passes(step: int) -> tuple[Pass, ...]:
        found = [Pass(0, rows, config.model.num_channels, 1.0)]
        drawn = random.Random(f"nested {config.run.seed} {step}")
        first = 0
        for share, weight in recipe.extras:
            last = first + max(1, round(share * rows))
            found.append(Pass(first, last, drawn.choice(smaller), weight, recipe.distill))
            first = last
        return tuple(found)

    return passes


def peer_passes(config: Config, sizes: Sequence[int]) -> Passes:
    """The whole model at every second draw: a peer that pays less for its sizes than by drawing them all alike."""

    def passes(step: int) -> tuple[Pass, ...]:
        drawn = random.Random(f"exit {config.run.seed} {step}")
        k = sizes[-1] if drawn.random() < FULL_SHARE else drawn.choice(sizes)
        return (Pass(0, config.train.batch_sequences, k, 1.0),)

    return passes


class Training:
    """One model's training."""

    def __init__(
        self, net: nn.Module, config: Config, batches: Batches, passes: Passes, predict: Callable[..., Predicted]
    ) -> None:
        """`predict` is called with ids (B, T) and k: `predicted` of `net`."""
        self.net, self.config, self.batches, self.passes, self.predict = net, config, batches, passes, predict
        self.device = batches.ids_NBT.device
        self.kept = Path(config.run.dir) / STATE
        self.parameters = list(net.parameters())
        self.ids_BT = torch.empty(batches.ids_NBT.shape[1:], dtype=torch.int64, device=self.device)
        self.mask_BL = torch.empty(batches.mask_NBL.shape[1:], dtype=torch.bool, device=self.device)
        self.optimizer = self._optimizer()
        self.graphs: dict[tuple[Pass, ...], torch.cuda.CUDAGraph] = {}
        """By the passes in them; the one of the step alone has none."""
        self.pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None

    def run(self) -> None:
        """From where an interrupted training was kept, if one was, to the end."""
        kept = time.monotonic()
        for step in range(self._resume(), self.config.train.steps):
            self.ids_BT.copy_(self.batches.ids_NBT[step])
            self.mask_BL.copy_(self.batches.mask_NBL[step])
            rate = learning_rate(self.config.optim, self.config.train, step)
            for group in self.optimizer.param_groups:
                _set_rate(group, rate * group[LR_FACTOR])
            how = self.passes(step)
            if self.pool is None:
                self._update(how)
            else:
                for graph in self._graphs(how):
                    graph.replay()
            if time.monotonic() - kept > KEPT_EVERY_S:
                self._keep(step + 1)
                kept = time.monotonic()

    def _keep(self, step: int) -> None:
        buffer = io.BytesIO()
        state = {"step": step, "net": self.net.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, buffer)
        self.kept.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.kept, buffer.getvalue())

    def _resume(self) -> int:
        """The update to go on with. Before any graph, which reads weights and moments where they are."""
        if not self.kept.exists():
            return 0
        state = torch.load(self.kept, map_location=self.device, weights_only=True)
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        return int(state["step"])

    def _optimizer(self) -> torch.optim.Optimizer:
        plain = build_optimizer(self.net, 1.0, self.config.optim)
        if self.device.type != "cuda":
            return plain
        groups = [{**group, "lr": torch.tensor(group["lr"], device=self.device)} for group in plain.param_groups]
        for group in groups:
            for key in ("fused", "foreach", "capturable", "params_names"):
                group.pop(key, None)
        return torch.optim.AdamW(groups, fused=True, capturable=True)

    def _graphs(self, how: tuple[Pass, ...]) -> list[torch.cuda.CUDAGraph]:
        """An update's. Passes that need nothing of each other have one each, which serves in any order of them."""
        if len(how) == 1 or any(part.distill for part in how):
            return [self._graph(how, partial(self._update, how))]
        return [*(self._graph((part,), partial(self._gradients, (part,))) for part in how), self._graph((), self._end)]

    def _graph(self, how: tuple[Pass, ...], work: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Of `work`; captured when first asked for, between updates, after a trial that leaves nothing behind."""
        if how not in self.graphs:
            side = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                self._gradients(how)  # libraries set themselves up
                self._begin()
                self.optimizer.zero_grad(set_to_none=False)
            torch.cuda.current_stream(self.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            precision = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("high")  # not in the trial, where kernels are held against torch
            try:
                with torch.cuda.graph(graph, pool=self.pool):
                    work()
            finally:
                torch.set_float32_matmul_precision(precision)
            self.graphs[how] = graph
        return self.graphs[how]

    def _begin(self) -> None:
        """Makes all gradients, and by an update without effect the optimizer's state, zero: graphs are to find them."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.optimizer.state:
            return
        rates = [group["lr"].clone() for group in self.optimizer.param_groups]
        for group in self.optimizer.param_groups:
            group["lr"].zero_()
        self.optimizer.step()
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"].copy_(rate)

    def _update(self, how: tuple[Pass, ...]) -> None:
        self.optimizer.zero_grad()
        self._gradients(how)
        self._step()

    def _step(self) -> None:
        if self.config.optim.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.parameters, self.config.optim.grad_clip)
        self.optimizer.step()

    def _end(self) -> None:
        """The step after passes that have graphs of their own: the gradients stay where they are, zero again."""
        self._step()
        self.optimizer.zero_grad(set_to_none=False)

    def _gradients(self, how: tuple[Pass, ...]) -> None:
        """Adds those of some passes."""
        teacher_BLV: Tensor | None = None
        for part in how:
            rows = slice(part.first, part.last)
            ids_BT, mask_BL = self.ids_BT[rows], self.mask_BL[rows]
            logits_BLV, nll_BL = self.predict(ids_BT, part.k)
            if part.distill:
                assert teacher_BLV is not None
                net = cast(LanguageModel, self.net)
                divergence_BL = net.divergences(ids_BT[:, :-1], logits_BLV, teacher_BLV[rows], temperature=1.0)
                nll_BL = nll_BL.lerp(divergence_BL, part.distill)
            loss = part.weight * (nll_BL * mask_BL).sum() / mask_BL.sum()
            loss.backward()  # type: ignore[no-untyped-call]
            teacher_BLV = logits_BLV.detach() if teacher_BLV is None else teacher_BLV


def predicted(net: nn.Module, ids_BT: Tensor, k: int, document_end: int | None = None) -> Predicted:
    """Logits (B, L, V) and negative log-likelihood in nats (B, L) of the tokens after the first."""
    ids_BL, targets_BL = ids_BT[:, :-1], ids_BT[:, 1:]
    if isinstance(net, LanguageModel):
        logits_BLV = cast(Tensor, net(ids_BL, k, document_numbers(ids_BL, document_end)))
        return logits_BLV, net.losses(ids_BL, logits_BLV, targets_BL)
    logits_BLV = net(ids_BL, k)
    nll_N = F.cross_entropy(logits_BLV.flatten(0, 1).float(), targets_BL.flatten(), reduction="none")
    return logits_BLV, nll_N.view_as(targets_BL)


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _validated(
    net: nn.Module, config: Config, data: Dataset, sizes: Sequence[int], predict: Callable[..., Predicted]
) -> dict[int, Score]:
    batches = list(validation_batches(data.valid, stream_plan(config), config.eval.sequences))
    token_bytes = data.token_bytes(config.model.vocab_size)
    device = next(net.parameters()).device

    def losses(ids_BT: Tensor, k: int) -> Tensor:
        ids_BT = ids_BT.to(device)
        logits_BLV, nll_BL = predict(ids_BT, k)
        if not isinstance(net, LanguageModel):
            return nll_BL
        return torch.stack((nll_BL, net.hits(ids_BT[:, :-1], logits_BLV, ids_BT[:, 1:])))

    return {k: score(losses, batches, k, token_bytes, device) for k in sizes}
