"""A chat template that goes with an exported model."""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import TemplateSyntaxError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megassm.errors import UserError
from megassm.guarded import LINE_BYTES, read_bytes

OF_TRANSFORMERS = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
"""The one tag that transformers adds to Jinja: it marks what an assistant says."""


def read_chat_template(path: Path) -> str:
    """A file's text, which is a template.

    Raises:
        UserError: there is no such file, or it is no Jinja template.
    """
    way_out = "give a Jinja template, as transformers' chat_template.jinja is"
    try:
        text = read_bytes(path, LINE_BYTES, way_out).decode()
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(OF_TRANSFORMERS.sub("", text))
    except FileNotFoundError as error:
        raise UserError(f"--chat-template {path}: {error.strerror}; {way_out}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"--chat-template {path}: not UTF-8 ({error.reason}); {way_out}") from None
    except TemplateSyntaxError as error:
        raise UserError(f"--chat-template {path}:{error.lineno}: {error.message}; {way_out}") from None
    return text
