"""Trainers' own HTTP clients ask the server: OpenRLHF's in `make test`, slime's and verl's where they are installed.

tests/harness/reward_clients.py records what each client sends, reads and asks again. The server's rewards are compared
with an oracle that reads full logits in this process.
"""

import asyncio
import contextlib
import json
import shutil
import subprocess

import pytest
import torch
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from transformers import AutoTokenizer

from endoreward_fast import EndoRewardModel
from endoreward_fast.model.checkpoint import pocket_path
from endoreward_fast.scoring.sampled import UNSCORED
from endoreward_fast.serving.dialects import DIALECTS
from pages import ROOT, blocks, commands
from reward_clients import PATHS, VLLM, VLLM_AROUND, Failed, ask, opened, run, sources
from served import command
from tiny_models import sampled_rewards

TOKEN = "a-token-of-this-test"
CHATS = [[{"role": "user", "content": "What is 2 + 3?"}], [{"role": "user", "content": "Name a colour."}]]
EACH = pytest.mark.parametrize(("client", "real"), sources())
OPENRLHF, SLIME = (
    pytest.mark.parametrize(("client", "real"), [one for one in sources() if one.values[0] == name])
    for name in ("openrlhf", "slime")
)


@pytest.fixture(scope="module")
def pocket():
    return EndoRewardModel.from_pretrained("pocket")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(str(pocket_path()))


@pytest.fixture(scope="module")
def port():
    with command("--model", str(pocket_path()), ENDOREWARD_TOKEN=TOKEN) as (_, asker):
        asker.wait_until_ready()
        yield int(asker.url.rpartition(":")[2])


@pytest.fixture(scope="module")
def server(port):
    """The server's address as trainers are given it: their clients can send no header."""
    return f"http://any:{TOKEN}@127.0.0.1:{port}"


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def oracle(pocket, tokenizer, chat, response_ids, limit=None):
    prompt = ids(tokenizer, opened(tokenizer, chat))
    return sampled_rewards(pocket, prompt[-limit:] if limit else prompt, response_ids, pocket.eos_ids).sum().item()


@contextlib.asynccontextmanager
async def relay(port, refusals=()):
    """Yield (address of a relay to the server, requests so far). It answers the first requests with these statuses."""
    seen, left = [], list(refusals)

    async def pass_on(request):
        seen.append(request.path)
        if left:
            return web.json_response({"error": "the queue is full"}, status=left.pop(0), headers={"Retry-After": "1"})
        headers = {name: request.headers[name] for name in ("Authorization", "Content-Type")}
        async with (
            ClientSession() as session,
            session.post(
                f"http://127.0.0.1:{port}{request.path}", data=await request.read(), headers=headers
            ) as answer,
        ):
            return web.Response(body=await answer.read(), status=answer.status, content_type=answer.content_type)

    app = web.Application()
    app.router.add_post("/{path:.*}", pass_on)
    async with TestServer(app) as front:
        yield f"http://any:{TOKEN}@127.0.0.1:{front.port}", seen


@EACH
def test_rewards_equal_the_oracles(client, real, server, pocket, tokenizer):
    """Many at once, as trainers ask. verl's text begins each response with the template's space and ends each turn."""
    texts = [" 5", " 5 and", " blue, or green", " 6"]
    asked = [(chat, ids(tokenizer, text + tokenizer.eos_token)) for chat in CHATS for text in texts]
    wanted = [oracle(pocket, tokenizer, *one) for one in asked]
    if client.startswith("verl"):  # its template adds the space
        asked = [(chat, ids(tokenizer, text[1:] + tokenizer.eos_token)) for chat in CHATS for text in texts]

    async def asks():
        return await asyncio.gather(*(ask(client, server, tokenizer, *one, real=real) for one in asked))

    torch.testing.assert_close(run(asks()), wanted, rtol=1e-5, atol=5e-4)


@EACH
def test_a_response_that_was_cut(client, real, server, pocket, tokenizer):
    """Without its end token it keeps V(s'). verl's template closes each turn, so its text does not tell."""
    cut = ids(tokenizer, " 5 and")
    ended = [*cut, tokenizer.eos_token_id]
    sent = ids(tokenizer, "5 and") if client.startswith("verl") else cut
    found = run(ask(client, server, tokenizer, CHATS[0], sent, real=real))
    wanted = oracle(pocket, tokenizer, CHATS[0], ended if client.startswith("verl") else cut)
    assert found == pytest.approx(wanted, abs=5e-4)
    assert abs(oracle(pocket, tokenizer, CHATS[0], ended) - oracle(pocket, tokenizer, CHATS[0], cut)) > 0.1


@EACH
def test_a_response_without_a_reward_gets_a_number_at_the_first_try(client, real, port, pocket, tokenizer):
    """An error would be asked again, up to 16 times, and would end the run."""
    sent = ids(tokenizer, "blue " * pocket.max_positions)

    async def asks():
        async with relay(port) as (address, seen):
            return await ask(client, address, tokenizer, CHATS[0], sent, real=real), seen

    found, seen = run(asks())
    assert found == UNSCORED and seen == [PATHS[client]]


@OPENRLHF
def test_an_empty_response_has_no_reward(client, real, server, tokenizer):
    assert run(ask(client, server, tokenizer, CHATS[0], [], real=real)) == UNSCORED


@EACH
def test_a_full_queue_is_asked_again(client, real, port, pocket, tokenizer):
    """With the status that the server has for this path: verl would end the run at a 429."""
    response = ids(tokenizer, "5" + tokenizer.eos_token)

    async def asks():
        async with relay(port, refusals=[DIALECTS[PATHS[client]].when_full]) as (address, seen):
            return await ask(client, address, tokenizer, CHATS[0], response, real=real), seen

    found, seen = run(asks())
    spoken = ids(tokenizer, " 5" + tokenizer.eos_token) if client.startswith("verl") else response
    assert found == pytest.approx(oracle(pocket, tokenizer, CHATS[0], spoken), abs=5e-4)
    assert seen == [PATHS[client]] * 2


@pytest.mark.parametrize("path", VLLM)
def test_answers_have_the_fields_of_vllms(path, server, tokenizer):
    """A client of vLLM may read more of an answer than verl does."""
    text = opened(tokenizer, CHATS[0]) + " 5" + tokenizer.eos_token

    async def asks():
        async with ClientSession() as session, session.post(server + path, json={"input": [text, text]}) as answer:
            return await answer.json()

    found = run(asks())
    kinds = [{name: type(value) for name, value in part.items()} for part in (found, *found["data"])]
    assert kinds == [VLLM_AROUND, VLLM[path], VLLM[path]]
    assert found["object"] == "list" and [one["index"] for one in found["data"]] == [0, 1]
    assert found["usage"]["prompt_tokens"] == found["usage"]["total_tokens"] == 2 * len(ids(tokenizer, text))


@pytest.mark.parametrize("client", PATHS)
def test_a_wrong_token_is_refused(client, port, tokenizer):
    for user in ("", "any:wrong-wrong-wrong@"):
        with pytest.raises(Failed, match="401"):
            run(ask(client, f"http://{user}127.0.0.1:{port}", tokenizer, CHATS[0], [5]))


@SLIME
def test_slimes_prompt_may_be_messages(client, real, server, pocket, tokenizer):
    response = ids(tokenizer, " 5" + tokenizer.eos_token)
    found = run(ask(client, server, tokenizer, CHATS[0], response, real=real, listed=True))
    assert found == pytest.approx(oracle(pocket, tokenizer, CHATS[0], response), abs=5e-4)


@OPENRLHF
def test_openrlhfs_prompt_may_have_lost_its_start(client, real, server, pocket, tokenizer):
    """OpenRLHF cuts a prompt that is too long from the left. The query then does not begin with the prompt."""
    response, whole = ids(tokenizer, " 5" + tokenizer.eos_token), ids(tokenizer, opened(tokenizer, CHATS[0]))
    kept = len(whole) - 2
    found = run(ask(client, server, tokenizer, CHATS[0], response, real=real, limit=kept + 8))
    assert found == pytest.approx(oracle(pocket, tokenizer, CHATS[0], response, kept), abs=5e-4)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_pages_line_for_curl_prints_what_the_page_shows(server):
    page = ROOT / "docs" / "serving.md"
    [line] = [line for line, words in commands(blocks(page, "sh")[0].text) if words[0] == "curl"]
    line = line.replace("localhost:8000", server)
    found = json.loads(subprocess.run(["bash", "-c", line], check=True, capture_output=True, text=True).stdout)
    shown = json.loads(blocks(page, "json")[0].text)
    (row,), (shown_row,) = found.pop("rows"), shown.pop("rows")
    assert found == shown and row.keys() == shown_row.keys()
    for name, numbers in shown_row.items():
        assert row[name] == pytest.approx(numbers, abs=0.006), name
