"""A model as a folder, in Hugging Face's layout: what tools/export.py writes, and what opens anywhere.

    model.safetensors         every parameter whole, under "model." + its name here; the head of classes is score.weight
    config.json               this package's model section under "megassm"; the rest is for transformers
    modeling_megassm.py       imports `megassm.hf`, so that transformers finds its classes
    tokenizer.model           or tokenizer.json, or a task's task.json; none for bytes
    tokenizer_config.json     README.md; generation_config.json but for models with classes
    chat_template.jinja       where one was given
    SHA256SUMS                of all but README.md: `sha256sum -c SHA256SUMS`; checked here wherever the file is there

The filters are not in it: model.seq_len, model.num_channels and model.basis say what they are, when it is opened.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megassm import __version__
from megassm.checkpoint.format import NOTHING_HELD, check_room
from megassm.checkpoint.tensor_file import leading
from megassm.config.model import ModelConfig
from megassm.data.dataset import own_tokenizer
from megassm.data.task import TASK_NAME, TaskTokenizer
from megassm.data.tokenizer.base import EOD_PIECE, Tokenizer, load_tokenizer
from megassm.data.tokenizer.hugging_face import CONFIG_NAME, FILE_NAME
from megassm.errors import UserError
from megassm.files import open_as_its_folder, open_given, sync, write_atomically
from megassm.guarded import LINE_BYTES, read_bytes, read_json
from megassm.layers.initial import BLOCK_NUMBERS
from megassm.model import LanguageModel, parameter_shapes

CONFIG, WEIGHTS, CODE = "config.json", "model.safetensors", "modeling_megassm.py"
SECTION = "megassm"
PREFIX = "model."
HEAD, SCORE = "head_VD", "score.weight"
CHAT_TEMPLATE = "chat_template.jinja"
INDEX_BYTES = 64 << 20
INDEX = "model.safetensors.index.json"
"""Instead of `WEIGHTS` where transformers has saved a large model in several files: which has which parameter."""
SUMS = "SHA256SUMS"
SUM_LINE = re.compile(r"([0-9a-f]{64})  ([\w.-]{1,100})")
CODE_PATH = Path(__file__).parents[1] / "hf" / CODE
STEM = CODE.removesuffix(".py")
AUTO_MAP = {
    "AutoConfig": f"{STEM}.MegaSSMConfig",
    "AutoModel": f"{STEM}.MegaSSMModel",
    "AutoModelForCausalLM": f"{STEM}.MegaSSMForCausalLM",
    "AutoModelForSequenceClassification": f"{STEM}.MegaSSMForSequenceClassification",
}
"""Where transformers finds the classes of a model; in its config.json."""
OF_TRAINING_ONLY = (
    "filterbank", "gate_bias_init", "gate_init_scale", "channel_init_std", "embed_init_std", "base_width"
)  # fmt: skip
"""Knobs of a model that its results do not depend on."""


@dataclass(frozen=True)
class ModelFolder:
    """An exported model on disk."""

    folder: Path
    config: ModelConfig

    def model_config(self) -> ModelConfig:
        self.check_size()
        return self.config

    def weights(self, k: int | None = None, held: Mapping[str, Tensor] = NOTHING_HELD) -> Iterator[tuple[str, Tensor]]:
        """See `megassm.checkpoint.format.StoredModel`."""
        self.check_weights()
        kept = parameter_shapes(self.config if k is None else self.config.cut(k))
        with ExitStack() as stack:
            files: dict[Path, Any] = {}
            for name, shape in parameter_shapes(self.config).items():
                if name in held and held[name].shape == kept[name]:
                    continue
                path = self._file_of(name)
                with _as_weights(path):
                    if path not in files:
                        files[path] = stack.enter_context(safe_open(path, framework="pt"))
                    values = leading(files[path], name_in_file(name, self.config), shape, kept[name])
                _check_finite(values, path, name)
                yield name, values.float()

    def check_size(self, bytes_each: float = 2) -> None:
        """UserError if the files are too small for the model of its configuration, before one of that size is made;
        `bytes_each` parameter at least, 2 of bfloat16."""
        names = {WEIGHTS} if self._index is None else set(self._index.values())
        try:
            size = sum((self.folder / name).stat().st_size for name in names)
        except OSError as error:
            raise UserError(f"{error.filename}: {error.strerror}, and {INDEX} names it; save the model again") from None
        check_room(self.folder / CONFIG, self.config, size, bytes_each)

    def _file_of(self, name: str) -> Path:
        in_file = name_in_file(name, self.config)
        return self.folder / (WEIGHTS if self._index is None else self._index.get(in_file, WEIGHTS))

    @cached_property
    def _index(self) -> Mapping[str, str] | None:
        """The file by parameter; None where there is one for all."""
        path = self.folder / INDEX
        if (self.folder / WEIGHTS).is_file():
            return None
        try:
            files: dict[str, str] = read_json(path, dict[str, Any], limit=INDEX_BYTES)["weight_map"]
            if not all(isinstance(file, str) and file == Path(file).name for file in files.values()):
                raise ValueError("weight_map does not name files of this folder")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not an index of weights ({error}); save the model again") from None
        return files

    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(own_tokenizer(self.folder))

    def rows(self, name: str) -> Iterator[Tensor]:
        """The float32 values of a parameter, in blocks of its rows.

        Raises:
            UserError: as `weights`.
        """
        shape, path = parameter_shapes(self.config)[name], self._file_of(name)
        count = max(1, BLOCK_NUMBERS // shape[1:].numel())
        with _as_weights(path), safe_open(path, framework="pt") as file:
            in_file = name_in_file(name, self.config)
            stored = file.get_slice(in_file)
            if tuple(stored.get_shape()) != tuple(shape):
                raise ValueError(f"{in_file} is {tuple(stored.get_shape())}, expected {tuple(shape)}")
            for first in range(0, shape[0], count):
                values = stored[first : min(first + count, shape[0])]
                _check_finite(values, path, name)
                yield values.float()

    def check_weights(self) -> None:
        """UserError if the files of the weights are not what `SUMS` says, where it says anything."""
        self.check_size()
        if (self.folder / WEIGHTS).is_file():
            check_sums(self.folder, {WEIGHTS})

    def check_origin(self, wanted: ModelConfig, tokenizer: Tokenizer) -> None:
        """Checks that a run of the model `wanted` can start from its weights.

        Raises:
            UserError: parameters are missing, too many or of other shapes, or the ids mean something else.
        """
        theirs, ours = parameter_shapes(self.config), parameter_shapes(wanted)
        wrong = sorted(name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name))
        if wrong:
            shapes = "; ".join(f"{name} is {_shape(theirs, name)}, not {_shape(ours, name)}" for name in wrong[:3])
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise UserError(
                f"run.init_from = {str(self.folder)!r}: not this run's model: {shapes}{more}. "
                f"Set {', '.join(self.differences(wanted))}, or choose another run.init_from"
            )
        if self.tokenizer().sha256 != tokenizer.sha256:
            raise UserError(
                f"run.init_from = {str(self.folder)!r}: its tokenizer is {self.tokenizer().name}, the data set's is "
                f"{tokenizer.name}, and their ids mean different text; prepare the data with the model's tokenizer"
            )

    def differences(self, wanted: ModelConfig) -> list[str]:
        """The knobs in which what this model computes is not `wanted`, with this model's values."""
        theirs, ours = self.config.model_dump(mode="json"), wanted.model_dump(mode="json")
        return [f"model.{name}={json.dumps(theirs[name])}" for name in theirs
                if theirs[name] != ours[name] and name not in OF_TRAINING_ONLY]  # fmt: skip


@contextmanager
def _as_weights(path: Path) -> Iterator[None]:
    """What reading raises becomes a `UserError`."""
    try:
        yield
    except UserError:
        raise
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not the weights of its {CONFIG} ({error}); export it again") from None


def _check_finite(values: Tensor, path: Path, name: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise UserError(f"{path}: {name} is not finite; export it again")


def is_model_folder(path: Path) -> bool:
    return any((path / name).is_file() for name in (WEIGHTS, INDEX)) and (path / CONFIG).is_file()


def open_model_folder(path: Path) -> ModelFolder:
    """Reads what the model is; its weights are read when asked for.

    Raises:
        UserError: it is not such a folder.
    """
    try:
        section = read_json(path / CONFIG, dict[str, Any], limit=LINE_BYTES)[SECTION]
        config = ModelConfig.model_validate_json(json.dumps(section["model"]))
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        why = error.strerror if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path / CONFIG}: not an exported model ({why}); give a folder that tools/export.py wrote"
        ) from None
    if (sums := read_sums(path)) is not None:
        check_sums(path, sums.keys() - {WEIGHTS})
    return ModelFolder(path, config)


def read_sums(folder: Path) -> dict[str, str] | None:
    """SHA-256 by file name, as `SUMS` has them; None where there is no such file, as in models saved by others.

    Raises:
        UserError: it is damaged, or does not name the weights.
    """
    path, way_out = folder / SUMS, "export the model again"
    try:
        lines = read_bytes(path, LINE_BYTES, way_out).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    found = [SUM_LINE.fullmatch(line) for line in lines]
    sums = {line[2]: line[1] for line in found if line is not None}
    if None in found or not {WEIGHTS, CONFIG} <= sums.keys():
        raise UserError(f"{path}: damaged: not the checksums of an exported model; {way_out}")
    return sums


def check_sums(folder: Path, names: Set[str]) -> None:
    """These files are what was written, as far as `SUMS` tells.

    Raises:
        UserError: one is missing, or another than it was.
    """
    sums = read_sums(folder) or {}
    for name in sorted(names & sums.keys()):
        path = folder / name
        try:
            with open_given(path) as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}, and {SUMS} names it; export the model again") from None
        if found != sums[name]:
            raise UserError(
                f"{path}: damaged: its SHA-256 is not that of {SUMS}; export the model again, or remove {SUMS} if you "
                "have changed the file yourself"
            )


def write_sums(folder: Path) -> None:
    """Writes `SUMS` for what is in the folder."""
    lines = []
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    write_atomically(folder / SUMS, "".join(lines).encode())


def name_in_file(name: str, config: ModelConfig) -> str:
    """A parameter's name in a file. The head of classes has transformers' own, so that no file of a language model has
    a head that a classifier could take for its own."""
    return SCORE if name == HEAD and config.classes is not None else PREFIX + name


def write_model_folder(
    folder: Path, model: LanguageModel, tokenizer: Tokenizer, dtype: torch.dtype, chat_template: str | None = None
) -> None:
    """Writes everything but README.md into an empty folder."""
    tensors = {
        name_in_file(name, model.config): value.detach().to("cpu", dtype).contiguous()
        for name, value in model.named_parameters()
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    open_as_its_folder(folder / WEIGHTS)
    sync(folder / WEIGHTS)
    for name, content in tokenizer.files().items():
        write_atomically(folder / name, content)
    write_code(folder)
    _write_json(folder / CONFIG, _hub_config(model.config, tokenizer, dtype))
    if model.config.classes is None:
        special = {"bos_token_id": tokenizer.eod, "eos_token_id": tokenizer.eod, "pad_token_id": _pad(tokenizer)}
        _write_json(folder / "generation_config.json", {**special, "do_sample": False, "use_cache": True})
    _write_json(folder / CONFIG_NAME, _tokenizer_config(folder, model.config))
    if chat_template is not None:
        write_atomically(folder / CHAT_TEMPLATE, chat_template.encode())
    write_sums(folder)


def _hub_config(config: ModelConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> dict[str, Any]:
    """config.json."""
    common = {
        "model_type": "megassm",
        "auto_map": AUTO_MAP,
        "dtype": str(dtype).removeprefix("torch."),
        SECTION: {"version": __version__, "model": config.model_dump(mode="json")},
    }
    if config.classes is None:
        return {"architectures": ["MegaSSMForCausalLM"], **common}
    known = tokenizer.task.answers if isinstance(tokenizer, TaskTokenizer) else ()
    labels = [*known, *(f"LABEL_{i}" for i in range(len(known), config.classes))]
    return {
        "architectures": ["MegaSSMForSequenceClassification"],
        **common,
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "pad_token_id": _pad(tokenizer),
    }


def _pad(tokenizer: Tokenizer) -> int:
    """The id that texts of a batch are filled up with."""
    return tokenizer.task.pad if isinstance(tokenizer, TaskTokenizer) else tokenizer.eod


def write_code(folder: Path) -> None:
    """Writes the file that `AUTO_MAP` names."""
    write_atomically(folder / CODE, CODE_PATH.read_bytes())


def _tokenizer_config(folder: Path, config: ModelConfig) -> dict[str, Any]:
    """A tokenizer.json is read by transformers itself, the others by `megassm.hf`."""
    common = {"clean_up_tokenization_spaces": False, "padding_side": "left" if config.classes is None else "right"}
    if not (folder / FILE_NAME).exists():
        own = {"tokenizer_class": "MegaSSMTokenizer", "auto_map": {"AutoTokenizer": [f"{STEM}.MegaSSMTokenizer", None]}}
        return {**common, **own, **({} if (folder / TASK_NAME).exists() else {"eos_token": EOD_PIECE})}
    eod = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))["eos_token"]
    return {**common, "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eod, "pad_token": eod}


def _write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def _shape(shapes: Mapping[str, torch.Size], name: str) -> str:
    return str(tuple(shapes[name])) if name in shapes else "absent"
