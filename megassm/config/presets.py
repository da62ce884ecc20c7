"""Named sets of knobs. `preset: NAME` in a file gives defaults, which every knob written down overrides; `preset=NAME`
among the overrides sets them over the file's, and later overrides win. A resolved configuration has knobs only."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # arXiv 2601.22488, and its authors' notebook where the paper leaves something open
    "paper": {
        "model": {
            "basis": "plus",
            "mixer_heads": 1,
            "gate": "softmax",
            "gate_rescale": True,
            "sigma_scale": "quarter_power",
            "input_taps": 1,
            "ffn_elastic": None,
            "channel_init_std": 1e-3,
            "gate_bias_init": -2.0,
            "gate_init_scale": 0.577,  # torch's own start of a linear layer: uniform within 1/sqrt(inputs)
        },
        "budget": {"strategy": "paper", "sampler": "authors", "bias": 0.6, "full_every": 8, "draws": 1},
    },
}
