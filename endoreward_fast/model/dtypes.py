"""Names of dtypes, for the Python API and the command. This module does not import torch."""

from difflib import get_close_matches

from ..errors import EndoRewardError

FASTEST = "fastest"
"""stands for bfloat16 where the device computes in it, else float32"""
DTYPES = ("auto", FASTEST, "float32", "bfloat16", "float16", "float64")
ALIASES = {
    "bf16": "bfloat16", "fp16": "float16", "half": "float16", "f16": "float16", "fp32": "float32", "f32": "float32",
    "float": "float32", "fp64": "float64", "f64": "float64", "double": "float64",
}  # fmt: skip


def dtype_name(name: str) -> str:
    """Return the entry of DTYPES that a name such as "bf16", "torch.bfloat16" or "BFloat16" stands for.

    Raises EndoRewardError for any other name.
    """
    plain = name.strip().lower().removeprefix("torch.")
    found = ALIASES.get(plain, plain)
    if found in DTYPES:
        return found
    near = get_close_matches(plain, [*DTYPES, *ALIASES], n=1, cutoff=0.75)
    meant = f" (did you mean {near[0]}?)" if near else ""
    raise EndoRewardError(f"dtype {name!r}: expected {', '.join(DTYPES)}{meant}")
