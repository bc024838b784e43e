"""What the emulator raises. The message names the instruction, and where the mistake lies."""


class Fault(Exception):
    """The kernel did something that a device would not forgive."""


class OutOfBounds(Fault):
    """An access outside the tensors of the launch, or outside the block's shared memory."""


class Misaligned(Fault):
    """An address that is not a multiple of the size of the access."""


class Unwritten(Fault):
    """A read of shared memory that nobody has written."""


class EarlyAccess(Fault):
    """An access to shared memory that an asynchronous copy or matmul still uses: nothing has waited for it."""


class Race(Fault):
    """Two warps touch the same shared memory, one of them writes, and no barrier orders them."""


class Deadlock(Fault):
    """Every warp that is left waits."""


class Unfinished(Fault):
    """A program that ends before its asynchronous copies or matmuls have."""


class NotEmulated(Exception):
    """An instruction, or a form of it, that the emulator does not know."""
