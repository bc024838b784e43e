"""What prime-rl, SkyRL and slime hand over, recorded from their sources; and their own types where they are installed.

prime-rl 0.8.0 (559b447, read 2026-11-29)     src/prime_rl/orchestrator/algo/base.py, trajectories.py and
                                              verifiers/v1/graph.py: episodes -> traces -> nodes and branches
skyrl 0.3.0 (PyPI, read 2026-11-29)          skyrl/train/generators/base.py: GeneratorInput and GeneratorOutput
slime 0.3.1 (624b824, read 2026-11-29)        slime/utils/types.py: Sample; slime/rollout/rm_hub: how it is asked for
"""

import importlib.util
from dataclasses import dataclass, field
from enum import Enum
from types import SimpleNamespace
from typing import Any

import pytest


def needs(module):
    """A mark that skips a test where a trainer's module cannot be imported, and says why."""
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        return pytest.mark.skipif(True, reason=f"{package} is not installed")
    try:
        importlib.import_module(module)
    except Exception as error:  # installed without what it needs, as `pip install --no-deps skyrl` does for its kernel
        return pytest.mark.skipif(True, reason=f"{module} cannot be imported: {error!r}"[:150])
    return pytest.mark.skipif(False, reason="")


PRIME_RL, SKYRL, SLIME = "prime_rl.orchestrator.algo", "skyrl.train.trainer", "slime.rollout.sglang_rollout"


# --- prime-rl: a node (parent, token ids, sampled), as verifiers' MessageNode
def trace(nodes, *, real=False, reward=0.0, error=False, trainable=True):
    """A trace of nodes (index of the parent or None, token ids, whether the policy sampled them)."""
    if real:
        return _verifiers_trace(nodes, reward, error, trainable)
    made = [
        SimpleNamespace(parent=parent, token_ids=list(ids), sampled=sampled, mask=[sampled] * len(ids), advantages=None)
        for parent, ids, sampled in nodes
    ]
    leaves = [i for i in range(len(made)) if all(node.parent != i for node in made)]
    branches = [SimpleNamespace(nodes=_path(made, leaf), multi_modal_data=None) for leaf in leaves]
    agent = SimpleNamespace(trainable=trainable)
    return SimpleNamespace(
        id="t", nodes=made, branches=branches, reward=reward, has_error=error, agent=agent, metrics={}
    )


def _path(nodes, leaf):
    found = []
    while leaf is not None:
        found.append(nodes[leaf])
        leaf = nodes[leaf].parent
    return found[::-1]


def _verifiers_trace(nodes, reward, error, trainable):
    import verifiers.v1 as vf
    from verifiers.v1.graph import MessageNode
    from verifiers.v1.types import AssistantMessage, UserMessage

    made = [
        MessageNode(
            parent=parent, message=(AssistantMessage if sampled else UserMessage)(content="x"), sampled=sampled,
            token_ids=list(ids), mask=[sampled] * len(ids), logprobs=[-0.1] * len(ids) if sampled else [],
        )
        for parent, ids, sampled in nodes
    ]  # fmt: skip
    return vf.Trace(
        task=vf.TraceTask(type="Task", data=vf.TaskData(idx=0, prompt=None)),
        agent=vf.AgentInfo(config=vf.AgentConfig(), trainable=trainable), nodes=made,
        rewards={"env": {"score": reward}},
        ok=not error,
    )  # fmt: skip


def episodes(traces, real=False):
    if not real:
        return [SimpleNamespace(traces=[one]) for one in traces]
    import verifiers.v1 as vf

    env, group = vf.EnvInfo(id="test", name="test"), vf.GroupInfo(id="group")
    return [vf.Episode(env=env, task=one.task, group=group, traces=[one]) for one in traces]


class Algorithm:
    """prime-rl's base class, as far as EndoScoring calls it."""

    def __init__(self, config, policy_pool):
        self.policy_pool = policy_pool

    async def setup(self):
        pass


# --- SkyRL
class Generated:
    """A generator that has generated already. Every call is kept."""

    def __init__(self, output):
        self.output, self.calls = output, []

    async def generate(self, input_batch):
        self.calls.append(input_batch)
        return self.output


def generator_output(rows, rewards, **more):
    """Rows (prompt ids, response ids, loss mask)."""
    prompts, responses, masks = zip(*rows, strict=True)
    return {
        "prompt_token_ids": list(prompts), "response_ids": list(responses), "loss_masks": list(masks),
        "rewards": rewards, "stop_reasons": ["stop"] * len(rows), "rollout_metrics": {"generate/x": 1.0},
        "rollout_logprobs": None, "is_last_step": None,
    } | more  # fmt: skip


def generator_input(instances, phase="train"):
    return {
        "prompts": [[{"role": "user", "content": "?"}]] * len(instances),
        "trajectory_ids": [SimpleNamespace(instance_id=i, repetition_id=n) for n, i in enumerate(instances)],
        "batch_metadata": SimpleNamespace(global_step=1, training_phase=phase),
    }


# --- slime
class Status(Enum):
    COMPLETED = "completed"
    TRUNCATED = "truncated"
    ABORTED = "aborted"


@dataclass
class Sample:
    tokens: list
    response_length: int
    index: int = 0
    group_index: int = 0
    reward: Any = None
    loss_mask: list | None = None
    status: Any = Status.COMPLETED
    metadata: dict = field(default_factory=dict)
    multimodal_inputs: dict | None = None

    def get_reward_value(self, args):
        return self.reward if not args.reward_key else self.reward[args.reward_key]


def sample(prompt, response, *, real=False, status="completed", **fields):
    kind, states = Sample, Status
    if real:
        from slime.utils.types import Sample as kind

        states = kind.Status
    return kind(tokens=[*prompt, *response], response_length=len(response), status=states(status), **fields)


def slime_args(model, **options):
    return SimpleNamespace(
        hf_checkpoint=model, reward_key=None, custom_rm_path="endoreward_fast.integrations.slime.custom_rm",
        custom_advantage_function_path=None, rm_type=None, group_rm=False, **options,
    )  # fmt: skip
