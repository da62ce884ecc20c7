"""Parameter groups, the optimizer, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from typing import assert_never

import torch
from torch import nn

from megassm.config import OptimConfig, TrainConfig


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """torch's AdamW: DeepSpeed takes it at every ZeRO stage, and nothing has to be compiled.

    Matrices decay; vectors (norm gains, biases) do not.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


def learning_rate(optim: OptimConfig, train: TrainConfig, step: int) -> float:
    """The learning rate of update `step`, from 0: linear warm-up, then the schedule down to min_lr_ratio * lr."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    match optim.schedule:
        case "cosine":
            progress = (step - optim.warmup_steps) / max(1, train.steps - optim.warmup_steps)
            height = (1 + math.cos(math.pi * min(1.0, progress))) / 2
        case "wsd":
            decay_steps = optim.decay_steps or max(1, min(train.steps // 10, train.steps - optim.warmup_steps))
            height = min(1.0, max(0.0, (train.steps - step) / decay_steps))
        case _:
            assert_never(optim.schedule)
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * height)
