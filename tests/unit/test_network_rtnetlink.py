"""The netlink socket, in a network namespace of its own that has nothing but a loopback."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest
from apart import in_network

from kata.network import rtnetlink

LOOPBACK = 1


def inside(work: Callable[[rtnetlink.Rtnl], None]) -> None:
    """Run something in a thread that has a new network namespace."""
    if os.geteuid() != 0:
        pytest.skip("a network namespace needs root")

    def run() -> None:
        with rtnetlink.Rtnl() as rtnl:
            work(rtnl)

    in_network(run)


def test_an_interface_is_found_and_brought_up() -> None:
    def work(rtnl: rtnetlink.Rtnl) -> None:
        by_index = {link.index: link for link in rtnl.links()}
        assert by_index[LOOPBACK].name == "lo"
        assert not by_index[LOOPBACK].flags & rtnetlink.UP
        assert rtnl.addresses() == []
        rtnl.bring_up(LOOPBACK, 1400)
        (link,) = (link for link in rtnl.links() if link.index == LOOPBACK)
        assert link.flags & rtnetlink.UP
        assert link.mtu == 1400
        assert ("127.0.0.1", 8) in [(address.ip, address.prefix) for address in rtnl.addresses()]
        assert rtnl.neighbors() == []

    inside(work)


def test_what_the_kernel_refuses_is_an_error_and_the_socket_goes_on() -> None:
    def work(rtnl: rtnetlink.Rtnl) -> None:
        refusals: list[tuple[Callable[[], None], set[int]]] = [
            (lambda: rtnl.bring_up(4711), {errno.ENODEV}),
            (lambda: rtnl.delete_link(4711), {errno.ENODEV}),
            (lambda: rtnl.delete_link(LOOPBACK), {errno.EOPNOTSUPP, errno.EBUSY}),
            (lambda: rtnl.add_macvtap("tap0", 4711), {errno.ENODEV, errno.EOPNOTSUPP}),
            (lambda: rtnl.redirect(4711, LOOPBACK), {errno.ENODEV, errno.ENOENT, errno.EOPNOTSUPP}),
        ]
        for call, numbers in refusals:
            with pytest.raises(OSError) as caught:  # noqa: PT011 - its number is what counts
                call()
            assert caught.value.errno in numbers
            assert LOOPBACK in [link.index for link in rtnl.links()], (
                "nothing of the refusal is left in the socket"
            )

    inside(work)


def test_a_redirection_is_made_once_and_taken_back_as_often_as_one_likes() -> None:
    def work(rtnl: rtnetlink.Rtnl) -> None:
        rtnl.stop_redirecting(LOOPBACK)
        rtnl.stop_redirecting(4711)
        try:
            rtnl.redirect(LOOPBACK, LOOPBACK)
        except OSError as error:
            pytest.skip(f"needs a kernel that can redirect packets (act_mirred): {error}")
        with pytest.raises(FileExistsError):
            rtnl.redirect(LOOPBACK, LOOPBACK)
        rtnl.stop_redirecting(LOOPBACK)
        rtnl.stop_redirecting(LOOPBACK)
        rtnl.redirect(LOOPBACK, LOOPBACK)

    inside(work)


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", []),
        (rtnetlink.attribute(3, b"lo\0") + rtnetlink.attribute(0x8000 | 18, b""), [(3, b"lo\0"), (18, b"")]),
        (b"\x00\x00\x01\x00", []),  # a length of nothing would be walked for ever
        (b"\xff\xff\x01\x00ab", [(1, b"ab")]),
        (b"\x04\x00\x01", []),
    ],
)
def test_attributes_end_with_their_data(data: bytes, found: list[tuple[int, bytes]]) -> None:
    assert list(rtnetlink.attributes(data)) == found
