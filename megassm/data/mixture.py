"""What a run trains on: one or several data sets, and in what shares over the run.

The simple case is one data set; it is a mixture of one source and has that set's own fingerprint.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from megassm.config.schema import Config
from megassm.data.index import ShardSet
from megassm.data.order import MixtureOrder, OrderPhase, SampleOrder, epoch_samples
from megassm.data.transport import Patience
from megassm.errors import UserError

ONE_SOURCE = "data"  # its name, where there is but one


class DataSource(NamedTuple):
    """A data set of a mixture."""

    name: str
    shards: ShardSet


@dataclass(frozen=True)
class ReadOptions:
    """How the blocks are read; nothing here changes a batch, but for damaged data."""

    patience: Patience = field(default_factory=Patience)
    batch_wait_s: float | None = None
    """The longest wait for one batch; None waits for ever."""
    cache_dir: Path | None = None
    cache_bytes: int = 0
    on_bad_block: Literal["raise", "mask"] = "raise"


@dataclass(frozen=True)
class MixturePhase:
    """From an update on, the weights of the sources, by name; those left out are not read."""

    start_step: int
    weights: dict[str, float]


@dataclass(frozen=True)
class Mixture:
    """The sources of a run and their shares. All are in the ids of one tokenizer."""

    sources: tuple[DataSource, ...]
    phases: tuple[MixturePhase, ...]
    reading: ReadOptions = field(default_factory=ReadOptions)
    answers: int | None = None
    """Of a task: ids below it are answers, which alone are to be predicted (`megassm.data.task`)."""

    @property
    def tokens(self) -> int:
        return sum(source.shards.tokens for source in self.sources)

    @property
    def eod(self) -> int:
        return self.sources[0].shards.eod

    @property
    def fingerprint(self) -> str:
        """What must not change while a run goes on: all sources, names, weights and phases."""
        if len(self.sources) == 1:
            return self.sources[0].shards.fingerprint
        facts = {
            "sources": {source.name: source.shards.fingerprint for source in self.sources},
            "phases": [[phase.start_step, phase.weights] for phase in self.phases],
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def order(self, shape: OrderShape) -> MixtureOrder:
        """Which tokens are which sample."""
        orders = []
        for name, shards in self.sources:
            if shards.tokens < 2:
                raise UserError(f"{shards.store.place}: 1 token of {name} leaves nothing to predict; give more text")
            samples = epoch_samples(shards.tokens, shape.seq_len)
            orders.append(SampleOrder(samples, shape.seed, shape.lanes, shape.window))
        phases = [
            OrderPhase(
                phase.start_step * shape.batch_sequences, tuple(phase.weights.get(s.name, 0.0) for s in self.sources)
            )
            for phase in self.phases
        ]
        return MixtureOrder(orders, phases)


class OrderShape(NamedTuple):
    """The numbers that, with the data, decide the order."""

    seq_len: int
    batch_sequences: int
    seed: int
    lanes: int = 48
    window: int = 64


def one_source(shards: ShardSet, reading: ReadOptions | None = None) -> Mixture:
    """The simple case."""
    return Mixture((DataSource(ONE_SOURCE, shards),), (MixturePhase(0, {ONE_SOURCE: 1.0}),), reading or ReadOptions())


def check_repeats(mixture: Mixture, config: Config) -> None:
    """Where `data.on_repeats` is "refuse", that nothing is read more often than `data.max_epochs`. Tasks are exempt:
    their examples are meant to come again.

    Raises:
        UserError: naming each source that would be, with the numbers.
    """
    if config.data.on_repeats == "refuse" and mixture.answers is None and (told := repeats_told(mixture, config)):
        raise UserError(f"{told}, raise data.max_epochs, or set data.on_repeats=warn")


def repeats_told(mixture: Mixture, config: Config) -> str:
    """What would be read more often than `data.max_epochs` over the planned steps, and what to do; "" for nothing."""
    shape = OrderShape(config.model.seq_len, config.train.batch_sequences, config.run.seed)
    steps, limit = config.train.steps, config.data.max_epochs
    epochs = mixture.order(shape).epochs(steps * config.train.batch_sequences)
    too_often = [
        f"{_named(source, mixture)} {read:.2f} times ({read * source.shards.tokens:,.0f} of its "
        f"{source.shards.tokens:,} tokens)"
        for source, read in zip(mixture.sources, epochs, strict=True)
        if read > limit
    ]
    if not too_often:
        return ""
    fitting = max(1, int(steps * limit / max(epochs)))
    way_out = "lower the weight, train.steps or the batch" if len(epochs) > 1 else f"lower train.steps to {fitting:,}"
    return f"data.max_epochs = {limit:g}: {steps} steps would read {', '.join(too_often)}; {way_out}, give more text"


def _named(source: DataSource, mixture: Mixture) -> str:
    return repr(source.name) if len(mixture.sources) > 1 else "the training text"
