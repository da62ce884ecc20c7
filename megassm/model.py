"""The language model: embedding, blocks from the pattern, head; its initialisation; cutting it to a budget.

    x = E[ids];  for each block:  x = x + mixer(norm(x));  x = x + ffn(norm(x));  logits = norm(x) H^T

Shapes: B batch, L length, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, Protocol, Self, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megassm.config.model import Budget, ModelConfig
from megassm.layers.attention import Mask, mask_for, rope_tables
from megassm.layers.block import Block
from megassm.layers.compiled import of_any_number
from megassm.layers.context import Context
from megassm.layers.initial import initial_blocks
from megassm.layers.state import Continued, DecodingState, Extension
from megassm.layers.vocabulary import Vocabulary
from megassm.layers.window import filter_bank
from megassm.ops.documents import check_documents, document_numbers
from megassm.ops.pooling import content_positions, pooled, separators
from megassm.ops.transfer import to_device


class Source(Protocol):
    """Where a model was read from, which may have more of it (`megassm.checkpoint.grow`)."""

    def grow(self, model: LanguageModel, k: int) -> None:
        """See `LanguageModel.grow`."""


class LanguageModel(nn.Module):
    """An elastic spectral language model, or a hybrid with attention.

    Embedding and head are parameters of this module itself: under ZeRO-3 they are then gathered for the whole
    forward pass, which is what tied embeddings need.

    Made by hand it has neither weights nor filters: use `build_model`, or `assembled` with weights from elsewhere.
    """

    def __init__(self, config: ModelConfig, recompute: bool = False) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.vocabulary = Vocabulary()
        self.source: Source | None = None
        self.part = (0, 1)
        """Which part of every sequence this model is given, and of how many (`megassm.parallel.sequence`)."""
        self.embedding_VD = nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.blocks = nn.ModuleList(Block(config.layer(n), scale) for n, scale in enumerate(config.sigma_scales))
        self.head_norm = nn.RMSNorm(config.d_model, eps=config.norm_eps)
        self.head_VD = nn.Parameter(torch.empty(config.outputs, config.d_model)) if config.has_head else None
        self.filterbank = filter_bank(config)

    def forward(self, ids_BL: Tensor, k: Budget | None = None, documents_BL: Tensor | None = None) -> Tensor:
        """Logits (B, L, V) of the token after each; of a model with classes (B, 1, C).

        A split model's are its own part of the vocabulary's; `losses`, `hits` and `divergences` take them as they are.

        Args:
            ids_BL: token ids.
            k: the budget, 1 <= k <= K_max, or one for each layer; None: K_max.
            documents_BL: the number of each position's document, which does not fall along a sequence: no position
                then sees another document. Rotary positions run on. None: a sequence is one document.

        Raises:
            UserError: a budget out of range, or `documents_BL` is not a valid numbering.
        """
        if documents_BL is not None:
            check_documents(documents_BL, ids_BL)
        return self.logits(self._hidden(ids_BL, self.context(0, ids_BL.shape[1], k, documents_BL)))

    def losses(self, ids_BL: Tensor, logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        """Negative log-likelihood in nats, (B, L) float32, of the `targets_BL` that follow `ids_BL`.

        Of a model with classes it is 0 but where the label is the target.
        """
        return self._where_asked(ids_BL, self.token_losses(logits_BLV, self._asked(ids_BL, targets_BL)))

    def hits(self, ids_BL: Tensor, logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        """1 where the target is the most likely of all, (B, L) float32; 1/n where n are equally likely."""
        return self._where_asked(ids_BL, self.vocabulary.hits(logits_BLV, self._asked(ids_BL, targets_BL)))

    def divergences(self, ids_BL: Tensor, logits_BLV: Tensor, teacher_BLV: Tensor, temperature: float) -> Tensor:
        """T^2 KL(teacher || student) of two logits for `ids_BL` at temperature T, (B, L) float32 (arXiv 1503.02531)."""
        return self._where_asked(ids_BL, self.vocabulary.divergences(logits_BLV, teacher_BLV, temperature))

    def _asked(self, ids_BL: Tensor, targets_BL: Tensor) -> Tensor:
        """What is predicted: every target, or an example's label (B, 1)."""
        classes = self.config.classes
        return targets_BL if classes is None else (targets_BL * separators(ids_BL, classes)).sum(1, keepdim=True)

    def _where_asked(self, ids_BL: Tensor, values_BL: Tensor) -> Tensor:
        return values_BL if self.config.classes is None else values_BL * separators(ids_BL, self.config.classes)

    def features(self, ids_BL: Tensor, k: Budget | None = None) -> Tensor:
        """The normed output of the last block (B, L, D): for callers that want logits at some positions only."""
        return self._hidden(ids_BL, self.context(0, ids_BL.shape[1], k))

    def _hidden(self, ids_BL: Tensor, context: Context) -> Tensor:
        """What the head reads, (B, L, D); with classes the mean over an example's positions, (B, 1, D)."""
        classes = self.config.classes
        content_BL = None if classes is None else content_positions(ids_BL, classes)
        x_BLD = self.embed(ids_BL if content_BL is None else ids_BL.where(content_BL, cast(int, classes)))
        for number, block in enumerate(self.blocks):
            if self.recompute and self.training:
                x_BLD = checkpoint(block, x_BLD, context.of(number), use_reentrant=False)
            else:
                x_BLD = block(x_BLD, context.of(number))
        x_BLD = self.head_norm(x_BLD)
        return x_BLD if content_BL is None else pooled(x_BLD, content_BL)

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the embedding, (..., D)."""
        return self.vocabulary.embed(ids, self.embedding_VD)

    def logits(self, x: Tensor) -> Tensor:
        """Of the normed output of the last block."""
        return self.vocabulary.logits(x, self.embedding_VD if self.head_VD is None else self.head_VD)

    def token_losses(self, logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        return self.vocabulary.losses(logits_BLV, targets_BL)

    @torch.no_grad()
    def prefill(
        self,
        ids_BL: Tensor,
        k: Budget | None = None,
        counts: Sequence[int] | None = None,
        state: DecodingState | None = None,
    ) -> tuple[Tensor, DecodingState]:
        """(logits (B, V) of the token after the last, the state that `step` and `extend` continue from).

        With `counts`, text b is its first counts[b] tokens, and padding on the right; with `state` they follow those
        of the state.
        """
        x_BLD, extension = self._extended(ids_BL, state, k)
        last_BD = x_BLD[:, -1] if counts is None else x_BLD[range(len(counts)), [count - 1 for count in counts]]
        return self.logits(self.head_norm(last_BD)), extension.keep(counts)

    @torch.no_grad()
    def extend(self, ids_BL: Tensor, state: DecodingState | None, k: Budget | None = None) -> tuple[Tensor, Extension]:
        """Reads L more tokens of every text by the parallel form; from nothing where `state` is None.

        Returns:
            (logits (B, L, V) of the tokens after each, what the state after all or some of the L is kept from). Texts
            that take fewer than L are padded on the right, and the rest of theirs is not kept.

        Raises:
            UserError: a budget out of range.
        """
        x_BLD, extension = self._extended(ids_BL, state, k)
        return self.logits(self.head_norm(x_BLD)), extension

    def _extended(self, ids_BL: Tensor, state: DecodingState | None, k: Budget | None) -> tuple[Tensor, Extension]:
        batch, length = ids_BL.shape
        lengths = (0,) * batch if state is None else state.lengths
        context = self.context(0, length, k) if state is None else self._decoding_context(state, length, k)
        x_BLD = self.embed(ids_BL)
        layers: list[Continued] = []
        for number, block in enumerate(cast(list[Block], self.blocks)):
            x_BLD, continued = block.extend(x_BLD, None if state is None else state.layers[number], context.of(number))
            layers.append(continued)
        return x_BLD, Extension(lengths, length, layers, None if self.source is None else context.filterbank)

    @torch.no_grad()
    def step(self, ids_B: Tensor, state: DecodingState, k: Budget | None = None) -> tuple[Tensor, DecodingState]:
        """(logits (B, V) of the token after `ids_B`, the state after it); k may differ from step to step."""
        context = self._decoding_context(state, 1, k)
        x_BD = self.embed(ids_B)
        layers = []
        for number, block in enumerate(cast(list[Block], self.blocks)):
            x_BD, after = block.step(x_BD, state.layers[number], context.of(number))
            layers.append(after)
        lengths = tuple(seen + 1 for seen in state.lengths)
        bank = None if self.source is None else context.filterbank
        return self.logits(self.head_norm(x_BD)), DecodingState(lengths, layers, bank)

    def _decoding_context(self, state: DecodingState, length: int, k: Budget | None) -> Context:
        """For `length` positions after those that each text has; rotary tables (L, P/2), or (B, L, P/2) for texts of
        different lengths. Whom a query may see is the caches' to say."""
        begun, lengths = state.filterbank, state.lengths
        budgets = self.config.layer_budgets(begun.num_channels if k is None and begun is not None else k)
        state.check_budget(max(budgets))
        base = Context.at(budgets, begun or self.filterbank)
        if "A" not in self.config.mixers:
            return base
        starts = lengths[:1] if len(set(lengths)) == 1 else lengths
        device = self.embedding_VD.device
        positions_BL = torch.tensor(starts, device=device)[:, None] + torch.arange(length, device=device)
        return base._replace(rope=self._rope(positions_BL[0] if len(starts) == 1 else positions_BL))

    def context(self, first: int, length: int, k: Budget | None, documents_BL: Tensor | None = None) -> Context:
        """For `length` positions from `first` on; a `k` of None is K_max; with the documents, if any, kept apart."""
        base = Context.at(self.config.layer_budgets(k), self.filterbank)
        if documents_BL is not None:
            base = self._apart(base, documents_BL)
        if "A" not in self.config.mixers:
            return base
        part, parts = self.part
        positions_L = first + part * length + torch.arange(length, device=self.embedding_VD.device)
        return base._replace(rope=self._rope(positions_L), mask=self._mask(parts * length, base.documents_BL))

    def _mask(self, length: int, documents_BL: Tensor | None) -> Mask:
        eager = self.training and cast(Block, self.blocks[0]).program is None
        return mask_for(self.config, length, documents_BL, self.embedding_VD, trains=eager)

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rope_tables(positions, self.config.d_model // self.config.n_heads, self.config.rope_theta)

    def _apart(self, context: Context, documents_BL: Tensor) -> Context:
        """`context` that knows where documents begin."""
        device, segments = self.embedding_VD.device, None
        if self.filterbank is not None:
            compiled = cast(Block, self.blocks[0]).program is not None
            segments = self.filterbank.segments(documents_BL, always_copies=compiled).to(device)
            segments = of_any_number(segments) if compiled else segments
        return context._replace(segments=segments, documents_BL=to_device(documents_BL, device))

    def beyond_trained(self, length: int, k: Budget | None = None) -> str | None:
        """What is wrong with sequences of `length` at budget k, where the filters cannot be continued so far."""
        k = max(self.config.layer_budgets(k))
        steady = k if self.filterbank is None else self.filterbank.steady_channels(length)
        if k <= steady:
            return None
        return (f"{length} positions at K = {k}: beyond the {self.config.seq_len} of the training the filters from "
                f"channel {steady + 1} on grow without bound, and what they say is noise; take K <= {steady}, stay "
                f"within {self.config.seq_len}, or read by windows: --beyond window (model.beyond)")  # fmt: skip

    def read_beyond(self, choice: Literal["continue", "window"]) -> None:
        """Sets `ModelConfig.beyond`, which no weight depends on; states made before are of no use then."""
        self.config = self.config.model_copy(update={"beyond": choice})
        before, self.filterbank = self.filterbank, filter_bank(self.config)
        if before is not None and self.filterbank is not None:
            self.filterbank.take(before)

    def grow(self, k: int) -> Self:
        """Reads what budget k needs from where the model was opened (`open_model`), and is then of K_max = k.

        Other threads may use the model in the meantime: it answers at its old budgets until all is there. A text that
        is being continued then goes on as it was begun, at the budgets of that time.

        Raises:
            UserError: the budget is out of range, or what it needs cannot be read.
        """
        if self.source is None:
            self.config.layer_budgets(k)
        else:
            self.source.grow(self, k)
        return self

    def reset_filters(self) -> None:
        if self.filterbank is not None:
            self.filterbank.reset()


def losses_at(
    model: LanguageModel,
    ids_BT: Tensor,
    k: Budget,
    document_end: int | None = None,
    forward: Callable[..., Tensor] | None = None,
    hits: bool = False,
) -> Tensor:
    """Negative log-likelihood in nats, (B, L) float32, of the tokens that follow each of the first L = T - 1.

    With `document_end`, the id of that name, no position sees another document. `forward` is what computes the model's
    logits where something is wrapped around the model. With `hits` it is (2, B, L): `LanguageModel.hits` besides.
    """
    documents_BL = document_numbers(ids_BT[:, :-1], document_end)
    ids_BT = to_device(ids_BT, model.embedding_VD.device)
    ids_BL = ids_BT[:, :-1]
    logits_BLV: Tensor = (model if forward is None else forward)(ids_BL, k, documents_BL)
    losses_BL = model.losses(ids_BL, logits_BLV, ids_BT[:, 1:])
    return torch.stack((losses_BL, model.hits(ids_BL, logits_BLV, ids_BT[:, 1:]))) if hits else losses_BL


@functools.cache
def parameter_shapes(config: ModelConfig) -> Mapping[str, torch.Size]:
    """The shape of every parameter of the whole model, by name."""
    with torch.device("meta"):  # half a second for hundreds of layers, and asked for again and again
        shapes = {name: parameter.shape for name, parameter in LanguageModel(config).named_parameters()}
    return MappingProxyType(shapes)


def initial_weights(config: ModelConfig, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(name, float32 values) of every parameter, each drawn from its own stream (`megassm.layers.initial`)."""
    for name in parameter_shapes(config):
        blocks = list(initial_rows(config, seed, name))
        yield name, blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def initial_rows(config: ModelConfig, seed: int, name: str) -> Iterator[Tensor]:
    """The values that `initial_weights` has for one parameter, in blocks of its rows."""
    return initial_blocks(name, parameter_shapes(config)[name], config, seed)


def build_model(config: ModelConfig, seed: int = 0, recompute: bool = False) -> LanguageModel:
    """An initialised float32 model on the CPU, in training mode; equal seeds give equal weights.

    With `recompute`, each block's activations are computed again in the backward pass instead of kept.
    """
    return assembled(config, initial_weights(config, seed), recompute)


def assembled(config: ModelConfig, weights: Iterable[tuple[str, Tensor]], recompute: bool = False) -> LanguageModel:
    """A model whose parameters are the tensors `weights`, not copies of them; its filters are derived beside them.

    Raises:
        RuntimeError: a parameter is missing, unknown, or of another shape.
    """
    model = _without_filters(config, weights, recompute)
    model.reset_filters()
    return model


def _without_filters(config: ModelConfig, weights: Iterable[tuple[str, Tensor]], recompute: bool) -> LanguageModel:
    with torch.device("meta"):
        model = LanguageModel(config, recompute)
    model.load_state_dict(dict(weights), assign=True)
    if model.filterbank is not None:
        model.filterbank.to_empty(device=model.embedding_VD.device)
    return model


@torch.no_grad()
def truncate(model: LanguageModel, k: Budget) -> LanguageModel:
    """A smaller model that computes what `model` computes at budget k, one K a layer too, and at every budget below.

    Raises:
        UserError: k is out of range.
    """
    source, config = model.state_dict(), model.config.cut(k)
    leading = ((name, source[name][tuple(map(slice, shape))]) for name, shape in parameter_shapes(config).items())
    small = _without_filters(config, ((name, part.clone()) for name, part in leading), model.recompute)
    small.train(model.training)
    if small.filterbank is not None and model.filterbank is not None:
        small.filterbank.take(model.filterbank)
    return small
