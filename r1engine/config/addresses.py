"""Addresses of servers as people write them."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

FORMS = "http://host:port or https://host, perhaps with a path; an IPv6 address stands in brackets"


def address_problem(url: str) -> str:
    """Why `url` is no address of a server, for behind "required"; "" if it is one."""
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is none, a bracket that is not closed
        is_whole = False
    if not is_whole or re.search(r"[\s\x00-\x1f]", url):
        return FORMS
    if "@" in parts.netloc:
        return "an address without a name or key: name the variable of a key by key_variable"
    return "an address without ? and #" if parts.query or parts.fragment else ""
