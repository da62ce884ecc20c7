"""Trains a peer (`tools.experiments.peers`) as the package trains its own models, in a plain loop of one process.

The same batches in the same order, the same AdamW with the same groups, learning rate and clipping. What is measured is
kept in the run directory; a training that was interrupted starts again from its beginning.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megassm.config.schema import Config
from megassm.data.dataset import Dataset, open_dataset
from megassm.data.stream import StreamPlan, TokenStream, validation_batches
from megassm.eval.score import score
from megassm.files import write_atomically
from megassm.optim import build_optimizer, learning_rate
from tools.experiments.peers import Peer, build_peer, peer_parameters, peer_sizes

MEASURED = "peer.json"
FULL_SHARE = 0.5


def train_peer(config: Config, name: Peer) -> dict[int, tuple[int, float]]:
    """Parameters and bits per byte of validation text by size k; trained if that is not done yet."""
    path = Path(config.run.dir) / MEASURED
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        data = open_dataset(config)
        peer = build_peer(name, config.model, config.run.seed)
        _train(peer, config, data, peer_sizes(name, config.model))
        found = {k: (peer_parameters(peer, k), _bits(peer, config, data, k)) for k in peer_sizes(name, config.model)}
        write_atomically(path, json.dumps(found).encode())
    return {int(k): (count, bits) for k, (count, bits) in json.loads(path.read_bytes()).items()}


def _train(peer: nn.Module, config: Config, data: Dataset, sizes: list[int]) -> None:
    stream = TokenStream(data.train, _plan(config))
    optimizer = build_optimizer(peer, 1.0, config.optim)
    micro_steps = config.micro_steps(1)
    for step in range(config.train.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, config.train, step)
        optimizer.zero_grad()
        # the whole model at every second draw: a peer that pays less for its sizes than by drawing them all alike
        drawn = random.Random(f"exit {config.run.seed} {step}")
        k = sizes[-1] if drawn.random() < FULL_SHARE else drawn.choice(sizes)
        for micro_step in range(micro_steps):
            batch = stream.micro_batch(step, micro_step)
            ids_BT, mask_BL = torch.from_numpy(batch.ids_BT), torch.from_numpy(batch.mask_BL)
            loss = (_nll(peer, ids_BT, k) * mask_BL).sum() / mask_BL.sum() / micro_steps
            loss.backward()  # type: ignore[no-untyped-call]
        if config.optim.grad_clip is not None:
            nn.utils.clip_grad_norm_(peer.parameters(), config.optim.grad_clip)
        optimizer.step()


def _nll(peer: nn.Module, ids_BT: Tensor, k: int) -> Tensor:
    targets_BL = ids_BT[:, 1:]
    logits_NV = peer(ids_BT[:, :-1], k).flatten(0, 1).float()
    return F.cross_entropy(logits_NV, targets_BL.flatten(), reduction="none").view_as(targets_BL)


def _bits(peer: nn.Module, config: Config, data: Dataset, k: int) -> float:
    batches = list(validation_batches(data.valid, _plan(config), config.eval.sequences))
    token_bytes = data.token_bytes(config.model.vocab_size)
    found = score(lambda ids_BT, k: _nll(peer, ids_BT, k), batches, k, token_bytes, torch.device("cpu"))
    return found.bits_per_byte


def _plan(config: Config) -> StreamPlan:
    return StreamPlan(
        seq_len=config.model.seq_len,
        batch_sequences=config.train.batch_sequences,
        micro_batch_sequences=config.train.micro_batch_sequences,
        seed=config.run.seed,
    )
