"""Hosts and URLs: what is refused, with which fix, and in which spelling equal ones are equal."""

from typing import Any

import pytest

from services.clients import BlockingTeacherClient, RolloutClient, TeacherClient
from services.config.addresses import (
    checked_host,
    checked_url,
    checked_urls,
    is_loopback,
    is_wildcard,
    reachable,
    shown,
    url_of,
)
from services.errors import DistillServeError, InputError

REFUSED = [
    ("10.0.0.5:8101", "must begin with http:// or https://"),
    ("ftp://h", "must begin with http:// or https://"),
    ("http:h", "must begin with http:// or https://"),
    ("", "must begin with http:// or https://"),
    ("http://", "names no host"),
    ("http:///x", "names no host"),
    ("http://:80", "names no host"),
    ("http://h:0", "has the port '0'; a port is a number from 1 to 65535"),
    ("http://h:65536", "has the port '65536'"),
    ("http://h:99999999999999999999", "has the port '99999999999999999999'"),
    ("http://h:-1", "has the port '-1'"),
    ("http://h:+80", r"has the port '\+80'"),
    ("http://h:abc", "has the port 'abc'"),
    ("http://h:８0", "has the port '８0'"),
    ("http://h:", "has the port ''"),
    ("http://[::1]:", "has the port ''"),
    ("http://[::1", "is no URL .*in brackets"),
    ("http://::1", "an IPv6 address without its brackets"),
    ("http://::1:8100", "an IPv6 address without its brackets"),
    ("http://[::1]8100", "names no host that there can be"),
    ("http://[fe80::1]:80", "valid on one link alone; say which, e.g. fe80::1%eth0"),
    ("http://10.0.0.300", "is no IPv4 address"),
    ("http://10.0.5", "is no IPv4 address"),
    ("http://a..b", "is no host name"),
    ("http://-a", "is no host name"),
    ("http://" + "a" * 64, "is no host name"),
    ("http://" + ".".join(["a" * 60] * 5), "is no host name"),
    ("http://bücher", "is no host name.*xn--"),
    ("http://a,b", "is no host name"),
    ("http://h ", "has a space or a line end"),
    ("http://h\n", "has a space or a line end"),
    (" http://h", "has a space or a line end"),
    ("http://h\t:80", "has a space or a line end"),
    ("http://h?key=s3cret", "has a query or fragment"),
    ("http://h/#s3cret", "has a query or fragment"),
    ("http://h/?", "has a query or fragment"),
    ("http://h/v1", "has the path '/v1'; leave it out"),
    ("http://h/v1/", "has the path '/v1'; leave it out"),
    ("http://h/gateway/v1/teacher/logprobs", "leave it out"),
    ("http://h/ready", "leave it out"),
    ("http://h/docs", "leave it out"),
    ("http://h/a//b", "a base path is letters"),
    ("http://h/a/../b", "a base path is letters"),
    ("http://h/a%20b", "a base path is letters"),
    ("http://me:s3cret@h", "user or password"),
    ("http://me@h", "user or password"),
    ("http://me:s3cret/s3cret@h", "user or password"),
    ("http://me:s3cret?s3cret#s3cret@h:1", "user or password"),
    ("me:s3cret@h", "user or password"),
]


@pytest.mark.parametrize(("url", "said"), REFUSED)
def test_a_url_that_nobody_can_mean_is_refused_with_the_fix(url: str, said: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^teacher_client\.urls: .* {said}|^teacher_client\.urls: .*{said}"
    ) as caught:
        checked_urls("teacher_client.urls", ["http://good", url], base_path=True)
    assert "s3cret" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("client", [TeacherClient, RolloutClient, BlockingTeacherClient])
@pytest.mark.parametrize("url", ["http://h/v1", "http://me:s3cret@h", "h:8101"])
def test_the_python_clients_refuse_the_same(client: type, url: str) -> None:
    with pytest.raises(InputError, match=r"^urls: ") as caught:
        client([url])
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("urls", [[], "http://h"])
def test_a_client_is_given_a_list_of_urls(urls: Any) -> None:
    with pytest.raises(InputError, match="must be a list of at least one URL"):
        TeacherClient(urls)


@pytest.mark.parametrize(
    ("url", "spelt"),
    [
        ("http://a:8100", "http://a:8100"),
        ("HTTP://A.Example./", "http://a.example"),
        ("http://a:80//", "http://a"),
        ("https://a:443", "https://a"),
        ("https://a:80", "https://a:80"),
        ("http://a:0080", "http://a"),
        ("http://rollout_1:8100", "http://rollout_1:8100"),
        ("http://xn--bcher-kva", "http://xn--bcher-kva"),
        ("http://127.0.0.1:9", "http://127.0.0.1:9"),
        ("http://[0:0:0:0:0:0:0:1]:8100/", "http://[::1]:8100"),
        ("http://[2001:DB8::0:5]", "http://[2001:db8::5]"),
        ("http://[fe80::1%eth0]:8100", "http://[fe80::1%eth0]:8100"),
        ("http://[fe80::1%25eth0]:8100", "http://[fe80::1%eth0]:8100"),  # as RFC 6874 writes it
        ("https://gateway/teachers/maths/", "https://gateway/teachers/maths"),
    ],
)
def test_equal_urls_have_one_spelling(url: str, spelt: str) -> None:
    assert checked_url(url, base_path=True) == spelt
    assert checked_url(spelt, base_path=True) == spelt


@pytest.mark.parametrize("other", ["http://127.0.0.1:8100", "http://[0::1]:8100/"])
def test_localhost_beside_its_address_is_the_same_server_twice(other: str) -> None:
    with pytest.raises(
        ValueError, match=r"rollout_client\.urls names http://localhost:8100 and .* one server in two ways"
    ):
        checked_urls("rollout_client.urls", [other, "http://LocalHost:8100"])
    assert checked_urls("rollout_client.urls", ["http://127.0.0.1:8100", "http://[::1]:8100", "http://localhost:8101"])


def test_the_same_server_twice_is_found_in_every_spelling() -> None:
    with pytest.raises(
        ValueError, match=r"rollout_client\.urls names http://\[::1\]:8100 twice; give each server once"
    ):
        checked_urls("rollout_client.urls", ["http://[::1]:8100", "HTTP://[0::1]:8100/"])


def test_only_a_teacher_may_be_below_a_path() -> None:
    assert TeacherClient(["https://gateway/maths/"]).urls == ["https://gateway/maths"]
    with pytest.raises(InputError, match="has the path '/maths'; leave it out"):
        RolloutClient(["https://gateway/maths"])


@pytest.mark.parametrize(
    ("host", "spelt"),
    [
        ("LOCALHOST", "localhost"),
        ("[::1]", "::1"),
        ("0:0::", "::"),
        ("10.0.0.5", "10.0.0.5"),
        ("fe80::1%e", "fe80::1%e"),
    ],
)
def test_a_host_has_one_spelling_and_makes_a_url(host: str, spelt: str) -> None:
    assert checked_host(host) == spelt
    assert checked_url(url_of(spelt, 8100)) == url_of(spelt, 8100)


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("", "is no host"),
        (" ::1", "is no host"),
        ("http://10.0.0.5", "a host alone"),
        ("10.0.0.5:8100", "a host alone"),
        ("10.0.0.5/24", "a host alone"),
        ("[::1]:8100", "is no IPv6 address"),
        ("[::1", "is no IPv6 address"),
        ("[host]", "has brackets, which only an IPv6 address"),
        ("[host", "has brackets, which only an IPv6 address"),
        ("fe80::1", "say which, e.g. fe80::1%eth0"),
        ("10.0.0.256", "is no IPv4 address"),
        ("a b", "is no host name"),
    ],
)
def test_what_is_no_host_is_refused_with_the_fix(host: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        checked_host(host)


@pytest.mark.parametrize(
    ("host", "loopback", "wildcard", "reached"),
    [
        ("127.0.0.1", True, False, "127.0.0.1"),
        ("127.8.8.8", True, False, "127.8.8.8"),
        ("localhost", True, False, "localhost"),
        ("::1", True, False, "::1"),
        ("::ffff:127.0.0.1", True, False, "::ffff:127.0.0.1"),
        ("0.0.0.0", False, True, "127.0.0.1"),
        ("::", False, True, "::1"),
        ("::ffff:0.0.0.0", False, True, "127.0.0.1"),
        ("10.0.0.5", False, False, "10.0.0.5"),
        ("localhost.example", False, False, "localhost.example"),
    ],
)
def test_who_can_connect_and_where(host: str, loopback: bool, wildcard: bool, reached: str) -> None:
    assert (is_loopback(host), is_wildcard(host), reachable(host)) == (loopback, wildcard, reached)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("http://h:1/x?key=s", "http://h:1/x"),
        ("http://me:p@w/x@h:1", "http://...@h:1"),
        ("me:p?w#x@h", "...@h"),
        ("h", "h"),
    ],
)
def test_a_url_is_shown_without_its_secrets(url: str, text: str) -> None:
    assert shown(url) == text


def test_no_error_shows_the_password_of_a_url_that_strays_into_it() -> None:
    error = DistillServeError("the run file 'http://me:s3cret/s3@h/run.toml' and ssh://git@h/x, not me@example.org")
    assert str(error) == "the run file 'http://...@h/run.toml' and ssh://...@h/x, not me@example.org"
