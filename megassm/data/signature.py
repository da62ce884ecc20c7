"""A data set's signature, where it stands in the environment and not in the URL: sent to the server that it names."""

from __future__ import annotations

import os
import re
from urllib.parse import urlsplit

from megassm.errors import UserError

QUERY_VARIABLE = "MEGASSM_DATA_QUERY"
"""PREFIX?QUERY, several separated by blanks: see `query_for`."""
SERVER = re.compile(r"(?:(https?)://)?([\w.-]+(?::\d+)?|\[[0-9a-fA-F:.]+\](?::\d+)?)(/[^?]*|)\?(.+)")
"""(scheme, host and port, path, query) of a part of that variable."""


def query_for(url: str) -> str:
    """The query (a signature) that the environment has for a URL without one; empty if it has none.

    $MEGASSM_DATA_QUERY names to whom each may be sent, as a host or a prefix of the URL: `host?sig=...`,
    `https://host:8443/bucket/set?sig=...`. No other server sees it.

    Raises:
        UserError: a part of the variable names no host.
    """
    asked = urlsplit(url)
    host = asked.netloc.rpartition("@")[2].lower()
    found = ""
    for entry in os.environ.get(QUERY_VARIABLE, "").split():
        named = SERVER.fullmatch(entry)
        if named is None:
            raise UserError(
                f"environment: {QUERY_VARIABLE} does not say which server its query is for; write HOST?QUERY, or the "
                f"start of the URL and its query: {QUERY_VARIABLE}='{asked.scheme}://{host}{asked.path}?...'"
            )
        scheme, server, folder, query = named.groups()
        inside = f"{asked.path}/".startswith(f"{folder.rstrip('/')}/")
        if not found and inside and server.lower() == host and scheme in (None, asked.scheme):
            found = query
    return found
