"""Config -> DeepSpeed, and the only import of it. What DeepSpeed needs to behave is said here, with the reason.

Tried with deepspeed 0.19.8; docs/LOG.md has what was seen.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megassm.budget import drawn_budgets
from megassm.config.schema import Config
from megassm.cost import reduce_bucket_numbers
from megassm.layers.block import Block
from megassm.layers.compiled import compile_blocks
from megassm.model import LanguageModel, initial_rows, losses_at, parameter_shapes
from megassm.ops.documents import document_numbers
from megassm.ops.transfer import to_device
from megassm.optim import LR_FACTOR, build_optimizer
from megassm.parallel import state
from megassm.parallel.collect import Collection, Piece
from megassm.parallel.mesh import Mesh
from megassm.parallel.sequence import split_sequence
from megassm.parallel.slices import StoredTensor, read_flat
from megassm.parallel.start import WeightSource, start_weights
from megassm.parallel.state import Kind, State
from megassm.parallel.tensor import split_model, weight_slices
from megassm.parallel.world import Group, World

StateSource = Callable[[str, Kind], StoredTensor]
"""A kind of state of a parameter, by name."""


def deepspeed_config(config: Config, mesh: Mesh) -> dict[str, Any]:
    """DeepSpeed's dict, derived from ours; never written by hand."""
    train = config.train
    bf16 = train.precision == "bf16"
    derived: dict[str, Any] = {
        # all replicas are data ranks to DeepSpeed; sequence ranks hold parts of the same sequences
        "train_batch_size": train.batch_sequences * mesh.sequence,
        "train_micro_batch_size_per_gpu": train.micro_batch_sequences,
        "gradient_accumulation_steps": config.micro_steps(mesh.data),
        # at stage 0 we clip, because we need the norm
        "gradient_clipping": (config.optim.grad_clip or 0.0) if config.parallel.zero_stage > 0 else 0.0,
        "zero_optimization": {"stage": config.parallel.zero_stage, "reduce_bucket_size": reduce_bucket_numbers(config)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its CPU Adam would be compiled at start
        "bf16": {"enabled": bf16},
        "steps_per_print": 2**62,  # the journal reports progress
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # it would wait for the device twice a micro-step
    }
    if bf16:
        # each layer's gradient is added to the float32 sum as it is made, and freed; between ranks it is summed in
        # float32 too, or a sum over many ranks would lose what each adds
        derived["bf16"]["immediate_grad_update"] = True
        derived["data_types"] = {"grad_accum_dtype": "fp32"}
        derived["communication_data_type"] = "fp32"
    return derived


class _ModelParallelUnit:
    """What DeepSpeed asks about the mesh (its `mpu`). It gets no sequence groups: see `deepspeed_config`."""

    def __init__(self, world: World) -> None:
        self._world = world

    def get_data_parallel_group(self) -> Group:
        return self._world.replicas

    def get_data_parallel_rank(self) -> int:
        return self._world.replicas.rank()

    def get_data_parallel_world_size(self) -> int:
        return self._world.replicas.size()

    def get_model_parallel_group(self) -> Group:
        return self._world.tensor

    def get_model_parallel_rank(self) -> int:
        return self._world.tensor.rank()

    def get_model_parallel_world_size(self) -> int:
        return self._world.tensor.size()

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


class Engine:
    """This rank's part of a model under DeepSpeed ZeRO: forward, backward, one update, its state in and out."""

    def __init__(
        self,
        config: Config,
        world: World,
        document_end: int | None = None,
        weights: WeightSource | None = None,
        asked: int | None = None,
    ) -> None:
        """Builds the model of `config` from `weights`; None draws them from the seed.

        With `document_end`, the id of that name, no position sees another document. `asked` are the positions of a
        sequence that count; None: all.
        """
        deepspeed = _import_deepspeed(world.device, config.train.compile)
        self.document_end = document_end
        self.config = config
        self.world = world
        self.micro_steps = config.micro_steps(world.mesh.data)
        asked = asked or config.model.seq_len
        self._positions = config.train.micro_batch_sequences * asked / world.mesh.sequence
        parts = [weight_slices(config.model, world.mesh.tensor, rank) for rank in range(world.mesh.tensor)]
        self._parts = parts[world.coordinates.tensor]
        self._shapes = parameter_shapes(config.model)
        deepspeed.init_distributed(verbose=False, auto_mpi_discovery=False)
        model = self._start(deepspeed, weights or partial(initial_rows, config.model, config.run.seed))
        with contextlib.redirect_stdout(io.StringIO()):  # the bf16 optimizer prints its memory use, unasked
            self._engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=build_optimizer(model, config.model.width_factor, config.optim, self._shapes),
                config=deepspeed_config(config, world.mesh),
                mpu=_ModelParallelUnit(world),
                dist_init_required=False,
            )
        self.model: LanguageModel = self._engine.module
        self.kinds: tuple[Kind, ...] = state.KINDS
        """What is to be remembered of each parameter."""
        if config.optim.ema is not None:
            self.kinds += (state.AVERAGE,)
        self._updates = 0
        state.create_moments(self._engine, average=config.optim.ema is not None)
        state.add_gradients_in_one_pass(self._engine)
        pieces = {name: Piece(*state.piece(self._engine, each)) for name, each in self.model.named_parameters()}
        self.collection = Collection(world, parts, self._shapes, pieces)

    def _start(self, deepspeed: Any, weights: WeightSource) -> LanguageModel:
        """This rank's part of the model with its weights: at stage 3 its share of that, from the first moment on."""
        config, world = self.config, self.world
        dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
        model = split_model(config.model, world.tensor, config.train.recompute, dtype)
        split_sequence(model, world.sequence)
        if config.train.compile:
            compile_blocks(cast(list[Block], model.blocks), len(drawn_budgets(config)))
        if model.filterbank is not None:
            model.filterbank.to(world.device)
        settle: Callable[[torch.nn.Parameter], None] = lambda parameter: None  # noqa: E731
        if config.parallel.zero_stage == 3:
            zero = deepspeed.zero.Init(
                module=torch.nn.Module(),  # with one it replaces F.linear by its own, which keeps no gathered weight
                data_parallel_group=world.replicas,
                dtype=dtype,
                config_dict_or_path=deepspeed_config(config, world.mesh),
                mpu=_ModelParallelUnit(world),
            )
            settle = partial(state.divide, zero)
            if config.train.compile:  # a block's weights are gathered around it: no hook stands inside its graph
                deepspeed.utils.set_z3_leaf_modules(model, [Block])
        start_weights(model, self._parts, weights, world, settle)
        return model

    def losses(self, ids_BT: Tensor, k: int) -> Tensor:
        """Negative log-likelihood in nats (B, L) of the tokens that follow each of the first L = T - 1."""
        return losses_at(self.model, ids_BT, k, self.document_end, self._engine)

    def training_losses(self, ids_BT: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """(`losses`, what to train on): the same, or partly the divergence from the prediction at K_max."""
        budget, k_max = self.config.budget, self.config.model.num_channels
        if budget.distill_weight == 0 or k == k_max:
            nll_BL = self.losses(ids_BT, k)
            return nll_BL, nll_BL
        documents_BL = document_numbers(ids_BT[:, :-1], self.document_end)
        ids_BT = to_device(ids_BT, self.world.device)
        ids_BL = ids_BT[:, :-1]
        with torch.no_grad():
            teacher_BLV = self._engine(ids_BL, k_max, documents_BL)
        logits_BLV = self._engine(ids_BL, k, documents_BL)
        nll_BL = self.model.losses(ids_BL, logits_BLV, ids_BT[:, 1:])
        divergence_BL = self.model.divergences(ids_BL, logits_BLV, teacher_BLV, budget.distill_temperature)
        return nll_BL, nll_BL.lerp(divergence_BL, budget.distill_weight)

    @torch.no_grad()
    def eval_losses(self, ids_BT: Tensor, k: int, hits: bool = False) -> Tensor:
        """`losses` for validation, (2, B, L) with `hits`. Under ZeRO-3 all ranks must call it equally often."""
        self._engine.eval()
        try:
            return losses_at(self.model, ids_BT, k, self.document_end, self._engine, hits)
        finally:
            self._engine.train()

    def backward(self, losses_BL: Tensor, mask_BL: Tensor) -> None:
        """Accumulates the gradient of the mean loss over the global batch's positions that count.

        The denominator is the same for every batch, whatever is masked in it: so it is the same on every rank, and
        any split of a batch over ranks and micro-steps gives the same gradient.
        """
        self._engine.backward((losses_BL * mask_BL).sum() / self._positions)
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def update(self, learning_rate: float) -> float:
        """Clips, updates the weights, and returns the gradient's global norm before clipping.

        Where that is not finite, the gradient is dropped and no weight changes.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate * group[LR_FACTOR]
        if self.config.parallel.zero_stage > 0:
            self._engine.step()
            norm = float(self._engine.get_global_grad_norm())
            self._average(norm)
            return norm
        norm = self._stage_0_norm()
        limit = self.config.optim.grad_clip
        if not math.isfinite(norm):
            self._engine.zero_grad()
        elif limit is not None and norm > limit:
            for parameter in self.model.parameters():
                cast(Tensor, parameter.grad).mul_(limit / (norm + 1e-6))
        self._engine.step()
        self._average(norm)
        return norm

    def _average(self, norm: float) -> None:
        """After an update with a gradient of that norm."""
        if not math.isfinite(norm):
            return  # no weight has changed
        self._updates += 1
        decay = self.config.optim.ema
        if decay is not None:
            state.average(self._engine, min(decay, (1 + self._updates) / (10 + self._updates)))

    @torch.no_grad()
    def _stage_0_norm(self) -> float:
        """DeepSpeed reports no norm at stage 0; the gradients are reduced over the replicas at this point."""
        squares = torch.zeros(2, dtype=torch.float64)
        for parameter in self.model.parameters():
            assert parameter.grad is not None
            split = bool(parameter.tensor_model_parallel)  # type: ignore[attr-defined]
            squares[int(split)] += float(parameter.grad.double().square().sum())
        if self.world.mesh.tensor > 1:
            dist.all_reduce(squares[1], group=self.world.tensor)
        return float(squares.sum().sqrt())

    def close(self) -> None:
        """Lets the memory go with the last reference: DeepSpeed's hooks on gradients hold weights and moments else."""
        with contextlib.redirect_stdout(io.StringIO()):
            self._engine.destroy()

    @torch.no_grad()
    def read_state(self, kinds: Sequence[Kind], into: State | None = None) -> State:
        """Kinds of state of the parameters whose home is this rank, whole, float32, on the CPU; those of all ranks
        together are the model's. All ranks must call it.

        One parameter travels at a time, so that nobody ever holds a second model. What an earlier call gave can be
        written over: `into`.
        """
        kept: State = {} if into is None else into
        here, pinned = set(self.collection.here), self.world.device.type == "cuda"
        for name, parameter in self.model.named_parameters():
            self.world.progress.note("state of the parameters")
            for kind in kinds:
                whole = None
                if name in here:
                    copies = kept.setdefault(name, {})
                    if kind not in copies:
                        copies[kind] = torch.empty(self._shapes[name], dtype=torch.float32, pin_memory=pinned)
                    whole = copies[kind]
                self.collection.put_together(name, state.held(self._engine, parameter, kind), whole)
        return kept

    def write_state(self, source: StateSource, updates: int) -> None:
        """Restores what `read_state` gave on any mesh; `updates` is what `applied_updates` was. All ranks must call it.

        A rank reads the numbers that it keeps, and of those that all replicas keep a share: never a whole model.
        """
        for name, parameter in self.model.named_parameters():
            shape = self._parts[name].shape(self._shapes[name])
            for kind in self.kinds:
                numbers = partial(read_flat, source(name, kind), self._parts[name], shape)
                state.write(self._engine, parameter, kind, numbers, self.world.replicas)
        self._updates = updates
        state.set_applied_updates(self._engine, updates)
        state.finish_writing(self._engine)

    def squares(self, parameter: torch.nn.Parameter) -> list[float]:
        """Along the first axis, sums of squares of this rank's share; summed over all ranks those of the whole.

        The parameter must be one that tensor ranks divide along another axis.
        """
        return state.squares(self._engine, parameter, self.world.replicas.rank()).tolist()

    @property
    def shape(self) -> dict[str, int]:
        """What a checkpoint may change: ranks along each axis, and the ZeRO stage."""
        return self.world.mesh._asdict() | {"zero_stage": self.config.parallel.zero_stage}

    @property
    def applied_updates(self) -> int:
        """Updates made; fewer than steps where some were skipped."""
        return state.applied_updates(self._engine)


def _import_deepspeed(device: torch.device, compiles: bool) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    if device.type == "cpu" and not compiles:
        # importing the compiler is most of an engine's start-up time
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
