"""EndoRewardModel.forward in a training loop, with the wrappers that torch and transformers put around a model."""

import warnings

import pytest
import torch
from transformers import GPT2Config, LlamaConfig

import two_ranks
from endoreward_fast import EndoRewardModel
from endoreward_fast.head.head import without_cache
from endoreward_fast.vocab import reference
from tiny_models import MODELS, alone, build, random_rows, same

LENGTH, PROMPT = 12, 4
FIELDS = ("reward", "logprob", "value")
MASK = (torch.arange(LENGTH) >= PROMPT).expand(2, -1)
IDS = torch.stack(random_rows(LENGTH, LENGTH))


def llama(**changes):
    return build(LlamaConfig, num_hidden_layers=1, tie_word_embeddings=False, **changes)


def gradients(module, rewards):
    """Return {parameter: gradient} of a loss that uses every field."""
    module.zero_grad()
    weights = torch.linspace(-1, 1, rewards.reward.shape[1])
    loss = (rewards.reward * weights).sum() + rewards.logprob.square().sum() + rewards.entropy.sum()
    loss.backward()
    return {name: p.grad for name, p in module.named_parameters()}


def assert_same_gradients(ours, expected, tolerance=1e-5):
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        assert (ours[name] - gradient).norm() <= tolerance * gradient.norm(), name


# ------------------------------------------------------------------------------------------------------------ autocast


def pocket():
    return EndoRewardModel.from_pretrained("pocket").model


@pytest.mark.parametrize("build_model", [MODELS["llama"], MODELS["gemma2"], pocket])
def test_autocast_rewards_are_as_accurate_as_the_models_logits(build_model):
    """The error is compared over the batch, because a softcap moves the rounding to bf16, and single tokens vary.

    On a processor with bf16 units, models without a softcap have bitwise the model's logits. On any other processor,
    all are exact to float32.
    """
    scorer = EndoRewardModel(build_model())
    head = {"bias": scorer.head.bias, "logit_scale": scorer.head.logit_scale, "softcap": scorer.head.softcap}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = scorer(IDS, completion_mask=MASK, entropy=True)
        with scorer.head.capture() as seen:
            scorer.model(IDS, use_cache=False)
        logits = scorer.model(IDS, use_cache=False).logits
    assert logits.dtype == torch.bfloat16
    weight = scorer.head.weight.bfloat16().double()
    exact = reference.linear_token_rewards(
        seen.hidden.bfloat16().double(), weight, IDS, mask=MASK, entropy=True, dtype=torch.float64, **head
    )
    eager = reference.token_rewards(logits.float(), IDS, mask=MASK, entropy=True)
    for name, a, b, oracle in zip(ours._fields, ours, eager, exact, strict=True):
        assert a.dtype == torch.float32
        error, eager_error, size = ((x - y)[MASK].norm() for x, y in ((a, oracle), (b, oracle), (oracle, 0)))
        room = 16 * torch.finfo(torch.float32).eps * size
        assert error <= eager_error + room and 10 * room < eager_error < 0.02 * size, name


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_autocast_gradients_are_as_accurate_as_through_full_logits(family):
    scorer = EndoRewardModel(MODELS[family]())
    exact = gradients(scorer, scorer(IDS, completion_mask=MASK, entropy=True))
    with torch.autocast("cpu", torch.bfloat16):
        ours = scorer(IDS, completion_mask=MASK, entropy=True)
    ours = gradients(scorer, ours)
    with torch.autocast("cpu", torch.bfloat16):
        logits = scorer.model(IDS, use_cache=False).logits
    eager = gradients(scorer, reference.token_rewards(logits.float(), IDS, mask=MASK, entropy=True))
    for name, parameter in scorer.named_parameters():
        gradient = ours[name]
        assert gradient.dtype == parameter.dtype == torch.float32 and gradient.isfinite().all()
        error, eager_error = ((g[name] - exact[name]).norm() / exact[name].norm() for g in (ours, eager))
        assert error <= 1.5 * eager_error, name


# ------------------------------------------------------------------------------------------------ checkpoints, modes


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_gradient_checkpointing_changes_no_gradient_and_runs_the_head_once(family, reentrant):
    scorer = EndoRewardModel(MODELS[family]()).train()
    for module in scorer.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    expected = gradients(scorer, scorer(IDS, completion_mask=MASK, entropy=True))
    runs = {"head": 0, "layer": 0}

    def count(name):
        def hook(*_):
            runs[name] += 1

        return hook

    scorer.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        scorer.model.enable_input_require_grads()
    scorer.head.module.register_forward_pre_hook(count("head"))
    body = scorer.model.get_decoder()
    layer = (body.layers if hasattr(body, "layers") else body.h)[0]
    (layer.mlp).register_forward_pre_hook(count("layer"))
    rewards = scorer(IDS, completion_mask=MASK, entropy=True)
    assert runs == {"head": 1, "layer": 1}
    assert_same_gradients(gradients(scorer, rewards), expected)
    assert runs == {"head": 1, "layer": 2}  # the layers are recomputed, but the head is not


def test_training_mode_draws_the_dropout_of_the_model():
    """In training mode, forward draws the same dropout as the model, because no check before it uses random numbers."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=128)
    scorer = EndoRewardModel(type(MODELS["gpt2"]())(config)).train()
    attended = torch.ones_like(IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(7)
        ours = scorer(IDS, attended, MASK)
    assert all(module.training for module in scorer.modules())
    torch.manual_seed(7)
    logits = scorer.model(IDS, attention_mask=attended, **without_cache(scorer.model)).logits
    same(ours, reference.token_rewards(logits, IDS, mask=MASK))
    again = scorer(IDS, attended, MASK)
    assert (again.reward - ours.reward).abs().max() > 0.01


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_work_again_after_a_pass_without_them(mode):
    scorer = EndoRewardModel(llama())
    with_graph = scorer(IDS, completion_mask=MASK, entropy=True)
    with mode():
        without = scorer(IDS, torch.ones_like(IDS), MASK, entropy=True)
    same(without, with_graph)
    assert not any(field.requires_grad for field in without) and all(field.requires_grad for field in with_graph)
    expected = gradients(scorer, with_graph)
    assert_same_gradients(gradients(scorer, scorer(IDS, torch.ones_like(IDS), MASK, entropy=True)), expected)


# --------------------------------------------------------------------------------------------------------- compilation


class Graphs:
    """A backend for torch.compile that counts graphs and runs them unchanged."""

    def __init__(self):
        torch.compiler.reset()  # otherwise graphs of earlier tests count towards the limit of one function
        self.count = 0

    def __call__(self, graph, inputs):
        self.count += 1
        return graph.forward


def model_first(backend):
    model = llama()
    model.compile(backend=backend)
    return EndoRewardModel(model)


def wrapped_model_first(backend):
    return EndoRewardModel(torch.compile(llama(), backend=backend))


def model_afterwards(backend):
    scorer = EndoRewardModel(llama())
    scorer.model.compile(backend=backend)
    return scorer


def decoder(backend):
    scorer = EndoRewardModel(llama())
    scorer.model.model.compile(backend=backend)
    return scorer


def everything(backend):
    scorer = EndoRewardModel(llama())
    scorer.compile(backend=backend)
    return scorer


@pytest.mark.parametrize("compiled", [model_first, wrapped_model_first, model_afterwards, decoder, everything])
def test_compiled(compiled):
    plain, graphs = EndoRewardModel(llama()), Graphs()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        scorer = compiled(graphs)
    assert scorer.head.linear and graphs.count == 0  # the check at load does not compile
    wanted = {"completion_mask": MASK, "entropy": True}
    ours, expected = scorer(IDS, **wanted), plain(IDS, **wanted)
    same(ours, expected)
    found = {name.replace("_orig_mod.", ""): g for name, g in gradients(scorer, ours).items()}
    assert_same_gradients(found, gradients(plain, expected))
    assert scorer.model(IDS).logits.shape == (2, LENGTH, 384)  # other callers do not get the empty logits
    counts = []
    for length in (9, 10, 7):  # the second length is compiled with a dynamic shape
        ids, wanted = IDS.flip(0)[:, :length], {"completion_mask": MASK[:, :length]}
        same(scorer(ids, **wanted), plain(ids, **wanted))
        counts.append(graphs.count)
    assert counts[-1] == counts[1] > 0


def test_compiled_model_that_has_run_before():
    """A graph that was compiled without the capturing hook is not used for a pass with it."""
    scorer = model_first(Graphs())
    with torch.no_grad():
        for _ in range(2):
            logits = scorer.model(IDS, use_cache=False).logits
            same(scorer(IDS), reference.token_rewards(logits, IDS))


def test_compiled_model_knows_packed_rows():
    """The wrapper accepts any argument, so the inner model's arguments are read, and position_ids are passed."""
    scorer = wrapped_model_first(Graphs())
    with torch.no_grad():
        packed = scorer(IDS[:1], position_ids=(torch.arange(LENGTH) % 5)[None])
        for start, stop in ((0, 5), (5, 10), (10, 12)):
            part = packed._replace(**{name: getattr(packed, name)[:, start:stop] for name in FIELDS})
            same(part, alone(scorer, IDS[0, start:stop]))


# ----------------------------------------------------------------------------------------------------------- two ranks


@pytest.fixture(scope="module")
def ranks():
    """Return {case: error on either process, or ""}."""
    return two_ranks.run()


@pytest.mark.parametrize("case", two_ranks.CASES)
def test_on_two_ranks(ranks, case):
    assert not ranks[case], ranks[case]
