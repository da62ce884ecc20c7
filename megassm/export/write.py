"""A trained model cut to budgets K: folders that open anywhere, each checked as written, with a card.

What is checked is the file: it is read back, and its logits on validation text are compared with those of the whole
model at that budget, both in float64, where rounding does not hide a difference.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megassm.checkpoint.exported import WEIGHTS, is_model_folder, open_model_folder, write_model_folder
from megassm.checkpoint.format import load_model
from megassm.cli.mixtures import Limit
from megassm.cli.progress import SILENT, Progress, tracked
from megassm.config.model import Budget, ModelConfig
from megassm.data.stream import MicroBatch
from megassm.errors import UserError
from megassm.eval.mix import Mixture, cost_function, search, timings
from megassm.eval.score import Score, score
from megassm.eval.session import Session
from megassm.export.card import ExportedModel, Origin, model_card
from megassm.files import sync, write_atomically
from megassm.model import LanguageModel, losses_at, truncate

TOLERANCE = 1e-5
"""Largest difference of a logit: weights are copied; the filters, derived anew for fewer channels, agree to less."""
CHECKED_SEQUENCES = 2


Key = int | Mixture
"""What a model is cut to."""


@dataclass(frozen=True)
class ExportPlan:
    """How to write."""

    dtype: torch.dtype = torch.float32
    seq_len: int | None = None
    """The length to derive the filters for; None is the one trained at."""
    sequences: int = 64
    """Validation sequences to measure quality on."""
    chat_template: str | None = None
    """Jinja text that turns messages into a prompt, for transformers' `apply_chat_template`."""


def export_models(
    session: Session, folders: Mapping[Key, Path], plan: ExportPlan, progress: Progress = SILENT
) -> list[ExportedModel]:
    """Writes the model cut to each budget into its folder, with a card.

    Args:
        session: the trained model and its data.
        folders: by K, one number or one for each layer; what an earlier export left there is replaced.
        plan: how.
        progress: advanced by each model.

    Raises:
        UserError: a budget beyond K_max, a folder with something else in it, no validation text, or a file that does
            not compute what the model does.
    """
    seq_len = plan.seq_len or session.config.model.seq_len
    batches = _text_to_check_with(session, folders, plan.sequences, seq_len)
    k_max = session.config.model.num_channels
    whole = _in_float64(session.model, plan.dtype)
    full = _measured(session, rederived(session.model, k_max, seq_len), batches)
    exported = []
    for k, folder in tracked(folders.items(), progress, "export", len(folders), "models"):
        with _replaced(folder) as partial:
            small = rederived(session.model, k, seq_len)
            write_model_folder(partial, small, session.tokenizer, plan.dtype, plan.chat_template)
            found = load_model(open_model_folder(partial))
            difference = _check(session, whole, found, k)
            quality = _measured(session, found, batches)
            kept = _with_trained_filters(session, found, batches) if plan.seq_len else None
            exported.append(
                ExportedModel(
                    k=found.config.num_channels,
                    layers=found.config.layer_channels,
                    parameters=sum(parameter.numel() for parameter in found.parameters()),
                    file_bytes=(partial / WEIGHTS).stat().st_size,
                    bits_per_byte=quality.bits_per_byte,
                    gap_percent=100 * (quality.bits_per_byte / full.bits_per_byte - 1),
                    accuracy=None if session.task is None else quality.accuracy,
                    trained_filters_bits_per_byte=kept,
                    logits_difference=difference,
                    folder=folder,
                )
            )
    step, trained = session.checkpoint.manifest.step, session.config.model.seq_len
    origin = Origin(session.run_dir.name, step, trained, session.task)
    for model in exported:
        card = model_card(open_model_folder(model.folder), exported, origin)
        write_atomically(model.folder / "README.md", card.encode())
    return exported


def mixture_under(session: Session, limit: Limit, ladder: Sequence[int], sequences: int) -> Mixture:
    """One K a layer under a limit, by `megassm.eval.mix`, on the validation sequences that follow the first
    `sequences`, by which an export is measured; on these where there are no more.

    Raises:
        UserError: nothing is within the limit, no validation text, or time is asked of a model that cannot decode.
    """
    model = session.model.to(session.device)
    batches = session.validation(2 * sequences)
    held = batches[len(session.validation(sequences)) :] or batches
    if not held:
        raise UserError("no validation text to search on: prepare the data with a --valid-fraction")

    def loss(layers: Mixture) -> float:
        def losses(ids_BT: Tensor, k: int) -> Tensor:
            return losses_at(model, ids_BT, layers, session.document_end)

        return score(losses, held, model.config.num_channels, session.token_bytes, session.device).loss

    table = timings(model, ladder) if limit.what == "ms" else {}
    return search(model.config, limit.most, ladder, cost_function(model.config, limit, table), loss).layers


def _text_to_check_with(
    session: Session, folders: Mapping[Key, Path], sequences: int, seq_len: int
) -> Sequence[MicroBatch]:
    """Validation text, after everything that can be said before a file is written has been checked."""
    if session.task is not None and seq_len != session.task.length:
        rule = f"the examples of {session.tokenizer.name} are {session.task.length} long; leave it out"
        raise UserError(f"--seq-len {seq_len}: {rule}")
    for k, folder in folders.items():
        resized(session.config.model, k, seq_len)
        _check_replaceable(folder)
    batches = session.validation(sequences, seq_len)
    if not batches:
        raise UserError("no validation text to check the files with: prepare the data with a --valid-fraction")
    return batches


def resized(config: ModelConfig, k: Budget | None, seq_len: int) -> ModelConfig:
    """The same model with k channels, None being all, for sequences of `seq_len`.

    Raises:
        UserError: k is out of range, or seq_len is smaller than k.
    """
    cut = config.cut(k)
    if seq_len < cut.num_channels:
        raise UserError(
            f"--seq-len {seq_len}: must be at least K = {cut.num_channels}: there are no more filters than positions"
        )
    return cut.model_copy(update={"seq_len": seq_len})


@torch.no_grad()
def rederived(model: LanguageModel, k: Budget | None, seq_len: int) -> LanguageModel:
    """The weights of `model` cut to k, None being all, with the filters derived for what is left and `seq_len`."""
    small = LanguageModel(resized(model.config, k, seq_len)).to(model.embedding_VD.dtype)
    small.load_state_dict((model if k is None else truncate(model, k)).state_dict())
    small.to(model.embedding_VD.device).reset_filters()
    return small.eval()


def _in_float64(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    """What a file of `dtype` has to agree with: the whole model, its weights rounded as the file's are."""
    return copy.deepcopy(model).cpu().to(dtype).double()


def _check(session: Session, whole: LanguageModel, found: LanguageModel, k: Budget) -> float:
    """The largest difference of a logit between the file, at the trained length, and the whole model at budget k.

    Raises:
        UserError: it is too large.
    """
    small = rederived(found.double(), None, whole.config.seq_len)
    found.float()
    (batch, *_) = session.validation(CHECKED_SEQUENCES)
    ids_BL = torch.from_numpy(batch.ids_BT[:CHECKED_SEQUENCES, :-1])
    with torch.no_grad():
        difference = float((whole(ids_BL, k) - small(ids_BL)).abs().max())
    if not difference <= TOLERANCE:
        raise UserError(
            f"K = {k}: logits of the written file differ from the model's by {difference:.2g}, more than "
            f"{TOLERANCE:g}; nothing was exported. Report it with the run's config.yaml"
        )
    return difference


def _with_trained_filters(session: Session, found: LanguageModel, batches: Sequence[MicroBatch]) -> float | None:
    """Bits per byte of the same weights with the filters they were trained with, continued where the text is longer;
    None where they have no continuation."""
    kept = rederived(found, None, session.config.model.seq_len)
    try:
        return _measured(session, kept, batches).bits_per_byte
    except UserError:
        return None


def _measured(session: Session, model: LanguageModel, batches: Sequence[MicroBatch]) -> Score:
    """Of a task with what was right."""
    model = model.to(session.device)

    def losses(ids_BT: Tensor, k: int) -> Tensor:
        return losses_at(model, ids_BT, k, session.document_end, hits=session.task is not None)

    return score(losses, batches, model.config.num_channels, session.token_bytes, session.device)


def _check_replaceable(folder: Path) -> None:
    if folder.exists() and not is_model_folder(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: holds something that is not an exported model; choose another --output")


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """An empty folder that takes the name `folder` when all went well."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
