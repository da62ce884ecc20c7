"""The README.md of an exported model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from megassm.checkpoint.exported import ModelFolder
from megassm.cli.mixtures import layers_text
from megassm.data.task import Task
from megassm.errors import install_hint

FRONT_MATTER = """\
---
library_name: transformers
pipeline_tag: {pipeline}
tags: [megassm, state-space-model, spectral]
---
"""

USE = """\
```python
# {install}
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained("{name}", trust_remote_code=True)
prompts = tokenizer({example}, return_tensors="pt", padding=True)
print(tokenizer.batch_decode(model.generate(**prompts, max_new_tokens=20), skip_special_tokens=True))
```
"""

CLASSIFY = """\
```python
# {install}
from transformers import pipeline

classify = pipeline("text-classification", model="{name}", trust_remote_code=True)
print(classify({example}))
```
"""

SEQ_LEN = """\
## Another length

The model was trained on sequences of {trained} tokens; its filters here are derived for {here}. Filters are
eigenvectors of a matrix of that size: the leading ones hardly depend on it, the high ones do, and no weight was trained
with these. Compare the two columns of bits per byte above (sequences of {here} tokens), the second with the trained
filters, continued where a text is longer.
"""


PADDING = """\
Pad on the left to generate for a batch. The cache (`use_cache=True`, the default) has a constant size a sequence, but
for the keys and values of attention layers.
"""

LABELS = """\
What is classified is the mean over a text's positions; padding, on either side, is left out by the attention mask.
"""


@dataclass(frozen=True)
class ExportedModel:
    """One file, as measured."""

    k: int
    """Channels; the largest number where each layer has its own."""
    layers: tuple[int, ...] | None
    """... of each layer then."""
    parameters: int
    file_bytes: int
    bits_per_byte: float
    """On validation text, of the file itself; of a task, bits an answer."""
    gap_percent: float
    """... above the whole model's, in percent of it."""
    trained_filters_bits_per_byte: float | None
    """... with the filters of the trained length, where the file's are for another one."""
    accuracy: float | None
    """Of a task: the share of answers that are the most likely of all."""
    logits_difference: float
    """The largest, against the whole model at this budget, in float64."""
    folder: Path


class Origin(NamedTuple):
    """Where a model comes from."""

    run: str
    step: int
    seq_len: int
    task: Task | None = None
    """What its examples are, of a model of labelled data."""


def model_card(model: ModelFolder, family: Sequence[ExportedModel], origin: Origin) -> str:
    """Markdown, the table of the whole family in it."""
    config, name = model.config, model.folder.name
    classifies = config.classes is not None
    what, call = ("classifier", "model(..., k=1)") if classifies else ("language model", "model.generate(..., k=1)")
    task = "" if origin.task is None else f" on the task {origin.task.name}"
    own = config.layer_channels
    k = f"{config.num_channels}" if own is None else layers_text(own)
    channels = k if own is None else f"{k}, one number a layer,"
    parts = [
        FRONT_MATTER.format(pipeline="text-classification" if classifies else "text-generation"),
        f"# {origin.run}, K = {k}\n",
        f"An elastic spectral {what}, trained once{task} and cut to {channels} spectral channels, without "
        f"retraining (run {origin.run}, step {origin.step:,}). Layers {config.mixers}, width {config.d_model}, "
        f"vocabulary {config.vocab_size:,}, sequences of {config.seq_len:,} tokens. It serves every smaller budget "
        f"too: `{call}`.\n",
        (CLASSIFY if classifies else USE).format(name=name, install=install_hint("hf"), example=_examples(origin.task)),
        "## Sizes and quality\n",
        family_table(family),
        f"Bits per {'byte' if origin.task is None else 'answer'} on held-out "
        f"{'text' if origin.task is None else 'examples'}, lower is better; the gap is to the whole model.\n",
        LABELS if classifies else PADDING,
    ]
    if config.seq_len != origin.seq_len:
        parts.append(SEQ_LEN.format(trained=f"{origin.seq_len:,}", here=f"{config.seq_len:,}"))
    return "\n".join(parts)


def _examples(task: Task | None) -> str:
    """Two inputs, as Python."""
    if task is None or task.is_text:
        return '["Once upon a time", "The"]'
    return repr([" ".join(task.symbols[:3]), task.symbols[0]])


def family_table(family: Sequence[ExportedModel]) -> str:
    """Markdown."""
    of_task = any(model.accuracy is not None for model in family)
    other_length = any(model.trained_filters_bits_per_byte is not None for model in family)
    names = [
        "K",
        "parameters",
        "file, MB",
        *(["accuracy"] if of_task else []),
        "bits per answer" if of_task else "bits per byte",
        *(["with the trained filters"] if other_length else []),
        "gap",
    ]
    lines = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for model in family:
        kept = model.trained_filters_bits_per_byte
        cells = [
            f"{model.k}" if model.layers is None else layers_text(model.layers),
            f"{model.parameters:,}",
            f"{model.file_bytes / 1e6:.2f}",
            *([f"{model.accuracy:.4f}"] if model.accuracy is not None else []),
            f"{model.bits_per_byte:.4f}",
            *([f"{kept:.4f}" if kept is not None else "-"] if other_length else []),
            f"{model.gap_percent:+.2f}%",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
