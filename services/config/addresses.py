"""Hosts and URLs as options, arguments and run files give them: read once, refused in one line, compared in one spelling.

Nothing is looked up here: a name that resolves to nothing is found when it is connected to.
"""

import ipaddress
import re
from collections import Counter
from collections.abc import Iterable
from urllib.parse import urlsplit

_EXAMPLE = "http://10.0.0.5:8100"
_LABEL = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?")
_LONGEST_NAME = 253
_PATH_SEGMENT = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9._~-]+")
# What follows a base URL: who gives one of these has copied the address of a route.
_ROUTES = frozenset({"v1", "ready", "health", "docs", "redoc", "openapi.json", "metrics", "pause", "resume", "ping"})
_DEFAULT_PORTS = {"http": 80, "https": 443}


def checked_urls(option: str, urls: Iterable[str], *, base_path: bool = False) -> list[str]:
    """The base URLs of equal servers, each in its one spelling (see `checked_url`).

    Raises:
        ValueError: one of them cannot be meant, or two name the same server; says which option, and the fix.
    """
    checked = []
    for url in urls:
        try:
            checked.append(checked_url(url, base_path=base_path))
        except ValueError as error:
            raise ValueError(f"{option}: {shown(url)!r} {error}") from None
    twice = [url for url, count in Counter(checked).items() if count > 1]
    if twice:
        raise ValueError(f"{option} names {twice[0]} twice; give each server once")
    for url, host in ((url, host) for url in checked for host in ("127.0.0.1", "[::1]")):
        same = url.replace("//localhost", f"//{host}", 1)
        if same != url and same in checked:
            raise ValueError(f"{option} names {url} and {same}, one server in two ways; give it once")
    return checked


def checked_url(url: str, *, base_path: bool = False) -> str:
    """A server's base URL in the spelling in which equal ones are equal: lower case, addresses in their short form, no
    default port, no slash at the end.

    Args:
        base_path: whether a path may follow, as a reverse proxy puts teachers under one ("https://gateway/maths"). Rollout
            servers have none: what pushes weights to them drives each one itself.

    Raises:
        ValueError: what is wrong with it and the fix, without the URL, which may hold a password.
    """
    if "@" in url:
        raise ValueError(
            "has a user or password in it, which would end up in logs; give the server's key in the environment instead"
        )
    if url != url.strip() or re.search(r"[\s\x00-\x1f\x7f]", url):
        raise ValueError("has a space or a line end in it; leave it out")
    scheme, separator, _ = url.partition("://")
    if not separator or scheme.lower() not in _DEFAULT_PORTS:
        raise ValueError(f"must begin with http:// or https://, e.g. {_EXAMPLE}")
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ValueError(f"is no URL ({error}); an IPv6 address stands in brackets, e.g. http://[::1]:8100") from None
    if parts.query or parts.fragment or url.endswith(("?", "#")):
        raise ValueError("has a query or fragment; leave out what follows the port")
    host = _host_of(parts.netloc)
    scheme = parts.scheme.lower()
    port = _port_of(parts.netloc)
    path = _checked_path(parts.path, base_path)
    return url_of(host, None if port == _DEFAULT_PORTS[scheme] else port, scheme) + path


def shown(url: str) -> str:
    """A URL as a message may repeat it: without user, password, query and fragment."""
    secret, at, rest = url.rpartition("@")
    scheme, separator, _ = secret.partition("://")
    before = f"{scheme}://...@" if at and separator else "...@" if at else ""
    return before + re.split(r"[?#]", rest)[0]


def url_of(host: str, port: int | None, scheme: str = "http") -> str:
    """The base URL of a host, whose address may be of either family."""
    bracketed = f"[{host}]" if ":" in host else host
    return f"{scheme}://{bracketed}" + ("" if port is None else f":{port}")


def checked_host(host: str) -> str:
    """A name or address in its one spelling: lower case, without brackets, IPv6 in its short form.

    Raises:
        ValueError: it is neither; says the fix.
    """
    if not host or host != host.strip():
        raise ValueError(f"{host!r} is no host; give an address such as 127.0.0.1 or ::1, or a name")
    if "/" in host or "@" in host or host.count(":") == 1:
        raise ValueError(f"{shown(host)!r} must be a host alone, e.g. 10.0.0.5; leave out everything around it")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if ":" in bare:
        return _ipv6(bare)
    if "[" in host or "]" in host:
        raise ValueError(f"{host!r} has brackets, which only an IPv6 address may have; it is given as ::1 or [::1]")
    return _ipv4_or_name(bare)


def address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host is, an IPv4 one in the clothes of IPv6 (::ffff:127.0.0.1) undressed; None for a name."""
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to who listens there."""
    found = address(host)
    return host == "localhost" if found is None else found.is_loopback


def is_wildcard(host: str) -> bool:
    """Whether it stands for all addresses of a machine."""
    found = address(host)
    return found is not None and found.is_unspecified


def reachable(host: str) -> str:
    """Where who listens on `host` is reached from the same machine."""
    if not is_wildcard(host):
        return host
    return "::1" if host == "::" else "127.0.0.1"


def _host_of(netloc: str) -> str:
    host = re.sub(r":[^:\]]*$", "", netloc) if netloc.count(":") <= 1 or "]" in netloc else netloc
    if not host:
        raise ValueError(f"names no host; give one, e.g. {_EXAMPLE}")
    if ":" in host and not host.startswith("["):
        raise ValueError("has an IPv6 address without its brackets; give it as http://[::1]:8100")
    bare = host.replace("%25", "%", 1) if host.startswith("[") else host  # RFC 6874's spelling of a zone
    try:
        return checked_host(bare)
    except ValueError as error:
        raise ValueError(f"names no host that there can be: {error}") from None


def _port_of(netloc: str) -> int | None:
    _, colon, text = netloc.rpartition("]")[2].rpartition(":")
    if not colon:
        return None
    # str.isdigit alone takes the digits of every script
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:6]) <= 65535 and len(text) <= 5):
        raise ValueError(f"has the port {text!r}; a port is a number from 1 to 65535")
    return int(text)


def _checked_path(path: str, base_path: bool) -> str:
    path = path.rstrip("/")
    if not path:
        return ""
    segments = path.removeprefix("/").split("/")
    if not base_path or not _ROUTES.isdisjoint(segments):
        fix = "leave it out: the routes are added to the address of the server"
        raise ValueError(f"has the path {path!r}; {fix}")
    if not all(_PATH_SEGMENT.fullmatch(segment) for segment in segments):
        raise ValueError(f"has the path {path!r}; a base path is letters, digits, and ._~- between single slashes")
    return path


def _ipv6(text: str) -> str:
    try:
        found = ipaddress.IPv6Address(text)
    except ValueError:
        fix = "is no IPv6 address; give one such as ::1, and a port in an option of its own"
        raise ValueError(f"{text!r} {fix}") from None
    if found.is_link_local and found.scope_id is None:
        raise ValueError(f"{text!r} is valid on one link alone; say which, e.g. {found}%eth0")
    return str(found)


def _ipv4_or_name(text: str) -> str:
    name = text.lower()
    labels = name.removesuffix(".").split(".")
    if labels[-1].isdecimal():
        try:
            return str(ipaddress.IPv4Address(name))
        except ValueError:
            raise ValueError(f"{text!r} is no IPv4 address; give four numbers from 0 to 255") from None
    if len(name) > _LONGEST_NAME or not all(_LABEL.fullmatch(label) for label in labels):
        raise ValueError(f"{text!r} is no host name; one has letters, digits, hyphens and dots (others as xn--...)")
    return name.removesuffix(".")
