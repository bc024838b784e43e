"""What to do about what `endoreward doctor` found: one line for each thing that is missing, wrong or slow."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .checks import Checked
from .stored import Stored

SLOW = 1.3
"""times torch.mm. Storing all logits and reading them again takes about 1.3 to 1.8. Three quarters of the
rounds must take longer: otherwise it may be noise"""


def advice(facts: Mapping[str, Any], results: Sequence[Checked], tuned: Sequence[Stored]) -> Iterator[str]:
    """Yield lines of advice, the most urgent first."""
    yield from _of_results(results)
    for name, needed in facts["unmet"].items():
        version = facts["versions"].get(name)
        fault = f"{name} {version} is not supported" if version else f"{name} is not installed"
        yield f"{fault}: pip install '{name}{needed}'"
    if facts["gpu_without_torch"]:
        yield "a GPU's driver is loaded, and torch sees no GPU: install a build of torch for it (docs/install.md)"
    if facts["environment"].get("TRITON_INTERPRET") == "1":
        yield "TRITON_INTERPRET=1 makes kernels run in Triton's interpreter, for tests: unset it"
    for name, cache in facts["caches"].items():
        if not cache["writable"]:
            yield f"{cache['folder']} ({name}) cannot be written: name another folder in {cache['variable']}"
    if facts["compiler"] is None:
        yield "no C++ compiler: impl='compiled' needs one on the CPU, and Triton needs one on a GPU (apt install g++)"
    for item in tuned:
        if item.entry is None:
            yield f"{item.path.name} is not read ({item.unused}): delete it"
        elif item.unused:
            yield f"the tuning of {item.entry.head} is not used ({item.unused}): run `endoreward tune` again"


def _of_results(results: Sequence[Checked]) -> Iterator[str]:
    for result in results:
        name = f"{result.subject.name} on {result.subject.device}"
        if result.failed:
            yield f"{name} fails: report it with this output, and use another impl meanwhile"
        elif result.problems:
            yield f"{name} does not run; only tests need it"
        elif result.ratios is not None and result.ratios[0] > SLOW:
            median = result.ratios[1]
            yield f"{name} takes {median:.2f} times torch.mm: `endoreward tune --model NAME` may find a faster way"
