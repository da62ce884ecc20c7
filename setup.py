"""Puts configs/ into the wheel as megassm/configs, so that `megassm train --config tiny` works without the project."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithConfigs(build_py):
    """The package as it is, and the configurations."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree("configs", Path(self.build_lib) / "megassm" / "configs", dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithConfigs})
