"""A process that hangs, dies or says nonsense costs its own requests, and nothing is left of it."""

import os
import sys
import time
from pathlib import Path

import pytest

from endoreward_fast.tuning.child import ask

READ = "import json, os, signal, sys, time; requests = json.load(sys.stdin); "


def runs(pid):
    try:
        return "zombie" not in Path("/proc", pid, "status").read_text()
    except OSError:
        return False


def run(code, requests=({"a": 1},), limit=20.0, env=None):
    return ask(requests, limit, command=(sys.executable, "-S", "-c", READ + code), env=env)


def test_answers_come_back_in_order():
    code = "print('a note'); print(json.dumps([{'twice': 2 * r['a']} for r in requests]))"
    assert run(code, [{"a": 1}, {"a": 4}]) == [{"twice": 2}, {"twice": 8}]


def test_environment_variables_reach_the_process():
    assert run("print(json.dumps([os.environ['THIS']]))", env={"THIS": "that"}) == ["that"]


@pytest.mark.parametrize(
    ("code", "problem"),
    [
        ("os.kill(os.getpid(), 9)", "ended by SIGKILL"),
        ("os.abort()", "ended by SIGABRT"),
        ("raise MemoryError('no room')", "exit code 1: MemoryError: no room"),
        ("sys.exit(3)", "exit code 3: "),
        ("pass", "it printed no answer: ''"),
        ("print('{}')", "it printed no answer: '{}'"),
        ("print('[1, 2]')", "it printed no answer: '[1, 2]'"),
        ("print('[oops')", "it printed no answer: '[oops'"),
    ],
)
def test_a_process_that_fails_is_a_problem_of_every_request(code, problem):
    assert run(code) == [{"problem": problem}]
    assert run("os.abort()", [{}, {}]) == [{"problem": "ended by SIGABRT"}] * 2


def test_a_process_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    pids = tmp_path / "pids"
    code = (
        "import subprocess; inner = subprocess.Popen(['sleep', '600']); "
        f"open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{inner.pid}}'); signal.signal(15, signal.SIG_IGN); "
        "time.sleep(600)"
    )
    start = time.monotonic()
    assert run(code, limit=1.0) == [{"problem": "no answer within 1 s"}]
    while alive := [pid for pid in pids.read_text().split() if runs(pid)]:
        assert time.monotonic() - start < 20, alive
        time.sleep(0.05)


def test_the_process_gets_a_limit_by_which_it_ends_itself():
    """If the tuner is killed, nobody else would."""
    assert run("print(json.dumps([int(sys.argv[1])]))", limit=7.5) == [18]
    assert run("signal.alarm(1); time.sleep(600)") == [{"problem": "ended by SIGALRM"}]


def test_measure_sets_that_limit():
    found = ask([{}], 15.0, command=(sys.executable, "-c", "import sys; print(sys.argv)"), env={"X": os.sep})
    assert "'25'" in found[0]["problem"]
