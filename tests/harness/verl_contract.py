"""What verl 0.9.1 hands to a reward manager, recorded from its sources; and from verl itself where it is there.

trainer/ppo/reward.py                        load_reward_manager: (config=, tokenizer=, compute_score=, **addresses)
experimental/reward_loop/reward_loop.py      compute_score: await run_single(data of one);
                                             compute_rm_score: assemble_rm_scores(data, [reward_score, ...])
experimental/agent_loop/agent_loop.py        the data of a streamed reward, `streamed` below
trainer/ppo/v1/trainer_base.py               the data of a colocated one, `colocated` below
"""

import importlib.util
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

INSTALLED = importlib.util.find_spec("verl") is not None
PAD = 0


class Recorded:
    """The part of verl's DataProto that its own reward managers use."""

    def __init__(self, batch, non_tensor_batch):
        self.batch, self.non_tensor_batch = batch, non_tensor_batch

    def __len__(self):
        return len(self.batch["responses"])

    def __getitem__(self, rows):
        return Recorded(
            {name: x[rows] for name, x in self.batch.items()},
            {name: x[rows] for name, x in self.non_tensor_batch.items()},
        )


def data_proto(batch, non_tensor_batch, real):
    if not real:
        return Recorded(batch, non_tensor_batch)
    from tensordict import TensorDict
    from verl import DataProto

    return DataProto(batch=TensorDict(batch, batch_size=len(batch["responses"])), non_tensor_batch=non_tensor_batch)


def _padded(rows):
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=PAD)


def streamed(outputs, *, turns=2, own=None, real=False):
    """One rollout's outputs [(prompt ids, response ids), ...]: padded on the right, the mask over both together."""
    prompts, responses = zip(*outputs, strict=True)
    batch = {
        "prompts": _padded(prompts),
        "responses": _padded(responses),
        "attention_mask": _padded([[1] * (len(p) + len(r)) for p, r in outputs]),
    }
    if own is not None:
        batch["response_mask"] = _padded(own)
    others = {
        "__num_turns__": np.array([turns] * len(outputs)),
        "prompt_len": np.array([len(p) for p in prompts]),
        "response_len": np.array([len(r) for r in responses]),
        "data_source": np.array(["test"] * len(outputs)),
    }
    return data_proto(batch, others, real)


def colocated(samples, *, left=False, own=None, real=False):
    """A batch of samples: prompts padded on the right (v1) or on the left (before), responses on the right."""
    prompts, responses = zip(*samples, strict=True)
    whole = _padded(prompts), _padded([[1] * len(p) for p in prompts])
    if left:
        width = whole[0].shape[1]
        whole = [torch.stack([x.roll(width - len(p)) for x, p in zip(part, prompts, strict=True)]) for part in whole]
    mask = torch.cat([whole[1], _padded([[1] * len(r) for r in responses])], 1)
    raw = np.empty(len(samples), dtype=object)
    raw[:] = [[{"role": "user", "content": "?"}]] * len(samples)
    batch = {"prompts": whole[0], "responses": _padded(responses), "attention_mask": mask}
    if own is not None:
        batch["response_mask"] = _padded(own)
    return data_proto(batch, {"raw_prompt": raw}, real)


def config(path, reward_kwargs=None):
    """The part of verl's configuration that a reward manager reads; a DictConfig where there is one."""
    found = {
        "actor_rollout_ref": {"model": {"path": path, "tokenizer_path": None}},
        "reward": {
            "num_workers": 1,
            "reward_kwargs": {"endo_reward": reward_kwargs or {}},
            "custom_reward_function": {"path": None},
            "reward_model": {"enable": False},
            "reward_manager": {
                "source": "importlib",
                "name": "EndoRewardManager",
                "module": {"path": "pkg://endoreward_fast.integrations.verl"},
            },
        },
    }
    if INSTALLED:
        from omegaconf import OmegaConf

        return OmegaConf.create(found)
    model = SimpleNamespace(**found["actor_rollout_ref"]["model"])
    return SimpleNamespace(actor_rollout_ref=SimpleNamespace(model=model), reward=found["reward"])
