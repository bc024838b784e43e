"""How trainers ask a reward server: recorded from the sources of their clients, and by those sources where installed.

OpenRLHF 0.11.2 (PyPI, read 2026-11-29)     openrlhf/utils/agent.py: SingleTurnAgentExecutor
slime 0.3.1 (624b824, read 2026-11-29)       slime/rollout/rm_hub/__init__.py: async_rm and remote_rm
verl 0.9.1 (PyPI, read 2026-11-29)           verl/experimental/reward_loop/reward_loop.py: RewardLoopWorker

Each function below asks for the reward of one sampled completion, as its trainer does. All three use aiohttp and
`raise_for_status`, and none reads Retry-After. They differ in what they ask again:

           tries    seconds between tries     a try's time limit     asks again at
OpenRLHF   5        1                         180 s                  every error
slime      10       1, 2, 4, ... and a part   120 s                  every error
verl       16       1, 2, 4, ..., 30          none                   5xx, and no connection; any 4xx ends the run
"""

import asyncio
import sys
from importlib.util import find_spec
from types import SimpleNamespace

import aiohttp
import numpy as np
import pytest

import verl_contract
from trainer_contracts import needs

OPENRLHF, RM_HUB, REWARD_LOOP = (
    "openrlhf.utils.agent", "slime.rollout.rm_hub", "verl.experimental.reward_loop.reward_loop"
)  # fmt: skip
PATHS = {"openrlhf": "/get_reward", "slime": "/slime", "verl-vllm": "/classify", "verl-sglang": "/v1/embeddings"}
REAL = {"openrlhf": OPENRLHF, "slime": RM_HUB, "verl-vllm": REWARD_LOOP, "verl-sglang": REWARD_LOOP}

VLLM = {
    "/classify": {"index": int, "label": str, "probs": list, "num_classes": int},
    "/pooling": {"index": int, "object": str, "data": list},
}
"""what vLLM 0.33.0 (PyPI, read 2026-11-29) answers for each input: entrypoints/pooling/*/protocol.py"""
VLLM_AROUND = {"id": str, "object": str, "created": int, "model": str, "data": list, "usage": dict}


class Failed(Exception):
    """A recorded client's last try failed."""


class Engine:
    """A stand-in for vLLM: `generate` returns the tokens of the response."""

    def __init__(self, response_ids):
        self.response_ids = response_ids

    async def generate(self, prompt_ids, sampling_params, multi_modal_data=None):
        await asyncio.sleep(0)
        output = SimpleNamespace(token_ids=list(self.response_ids), text="", finish_reason="stop", logprobs=None)
        return SimpleNamespace(outputs=[output])


async def _posted(url, payload, *, tries, again=lambda status: True):
    """Return what a client reads from the answer, without its sleeps."""
    for _ in range(tries):
        async with aiohttp.ClientSession() as session, session.post(url, json=payload) as response:
            if response.status < 400:
                return await response.json()  # refuses an answer that is not application/json
            if not again(response.status):
                break
    raise Failed(f"{url}: {response.status}")


async def openrlhf(server, tokenizer, chat, response_ids, *, real=False, limit=64):
    """Generate and ask, as the engine's actor does. `limit` is the most tokens of prompt and response."""
    url, prompt = f"{server}/get_reward", opened(tokenizer, chat)
    params = SimpleNamespace(max_tokens=8, logprobs=None)
    if real:
        from openrlhf.utils.agent import SingleTurnAgentExecutor

        executor = SingleTurnAgentExecutor(url)
        found = await executor.execute(prompt, "5", params, limit, tokenizer, Engine(response_ids))
    else:
        prompt_ids = tokenizer(text=prompt, add_special_tokens=False)["input_ids"][-(limit - params.max_tokens) :]
        query = tokenizer.decode([*prompt_ids, *response_ids], skip_special_tokens=False)
        payload = {"query": [query], "prompts": [prompt], "labels": ["5"]}
        answer = await _posted(url, payload, tries=5)
        found = {"reward": answer["rewards"], "scores": answer["scores"], "extra_logs": answer["extra_logs"]}
    if found["reward"] is None:  # the executor logs an error and goes on; the trainer then has no reward
        raise Failed(url)
    assert found["scores"] == found["reward"]
    assert all(np.isfinite(value).all() and np.shape(value) == (1,) for value in found["extra_logs"].values())
    [reward] = found["reward"]
    return reward


async def slime(server, tokenizer, chat, response_ids, *, real=False, listed=False):
    """Ask for a sample's reward. The prompt is text, or messages (`listed`) if slime applies no template."""
    prompt = chat if listed else opened(tokenizer, chat)
    response = tokenizer.decode(response_ids, skip_special_tokens=False)  # SGLang's text, with no_stop_trim
    if not real:
        payload = {"prompt": prompt, "response": response, "label": "5"}
        return await _posted(f"{server}/slime", payload, tries=10)
    from slime.rollout import rm_hub
    from slime.utils.types import Sample

    args = SimpleNamespace(rm_url=f"{server}/slime", rm_type="remote_rm", custom_rm_path=None, reward_key=None)
    sample = Sample(prompt=prompt, response=response, label="5")
    sample.reward = await rm_hub.async_rm(args, sample)
    return sample.get_reward_value(args)


async def verl(server, tokenizer, chat, response_ids, *, engine, real=False):
    """Ask as a worker of the reward loop does, for a reward model that `engine` serves."""
    path, address = tokenizer.name_or_path, server.removeprefix("http://")
    if real:
        from verl.experimental.reward_loop.reward_loop import RewardLoopWorker

        worker = await asyncio.to_thread(RewardLoopWorker, _loop_config(path, engine), address)
        found = await worker.compute_score(_data(chat, response_ids))
        return found["reward_score"]
    text = tokenizer.decode(response_ids).replace(tokenizer.eos_token, "")
    whole = [*chat, {"role": "assistant", "content": text}]
    text = tokenizer.apply_chat_template(whole, add_generation_prompt=False, tokenize=False)
    payload = {"model": path, "input": text.removeprefix(tokenizer.bos_token)}
    if engine == "vllm":
        payload["use_activation"] = False
    url = f"http://{address}/{'classify' if engine == 'vllm' else 'v1/embeddings'}"
    answer = await _posted(url, payload, tries=16, again=lambda status: status >= 500)
    return answer["data"][-1]["probs" if engine == "vllm" else "embedding"][-1]


def _loop_config(path, engine):
    from omegaconf import OmegaConf

    model = {"path": path, "tokenizer_path": None}
    reward = {
        "num_workers": 1, "custom_reward_function": {"path": None}, "sandbox_fusion": {"url": None},
        "reward_manager": {"source": "register", "name": "naive"},
        "reward_model": {"enable": True, "model_path": path, "rollout": {"name": engine}},
    }  # fmt: skip
    return OmegaConf.create({"actor_rollout_ref": {"model": model}, "data": {}, "reward": reward})


def _data(chat, response_ids):
    data = verl_contract.streamed([([1], response_ids)], real=True)
    raw = np.empty(1, dtype=object)
    raw[0] = chat
    data.non_tensor_batch["raw_prompt"] = raw
    return data


def opened(tokenizer, chat):
    """Return the prompt's text, as trainers write it."""
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


def run(asking, seconds=60):
    """Run asks in an event loop of their own, and close slime's session, which belongs to that loop."""

    async def within():
        try:
            return await asyncio.wait_for(asking, seconds)
        finally:
            if RM_HUB in sys.modules:
                await sys.modules[RM_HUB]._get_shared_session().close()

    return asyncio.run(within())


async def ask(client, server, tokenizer, chat, response_ids, *, real=False, **more):
    """Return the reward that a client gets from the server at this address."""
    if client.startswith("verl"):
        more["engine"] = client.removeprefix("verl-")
        return await verl(server, tokenizer, chat, response_ids, real=real, **more)
    return await {"openrlhf": openrlhf, "slime": slime}[client](
        server, tokenizer, chat, response_ids, real=real, **more
    )


def sources():
    """Return pytest's parameters (client, real): each client as recorded, and by its own code where it is installed."""
    found = []
    for client, module in REAL.items():
        # A client that `make test` installs must import. The others may be installed without what they need.
        mark = pytest.mark.skipif(find_spec("openrlhf") is None, reason="openrlhf is not installed")
        found += [
            pytest.param(client, False, id=f"{client}-recorded"),
            pytest.param(client, True, id=f"{client}-own", marks=mark if client == "openrlhf" else needs(module)),
        ]
    return found
