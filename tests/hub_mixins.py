"""transformers' own tests of a model, its "mixins", as modules of this package.

    python -m tests.hub_mixins      fetches them with pip: from the source distribution of the transformers installed

The distribution has the mixins of models and configurations, but not of generation and pipelines. With a checkout of
transformers' repository at that version those are run too: TRANSFORMERS_CHECKOUT names its folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

from tests.archives import unpack

FOLDER = Path(__file__).parents[1] / ".transformers-tests"
STAND_INS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}
"""What the distribution's files import of those it leaves out, empty."""
MARKS = ("flash_attn", "flash_attn_3", "flash_attn_4", "all_flash_attn", "accelerate", "torch_compile", "torch_export",
         "onnx_export", "executorch_export", "is_agent", "is_staging", "is_pipeline", "is_training",
         "is_tensor_parallel", "is_expert_parallel", "is_fsdp")  # fmt: skip
"""The marks of their tests, without "_test"."""


def find() -> Path | None:
    """The folder of their tests; None if there is none for the version installed."""
    checkout = os.environ.get("TRANSFORMERS_CHECKOUT")
    folder = Path(checkout) if checkout is not None else FOLDER / version("transformers")
    return folder.resolve() / "tests" if (folder / "tests/test_modeling_common.py").is_file() else None


def fetch() -> None:
    """Downloads the source distribution, and keeps its tests.

    Raises:
        subprocess.CalledProcessError: pip cannot, offline for one.
    """
    wanted = f"transformers=={version('transformers')}"
    folder = FOLDER / version("transformers")
    with tempfile.TemporaryDirectory() as download:
        pip = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers")
        subprocess.run([*pip, "--dest", download, wanted], check=True)
        (archive,) = Path(download).glob("*.tar.gz")
        unpack(archive, Path(download))
        (partial,) = Path(download).glob("transformers-*/tests")
        for name, text in STAND_INS.items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_text(text)
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(partial, folder / "tests")


if __name__ == "__main__" and find() is None:
    fetch()
