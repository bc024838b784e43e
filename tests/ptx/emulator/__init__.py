"""An emulator in numpy of the PTX that Triton writes for compute capability 8.0 and 9.0. See ../README.md."""
