"""Runs what users of Hugging Face's libraries do with an exported model, and prints a table of what was seen.

Needs the packages of `PACKAGES`; docs/results/huggingface.md has its output. tools/check_hub_api.py has what needs
transformers only.
"""

from __future__ import annotations

import io
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from megassm.checkpoint.exported import open_model_folder, write_model_folder
from megassm.checkpoint.format import load_model
from megassm.cli.arguments import Parser, run_tool
from megassm.config.model import ModelConfig
from megassm.data.tokenizer.base import load_tokenizer
from megassm.errors import UserError
from megassm.model import build_model, truncate
from tools.hub_api import converted
from tools.hub_api.seen import at_most, equal, largest
from tools.hub_api.subject import OURS

ELASTIC: dict[str, Any] = {"d_ffn": 144, "ffn_elastic": {"knee_k": 3, "below": 16, "above": 8}}
TEXTS = ["def f(x): return x + 1", "The quick brown fox", "Where is it? There it is."] * 4
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


class Model:
    """An exported model, opened anew by each check."""

    def __init__(self, knobs: dict[str, Any]) -> None:
        self.knobs = knobs
        sizes: dict[str, Any] = {"vocab_size": 300, "d_model": 64, "n_layers": 4, "seq_len": 128, "num_channels": 6}
        self.folder = Path(tempfile.mkdtemp())
        self.ours = build_model(ModelConfig(**{**sizes, "d_ffn": 128, "n_heads": 4, **knobs}), 0).eval()
        write_model_folder(self.folder, self.ours, load_tokenizer("bytes"), torch.float32)
        self.ids = torch.randint(0, 256, (2, 50), generator=torch.Generator().manual_seed(1))

    def load(self, **options: Any) -> Any:
        from transformers import AutoModelForCausalLM

        model: Any = AutoModelForCausalLM.from_pretrained(self.folder, **options)
        return model.eval()

    @property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder)


def the_same_logits(m: Model) -> str:
    h = m.load()
    return at_most(max(largest(m.ours(m.ids, k), h(m.ids, k=k).logits) for k in (1, 3, 6)), 0.0)


def the_same_logits_of(m: Model, **knobs: Any) -> str:
    """Of the same model but for `knobs`."""
    return the_same_logits(Model({**m.knobs, **knobs}))


def assistant_of_fewer_channels(m: Model) -> str:
    h, small = m.load(), m.load(k=2)
    options = {"max_new_tokens": 30, "do_sample": False}
    return equal(h.generate(m.ids[:1], assistant_model=small, **options), h.generate(m.ids[:1], **options))


def prompt_lookup(m: Model) -> str:
    h = m.load()
    options = {"max_new_tokens": 30, "do_sample": False}
    return equal(h.generate(m.ids[:1], prompt_lookup_num_tokens=3, **options), h.generate(m.ids[:1], **options))


def pipeline_generates(m: Model) -> str:
    from transformers import pipeline

    text = pipeline("text-generation", model=m.load(), tokenizer=m.tokenizer)("The ", max_new_tokens=5, do_sample=False)
    assert text[0]["generated_text"].startswith("The ")
    return "starts with its prompt"


def streamer_prints(m: Model) -> str:
    from transformers import TextStreamer

    h, tokenizer = m.load(), m.tokenizer
    prompt = tokenizer("The ", return_tensors="pt")
    with redirect_stdout(io.StringIO()) as printed:
        whole = h.generate(**prompt, streamer=TextStreamer(tokenizer), max_new_tokens=8, do_sample=False)
    return equal(printed.getvalue().rstrip("\n"), tokenizer.decode(whole[0]).rstrip("\n"))


def adapter(m: Model, config: Any) -> str:
    """Differences of logits by the adapter, merged, and merged and cut to two channels."""
    import peft

    wrapped: Any = peft.get_peft_model(m.load(), config)
    generator = torch.Generator().manual_seed(0)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.05
    wrapped.eval()
    before = {k: wrapped(m.ids, k=k).logits.detach() for k in (2, 6)}
    moved = largest(before[6], m.load()(m.ids).logits)
    assert moved > 1e-3, "the adapter changes nothing"
    merged = wrapped.merge_and_unload()
    apart = max(largest(merged(m.ids, k=k).logits, logits) for k, logits in before.items())
    folder = Path(tempfile.mkdtemp())
    merged.save_pretrained(folder)
    cut = truncate(load_model(open_model_folder(folder)), 2)
    seen = at_most(apart, 2e-6), at_most(largest(cut(m.ids, 2), before[2]), 2e-6)
    return f"{sum(p.numel() for p in trained):,} trained; merged {seen[0]}, cut to K=2 {seen[1]}"


def lora(m: Model, **options: Any) -> str:
    import peft

    return adapter(m, peft.LoraConfig(**{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **options}))


def ia3(m: Model) -> str:
    import peft

    return adapter(m, peft.IA3Config(target_modules=["channels", "up"], feedforward_modules=[], task_type="CAUSAL_LM"))


def _rows() -> list[dict[str, Any]]:
    return [{"input_ids": list(text.encode())[:19], "labels": list(text.encode())[:19]} for text in TEXTS]


def trained(m: Model, steps: int = 3, resume: Path | None = None, **options: Any) -> tuple[Any, Any]:
    """(the model after some updates by Trainer, the trainer)."""
    from transformers import Trainer, TrainingArguments

    defaults: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "max_steps": steps, "learning_rate": 1e-3, "report_to": [],
        "logging_steps": 1, "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "seed": 0,
        "per_device_train_batch_size": 4, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 1.0,
    }  # fmt: skip
    torch.manual_seed(0)
    h = m.load()
    rows = [row for row in _rows() if len(row["input_ids"]) == 19]
    trainer = Trainer(model=h, args=TrainingArguments(**{**defaults, **options}), train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return h, trainer


def difference(one: Any, other: Any) -> float:
    return max(largest(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def accumulation(m: Model) -> str:
    whole, _ = trained(m)
    parts, _ = trained(m, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert difference(whole, m.load()) > 1e-6
    return at_most(difference(whole, parts), 1e-6)


def bfloat16_training(m: Model) -> str:
    _, trainer = trained(m, bf16=True, gradient_checkpointing=True)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert all(5 < loss < 6.5 for loss in losses), losses
    return "losses " + ", ".join(f"{loss:.3f}" for loss in losses)


def resumed(m: Model) -> str:
    folder = tempfile.mkdtemp()
    options: dict[str, Any] = {"output_dir": folder, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch"}
    straight, _ = trained(m, 4, **options)
    again, _ = trained(m, 4, Path(folder) / "checkpoint-2", **options)
    return at_most(difference(straight, again), 1e-7)


def label_smoothing(m: Model) -> str:
    """The Trainer shifts the labels of models it knows by name."""
    _, trainer = trained(m, 1, label_smoothing_factor=1e-6)
    _, plain = trained(m, 1)
    losses = [t.state.log_history[0]["loss"] for t in (trainer, plain)]
    return f"losses {losses[0]:.4f} and {losses[1]:.4f}, {at_most(abs(losses[0] - losses[1]), 1e-3)}"


def sft(m: Model, rows: list[dict[str, Any]], **options: Any) -> str:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    tokenizer = m.tokenizer
    tokenizer.chat_template = CHAT
    defaults: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "max_steps": 2, "report_to": [], "use_cpu": True, "logging_steps": 1,
        "per_device_train_batch_size": 2, "max_length": 64, "save_strategy": "no", "disable_tqdm": True, "bf16": False,
    }  # fmt: skip
    args = SFTConfig(**{**defaults, **options})
    trainer: Any = SFTTrainer(
        model=m.load(), args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 2
    assert all(4 < loss < 7 for loss in losses), losses
    return "losses " + ", ".join(f"{loss:.3f}" for loss in losses)


def chat_rows() -> list[dict[str, Any]]:
    turn = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me."}
    return [{"messages": list(turn)}] * 8


def dpo(m: Model) -> str:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    rows = [{"prompt": "The ", "chosen": "fox", "rejected": "xof"}] * 8
    args = DPOConfig(output_dir=tempfile.mkdtemp(), max_steps=2, report_to=[], use_cpu=True, logging_steps=1,
                     per_device_train_batch_size=2, save_strategy="no", disable_tqdm=True, bf16=False)  # fmt: skip
    trainer: Any = DPOTrainer(
        model=m.load(),
        ref_model=m.load(),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=m.tokenizer,
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert abs(losses[0] - 0.6931) < 1e-3, losses  # ln 2: both models are the same
    return "losses " + ", ".join(f"{loss:.4f}" for loss in losses)


def offloaded(m: Model, **options: Any) -> str:
    h, plain = m.load(device_map=options["device_map"], offload_folder=tempfile.mkdtemp()), m.load()
    wanted = {"max_new_tokens": 8, "do_sample": False}
    places = sorted({str(place) for place in h.hf_device_map.values()}) if hasattr(h, "hf_device_map") else ["cpu"]
    return f"{equal(h.generate(m.ids, **wanted), plain.generate(m.ids, **wanted))}, on {' and '.join(places)}"


DISK = {
    **dict.fromkeys(("model.embed_tokens", "model.filterbank", "model.head_norm", "lm_head"), "cpu"),
    **{f"model.blocks.{i}": "disk" if i in (1, 2) else "cpu" for i in range(4)},
}

CHECKS: dict[str, Callable[[Model], str]] = {
    "logits of the training code, three K": the_same_logits,
    "the same, elastic width": partial(the_same_logits_of, **ELASTIC),
    "the same, untied": partial(the_same_logits_of, tie_embeddings=False),
    "generate with itself at K=2 as assistant": assistant_of_fewer_channels,
    "generate with prompt lookup": prompt_lookup,
    "pipeline text-generation": pipeline_generates,
    "TextStreamer": streamer_prints,
    "device_map cpu": partial(offloaded, device_map={"": "cpu"}),
    "device_map cpu and disk": partial(offloaded, device_map=DISK),
    "PEFT LoRA, all-linear": lora,
    "PEFT LoRA, channels": partial(lora, target_modules=["channels"]),
    "PEFT DoRA, all-linear": partial(lora, use_dora=True),
    "PEFT IA3, channels and up": ia3,
    "torchao int8 weights": converted.int8_by_torchao,
    "bitsandbytes int8": partial(converted.by_bitsandbytes, limit=3e-2, load_in_8bit=True),
    "torch.export, any batch and length": converted.exported,
    "ONNX, any batch and length": converted.onnx,
    "Trainer: 4 x 1 accumulated is 1 x 4": accumulation,
    "Trainer: bfloat16, checkpointing": bfloat16_training,
    "Trainer: resumed is straight on": resumed,
    "Trainer: label smoothing": label_smoothing,
    "TRL SFT, text": partial(sft, rows=[{"text": text} for text in TEXTS]),
    "TRL SFT, chat": partial(sft, rows=chat_rows()),
    "TRL SFT, prompt and completion": partial(sft, rows=[{"prompt": "The ", "completion": "fox jumps"}] * 8),
    "TRL SFT, packing": partial(sft, rows=[{"text": text} for text in TEXTS], packing=True),
    "TRL SFT, NEFTune": partial(sft, rows=[{"text": text} for text in TEXTS], neftune_noise_alpha=5.0),
    "TRL DPO": dpo,
}


PACKAGES = (
    "torch", "transformers", "accelerate", "peft", "trl", "torchao", "bitsandbytes", "onnx", "onnxscript", "datasets"
)  # fmt: skip


def main() -> None:
    Parser(__doc__ or "", "python tools/check_huggingface.py > checks.md").parse_args()
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f"not installed: {', '.join(missing)}; pip install {' '.join(missing)}")
    warnings.simplefilter("ignore")
    print(", ".join(f"{name} {version(name)}" for name in PACKAGES) + "\n")
    print("| check | model | seen |\n|---|---|---|")
    failed = 0
    torch.manual_seed(0)
    for kind, knobs in OURS.items():
        m = Model(knobs)
        for name, check in CHECKS.items():
            try:
                with redirect_stdout(sys.stderr):  # where the libraries' own lines go
                    seen = check(m)
            except Exception as error:  # one check that fails is a row
                failed += 1
                traceback.print_exc()
                seen = f"FAILED: {type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            print(f"| {name} | {kind} | {seen} |", flush=True)
    print(f"\n{2 * len(CHECKS) - failed} of {2 * len(CHECKS)} hold")
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    run_tool(main)
