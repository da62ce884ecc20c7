"""Config -> DeepSpeed, and the only import of it. What DeepSpeed needs to behave is said here, with the reason.

Tried with deepspeed 0.19.8; docs/LOG.md has what was seen.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megassm.config import Config
from megassm.errors import UserError
from megassm.model import LanguageModel
from megassm.ops.documents import document_numbers
from megassm.optim import build_optimizer
from megassm.parallel.world import World

SHARDS_TAG = "state"
"""Sub-folder of a checkpoint that DeepSpeed writes."""


def deepspeed_config(config: Config, data_ranks: int) -> dict[str, Any]:
    """DeepSpeed's dict, derived from ours; never written by hand."""
    train = config.train
    bf16 = train.precision == "bf16"
    derived: dict[str, Any] = {
        "train_batch_size": train.batch_sequences,
        "train_micro_batch_size_per_gpu": train.micro_batch_sequences,
        "gradient_accumulation_steps": config.micro_steps(data_ranks),
        "gradient_clipping": config.optim.grad_clip or 0.0,
        "zero_optimization": {"stage": config.parallel.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its CPU Adam would be compiled at start
        "bf16": {"enabled": bf16},
        "steps_per_print": 2**62,  # the journal speaks
        "wall_clock_breakdown": False,
    }
    if bf16:
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
    return derived


class Engine:
    """A model under DeepSpeed ZeRO: forward, backward, one update, shards on disk.

    With `document_end`, the id of that name, no position sees another document.
    """

    def __init__(self, model: LanguageModel, config: Config, world: World, document_end: int | None = None) -> None:
        deepspeed = _import_deepspeed(world.device)
        self.document_end = document_end
        self.config = config
        self.world = world
        self.micro_steps = config.micro_steps(world.size)
        self._positions = config.train.micro_batch_sequences * config.model.seq_len
        model.to(world.device)
        deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)
        with contextlib.redirect_stdout(io.StringIO()):  # the bf16 optimizer prints its memory use, unasked
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=build_optimizer(model, config.optim),
                config=deepspeed_config(config, world.size),
                dist_init_required=False,
            )
        self.model: LanguageModel = self._engine.module
        self.model.check_filters()

    def losses(self, ids_BT: Tensor, k: int) -> Tensor:
        """Negative log-likelihood in nats (B, L) of the tokens that follow each of the first L = T - 1."""
        documents_BL = document_numbers(ids_BT[:, :-1], self.document_end)
        nll: Tensor = self._engine(ids_BT[:, :-1], k, ids_BT[:, 1:], documents_BL)
        return nll

    @torch.no_grad()
    def eval_losses(self, ids_BT: Tensor, k: int) -> Tensor:
        """`losses` for validation. Under ZeRO-3 all ranks must call it equally often."""
        self._engine.eval()
        try:
            return self.losses(ids_BT, k)
        finally:
            self._engine.train()

    def backward(self, nll_BL: Tensor, mask_BL: Tensor) -> None:
        """Accumulates the gradient of the mean loss over the global batch's positions.

        The denominator counts all positions, masked ones too: so it is the same on every rank, and any split of a
        batch over ranks and micro-steps gives the same gradient.
        """
        self._engine.backward((nll_BL * mask_BL).sum() / self._positions)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def update(self, learning_rate: float) -> float:
        """Clips, updates the weights, and returns the gradient's global norm before clipping."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._stage_0_norm() if self.config.parallel.zero_stage == 0 else None
        self._engine.step()
        return float(norm if norm is not None else self._engine.get_global_grad_norm())

    def _stage_0_norm(self) -> Tensor:
        # DeepSpeed reports none at stage 0; the gradients are whole and reduced on every rank at this point
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients)

    def whole_weights(self) -> dict[str, Tensor]:
        """The float32 weights, whole and on the CPU, on the main rank; empty elsewhere. All ranks must call it."""
        from deepspeed.utils import safe_get_full_fp32_param

        weights = {}
        for name, parameter in self.model.named_parameters():
            # one parameter at a time, so that no device ever holds a second model
            whole = parameter.detach() if self.config.parallel.zero_stage == 0 else safe_get_full_fp32_param(parameter)
            if self.world.is_main:
                weights[name] = whole.to("cpu", torch.float32, copy=True)
        return weights

    def save_shards(self, folder: Path) -> None:
        """Every rank writes its part of weights and optimizer state below `folder`."""
        self._engine.save_checkpoint(str(folder), tag=SHARDS_TAG, save_latest=False)

    def load_shards(self, folder: Path) -> None:
        """Restores what `save_shards` wrote at the same world size and ZeRO stage."""
        try:
            path, _ = self._engine.load_checkpoint(str(folder), tag=SHARDS_TAG)
        except Exception as error:  # what torch.load and DeepSpeed raise for a damaged shard has many types
            raise UserError(
                f"{folder / SHARDS_TAG}: DeepSpeed cannot load it ({type(error).__name__}: {error}); move {folder} "
                "away to continue from the checkpoint before"
            ) from None
        if path is None:
            raise UserError(f"{folder / SHARDS_TAG}: DeepSpeed finds no checkpoint there; move {folder} away")


def _import_deepspeed(device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if device.type == "cpu":
        # Nothing is compiled on a CPU; importing the compiler is most of an engine's start-up time.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    import deepspeed
    import deepspeed.ops

    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed would compile a shared-memory collective with c++ (minutes), and leaves a lock that hangs every
    # later job where a rank is killed meanwhile. gloo serves.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
