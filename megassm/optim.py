"""Parameter groups, the optimizer, and the learning rate as a pure function of the step.

With `model.base_width` = d0 the learning rate found at width d0 is meant to hold at width d: muP for Adam (arXiv
2203.03466, table 8), said in this model's terms. With m = d0 / d:

    parameters                              learning rate   start at        decay
    matrices with O(d) inputs               m lr            1/sqrt(inputs)  wd / m
    M_k of several heads                    lr              1/sqrt(inputs)  wd
    embedding, head                         lr              constant std    wd
    gains and biases                        lr              1, 0            0
    the last norm's gain, before the head   m lr            m               0

* The last line is muP's multiplier m of the logits, which tied embeddings need: Adam does not see the scale of a
  gradient, so a gain that starts at m and moves at m lr is m times one that starts at 1 and moves at lr. The model
  computes nothing else than without muP.
* Of the matrices, M_k of one head, D and the gates have d or d/2 inputs, ffn.down has d_ffn and the output projections
  the heads: all are taken to grow as d does. M_k of several heads has the d/H inputs of one, which stay the same: widen
  by heads, not by wider heads. K changes nothing; it must not grow with d here.
* AdamW decays by (learning rate) x (decay) an update: divided by m, the matrices forget as fast at every width (arXiv
  2405.13698).
* Attention keeps 1/sqrt(dimensions of a head) where muP has 1/dimensions: again, widen by heads.
* Depth, batch and length are not transferred over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple, assert_never

import torch
from torch import nn

from megassm.config.schema import OptimConfig, TrainConfig

LR_FACTOR = "lr_factor"
"""Key of a torch parameter group: what multiplies the learning rate of an update there."""
TABLES = ("embedding_VD", "head_VD")
HEAD_GAIN = "head_norm.weight"
CHANNELS, OUT = "mixer.channels_KDD", "mixer.out_DD"


class ParameterGroup(NamedTuple):
    """Parameters that are updated alike, by name."""

    names: list[str]
    lr_factor: float
    weight_decay: float


def parameter_groups(shapes: Mapping[str, torch.Size], factor: float, weight_decay: float) -> list[ParameterGroup]:
    """Every parameter in one group, in the order of `shapes`; `factor` is m, 1 without muP.

    Matrices decay; vectors (norm gains, biases) do not.
    """
    matrices = [name for name, shape in shapes.items() if len(shape) >= 2]
    vectors = [name for name, shape in shapes.items() if len(shape) < 2]
    if factor == 1:
        return [ParameterGroup(matrices, 1.0, weight_decay), ParameterGroup(vectors, 1.0, 0.0)]
    of_heads = {name.replace(OUT, CHANNELS) for name in matrices if name.endswith(OUT)}  # one head has no projection
    constant = [name for name in matrices if name in TABLES or name in of_heads]
    return [
        ParameterGroup([name for name in matrices if name not in constant], factor, weight_decay / factor),
        ParameterGroup(constant, 1.0, weight_decay),
        ParameterGroup([name for name in vectors if name != HEAD_GAIN], 1.0, 0.0),
        ParameterGroup([HEAD_GAIN], factor, 0.0),
    ]


def build_optimizer(
    model: nn.Module, factor: float, config: OptimConfig, shapes: Mapping[str, torch.Size] | None = None
) -> torch.optim.Optimizer:
    """torch's AdamW: DeepSpeed takes it at every ZeRO stage, and nothing has to be compiled. `shapes` are the
    parameters' before ZeRO has divided them; None: it has not.

    On CUDA fused: one pass over weights, gradients and moments, without the two temporaries of their size that it needs
    else. On a CPU it would change the last digits of every run.
    """
    parameters = dict(model.named_parameters())
    shapes = shapes or {name: parameter.shape for name, parameter in parameters.items()}
    groups = [
        {"params": [parameters[name] for name in group.names], "weight_decay": group.weight_decay,
         LR_FACTOR: group.lr_factor, "lr": config.lr * group.lr_factor}
        for group in parameter_groups(shapes, factor, config.weight_decay)
    ]  # fmt: skip
    return torch.optim.AdamW(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=next(iter(parameters.values())).is_cuda or None,
    )


def learning_rate(optim: OptimConfig, train: TrainConfig, step: int) -> float:
    """The learning rate of update `step`, from 0: linear warm-up, then the schedule down to min_lr_ratio * lr."""
    steps, warmup = train.steps, optim.warmup(train.steps)
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    match optim.schedule:
        case "cosine":
            progress = (step - warmup) / max(1, steps - warmup)
            height = (1 + math.cos(math.pi * min(1.0, progress))) / 2
        case "wsd":
            decay_steps = optim.decay_steps or max(1, min(steps // 10, steps - warmup))
            height = min(1.0, max(0.0, (steps - step) / decay_steps))
        case _:
            assert_never(optim.schedule)
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * height)
