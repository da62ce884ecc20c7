"""Models as other programs want them: exported for any length, and with weights of few bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tools.hub_api.seen import at_most, largest

LENGTHS = (9, 33, 100, 128)
"""Of texts, up to the one trained at."""


class Logits(nn.Module):
    """Two tensors in, one out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids, attention_mask, use_cache=False).logits
        return logits


def exported(m: Any) -> str:
    """torch.export for any batch and length."""
    logits = Logits(m.load())
    program: Any = torch.export.export(logits, _inputs(40), dynamic_shapes=_free()).module()
    return _as_ours(logits, program)


def onnx(m: Any) -> str:
    """ONNX for any batch and length, run by ONNX's own reference evaluator."""
    from onnx.reference import ReferenceEvaluator

    logits = Logits(m.load())
    program: Any = torch.onnx.export(logits, _inputs(40), dynamic_shapes=_free(), dynamo=True, verbose=False)
    names = [value.name for value in program.model_proto.graph.input]
    evaluator = ReferenceEvaluator(program.model_proto)

    def run(*given: Tensor) -> Tensor:
        (found,) = evaluator.run(None, dict(zip(names, (tensor.numpy() for tensor in given), strict=True)))
        return torch.from_numpy(found)

    return _as_ours(logits, run)


def _inputs(length: int) -> tuple[Tensor, Tensor]:
    """Three texts, the second with padding on the left."""
    ids_BL = torch.randint(0, 256, (3, length), generator=torch.Generator().manual_seed(length))
    mask_BL = torch.ones_like(ids_BL)
    mask_BL[1, :5] = 0
    return ids_BL, mask_BL


def _free() -> Any:
    sizes = {0: torch.export.Dim("B", min=1, max=64), 1: torch.export.Dim("L", min=2, max=LENGTHS[-1])}
    return sizes, sizes


@torch.no_grad()
def _as_ours(logits: Logits, program: Callable[..., Tensor]) -> str:
    off = [largest(program(*_inputs(length))[:, 5:], logits(*_inputs(length))[:, 5:]) for length in LENGTHS]
    return f"{at_most(max(off), 1e-5)} at lengths {', '.join(map(str, LENGTHS))}"


def int8_by_torchao(m: Any) -> str:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    q = m.load()
    found = [module for module in q.modules() if isinstance(module, nn.Linear) and module is not q.lm_head]
    share = _share(m, found)
    quantize_(q, Int8WeightOnlyConfig())
    return f"{share}; {_off(m, q, 3e-2)}"


def by_bitsandbytes(m: Any, limit: float, **bits: Any) -> str:
    """bitsandbytes looks for torch's own class of linear layers, and for no class made of it."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt
    from transformers import BitsAndBytesConfig

    config: Any = BitsAndBytesConfig(**bits)  # type: ignore[no-untyped-call]
    q = m.load(quantization_config=config, dtype=torch.float32)
    found = [module for module in q.modules() if isinstance(module, Linear4bit | Linear8bitLt)]
    return f"{_share(m, found)}; {_off(m, q, limit)}"


def _share(m: Any, found: list[Any]) -> str:
    whole = m.load()
    parameters = sum(parameter.numel() for parameter in whole.parameters())
    share = sum(module.in_features * module.out_features for module in found) / (
        parameters - whole.get_input_embeddings().weight.numel()
    )
    assert share >= 0.98, share  # what is left are biases, norms and taps
    return f"{share:.1%} of what is no embedding"


@torch.no_grad()
def _off(m: Any, quantised: Any, limit: float) -> str:
    exact = m.load()
    off = []
    for k in (1, 3, 6):
        expected = exact(m.ids, k=k).logits
        off.append(float((quantised(m.ids, k=k).logits - expected).norm() / expected.norm()))
    return f"logits off by {at_most(max(off), limit)} of their norm at K=1, 3, 6"
