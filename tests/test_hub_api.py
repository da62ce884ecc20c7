"""What users do with any model of transformers works with ours as with a Llama, but for the caches and masks that are
not ours (tools/check_hub_api.py)."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="needs the extra 'hf'")

from tools.check_hub_api import failures
from tools.hub_api.subject import Subject

pytestmark = pytest.mark.filterwarnings("ignore")

NOT_OURS = {
    "a mask of four dimensions",
    "transformers' own cache object",
    "attn_implementation flex_attention",
    "attn_implementation flash_attention_2",
    "moved to a CUDA device",
    "torch.compile, the whole graph",  # its compiler is switched off in tests; test_hf.py has it
}


def test_what_users_do_with_a_hybrid() -> None:
    found = failures(Subject("hybrid"))
    assert {name: repr(error) for name, error in found.items() if name not in NOT_OURS} == {}
