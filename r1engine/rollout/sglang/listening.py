"""The address that a server listens on: a name, an IPv4 or an IPv6 address, with or without brackets."""

from __future__ import annotations

import ipaddress
import socket

from r1engine.config import ConfigError


def listening_host(text: str) -> str:
    """The address without brackets, when it is one of this machine's and not all of them.

    Raises:
        ConfigError: it stands for no address, for all interfaces, or for a link of one interface.
    """
    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if "%" in host:
        raise ConfigError(f"serve: found --host {text}, required an address without a zone: others do not know it")
    try:
        found = addresses_of("" if host in ("", "*") else host)
    except OSError as error:
        raise ConfigError(
            f"serve: found --host {text}, which stands for no address ({error.strerror}), required a name or an address"
        ) from error
    if any(address.is_unspecified for address in found):
        raise ConfigError(
            f"serve: found --host {text}, required the one address that the trainer reaches: on all interfaces the "
            "servers would listen to networks that nobody thought of"
        )
    return host


def own_name() -> str:
    """This machine's name, if it stands for addresses that only its own network reaches.

    Raises:
        ConfigError: it stands for a public address, or for none.
    """
    name = socket.gethostname()
    try:
        found = addresses_of(name)
    except OSError as error:
        raise ConfigError(
            f"serve: the name {name} of this machine stands for no address ({error.strerror}); give --host"
        ) from error
    if public := [address for address in found if address.is_global]:
        raise ConfigError(
            f"serve: the name {name} of this machine stands for the public address {public[0]}, required --host with "
            "its address in the cluster"
        )
    return name


def addresses_of(host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """All that a name stands for, IPv4 and IPv6; "" stands for all interfaces. Raises OSError if it stands for none."""
    flags = 0 if host else socket.AI_PASSIVE
    found = socket.getaddrinfo(host or None, 1, type=socket.SOCK_STREAM, flags=flags)
    return [ipaddress.ip_address(str(place[0]).partition("%")[0]) for *_, place in found]
