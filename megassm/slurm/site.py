"""A site's defaults for jobs: ~/.config/megassm/slurm.yaml, options of `submit` by their names.

sbatch: [partition=gpu, account=lab]
setup: setup.sh            # beside this file
logs: label
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ruamel.yaml.error import YAMLError

from megassm.errors import UserError
from megassm.guarded import YAML_BYTES, parse_yaml, read_bytes
from megassm.slurm.request import SITE_OPTIONS, FileParser, add_site_options

SITE_FILE = "megassm/slurm.yaml"


def site_defaults() -> dict[str, Any]:
    """Values for a `JobRequest`; empty where there is no such file.

    Raises:
        UserError: naming the file and the option.
    """
    path = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / SITE_FILE
    try:
        found = parse_yaml(read_bytes(path, YAML_BYTES, "mend or remove it").decode())
    except FileNotFoundError:
        return {}
    except (YAMLError, ValueError) as error:
        raise UserError(f"{path}: is not YAML ({str(error).splitlines()[0]}); mend or remove it") from None
    known = [name.replace("_", "-") for name in SITE_OPTIONS]
    if not isinstance(found, dict):
        raise UserError(f"{path}: must be options by name, such as `logs: label`; known are {', '.join(known)}")
    words = []
    for name, value in found.items():
        if (option := str(name).replace("_", "-")) not in known:
            raise UserError(f"{path}: {name}: is no option that a site sets; known are {', '.join(known)}")
        several = option in ("sbatch", "srun")
        for one in value if several and isinstance(value, list) else [value]:
            if not isinstance(one, str | int) or isinstance(one, bool):
                raise UserError(f"{path}: {name} = {one!r}: must be text or a whole number; quote it")
            words.append(f"--{option}={one}")
    parser = FileParser(path, "mend it")
    add_site_options(parser)
    values = {name: value for name, value in vars(parser.parse_args(words)).items() if value is not None}
    if values.get("setup"):
        values["setup"] = str(path.parent / Path(values["setup"]).expanduser())
    return values
