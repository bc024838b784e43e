"""`python -m bench.harness.one CASE [PEER]`: run one case in this process, as JSON. With PEER, only its memory."""

import json
import sys

from bench.harness.cases import Case
from bench.harness.memory import extra_mib
from bench.harness.timing import run_case


def main(arguments: list[str]) -> None:
    fields = json.loads(arguments[0])
    case = Case(**fields | {name: tuple(fields[name]) for name in ("without", "only")})
    result = {"extra_mib": extra_mib(case, arguments[1])} if len(arguments) > 1 else run_case(case)
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
