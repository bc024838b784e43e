"""An application of Ray Serve on a local Ray: rewards, a killed replica, cancelled requests, arguments."""

import asyncio
import json
import os
import signal
import socket
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import yaml

from endoreward_fast import EndoRewardError, EndoRewardModel

ray = pytest.importorskip("ray", reason="Ray is not installed")
serve = pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
urllib3 = pytest.importorskip("urllib3")
from ray.exceptions import ActorDiedError, ActorUnavailableError  # noqa: E402
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as as_serve_run  # noqa: E402
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError  # noqa: E402
from ray.serve.schema import ServeDeploySchema  # noqa: E402

from endoreward_fast.integrations.ray_serve import HAPROXY, app  # noqa: E402
from endoreward_fast.integrations.ray_serve_arguments import sorted_arguments  # noqa: E402
from endoreward_fast.integrations.ray_serve_deployments import INGRESS, MODEL, Model, Replicas, build, web_app  # noqa: E402
from endoreward_fast.serving.answers import Answer  # noqa: E402
from endoreward_fast.serving.limits import TOKEN as VARIABLE  # noqa: E402
from pages import ROOT, blocks, commands  # noqa: E402

TOKEN = "a-token-of-the-tests"
ROWS = [[{"prompt": f"What is {i} + 3?", "completions": [str(i + 3), "no"]}] for i in range(24)]


def mortal(folder):
    """A class of replicas, made here so that Ray pickles it by value."""

    class Mortal(Model):
        """A replica that kills itself, once, when a file says so, and one whose answer takes long."""

        async def answer(self, path, body):
            if body and body.get("model") == "slow":
                open(f"{folder}/begun", "x").close()
                try:
                    await asyncio.sleep(60)
                except asyncio.CancelledError:
                    open(f"{folder}/cancelled", "x").close()
                    raise
            try:
                os.unlink(f"{folder}/deadly")
            except FileNotFoundError:
                return await super().answer(path, body)
            await asyncio.sleep(0.2)  # other requests arrive
            os.kill(os.getpid(), signal.SIGKILL)

    return Mortal


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ray_serve")


@pytest.fixture(scope="module")
def url(folder):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    settings, of_ray = sorted_arguments(
        {
            "model": "pocket",
            "num_replicas": 2,
            "ray_actor_options": {"num_cpus": 0.1},
            "graceful_shutdown_wait_loop_s": 0.1,
        }
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
            serve.start(http_options={"port": port})
            serve.run(build(settings, TOKEN.encode(), of_ray, mortal(str(folder))), name="rewards")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def pool():
    with urllib3.PoolManager(maxsize=24, retries=False) as pool:
        yield pool


def post(pool, url, body, token=TOKEN, **options):
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    return pool.request("POST", f"{url}/v1/rewards", json=body, headers=headers, **options)


def wait_for(path):
    until = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < until, f"no {path.name}"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def wanted():
    scorer = EndoRewardModel.from_pretrained("pocket")
    pairs = [{"prompt": row["prompt"], "completion": c} for (row,) in ROWS for c in row["completions"]]
    scores = iter(scorer.score(pairs))
    return [[next(scores).score, next(scores).score] for _ in ROWS]


def test_rewards_are_those_of_a_loaded_model(url, pool, wanted):
    assert [pool.request("GET", f"{url}/{path}").status for path in ("health", "ready")] == [200, 200]
    found = post(pool, url, {"rows": [row for rows in ROWS for row in rows]})
    assert found.status == 200
    for answer, scores in zip(found.json()["rows"], wanted, strict=True):
        assert answer["score"] == pytest.approx(scores, abs=1e-4)


def test_no_request_is_lost_if_a_replica_is_killed(url, pool, folder, wanted):
    """The replica has more than one request when it gets SIGKILL, and the other replica answers them."""
    with ThreadPoolExecutor(len(ROWS)) as threads:
        (folder / "deadly").touch()
        found = list(threads.map(lambda rows: post(pool, url, {"rows": rows}), ROWS))
    assert not (folder / "deadly").exists()
    for answer, scores in zip(found, wanted, strict=True):
        assert answer.status == 200, answer.data
        assert answer.json()["rows"][0]["score"] == pytest.approx(scores, abs=1e-4)


def test_a_client_that_leaves_cancels_its_request_at_the_replica(url, pool, folder):
    with pytest.raises(urllib3.exceptions.ReadTimeoutError):
        post(pool, url, {"rows": ROWS[0], "model": "slow"}, timeout=1)
    wait_for(folder / "begun")
    wait_for(folder / "cancelled")


def test_a_token_is_asked_for_and_shown_nowhere(url, pool):
    for token in (None, "another-token-of-tests"):
        assert post(pool, url, {"rows": ROWS[0]}, token).status == 401
    details = ray.get(serve.context._get_global_client()._controller.get_serve_instance_details.remote())
    assert INGRESS in str(details) and TOKEN not in str(details)


# ---------------------------------------------------------------- arguments
def deployed(**args):
    """The deployments as `serve run` builds them: (of the ingress, of the model)."""
    ingress = as_serve_run(app, args)._bound_deployment
    return ingress, ingress.init_args[0]._bound_deployment


def test_arguments_of_ray_pass_through(monkeypatch):
    monkeypatch.setenv(VARIABLE, TOKEN)
    ingress, model = deployed(
        model="pocket", max_queued_requests="7", ray_actor_options='{"num_gpus": 0.5}', ingress_replicas="2",
        max_rows="5", alpha="0.5",
        autoscaling_config='{"min_replicas": 0, "max_replicas": 3, "target_ongoing_requests": 16}',
    )  # fmt: skip
    scaling = model._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (0, 3, 16)
    assert (model.max_queued_requests, model.max_ongoing_requests) == (7, 512)
    assert model.ray_actor_options["num_gpus"] == 0.5 and "num_gpus" not in ingress.ray_actor_options
    assert ingress.num_replicas == 2 and model.init_args[0].limits.rows == 5
    assert model.init_args[0].options == {"alpha": 0.5}
    assert deployed(model="pocket", num_replicas=3, max_ongoing_requests=9)[1].max_ongoing_requests == 9


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({}, "no model: give model=NAME"),
        ({"modl": "pocket"}, "no option 'modl': did you mean 'model'?"),
        ({"token": "secret-of-a-user"}, "dashboard shows the arguments .* use token_file=FILE"),
        ({"model": 3}, "model: expected text, got 3"),
        ({"max_rows": "many"}, "max_rows: expected a whole number above 0, got 'many'"),
        ({"max_rows": True}, "max_rows: expected a whole number above 0, got True"),
        ({"alpha": "-1"}, "alpha"),
        ({"timeout": "-1"}, "timeout: expected a number above 0, got -1"),
        ({"trust_remote_code": "yes"}, "trust_remote_code: expected true or false, got 'yes'"),
        ({"num_replicas": "x"}, "Ray refuses an argument: num_replicas: Input should be a valid integer"),
        ({"ray_actor_options": '{"num_gpu": 1}'}, "Ray refuses an argument: Specifying 'num_gpu' in ray_actor_options"),
        ({"autoscaling_config": {"max_replica": 1}}, "no option 'max_replica': did you mean 'max_replicas'?"),
        ({"num_replicas": 2, "autoscaling_config": {}}, "Manually setting num_replicas is not allowed"),
        ({"token_file": "nowhere"}, "nowhere: No such file"),
    ],
)
def test_bad_arguments_raise_one_line(args, said):
    named = args if not args or "modl" in args else {"model": "pocket", "local": True, **args}
    with pytest.raises(EndoRewardError, match=said) as raised:
        as_serve_run(app, named)
    assert "\n" not in str(raised.value) and "secret" not in str(raised.value)


def test_a_token_or_local_is_required(monkeypatch, tmp_path):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(EndoRewardError, match=r"set ENDOREWARD_TOKEN, .* local=true serves this"):
        app({"model": "pocket"})
    deployed(model="pocket", local="true")
    file = tmp_path / "token"
    file.write_text(TOKEN)
    file.chmod(0o600)
    deployed(model="pocket", token_file=str(file))


def test_the_documented_applications_are_accepted(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, TOKEN)
    page, built = ROOT / "docs" / "distributed.md", []
    for block in blocks(page, "sh"):
        for _, words in commands(block.text):
            if words[:2] == ["serve", "run"]:
                built.append(deployed(**dict(word.split("=", 1) for word in words[3:])))
    monkeypatch.setattr(serve, "run", lambda built_, name: built.append(built_))
    for block in blocks(page, "py"):
        if "ray_serve" in block.text:
            exec(block.text, {})
    (config,) = (ServeDeploySchema.model_validate(yaml.safe_load(block.text)) for block in blocks(page, "yaml"))
    (application,) = config.applications
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "token").chmod(0o600)
    names = {deployment.name for deployment in deployed(**application.args | {"token_file": str(tmp_path / "token")})}
    assert {deployment.name for deployment in application.deployments} < names == {MODEL, INGRESS}
    assert len(built) == 2 and ServeDeploySchema(applications=[]).http_options.host == "0.0.0.0"  # as the page says


# ---------------------------------------------------------------- without a Ray
class Handle:
    """A deployment's handle whose replicas do what a list says: raise an error, or answer."""

    def __init__(self, *outcomes):
        self.outcomes, self.cancelled, self.answer = list(outcomes), 0, self

    def remote(self, path, body):
        outcome = self.outcomes.pop(0)

        async def response():
            if isinstance(outcome, BaseException):
                raise outcome
            return await outcome if asyncio.iscoroutine(outcome) else outcome

        future = SimpleNamespace(cancel=lambda: setattr(self, "cancelled", self.cancelled + 1))
        return Awaited(response(), future.cancel)


class Awaited:
    def __init__(self, response, cancel):
        self.response, self.cancel = response, cancel

    def __await__(self):
        return self.response.__await__()


def asked(*outcomes, path="/v1/rewards"):
    handle = Handle(*outcomes)
    answer = asyncio.run(Replicas(handle, 60, pause=0.001).answer(path, {}))
    return answer, len(outcomes) - len(handle.outcomes)


def lost():
    return ActorUnavailableError("the node is gone", None)


def test_a_lost_request_is_sent_to_other_replicas_a_few_times():
    good = Answer(200, {"rows": []})
    assert asked(ActorDiedError(), lost(), lost(), good) == (good, 4)
    answer, tries = asked(*[ActorDiedError()] * 5)
    assert (answer.status, tries) == (503, 4) and answer.headers["Retry-After"] == "10"
    assert "4 replicas were lost" in answer.content["error"]
    with pytest.raises(KeyError):  # a bug of a replica is not a lost replica
        asked(KeyError("bug"), good)


def test_a_full_replica_is_left_for_another_one_once():
    full, good = Answer(429, {"error": "full"}, {"Retry-After": "3"}), Answer(200, {})
    assert asked(full, good) == (good, 2)
    assert asked(full, full, good) == (full, 2)
    refused = Answer(422, {"error": "no score"})
    assert asked(refused, good) == (refused, 1)
    ending = Answer(503, {"error": "the server scores no more"}, {"Retry-After": "1"})  # until Ray replaces it
    assert asked(ending, good) == (good, 2)
    assert asked(ending, ending, good) == (ending, 2)


def test_a_full_queue_of_ray_is_answered_in_the_way_of_the_path():
    """verl ends the run at a 4xx."""
    for path, status in (("/v1/rewards", 429), ("/classify", 503)):
        answer, _ = asked(BackPressureError(7, 7, retry_after_s=5.0), path=path)
        assert (answer.status, answer.headers) == (status, {"Retry-After": "5"}) and "ask again" in answer.content[
            "error"
        ]
    assert asked(DeploymentUnavailableError(None))[0].status == 503


def test_a_cancelled_request_is_cancelled_at_its_replica():
    async def leave():
        handle = Handle(asyncio.sleep(60))
        task = asyncio.create_task(Replicas(handle, 60).answer("/v1/rewards", {}))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return handle.cancelled

    assert asyncio.run(leave()) == 1


def test_a_replica_that_scores_no_more_is_unhealthy():
    model = Model.__new__(Model)
    for alive in (True, False):
        model._service = SimpleNamespace(alive=lambda alive=alive: alive, close=lambda: None)
        with nullcontext() if alive else pytest.raises(RuntimeError, match="the thread that scores has ended"):
            model.check_health()


def test_a_request_that_takes_too_long_is_cancelled_at_its_replica():
    handle = Handle(asyncio.sleep(60))
    answer = asyncio.run(Replicas(handle, 0.05).answer("/v1/rewards", {}))
    assert (answer.status, handle.cancelled) == (504, 1) and "not scored within 0.05 s" in answer.content["error"]


@pytest.mark.parametrize(
    ("client", "server", "headers", "status"),
    [
        ("127.0.0.1", "127.0.0.1", [], 200),
        ("::1", "::1", [], 200),
        ("10.0.0.7", "10.0.0.1", [], 403),
        ("127.0.0.1", "10.0.0.1", [], 403),
        ("127.0.0.1", "127.0.0.1", [(b"x-forwarded-for", b"10.0.0.7")], 403),
        (None, "127.0.0.1", [], 403),
    ],
)
def test_without_a_token_other_machines_are_refused(client, server, headers, status):
    sent = []

    async def send(message):
        sent.append(message)

    async def receive():
        return {"type": "http.request", "body": b""}

    settings, _ = sorted_arguments({"model": "pocket", "local": True})
    scope = {
        "type": "http", "method": "GET", "path": "/health", "query_string": b"", "headers": headers,
        "client": client and (client, 1), "server": (server, 80),
    }  # fmt: skip
    asyncio.run(web_app(Handle(), settings, None)(scope, receive, send))
    assert sent[0]["status"] == status
    if status == 403:
        assert "set ENDOREWARD_TOKEN" in json.loads(sent[1]["body"])["error"]
    sent.clear()
    asyncio.run(web_app(Handle(), settings, TOKEN.encode())(scope, receive, send))
    assert sent[0]["status"] == 200


def test_local_is_refused_behind_a_proxy_that_hides_clients(monkeypatch):
    monkeypatch.setenv(HAPROXY, "1")
    with pytest.raises(EndoRewardError, match="local=true cannot work with RAY_SERVE_ENABLE_HA_PROXY"):
        app({"model": "pocket", "local": True})
