"""`endoreward doctor`: what runs on this machine, whether its numbers are right, and how fast it is."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from typing import Any

from ..model.devices import fastest_dtype
from ..tuning import checks, facts, stored
from ..tuning.advice import advice
from .run.monitor import say_now
from .tune import described

WIDTH = 26
"""columns of names"""
ABOUT = """\
largest error against float64
Time as a ratio to torch.mm: median (quartiles). On a CPU it is the processor's time on one thread"""


def examine(*, as_json: bool) -> bool:
    """Print what was found. Returns whether everything that should run gives right numbers."""
    found = gathered()
    if not as_json:
        say_now(_known(found))
        say_now(f"\nNumbers: {ABOUT}\n")
    results = []
    for result in checks.checked(checks.subjects(), fastest_dtype):
        results.append(result)
        if not as_json:
            say_now(_result(result))
    tuned = list(stored.stored())
    lines = list(advice(found, results, tuned))
    if as_json:
        about = {"checks": [r.to_json() for r in results], "tuned": [_tuned(t) for t in tuned], "advice": lines}
        say_now(json.dumps({**found, **about}, indent=1) + "\n")
    else:
        say_now("\nTuned heads\n")
        say_now(textwrap.indent("".join(map(described, tuned)) or "none: auto follows its rule\n", "  "))
        say_now("\nAdvice\n")
        say_now("".join(f"  - {line}\n" for line in lines) or "  nothing to do\n")
    return not any(result.failed for result in results)


def gathered() -> dict[str, Any]:
    """Return what is known without running anything."""
    return {
        "versions": facts.versions(),
        "unmet": facts.unmet(),
        "extras": facts.extras(),
        "devices": facts.devices(),
        "gpu_without_torch": facts.gpu_without_torch(),
        "compiler": facts.compiler(),
        "caches": facts.caches(),
        "environment": facts.environment(),
    }


def _known(found: Mapping[str, Any]) -> str:
    unmet = found["unmet"]
    versions = {
        name: (version or "not installed") + (f"  needs {unmet[name]}" if name in unmet else "")
        for name, version in found["versions"].items()
    }
    compiler = {"C++ compiler": found["compiler"] or "none"}
    extras = {name: _installed(packages) for name, packages in found["extras"].items()}
    devices = found["devices"] if len(found["devices"]) > 1 else {**found["devices"], "GPU": "none that torch sees"}
    caches = {
        name: f"{cache['folder']}, {'can be written' if cache['writable'] else 'CANNOT BE WRITTEN'}"
        for name, cache in found["caches"].items()
    }
    sections = {"Versions": versions | compiler, "Extras": extras, "Devices": devices, "Caches": caches}
    if found["environment"]:
        sections["Environment"] = found["environment"]
    return "\n".join(f"{title}\n{_lines(lines)}" for title, lines in sections.items())


def _lines(pairs: Mapping[str, str]) -> str:
    return "".join(f"  {name:<{WIDTH}}{value}\n" for name, value in pairs.items())


def _installed(packages: Mapping[str, str | None]) -> str:
    return ", ".join(f"{name} {version}" if version else f"no {name}" for name, version in packages.items())


def _result(result: checks.Checked) -> str:
    subject = result.subject
    name = f"{subject.name}, {subject.device}"
    if subject.obstacle:
        return _lines({name: f"not here: {subject.obstacle}"})
    if result.problems:
        problems = "; ".join(f"{dtype}: {problem}" for dtype, problem in result.problems.items())
        return _lines({name: f"{'FAILS' if result.failed else 'does not run'}: {problems}"})
    errors = ", ".join(f"{d} {error:.0e}" for d, error in result.errors.items() if d != checks.LARGE_HEAD)
    rate = ""
    if result.ratios is not None and result.matmul is not None:
        low, median, high = result.ratios
        spread = f"{median:.2f} ({low:.2f}-{high:.2f})"
        rate = f"time {spread}, with torch.mm at {result.matmul:.3g} TFLOP/s ({result.timed})"
    return _lines({name: f"right: {errors}"} | ({"": rate} if rate else {}))


def _tuned(item: stored.Stored) -> dict[str, Any]:
    head = None if item.entry is None else str(item.entry.head)
    impl = None if item.entry is None else item.entry.choice.impl
    return {"file": item.path.name, "head": head, "impl": impl, "ratio_to_matmul": item.ratio, "unused": item.unused}
