"""The one exception a user is meant to see, and URLs without what is secret in them.

A query string may be a signature, a user part a password.
"""

from __future__ import annotations

import re
import sys
from urllib.parse import urlsplit, urlunsplit

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]{0,30}://[^\s'\"<>]*[^\s'\"<>:;,.)]")
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
HIDDEN = "..."
MESSAGE_CHARS = 4000


class UserError(ValueError):
    """An error that a user can act on.

    The message names the place, the value, the rule and the way out. Whoever wrote it, what may be secret in a URL is
    taken out of it here, control characters are shown, and a long one loses its middle. Entry points print it without
    a traceback and exit with code 1 (see `megassm.cli.arguments.run_tool`); what else escapes is a bug of ours.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shortened(visible(redacted(message))))


def install_hint(extra: str) -> str:
    """How to install what an extra brings. No package index has this project: its name there may be a stranger's."""
    version = sys.modules["megassm"].__version__  # it is there: an import statement would be a circle
    return f"pip install -e '.[{extra}]' in a checkout of MegaSSM {version}"


def visible(text: str) -> str:
    """A text from outside for a terminal: control characters but newline and tab, and marks that reorder what is
    written, as \\x1b or \\u202e. What a terminal would obey is seen instead."""
    return _CONTROL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def shortened(text: str) -> str:
    """A message that people can read, though a value in it may be a whole file: its beginning, and its end."""
    if len(text) <= MESSAGE_CHARS:
        return text
    half = MESSAGE_CHARS // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


def scheme_of(place: str) -> str:
    """ "https" of "https://host/path", "" of a path."""
    return place.partition("://")[0].lower() if _URL.match(place) else ""


def without_secrets(place: str) -> str:
    """A URL without user, password, query and fragment; a path as it is."""
    if not scheme_of(place):
        return place
    try:
        parts = urlsplit(place)
    except ValueError:  # no URL after all, such as http://[::1
        return f"{scheme_of(place)}://{HIDDEN}"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def redacted(text: str) -> str:
    """A message in which every URL that held a secret says so and no more."""
    return _URL.sub(lambda found: _redacted_url(found[0]), text)


def _redacted_url(url: str) -> str:
    shown = without_secrets(url)
    try:
        parts = urlsplit(url)
    except ValueError:
        return shown
    return f"{shown}?{HIDDEN}" if parts.query or parts.fragment else shown
