"""ScoreRows and `--engine ray` on a local Ray: actors, batches, rows that cannot be scored."""

import gzip
import os
import pickle
import signal
import socket
import warnings
from contextlib import nullcontext
from dataclasses import replace

import pytest

from cli_harness import put, rows_of, run
from endoreward_fast import EndoRewardError, EndoRewardModel
from endoreward_fast.command.flags.engine_flags import EngineFlags
from endoreward_fast.command.run.jobs import Finished, Job
from endoreward_fast.command.run.monitor import Monitor

ray = pytest.importorskip("ray", reason="Ray Data is not installed")
pyarrow = pytest.importorskip("pyarrow")
from endoreward_fast.command.run import on_ray as module  # noqa: E402
from endoreward_fast.command.run.on_ray import actors, on_ray  # noqa: E402
from endoreward_fast.integrations.ray import ScoreRows  # noqa: E402

ROWS = [{"id": i, "prompt": f"What is {i} + 3?", "completion": str(i + 3), "messages": None} for i in range(20)]
ROWS[7] |= {"prompt": None, "completion": None, "messages": [{"role": "user", "content": "?"}]}  # nothing to score
ROWS[9] |= {
    "prompt": None, "completion": None,
    "messages": [{"role": "user", "content": "What is 9 + 3?"}, {"role": "assistant", "content": "12"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def expected(**options):
    return EndoRewardModel.from_pretrained("pocket").score(
        [{k: v for k, v in row.items() if v is not None} for row in ROWS], **options
    )


def test_scores_do_not_depend_on_the_distribution_of_rows(cluster):
    options = {"reduction": "mean"}
    found = ray.data.from_items(ROWS).map_batches(
        ScoreRows, fn_constructor_kwargs={"model": "pocket"} | options, batch_format="pyarrow", batch_size=6,
        compute=ray.data.ActorPoolStrategy(size=2),
    ).take_all()  # fmt: skip
    by_id = {row["id"]: row for row in found}
    assert len(by_id) == len(found) == len(ROWS)
    for row, wanted in zip(ROWS, expected(**options), strict=True):
        ours = by_id[row["id"]]
        assert (ours["prompt"], ours["tokens"], ours["error"]) == (row["prompt"], wanted.num_tokens, wanted.error)
        assert ours["score"] == (None if wanted.score is None else pytest.approx(wanted.score, abs=1e-4))
    assert by_id[7]["score"] is None and "wanted the assistant's, found 'user'" in by_id[7]["error"]


def test_bad_input_raises_one_line():
    with pytest.raises(EndoRewardError, match="alpha"):
        ScoreRows("pocket", alpha=-1)
    with pytest.raises(EndoRewardError, match=r"nowhere.*no such folder"):
        ScoreRows("./nowhere")
    score = ScoreRows("pocket")
    with pytest.raises(
        EndoRewardError, match=r"a batch is a dict, expected .* map_batches\(ScoreRows, batch_format='pyarrow'\)"
    ):
        score({"prompt": ["a"]})
    with pytest.raises(EndoRewardError, match="has a column 'error', which ScoreRows adds"):
        score(pyarrow.table({"prompt": ["a"], "completion": ["b"], "error": ["c"]}))
    with pytest.raises(EndoRewardError, match="no option 'unknown'"):
        ScoreRows("pocket", unknown=1)


# ---------------------------------------------------------------- an actor that dies
def test_a_killed_actor_is_replaced_and_no_row_is_lost(cluster, tmp_path):
    class Mortal(ScoreRows):  # a local class, so that Ray pickles it by value
        """Kill the actor's process at its second batch, once."""

        def __init__(self, model, killed):
            super().__init__(model)
            self.killed, self.batches = killed, 0

        def __call__(self, batch):
            self.batches += 1
            if self.batches == 2 and not os.path.exists(self.killed):
                open(self.killed, "x").close()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    killed = tmp_path / "killed"
    found = ray.data.from_items(ROWS, override_num_blocks=5).map_batches(
        Mortal, fn_constructor_kwargs={"model": "pocket", "killed": str(killed)}, batch_format="pyarrow", batch_size=4,
        compute=ray.data.ActorPoolStrategy(size=1),
    ).take_all()  # fmt: skip
    assert killed.exists()
    assert sorted(row["id"] for row in found) == list(range(20))
    wanted = [score.score for score in expected()]
    assert all(row["score"] == (wanted[row["id"]] and pytest.approx(wanted[row["id"]], abs=1e-4)) for row in found)


def test_rows_that_kill_every_actor_end_the_run(cluster, monkeypatch):
    class Deadly(Job):
        def load(self):
            return None

        def finish(self, number, items, scorer):
            if items == ["deadly"]:
                os.kill(os.getpid(), signal.SIGKILL)
            return Finished(number, [(items[0], items[0], None)])

    monkeypatch.setattr("endoreward_fast.command.run.on_ray.RETRIES", 1)
    windows, lines = iter([["a"], ["b"], ["deadly"], ["c"]]), []
    flags = EngineFlags(engine="ray", actors=1)
    with pytest.raises(EndoRewardError, match="an actor died 2 times over the same rows: "):
        on_ray(Deadly("score", flags), flags)(windows, lines.append, Monitor(quiet=True))
    assert set(lines) <= {"a", "b", "c"}  # the rows finished by then, on both sides of the deadly one


# ---------------------------------------------------------------- the command
def test_the_output_equals_that_of_one_process(cluster, monkeypatch, tmp_path):
    rows = [{k: v for k, v in row.items() if v is not None} for row in ROWS] * 4
    source = put(tmp_path, *rows[:30], "not json", *rows[30:])
    flags = ("score", source, "--max-tokens-per-batch", "64", "-q", "-o")
    here, there = tmp_path / "here.jsonl", tmp_path / "there.jsonl"
    run(*flags, here, code=2)
    said = run(*flags, there, "--engine", "ray", "--actors", "2", code=2).stderr
    for wanted, found in zip(rows_of(here.read_text()), rows_of(there.read_text()), strict=True):
        score = wanted.pop("score")
        assert found.pop("score") == (score if score is None else pytest.approx(score, abs=1e-4))
        assert found == wanted
    assert "endoreward: line 31: not valid JSON" in said
    whole = there.read_text()
    there.write_text("".join(whole.splitlines(keepends=True)[:50]) + '{"id"')
    run(*flags, there, "--engine", "ray", "--resume", code=2)
    assert there.read_text().count("\n") == whole.count("\n") == 81


def test_ray_is_not_started_if_no_rows_are_left(monkeypatch, tmp_path):
    flags = ("score", put(tmp_path, *ROWS[:3]), "-q", "-o", tmp_path / "out.jsonl")
    run(*flags)
    monkeypatch.setattr(ray, "init", None)
    monkeypatch.setattr(ray, "nodes", None)
    run(*flags, "--engine", "ray", "--resume")  # the engine is not part of the configuration that --resume compares
    assert len(rows_of((tmp_path / "out.jsonl").read_text())) == 3


@pytest.mark.parametrize("interrupted", [False, True])
def test_rows_stay_in_order_whichever_window_finishes_first(cluster, monkeypatch, interrupted):
    """The first window finishes last. Ctrl-C before that keeps the finished windows behind it."""

    def finished(packed, job, **size):
        for number in (2, 1, 3):
            yield Finished(number, [(f"{pickle.loads(packed[number]['items'])}", "", None)]).to_json()
        if interrupted:
            raise KeyboardInterrupt
        yield Finished(0, [("first", "", None)]).to_json()

    monkeypatch.setattr(module, "_finished", finished)
    flags, lines = EngineFlags(engine="ray"), []
    engine = on_ray(Job("score", flags), flags)
    with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
        engine(iter([["a"], ["b"], ["c"], ["d"]]), lines.append, Monitor(quiet=True))
    assert lines == [*["first"] * (not interrupted), "['b']", "['c']", "['d']"]


def test_finished_rows_are_written_before_an_error_stops_the_command(cluster, tmp_path):
    rows = [{k: v for k, v in row.items() if v is not None} for row in ROWS]
    out = tmp_path / "out.jsonl"
    ray_flags = ("--engine", "ray", "--max-tokens-per-batch", "1", "-q", "-o", out)
    said = run("score", put(tmp_path, *rows), "--strict", *ray_flags, code=2).stderr
    assert said.startswith("endoreward: line 8: ") and "--strict: stopped here" in said
    assert [row["id"] for row in rows_of(out.read_text())] == list(range(7))
    elsewhere = ("--model", "./nowhere", "--overwrite")
    assert "no such folder" in run("score", put(tmp_path, *rows), *elsewhere, *ray_flags, code=2).stderr


def test_a_truncated_file_is_reported_after_its_rows(cluster, tmp_path):
    torn, out = tmp_path / "torn.jsonl.gz", tmp_path / "out.jsonl"
    whole = put(tmp_path, *({"id": i, "prompt": "p", "completion": "c" * 500} for i in range(40))).read_bytes()
    torn.write_bytes(gzip.compress(whole, 0)[:-9000])
    flags = ("--engine", "ray", "--max-tokens-per-batch", "64", "-q", "-o", out)
    assert "to its end" in run("score", torn, *flags, code=2).stderr
    assert [row["id"] for row in rows_of(out.read_text())] == list(range(len(rows_of(out.read_text())))) != []


def test_there_are_as_many_actors_as_fit():
    plain = EngineFlags(engine="ray")
    one = {"num_gpus": 1.0, "num_cpus": 1.0}
    big, small, head = {"CPU": 64.0, "GPU": 8.0}, {"CPU": 16.0, "GPU": 1.0}, {"CPU": 0.0}
    cores = {"CPU": 32.0}
    assert actors(plain, [big]) == {"actors": 8, **one}
    assert actors(plain, [head, big, small]) == {"actors": 9, **one}
    assert actors(plain, [cores] * 3) == {"actors": 3, "num_gpus": 0.0, "num_cpus": 1.0}
    assert actors(plain, [head, cores])["actors"] == 1  # no actor on a machine without cores
    for each, count in ((0.5, 18), (0.1, 90), (0.2, 45), (0.6, 9), (2.0, 4)):
        assert actors(replace(plain, gpus_per_actor=each, cpus_per_actor=0.1), [big, small])["actors"] == count
    assert actors(replace(plain, actors=2), [{"CPU": 4.0, "GPU": 8.0}]) == {"actors": 2, **one}
    for flags, nodes, said in (
        (replace(plain, actors=9), [big], "--actors 9 with --gpus-per-actor 1 and --cpus-per-actor 1: .* room for 8"),
        (replace(plain, cpus_per_actor=16.0), [big], "--actors 8 with .* --cpus-per-actor 16: .* room for 4"),
        (replace(plain, gpus_per_actor=2.0, actors=1), [small, small], "room for 0"),  # no machine has two
        (replace(plain, cpus_per_actor=64.0), [cores, cores], "--actors 1 .* room for 0"),
    ):
        with pytest.raises(EndoRewardError, match=said):
            actors(flags, nodes)


@pytest.mark.parametrize("kind", [ConnectionError, ValueError, RuntimeError])
def test_a_missing_cluster_raises_one_line(monkeypatch, tmp_path, kind):
    def absent(**options):
        raise kind("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", absent)
    said = run("score", put(tmp_path, *ROWS[:2]), "--engine", "ray", "-q", code=2).stderr
    assert said == "endoreward: --engine ray: Could not find any running Ray instance: check RAY_ADDRESS\n"


def test_an_address_without_a_server_is_reported_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", None)  # ray.init would retry for minutes
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        module._look_for(address)
    for given in (address, f"ray://{address}"):
        monkeypatch.setenv("RAY_ADDRESS", given)
        said = run("score", put(tmp_path, *ROWS[:2]), "--engine", "ray", "-q", code=2).stderr
        assert said == f"endoreward: --engine ray: nothing answers at {given} (Connection refused): check RAY_ADDRESS\n"
    for other in ("", "auto", "local", "somewhere"):
        module._look_for(other)


def test_warnings_from_loading_an_actors_model_arrive_with_its_rows():
    class Warned(Job):
        def load(self):
            warnings.warn("no usable tokenizer", stacklevel=2)

        def finish(self, number, items, scorer):
            return Finished(number, notes=["halved"])

    actor = module.ScoreWindow(Warned("score", EngineFlags()))
    found = Finished.from_json(actor({"number": 4, "items": pickle.dumps([])})["finished"])
    assert (found.number, found.notes) == (4, ["no usable tokenizer", "halved"])


def test_only_a_ray_that_the_command_started_is_shut_down(cluster, monkeypatch):
    """The command shuts down a Ray that it started, and leaves any other one running."""
    ended = []
    monkeypatch.setattr(ray, "shutdown", lambda: ended.append(True))
    monkeypatch.setattr(module, "_finished", lambda *args, **options: iter(()))
    flags = EngineFlags(engine="ray")
    on_ray(Job("score", flags), flags)(iter([["a"]]), print, Monitor(quiet=True))
    assert ended == []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **options: None)
    on_ray(Job("score", flags), flags)(iter([["a"]]), print, Monitor(quiet=True))
    assert ended == [True]


def test_rays_output_does_not_mix_with_the_rows(cluster, monkeypatch, tmp_path):
    """Ray reports a dead actor on standard output."""
    finished = module._finished

    def chatty(*args, **options):
        for window in finished(*args, **options):
            print("(raylet) a worker died")
            yield window

    monkeypatch.setattr(module, "_finished", chatty)
    result = run("score", put(tmp_path, *ROWS[:2]), "--engine", "ray", "-q")
    assert len(rows_of(result.stdout)) == 2 and "(raylet) a worker died" in result.stderr


def test_invalid_flags_are_reported_at_once(tmp_path):
    source = put(tmp_path, *ROWS[:2])
    for flags, said in (
        (("--engine", "spark"), "--engine must be local, ray or http, got 'spark'"),
        (("--actors", "2"), "need --engine ray"),
        (("--engine", "ray", "--actors", "0"), "--actors must be 1 or more"),
        (("--engine", "ray", "--gpus-per-actor", "-1"), "--gpus-per-actor must be 0 or more, got -1.0"),
        (("--engine", "ray", "--cpus-per-actor", "1.5"), "--cpus-per-actor must be a whole number if it is above 1"),
    ):
        assert said in run("score", source, *flags, code=2).stderr
