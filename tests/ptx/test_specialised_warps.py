"""A Gluon kernel whose warps do different work: ring.py."""

import pytest
import torch

from emulator.faults import Deadlock, EarlyAccess, Race, Unwritten
from ring import ring_product

ORDERS = ("lockstep", "up", "down", 1, 2, 3)


def inputs():
    return torch.randn(128, 320).bfloat16(), torch.randn(64, 320).bfloat16()


@pytest.mark.parametrize("orders", [ORDERS, pytest.param(range(4, 40), marks=pytest.mark.ptx)], ids=["some", "many"])
def test_warps_in_every_order_give_the_same_bits(orders, package):
    a, b = inputs()
    results = []
    for order in orders:
        package.on(90, order)
        results.append(ring_product(a, b))
    torch.testing.assert_close(results[0].double(), a.double() @ b.double().T, rtol=1e-5, atol=1e-4)
    assert all(torch.equal(results[0], other) for other in results[1:])


AHEAD = ((Unwritten, EarlyAccess), "wgmma.*(nobody has written|nothing has waited for the copy)")
MISTAKES = {
    # mistake: the fault in the orders "lockstep" and "down", and what it says. Whoever runs first decides.
    "the producer waits for the other phase": (
        Deadlock, "warp 10: phase 0 of the mbarrier at shared address \\d+, where 2 of 2 arrivals", Deadlock, "warp 10",
    ),
    "the producer does not wait": (Race, "warp 10 overwrites", EarlyAccess, "nothing has waited for the copy"),
    "too many bytes are announced": (Deadlock, "0 of 1 arrivals and 8192 bytes are missing", Deadlock, "8192 bytes"),
    "a consumer waits for the other phase": (*AHEAD, (*AHEAD[0], Deadlock), ".*(wgmma|phase 1 of the mbarrier)"),
    "a consumer does not wait": (*AHEAD, *AHEAD),
    "a stage is given back while it is read": (
        (EarlyAccess, Race), "cp.async.bulk.*overwrites|cp.async.bulk.*nothing has waited for the wgmma that reads",
        (EarlyAccess, Race), "cp.async.bulk.*overwrites|cp.async.bulk.*nothing has waited for the wgmma that reads",
    ),
    "one consumer never gives a stage back": (
        Deadlock, "warp 10: phase 0 of the mbarrier at shared address \\d+, where 1 of 2 arrivals", Deadlock, "1 of 2",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found(mistake, package):
    for order, fault, says in zip(("lockstep", "down"), MISTAKES[mistake][::2], MISTAKES[mistake][1::2], strict=True):
        package.on(90, order)
        with pytest.raises(fault, match=says):
            ring_product(*inputs(), mistake=mistake)
