"""Every batch of a training, read once and held on the device."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from megassm.config.schema import Config
from megassm.data.dataset import Dataset
from megassm.data.stream import StreamPlan, TokenStream


class Batches(NamedTuple):
    """Every batch of a training, on the device: N updates."""

    ids_NBT: Tensor
    mask_NBL: Tensor


def read_batches(data: Dataset, config: Config, device: torch.device) -> Batches:
    key = (config.data.model_dump_json(), stream_plan(config), config.train.steps)
    if key not in _READ:
        _READ.clear()
        _READ[key] = _read(data, key[1], config.train.steps, config.model.vocab_size)
    return Batches(*(torch.from_numpy(array).to(device) for array in _READ[key]))


_READ: dict[tuple[str, StreamPlan, int], tuple[Any, Any]] = {}
"""What the last training of this process read: the next one often reads the same."""


def _read(data: Dataset, plan: StreamPlan, steps: int, vocab_size: int) -> tuple[Any, Any]:
    stream = TokenStream(data.train, plan)
    shape = (steps, plan.batch_sequences, plan.seq_len)
    ids_NBT = np.empty((*shape[:2], plan.seq_len + 1), dtype=np.int16 if vocab_size < 2**15 else np.int32)
    mask_NBL = np.empty(shape, dtype=np.bool_)
    micro_steps, rows = stream.micro_steps, plan.micro_batch_sequences
    for number, batch in enumerate(stream.batches(0, steps)):
        step, first = number // micro_steps, number % micro_steps * rows
        ids_NBT[step, first : first + rows] = batch.ids_BT
        mask_NBL[step, first : first + rows] = batch.mask_BL
    return ids_NBT, mask_NBL


def stream_plan(config: Config) -> StreamPlan:
    return StreamPlan(
        seq_len=config.model.seq_len,
        batch_sequences=config.train.batch_sequences,
        micro_batch_sequences=config.train.micro_batch_sequences,
        seed=config.run.seed,
    )
