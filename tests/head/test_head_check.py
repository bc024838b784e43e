"""The check at load: which heads fall back to full logits, which models are refused, and the messages."""

import math
import runpy
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, ChameleonForConditionalGeneration

from endoreward_fast.errors import EndoRewardError
from endoreward_fast.head.head import Head
from endoreward_fast.head.module import refuse_bad_weights, why_not_plain

transformers.logging.set_verbosity_error()
FAMILIES = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[2] / "tools" / "families.py")))
TOKENS = torch.arange(24).reshape(2, 12) * 7 % 250 + 5


@torch.no_grad()
def assert_linear(model, tokens=TOKENS):
    """Assert that the head loads without a warning and hidden @ weight.T gives the model's logits."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        head = Head(model)
    assert head.linear
    logits = head.read(model, {"input_ids": tokens}, lambda hidden: hidden @ head.weight.T)
    torch.testing.assert_close(logits, model(input_ids=tokens).logits, rtol=1e-4, atol=1e-5)


def assert_falls_back(model, words):
    with pytest.warns(UserWarning) as caught:
        head = Head(model)
    message = str(caught[0].message)
    assert not head.linear and words in head.reason and head.reason in message
    assert f"model type '{model.config.model_type}'" in message and "\n" not in message


@pytest.fixture
def llama():
    return FAMILIES.tiny_model("llama")


def test_a_head_that_runs_twice_a_token_falls_back():
    assert_falls_back(FAMILIES.tiny_model("prophetnet"), "is fed (2, 2, 8, 32), not one (batch, tokens, size)")


def test_logits_that_are_edited_afterwards_fall_back():
    """Chameleon masks its image tokens: two of 320 logits differ from the head's output."""
    config = FAMILIES.tiny_config(CONFIG_MAPPING["chameleon"])
    assert_falls_back(ChameleonForConditionalGeneration(config).eval(), "it does not apply HeadRecipe(")


def test_a_hooked_head_falls_back(llama):
    llama.lm_head.register_forward_hook(lambda module, args, y: y + 0.05 * module.weight.sum(1))
    assert_falls_back(llama, "its logits are not hidden @ weight.T + bias")


class Int8Linear(nn.Linear):
    """A quantised head as in most libraries: a subclass of Linear that multiplies by a rescaled weight."""

    def forward(self, x):
        return x @ (self.weight.float() * self.scale).T


def test_quantised_heads_fall_back(llama):
    plain = llama.lm_head
    llama.lm_head = Int8Linear(1, 1, bias=False)
    llama.lm_head.scale = plain.weight.detach().abs().max() / 127
    int8 = (plain.weight / llama.lm_head.scale).round().to(torch.int8)
    llama.lm_head.weight = nn.Parameter(int8, requires_grad=False)
    assert_falls_back(llama, "Int8Linear, not a plain torch.nn.Linear")
    bare = nn.Linear(2, 2, bias=False)
    bare.weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.float8_e4m3fn), requires_grad=False)
    assert "quantised (torch.float8_e4m3fn)" in why_not_plain(bare)
    llama.lm_head = plain
    assert_linear(llama)


def test_offloaded_sharded_and_replaced_heads_fall_back(llama):
    assert "offloaded" in why_not_plain(nn.Linear(2, 2, device="meta"))
    gathered = nn.Linear(2, 2)
    gathered.weight = nn.Parameter(torch.empty(0))  # as ZeRO-3 leaves it between forward passes
    assert "sharded away, shape (0,)" in why_not_plain(gathered)
    llama.lm_head.forward = lambda x: nn.functional.linear(x, llama.lm_head.weight)
    assert_falls_back(llama, "the forward of its output head was replaced")


def test_a_head_that_zero_3_gathers_falls_back(llama):
    """As with ZeRO-3, the weight is whole while the head runs and empty when the rewards would be computed."""
    head = llama.lm_head
    whole, empty = head.weight.detach().clone(), torch.empty(0)
    head.weight = nn.Parameter(empty, requires_grad=False)
    head.register_forward_pre_hook(lambda *_: setattr(head.weight, "data", whole))
    head.register_forward_hook(lambda *_: setattr(head.weight, "data", empty))
    assert_falls_back(llama, "sharded away, shape (0,)")


def test_a_reparametrised_head_stays_linear(llama):
    nn.utils.parametrizations.weight_norm(llama.lm_head)
    assert_linear(llama)


def test_fsdp_models_are_read_while_their_weights_are_gathered(llama):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    expected = llama(input_ids=TOKENS).logits
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(llama, mesh=dist.init_device_mesh("cpu", (1,)))
        assert_linear(llama)
        torch.testing.assert_close(llama(input_ids=TOKENS).logits, expected)
        assert_linear(llama)  # the pass before has gathered the weights
        llama.reshard()
        with torch.no_grad():
            llama.model.norm.weight.to_local()[3] = math.nan
        with pytest.raises(EndoRewardError, match=r"'model\.norm\.weight' has NaN"):
            Head(llama)
    finally:
        dist.destroy_process_group()


def test_a_compiled_decoder_stays_linear(llama):
    llama.model.compile(backend="eager")
    assert_linear(llama)


@pytest.mark.parametrize("warm", [False, True])
def test_a_compiled_model_stays_linear_and_the_check_compiles_nothing(llama, warm):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with torch.no_grad():
        tokens = TOKENS[:, :8]  # the shape that the check uses
        expected = llama(input_ids=tokens, use_cache=False).logits
        llama.compile(backend=backend)
        if warm:
            llama(input_ids=tokens, use_cache=False)
        before = len(graphs)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert Head(llama).linear
        assert len(graphs) == before
        logits = llama(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert_linear(llama)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_bad_weights_are_named(llama, name, value):
    with torch.no_grad():
        llama.get_parameter(name).view(-1)[7] = value
    with pytest.raises(EndoRewardError, match=f"model type 'llama'.*parameter '{name}' has NaN or infinite"):
        Head(llama)


def test_large_weights_are_not_bad_weights(llama):
    with torch.no_grad():
        llama.lm_head.weight.fill_(3e38)  # finite, but the sum of two of them is not
    refuse_bad_weights(llama, llama.lm_head)


def test_weights_that_were_never_loaded():
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(FAMILIES.tiny_config(transformers.LlamaConfig))
    with pytest.raises(EndoRewardError, match=r"'model\.embed_tokens\.weight' was never loaded"):
        Head(model)


@pytest.mark.parametrize(
    "cls, config, words",
    [
        ("T5ForConditionalGeneration", "t5", "is an encoder-decoder"),
        ("LlamaForSequenceClassification", "llama", "has no output embedding"),
        ("LlamaModel", "llama", "has no output embedding"),
        ("BertForMaskedLM", "bert", "is not causal"),
        ("BertLMHeadModel", "bert", "is not causal"),
        ("XLNetLMHeadModel", "xlnet", "is not causal"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_are_not_causal(cls, config, words, dtype):
    torch.manual_seed(0)
    config = FAMILIES.tiny_config(CONFIG_MAPPING[config], is_decoder=False, initializer_range=0.3)
    model = getattr(transformers, cls)(config).to(dtype)
    with pytest.raises(EndoRewardError, match=words) as caught:
        Head(model)
    assert cls in str(caught.value) and "\n" not in str(caught.value)


def test_models_that_cannot_be_scored(llama):
    with pytest.raises(EndoRewardError, match="Linear has no output embedding"):
        Head(nn.Linear(2, 2))
    with pytest.raises(EndoRewardError, match="has 4 output heads"):
        Head(FAMILIES.tiny_model("musicgen"))
    llama.model.layers[0].mlp = nn.Linear(3, 3)
    with pytest.raises(EndoRewardError, match="does not run on token ids alone: RuntimeError"):
        Head(llama)
    assert not llama.lm_head._forward_pre_hooks and not llama.lm_head._forward_hooks
