"""Compile every kernel for every architecture without a GPU, and report what the machine code shows.

stand_in   makes CPU tensors pass for tensors on a GPU, and records launches instead of running them
calls      the public calls whose launches are reported
compile    one row of the report from one launch
code       reads SASS and AMD assembly
page       the report as Markdown
gates      the requirements that `make kernel-report` checks

A launch is recorded from the public function that makes it. Triton's own binder decides types, constants and
divisibility, so the report compiles exactly what a GPU would run.
"""

from .archs import ARCHS, DTYPES, RESULTS, sources

__all__ = ["ARCHS", "DTYPES", "RESULTS", "sources"]
