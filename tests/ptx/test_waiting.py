"""Bounds, asynchronous copies, barriers and their mistakes, in a few lines of PTX each. Every fault says why."""

import pytest
import torch

from assembly import run
from emulator.faults import (
    Deadlock,
    EarlyAccess,
    Fault,
    Misaligned,
    NotEmulated,
    OutOfBounds,
    Race,
    Unfinished,
    Unwritten,
)

I32 = torch.int32
ORDERS = ("lockstep", "up", "down", 1, 2)


@pytest.fixture(params=ORDERS, ids=str)
def order(request):
    return request.param


def out(threads=64, columns=1):
    return torch.zeros(threads, columns, dtype=I32)


# ------------------------------------------------------------------------------------------------ bounds


def test_an_access_outside_of_every_tensor():
    x = torch.zeros(100, 4, dtype=I32)
    rows = x[10:42]
    run("ld.global.b32 %r0, [%x+12];", x=rows)
    with pytest.raises(OutOfBounds, match=r"4 bytes at byte 512 of 'x', 512 bytes long, lie outside of every tensor"):
        run("ld.global.b32 %r0, [%x+16];", x=rows)
    with pytest.raises(OutOfBounds, match="'x'"):
        run("ld.global.b32 %r0, [%x+-4];", x=rows)
    with pytest.raises(OutOfBounds):
        run("st.global.b32 [%x+16], %t;", x=rows)


def test_the_gap_between_the_rows_of_a_slice_is_outside():
    x = torch.zeros(32, 8, dtype=I32)[:, :5]
    run("ld.global.b32 %r0, [%x+16];", x=x)
    with pytest.raises(OutOfBounds, match="byte 20 of 'x', 20 bytes long"):
        run("ld.global.b32 %r0, [%x+20];", x=x)


def test_wide_accesses_must_be_aligned():
    with pytest.raises(Misaligned):
        run("ld.global.v2.b32 {%r0, %r1}, [%x+4];", x=out(32, 4))
    with pytest.raises(Misaligned):
        run("mov.b32 %r0, 8; ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r0];", shared=64)


def test_the_end_of_shared_memory():
    run("st.shared.b32 [60], 1;", shared=64)
    with pytest.raises(OutOfBounds, match="shared memory has 64 bytes, and the access reaches 68"):
        run("ld.shared.b32 %r1, [64];", shared=64)


def test_shared_memory_that_nobody_has_written():
    run("st.shared.b32 [0], 1; ld.shared.b32 %r1, [0];", shared=64)
    with pytest.raises(Unwritten, match="nobody has written shared address 4"):
        run("st.shared.b32 [0], 1; ld.shared.b32 %r1, [4];", shared=64)


def test_an_unknown_instruction_is_refused_by_name():
    with pytest.raises(NotEmulated, match=r"tcgen05\.mma"):
        run("tcgen05.mma.cta_group::1 %r0;")


# ------------------------------------------------------------------------------------------------ barriers

EXCHANGE = """
mul.lo.s32 %r0, %t, 4;
st.shared.b32 [%r0], 0;
bar.sync 0;
st.shared.b32 [%r0], %t;
{barrier}
xor.b32 %r1, %r0, 128;
ld.shared.b32 %r2, [%r1];
st.global.b32 [%out], %r2;
"""


def test_a_barrier_orders_warps(order):
    x = out()
    run(EXCHANGE.format(barrier="bar.sync 0;"), threads=64, shared=256, order=order, out=x)
    assert x.flatten().tolist() == [*range(32, 64), *range(32)]


def test_without_the_barrier_it_is_a_race_in_any_order(order):
    with pytest.raises(Race, match=r"shared address \d+, which warp \d (reads|writes); no barrier between"):
        run(EXCHANGE.format(barrier=""), threads=64, shared=256, order=order, out=out())


def test_a_place_must_not_be_overwritten_before_all_have_read_it(order):
    body = EXCHANGE.format(barrier="bar.sync 0;") + "st.shared.b32 [%r0], 7;"
    with pytest.raises(Race, match=r"warp \d (overwrites|reads) shared address \d+, which warp \d (reads|writes)"):
        run(body, threads=64, shared=256, order=order, out=out())


def test_barriers_have_numbers_and_counts(order):
    """Warps 0 and 1 meet at barrier 1, and 2 and 3 at barrier 2, as often as they like."""
    body = """
    shr.u32 %r3, %t, 6;
    add.s32 %r3, %r3, 1;
    bar.sync %r3, 64;
    """ + EXCHANGE.format(barrier="bar.sync %r3, 64;")
    x = out(128)
    run(body, threads=128, shared=512, order=order, out=x)
    assert x.flatten().tolist() == [*range(32, 64), *range(32), *range(96, 128), *range(64, 96)]


def test_warps_at_different_barriers_wait_for_ever(order):
    body = "shr.u32 %r0, %t, 5; bar.sync %r0;"
    with pytest.raises(Deadlock) as fault:
        run(body, threads=64, order=order)
    assert str(fault.value) == (
        "every warp waits; warp 0: barrier 0, where 32 of 64 threads are; warp 1: barrier 1, where 32 of 64 threads are"
    )


# ------------------------------------------------------------------------------------------------ mbarriers

# Warp 1 hands a number to warp 0 in each of three rounds, through one place: `full` and `empty` are at 0 and 8.
HAND_OVER = """
setp.eq.u32 %p0, %t, 0;
@%p0 mbarrier.init.shared::cta.b64 [0], 32;
@%p0 mbarrier.init.shared::cta.b64 [8], 32;
bar.sync 0;
mov.b32 %r5, 0;
mov.b32 %r0, 0;
and.b32 %r8, %t, 31;
mad.lo.s32 %r8, %r8, 4, 16;
setp.ge.u32 %p1, %t, 32;
@%p1 bra producer;
consumer:
and.b32 %r1, %r0, 1;
{{ .reg .pred ok; again: mbarrier.try_wait.parity.shared::cta.b64 ok, [0], {full}; @!ok bra again; }}
ld.shared.b32 %r2, [%r8];
add.s32 %r5, %r5, %r2;
{arrive}
add.s32 %r0, %r0, 1;
setp.lt.u32 %p2, %r0, 3;
@%p2 bra consumer;
st.global.b32 [%out], %r5;
ret;
producer:
and.b32 %r1, %r0, 1;
xor.b32 %r1, %r1, 1;
{{ .reg .pred ok; again: mbarrier.try_wait.parity.shared::cta.b64 ok, [8], {empty}; @!ok bra again; }}
mad.lo.s32 %r2, %r0, 100, 1;
st.shared.b32 [%r8], %r2;
mbarrier.arrive.shared::cta.b64 _, [0];
add.s32 %r0, %r0, 1;
setp.lt.u32 %p2, %r0, 3;
@%p2 bra producer;
"""
RIGHT = {"full": "%r1", "empty": "%r1", "arrive": "mbarrier.arrive.shared::cta.b64 _, [8];"}


def hand_over(order, **mistake):
    x = out()
    run(HAND_OVER.format(**RIGHT | mistake), threads=64, shared=256, order=order, out=x)
    return x.flatten().tolist()


def test_phases_of_mbarriers_hand_numbers_over(order):
    assert hand_over(order) == 32 * [1 + 101 + 201] + 32 * [0]


@pytest.mark.parametrize("mistake", [{"full": "1"}, {"empty": "1"}], ids=["consumer", "producer"])
def test_one_side_that_does_not_wait_is_a_race_or_a_deadlock(order, mistake):
    """Whoever runs first decides. A phase that was missed does not come back, and then both wait."""
    with pytest.raises((Race, Unwritten, Deadlock)):
        hand_over(order, **mistake)


def test_a_consumer_that_runs_ahead_reads_what_nobody_has_written():
    with pytest.raises(Unwritten, match="nobody has written shared address 16"):
        hand_over("down", full="1")


def test_a_producer_that_waits_for_the_wrong_phase_never_starts(order):
    with pytest.raises(Deadlock) as fault:
        hand_over(order, empty="0")
    missing = "where 32 of 32 arrivals and 0 bytes are missing"
    assert str(fault.value) == (
        f"every warp waits; warp 0: phase 0 of the mbarrier at shared address 0, {missing}; "
        f"warp 1: phase 0 of the mbarrier at shared address 8, {missing}"
    )


def test_a_forgotten_arrival_is_a_deadlock(order):
    with pytest.raises(Deadlock, match="phase 0 of the mbarrier at shared address 8, where 32 of 32 arrivals"):
        hand_over(order, arrive="")


def test_an_mbarrier_must_be_made_before_another_warp_uses_it():
    body = "setp.eq.u32 %p0, %t, 0; @%p0 mbarrier.init.shared::cta.b64 [0], 64; mbarrier.arrive.shared::cta.b64 _, [0];"
    with pytest.raises(Race, match="warp 1 reads shared address 0, which warp 0 writes"):
        run(body, threads=64, shared=64, order="up")
    with pytest.raises(Fault, match="there is no mbarrier at shared address 0"):
        run(body, threads=64, shared=64, order="down")


# ------------------------------------------------------------------------------------------------ copies of sm_80

COPY = """
mul.lo.s32 %r0, %t, 16;
cp.async.cg.shared.global [%r0], [%x], 16, {size};
cp.async.commit_group;
cp.async.cg.shared.global [%r0+512], [%x], 16;
cp.async.commit_group;
{wait}
ld.shared.b32 %r1, [%r0+12];
st.global.b32 [%out], %r1;
cp.async.wait_all;
"""


def copied(size=16, wait="cp.async.wait_group 1;"):
    x, result = torch.arange(128, dtype=I32).view(32, 4), out(32)
    run(COPY.format(size=size, wait=wait), shared=1024, x=x, out=result)
    return x, result


def test_a_copy_is_there_once_its_group_is_waited_for():
    x, result = copied()
    assert torch.equal(result[:, 0], x[:, 3])


def test_what_lies_beyond_the_source_size_becomes_zero():
    assert copied(size=8)[1].eq(0).all() and copied(size=0)[1].eq(0).all()


@pytest.mark.parametrize("wait", ["", "cp.async.wait_group 2;"])
def test_a_wait_left_out_or_one_too_short(wait):
    with pytest.raises(EarlyAccess, match="nothing has waited for the copy into shared address 12"):
        copied(wait=wait)


def test_a_copy_that_nothing_waits_for():
    with pytest.raises(Unfinished, match=r"cp\.async"):
        run("mul.lo.s32 %r0, %t, 16; cp.async.cg.shared.global [%r0], [%x], 16; cp.async.commit_group;", shared=512,
            x=out(32, 4))  # fmt: skip


def test_another_warp_sees_a_copy_behind_a_barrier(order):
    body = """
    mul.lo.s32 %r0, %t, 16;
    cp.async.cg.shared.global [%r0], [%x], 16;
    cp.async.commit_group;
    cp.async.wait_group 0;
    {barrier}
    xor.b32 %r0, %r0, 512;
    ld.shared.b32 %r1, [%r0];
    st.global.b32 [%out], %r1;
    """
    x, result = torch.arange(256, dtype=I32).view(64, 4), out()
    run(body.format(barrier="bar.sync 0;"), threads=64, shared=1024, order=order, x=x, out=result)
    assert torch.equal(result[:, 0], x[:, 0].roll(32))
    with pytest.raises((Race, EarlyAccess, Unwritten)):
        run(body.format(barrier=""), threads=64, shared=1024, order=order, x=x, out=result)
