"""Models whose head is split over processes, and what is asked of them on every rank: part of shard_ranks.py."""

import os
import warnings
from functools import partial
from unittest.mock import patch

import torch
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, LlamaForCausalLM, PhiConfig
from transformers.distributed import DistributedConfig

import endoreward_fast as er
from endoreward_fast.head import self_check
from endoreward_fast.head.head import Head, HeadRecipe
from tiny_models import ROWS, TOKENIZER, build, random_rows


def uneven():
    """A model whose 385 words two ranks cannot share evenly."""
    return build(LlamaConfig, tie_word_embeddings=False, vocab_size=385)


# Embeddings that are split with the head; a softcap; a bias.
MODELS_SPLIT = {
    "untied": uneven,
    "tied": partial(build, LlamaConfig, tie_word_embeddings=True),
    "capped": partial(build, Gemma2Config),
    "biased": partial(build, PhiConfig),
}


def of_a_model(rank, world, folder):
    """transformers' own tensor parallelism."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    split = DistributedConfig(tp_plan="auto")
    scorer = er.EndoRewardModel(AutoModelForCausalLM.from_pretrained(folder, distributed_config=split), TOKENIZER)
    return of_scorer(scorer) | {"rows": len(scorer.head.weight.to_local())}


def of_scorer(scorer):
    """Rewards, their gradients by name, and scores of text."""
    rewards = scorer(torch.stack(random_rows(12, 12)), entropy=True)
    (rewards.reward * torch.linspace(-1, 1, 12)).sum().backward()
    grads = {name: p.grad for name, p in scorer.model.named_parameters()}
    return {
        "linear": scorer.head.linear,
        "out": [f.detach() for f in rewards],
        "grads": {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()},
        "scores": [row.score for row in scorer.score(ROWS)] if scorer.tokenizer else None,
    }


def of_two_meshes(rank, world):
    """Tensor parallelism within pairs of ranks, FSDP2 across them: the head is a DTensor while it runs, and split in
    two ways when it does not."""
    model = uneven()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "words"))
    parallelize_module(model, mesh["words"], {"lm_head": ColwiseParallel(output_layouts=Replicate())})
    for part in (*model.model.layers, model.lm_head, model):
        fully_shard(part, mesh=mesh["data"])
    return of_scorer(er.EndoRewardModel(model, TOKENIZER))


def of_a_padded_head(rank, world):
    """A head whose last words are padding, split: what it takes to read the others, and to ask for its weight."""
    model = uneven()
    model.__class__ = Cut
    whole_logits(model, world)
    head = Head(model, recipe=HeadRecipe(vocab_size=Cut.words))
    scorer = er.EndoRewardModel(uneven())
    scorer.model, scorer.head = model, head
    with CommDebugMode() as asked:
        assert len(head.weight) == 385 and head.bias is None
    stats = scorer.stats(torch.stack(random_rows(12, 12)))
    return of_scorer(scorer) | {
        "asked": asked.get_total_counts(),
        "vocab": stats.vocab,
        "mean": stats.logit_mean.detach(),
    }


class Cut(LlamaForCausalLM):
    """A model that cuts the padding of its head off, as Inkling does."""

    words = 300

    def forward(self, *args, **options):
        output = super().forward(*args, **options)
        output.logits = output.logits[..., : self.words]
        return output


def whole_logits(model, world):
    """`model` with its head split by vocabulary, and logits laid out whole."""
    mesh = init_device_mesh("cpu", (world,))
    return parallelize_module(model, mesh, {"lm_head": ColwiseParallel(output_layouts=Replicate())})


def of_a_bad_shard(rank, world):
    """What is said of a head of which one rank's rows have NaN."""
    model = whole_logits(uneven(), world)
    if rank == 1:
        with torch.no_grad():
            model.lm_head.weight.to_local()[3, 3] = torch.nan
    try:
        er.EndoRewardModel(model)
    except er.EndoRewardError as error:
        return str(error)
    return "nothing was said"


def of_disagreement(rank, world):
    """What is found of a head that one rank would not read, for what it sees at each of two points."""
    found = {}
    for place in ("_recipe_mismatch", "_capture_mismatch"):
        seen = getattr(self_check, place)

        def other(*args, seen=seen):
            return seen(*args) or ("rank 1 sees noise" if rank == 1 else None)

        with patch.object(self_check, place, other), warnings.catch_warnings(record=True):
            found[place] = Head(whole_logits(uneven(), world)).reason
    return found


def of_little_left(rank, world):
    """What is found of a padded head of which one rank keeps a word, or none."""
    found = {}
    for words in (194, 193, 100):
        model = whole_logits(uneven(), world)
        model.__class__ = type("CutShort", (Cut,), {"words": words})
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found[words] = Head(model, recipe=HeadRecipe(vocab_size=words)).reason
    return found


def of_logits_in_parts(rank, world):
    """Why models whose logits stay split are refused."""
    mesh = init_device_mesh("cpu", (world,))

    def why(**options):
        try:
            er.EndoRewardModel(parallelize_module(uneven(), mesh, {"lm_head": ColwiseParallel(**options)}))
        except er.EndoRewardError as error:
            return str(error)
        return "nothing was said"

    return [why(), why(use_local_output=False)]
