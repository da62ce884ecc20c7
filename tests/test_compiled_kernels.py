"""The Triton kernels as the compiler makes them for today's GPUs, which need not be there: tensor cores, no spills."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}
"""Most that a block may have (CUDA C programming guide, table of compute capabilities)."""
TENSOR_CORES = {80: "HMMA", 90: "HGMMA|HMMA", 100: "UTC[A-Z]*MMA|HMMA"}

ALIGNED = ("D", "P", "E", "R")
"""Sizes that are multiples of 16."""


def compiled(kernel: Any, types: dict[str, str], constants: dict[str, int], capability: int, warps: int, stages: int,
             folder: Path) -> dict[str, Any]:  # fmt: skip
    """Registers, local memory (spills) and shared memory of a program, and how many tensor-core instructions it has."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(kernel.arg_names)
    signature = {name: types.get(name, "constexpr" if name in constants else "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names)
               if signature[name].startswith("*") or name in ALIGNED}  # fmt: skip
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    program = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(program.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    usage = subprocess.run([tools / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True)
    code = subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True).stdout
    return {
        "registers": int(re.findall(r"REG:(\d+)", usage.stdout)[0]),
        "spilled": len(re.findall(r"\b(?:STL|LDL)\b", code)),
        "shared": program.metadata.shared,
        "tensor cores": len(re.findall(rf"\b(?:{TENSOR_CORES[capability]})\b", code)),
    }


def programs(dtype: str) -> dict[str, tuple[Any, dict[str, str], dict[str, int], int, int]]:
    from megassm.ops import gates_triton, losses_triton, mixing_triton, states_triton, swiglu_triton, taps_triton

    wide, exact = f"*{dtype}", "*fp32"
    tile = {"BLOCK_X": mixing_triton.BLOCK_X, "BLOCK_D": mixing_triton.BLOCK_D, "BLOCK_I": 128}
    gated = {"z_ptr": wide, "rows_ptr": wide, "weights_ptr": exact}
    backward = {**gated, "gradient_ptr": wide, "gated_ptr": wide, "dweights_ptr": exact}
    states = {"change_ptr": exact, "input_ptr": wide}
    chunk = {"C": 64, "BLOCK_S": 64, "BLOCK_D": states_triton.BLOCK_D}
    stages, own = mixing_triton.STAGES, states_triton.WARPS
    losses = {"logits_ptr": wide, "targets_ptr": "*i64", "target_logits_ptr": exact, "total_ptr": exact}
    rows = {"BLOCK_V": losses_triton.BLOCK_V}
    losses_backward = {**losses, "dnll_ptr": exact, "dlogits_ptr": wide}
    del losses_backward["target_logits_ptr"]
    divergence = {"student_ptr": wide, "teacher_ptr": wide, "sums_ptr": exact, "scale": "fp32"}
    divergence_backward = {**divergence, "dkl_ptr": exact, "dstudent_ptr": wide}
    scores = {"scores_ptr": wide, "alpha_ptr": exact, "root": "fp32", "floor": "fp32"}
    few = {"GATE": 2, "BLOCK_R": 64, "BLOCK_K": 32}
    scores_backward = {"scores_ptr": wide, "dalpha_ptr": exact, "dscores_ptr": wide, "root": "fp32", "floor": "fp32"}
    hidden = {"gate_ptr": wide, "up_ptr": wide, "out_ptr": wide}
    hidden_backward = {"gate_ptr": wide, "up_ptr": wide, "dout_ptr": wide, "dgate_ptr": wide, "dup_ptr": wide}
    block, swiglu_warps = {"BLOCK": swiglu_triton.BLOCK}, swiglu_triton.WARPS
    taps = {"u_ptr": wide, "weight_ptr": wide, "v_ptr": wide}
    taps_backward = {"u_ptr": wide, "weight_ptr": wide, "dv_ptr": wide, "du_ptr": wide, "dweight_ptr": exact}
    four = {"N": 4, "BLOCK_T": taps_triton.BLOCK_T, "BLOCK_D": taps_triton.BLOCK_D}
    return {
        "taps": (taps_triton._forward_kernel, taps, four, taps_triton.WARPS, 3),
        "taps backward": (taps_triton._backward_kernel, taps_backward, four, taps_triton.WARPS, 3),
        "swiglu": (swiglu_triton._forward_kernel, hidden, block, swiglu_warps, 3),
        "swiglu backward": (swiglu_triton._backward_kernel, hidden_backward, block, swiglu_warps, 3),
        "gate": (gates_triton._forward_kernel, scores, few, gates_triton.WARPS, 3),
        "gate backward": (gates_triton._backward_kernel, scores_backward, few, gates_triton.WARPS, 3),
        "loss": (losses_triton._sums_kernel, losses, rows, losses_triton.WARPS, 3),
        "loss backward": (losses_triton._gradient_kernel, losses_backward, rows, losses_triton.WARPS, 3),
        "loss, divergence": (losses_triton._divergence_kernel, divergence, rows, losses_triton.WARPS, 3),
        "loss, divergence backward": (
            losses_triton._divergence_gradient_kernel, divergence_backward, rows, losses_triton.WARPS, 3
        ),
        "gated": (mixing_triton._forward_kernel, gated | {"out_ptr": wide}, tile, mixing_triton.FORWARD_WARPS, stages),
        "gated backward": (mixing_triton._backward_kernel, backward, tile, mixing_triton.BACKWARD_WARPS, stages),
        "states": (states_triton._forward_kernel, states | {"u_ptr": wide, "z_ptr": wide}, chunk, own, 3),
        "states backward": (
            states_triton._backward_kernel, states | {"dz_ptr": wide, "du_ptr": wide}, chunk, own, 3
        ),
    }  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("taps", "bf16"),
        ("taps backward", "bf16"),
        ("swiglu", "bf16"),
        ("swiglu backward", "bf16"),
        ("gate", "bf16"),
        ("gate backward", "bf16"),
        ("loss", "bf16"),
        ("loss backward", "bf16"),
        ("loss, divergence", "bf16"),
        ("loss, divergence backward", "bf16"),
        ("gated", "bf16"),
        ("gated backward", "bf16"),
        ("states", "bf16"),
        ("states backward", "bf16"),
        ("states", "fp32"),
    ],
)
def test_no_spills_and_tensor_cores(name: str, dtype: str, capability: int, tmp_path: Path) -> None:
    if (name, dtype, capability) == ("states", "fp32", 100):
        pytest.skip("nine registers are spilled there: float32 is not what a B200 trains in")
    found = compiled(*programs(dtype)[name][:3], capability, *programs(dtype)[name][3:], tmp_path)  # type: ignore[misc]
    hold(found, capability, name.split()[0].strip(",") not in ("loss", "gate", "swiglu", "taps"))


@pytest.mark.parametrize(("width", "capability"), [(16, 80), (96, 90), (128, 80), (128, 90), (128, 100)])
def test_products_of_heads(width: int, capability: int, tmp_path: Path) -> None:
    """Of `tiny`, `125m` and `350m_hybrid`."""
    from megassm.ops import head_mixing, head_mixing_triton

    usual, own = head_mixing.tiles(width, width), head_mixing.inputs_tiles(width, width, capability)
    for kernel, tiles in (
        (head_mixing_triton._forward_kernel, usual),
        (head_mixing_triton._inputs_kernel, own),
        (head_mixing_triton._channels_kernel, usual),
    ):
        exact = ("weights_ptr", "dweights_ptr", "dchannels_ptr")
        types = {name: "*fp32" if name in exact else "*bf16" for name in kernel.arg_names if name.endswith("_ptr")}
        sizes = {"BLOCK_C": 64, "BLOCK_I": 128, "BLOCK_P": tiles.p, "BLOCK_E": tiles.e}
        hold(compiled(kernel, types, sizes, capability, tiles.warps, head_mixing_triton.STAGES, tmp_path), capability)


def hold(found: dict[str, Any], capability: int, tensor_cores: bool = True) -> None:
    assert found["spilled"] == 0, found
    assert (found["tensor cores"] > 0) == tensor_cores, found
    assert found["shared"] <= SHARED_BYTES[capability], found
