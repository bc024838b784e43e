"""Heads: every rule of the table on a tiny random model, and capture without logits."""

import copy
import runpy
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, AutoModelForMultimodalLM

from endoreward_fast.errors import EndoRewardError
from endoreward_fast.head.head import Head, HeadRecipe, logits_of, recipe_for, without_cache

transformers.logging.set_verbosity_error()
FAMILIES = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "tools" / "families.py")))
TOKENS = torch.arange(24).reshape(2, 12) * 7 % 250 + 5
PLAIN = HeadRecipe()

# {model type: (its recipe, a plausible wrong recipe)}. The configs set logit_scale to 0.3, logits_scaling to 3, every
# multiplier to 0.3, every softcap to 5 and 300 of 320 words: see tools/families.py.
RULES = {
    "llama": (PLAIN, HeadRecipe(softcap=30.0)),
    "beam": (HeadRecipe(softcap=5.0), PLAIN),
    "gemma2": (HeadRecipe(softcap=5.0), PLAIN),
    "gemma3_text": (HeadRecipe(softcap=5.0), PLAIN),
    "gemma3n_text": (HeadRecipe(softcap=5.0), PLAIN),
    "gemma4": (HeadRecipe(softcap=5.0), PLAIN),
    "gemma4_text": (HeadRecipe(softcap=5.0), PLAIN),
    "gemma4_unified": (HeadRecipe(softcap=5.0), PLAIN),
    "vaultgemma": (HeadRecipe(softcap=5.0), PLAIN),
    "nanochat": (HeadRecipe(softcap=5.0), PLAIN),
    "paligemma": (HeadRecipe(softcap=5.0), PLAIN),
    "recurrent_gemma": (HeadRecipe(softcap=5.0), PLAIN),
    "xlstm": (HeadRecipe(softcap=5.0), PLAIN),
    "cohere": (HeadRecipe(0.3), PLAIN),
    "cohere2": (HeadRecipe(0.3), HeadRecipe(1 / 0.3)),
    "cohere2_moe": (HeadRecipe(0.3), PLAIN),
    "cohere_compass": (HeadRecipe(0.3), PLAIN),
    "granite": (HeadRecipe(1 / 3), HeadRecipe(3.0)),
    "granitemoe": (HeadRecipe(1 / 3), PLAIN),
    "granitemoehybrid": (HeadRecipe(1 / 3), PLAIN),
    "granite4_vision": (HeadRecipe(1 / 3), PLAIN),
    "granite_docling": (HeadRecipe(1 / 3), PLAIN),
    "hyperclovax": (HeadRecipe(3.0), HeadRecipe(1 / 3)),
    "hyperclovax_vision_v2": (HeadRecipe(3.0), HeadRecipe(1 / 3)),
    "falcon_h1": (HeadRecipe(0.3), PLAIN),
    "muse_glimmer": (HeadRecipe(0.3, 5.0), HeadRecipe(0.3)),
    "muse_spark": (HeadRecipe(0.3, 5.0), HeadRecipe(softcap=5.0)),
    "inkling_text": (HeadRecipe(vocab_size=300), PLAIN),
    "inkling2": (HeadRecipe(softcap=5.0, vocab_size=300), HeadRecipe(vocab_size=300)),
    "inkling2_text": (HeadRecipe(softcap=5.0, vocab_size=300), HeadRecipe(softcap=5.0)),
    # the config has a field that suggests a rule, but the model is plain
    "minicpm3": (PLAIN, HeadRecipe(1 / 3)),  # divides before the head
    "mpt": (PLAIN, HeadRecipe(0.3)),  # never reads logit_scale
    "gemma3": (PLAIN, HeadRecipe(softcap=5.0)),  # only gemma3_text reads final_logit_softcapping
    "cohere2_vision": (PLAIN, HeadRecipe(0.3)),  # only its text model scales
    "granite_speech": (PLAIN, HeadRecipe(1 / 3)),  # the same
}
BIASED = ["bert", "codegen", "ctrl", "gptj", "phi", "roberta", "xlm"]


def build(model_type):
    """Build a tiny model in evaluation mode, also for composite models outside the causal classes."""
    if model_type in FAMILIES.CLASSES:
        return FAMILIES.tiny_model(model_type)
    torch.manual_seed(0)
    auto = AutoModelForMultimodalLM if model_type == "granite_speech" else AutoModelForImageTextToText
    model = auto.from_config(FAMILIES.tiny_config(CONFIG_MAPPING[model_type]))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(10)
    return model.eval()


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return logits_of(model(input_ids=tokens, **without_cache(model)))


@torch.no_grad()
def captured(model, head, tokens=TOKENS):
    with head.capture() as seen:
        model(input_ids=tokens, **without_cache(model))
    return seen.hidden


def formula(hidden, weight, bias, scale, softcap):
    """Compute z = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap) in float64."""
    z = hidden.double() @ weight.double().T
    z = z if bias is None else z + bias.double()
    z = scale * z
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def quiet_head(model, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return Head(model, **kwargs)


@pytest.fixture
def llama():
    return FAMILIES.tiny_model("llama")


@pytest.mark.parametrize("model_type", RULES)
def test_rule(model_type):
    recipe, mistaken = RULES[model_type]
    model = build(model_type)
    head = quiet_head(model)
    assert head.linear
    assert head.recipe == recipe == recipe_for(model)

    expected = logits(model)
    hidden = captured(model, head)
    z = formula(hidden, head.weight, head.bias, head.logit_scale, head.softcap)
    spread = expected.std()
    torch.testing.assert_close(z.float(), expected, atol=1e-5 * spread.item(), rtol=1e-5)
    rows = model.get_output_embeddings().weight[: mistaken.vocab_size]
    wrong = formula(hidden, rows, head.bias, mistaken.logit_scale, mistaken.softcap)
    assert wrong.shape != expected.shape or (wrong - expected).abs().max() > 0.01 * spread

    # The check at load notices the wrong recipe, even on logits too small for a softcap to matter.
    for shrink in (1.0, 1e-4):
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(shrink)
        assert quiet_head(model).linear
        with pytest.warns(UserWarning, match=f"model type '{model_type}'"):
            assert not Head(model, recipe=mistaken).linear


@pytest.mark.parametrize("model_type", BIASED)
def test_bias_of_the_head(model_type):
    model = build(model_type)
    head = quiet_head(model)
    assert head.linear and head.bias is not None
    expected, hidden = logits(model), captured(model, head)
    z = formula(hidden, head.weight, head.bias, 1.0, None)
    torch.testing.assert_close(z.float(), expected, atol=1e-5 * expected.std().item(), rtol=1e-5)
    assert (formula(hidden, head.weight, None, 1.0, None) - expected).abs().max() > 0.1 * expected.std()


def test_a_missing_softcap_is_noticed_on_tiny_logits():
    """A new model has logits of size 0.1, which a softcap of 30 changes by 1e-7."""
    config = FAMILIES.tiny_config(CONFIG_MAPPING["gemma2"], final_logit_softcapping=30.0)
    model = transformers.Gemma2ForCausalLM(config)
    assert quiet_head(model).softcap == 30.0
    with pytest.warns(UserWarning, match="gemma2"):
        assert not Head(model, recipe=PLAIN).linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", ["llama", "gemma2", "granite", "muse_spark", "mixtral", "qwen3_moe", "bert"])
def test_half_precision(model_type, dtype):
    model = build(model_type).to(dtype)
    head = quiet_head(model)
    assert head.linear and head.weight.dtype == dtype and captured(model, head).dtype == dtype
    mistaken = PLAIN if head.recipe != PLAIN else HeadRecipe(softcap=30.0)
    with pytest.warns(UserWarning, match=model_type):
        assert not Head(model, recipe=mistaken).linear


def test_capture_makes_no_logits_and_leaves_nothing_behind(llama):
    before = logits(llama)
    made = []
    watch = llama.lm_head.register_forward_hook(lambda module, args, y: made.append(y.numel()))
    head = quiet_head(llama)
    made.clear()
    hidden = captured(llama, head)
    assert hidden.shape == (2, 12, 32) and made == [0]
    with pytest.raises(ZeroDivisionError), head.capture():
        raise ZeroDivisionError
    watch.remove()
    assert not llama.lm_head._forward_pre_hooks and not llama.lm_head._forward_hooks
    assert "forward" not in vars(llama.lm_head)
    assert torch.equal(logits(llama), before)


def test_capture_keeps_the_graph(llama):
    head = quiet_head(llama)
    llama(input_ids=TOKENS).logits.square().mean().backward()
    expected = {name: p.grad.clone() for name, p in llama.named_parameters()}
    llama.zero_grad()
    with head.capture() as seen:
        llama(input_ids=TOKENS)
    (seen.hidden @ head.weight.T).square().mean().backward()
    for name, parameter in llama.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_the_output_depends_on_the_readers_result_but_not_on_the_empty_matmul(llama):
    """FSDP's backward needs this order. The empty matmul must not make a (V, D) gradient of zeros."""
    head = quiet_head(llama)
    with head.capture(lambda hidden: (hidden @ head.weight.T).sum()) as seen:
        waiting = [llama(input_ids=TOKENS).logits.grad_fn]
    nodes, to_weight = set(), 0
    while waiting:
        node = waiting.pop()
        to_weight += getattr(node, "variable", None) is head.module.weight
        waiting += [parent for parent, _ in node.next_functions if parent is not None] if node not in nodes else []
        nodes.add(node)
    assert seen.once.grad_fn in nodes and to_weight == 1


def test_capture_honours_logits_to_keep(llama):
    head = quiet_head(llama)
    with torch.no_grad(), head.capture() as seen:
        llama(input_ids=TOKENS, logits_to_keep=3)
    torch.testing.assert_close(seen.hidden, captured(llama, head)[:, -3:])


def test_hidden_needs_exactly_one_call_of_the_head(llama):
    head = quiet_head(llama)
    with head.capture() as seen:
        pass
    with pytest.raises(EndoRewardError, match="ran 0 times"):
        _ = seen.hidden


def test_the_check_leaves_mode_and_random_state():
    model = FAMILIES.tiny_model("reformer").train()  # it has dropout, and random hashes also in evaluation mode
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    assert quiet_head(model).linear  # both passes drew the same hashes
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes and any(modes) and not all(modes)
    assert not torch.is_inference(next(model.parameters())) and torch.is_grad_enabled()


def test_weight_is_live_and_tied():
    model = FAMILIES.tiny_model("gemma2")
    head = quiet_head(model)
    embedding = model.get_input_embeddings().weight
    assert head.weight.data_ptr() == embedding.data_ptr()
    with torch.no_grad():
        embedding.add_(1.0)
    hidden, expected = captured(model, head), logits(model)
    torch.testing.assert_close(formula(hidden, head.weight, None, 1.0, 5.0).float(), expected)
    twin, twin_head = copy.deepcopy((model, head))
    assert twin_head.weight.data_ptr() == twin.lm_head.weight.data_ptr() != head.weight.data_ptr()


def test_padded_vocabulary_keeps_the_rows_the_model_keeps(llama):
    llama.resize_token_embeddings(330, pad_to_multiple_of=64)
    head = quiet_head(llama)
    assert head.linear and head.weight.shape == (384, 32) == (logits(llama).shape[-1], 32)
