"""Adapter folders as PEFT and TRL save them score like the merged model, or are refused."""

import importlib.util
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, LlamaForCausalLM

from endoreward_fast import EndoRewardError, EndoRewardModel
from endoreward_fast.model import adapters
from endoreward_fast.rivals.reward_model import RewardModel
from tiny_models import MODELS, ROWS, SIZES, TOKENIZER

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft", "ignore:`is_gradient_checkpointing`")
LORA = {"r": 4, "init_lora_weights": False, "target_modules": ["q_proj", "v_proj"]}
KINDS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 16},
    "dora": {"use_dora": True},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "saved head": {"modules_to_save": ["lm_head"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "base"
    MODELS["llama"]().save_pretrained(folder)
    TOKENIZER.save_pretrained(folder)
    return folder


def trained(model, folder, **config):
    """Save an adapter with random weights in `folder`, so that no part of it is an identity. Return the PEFT model."""
    torch.manual_seed(1)
    found = peft.get_peft_model(model, peft.LoraConfig(**{"task_type": "CAUSAL_LM"} | LORA | config)).eval()
    with torch.no_grad():
        for name, parameter in found.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    found.save_pretrained(folder)
    return found


def of_base(base, folder, **config):
    return trained(AutoModelForCausalLM.from_pretrained(base), folder, **config)


@pytest.fixture(scope="module")
def adapter(base):
    folder = base.parent / "adapter"
    of_base(base, folder)
    return folder


@pytest.mark.filterwarnings("ignore:.*its output head is a peft")
@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_those_of_the_merged_weights(base, tmp_path, kind):
    merged = of_base(base, tmp_path / "a", **KINDS[kind]).merge_and_unload()
    ours = EndoRewardModel.from_pretrained(tmp_path / "a", device="cpu").score(ROWS)
    expected = EndoRewardModel(merged.double(), TOKENIZER).score(ROWS)
    plain = EndoRewardModel.from_pretrained(base, device="cpu").score(ROWS)
    for one, other, before in zip(ours, expected, plain, strict=True):
        assert one.error is None and one.score == pytest.approx(other.score, rel=1e-4, abs=1e-3)
        assert one.num_tokens == 0 or abs(one.score - before.score) > 1e-2


def test_dtypes_and_places_of_the_tokenizer(base, adapter, tmp_path, monkeypatch):
    assert EndoRewardModel.from_pretrained(str(adapter), device="cpu").tokenizer is not None  # the base's
    half = EndoRewardModel.from_pretrained(adapter, dtype="bf16", device="cpu")
    assert half.head.weight.dtype == torch.bfloat16 and half.score(ROWS[:1])[0].error is None
    own = tmp_path / "own"
    shutil.copytree(adapter, own)
    TOKENIZER.save_pretrained(own)
    (own / "chat_template.jinja").write_text("{{ messages }}")
    assert EndoRewardModel.from_pretrained(own, device="cpu").tokenizer.chat_template == "{{ messages }}"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(own, tmp_path / "checkpoints" / "step-5")
    inside = EndoRewardModel.from_pretrained("checkpoints", subfolder="step-5", device="cpu")
    as_transformers = EndoRewardModel.from_pretrained(
        "checkpoints", adapter_kwargs={"subfolder": "step-5"}, adapter_name="mine", device="cpu"
    )
    assert inside.score(ROWS[:1]) == as_transformers.score(ROWS[:1])
    assert inside.tokenizer.chat_template == "{{ messages }}"


@pytest.mark.parametrize("name", ["../base", "base"])
def test_a_relative_base_is_found_here_or_beside_the_adapter(base, adapter, tmp_path, monkeypatch, name):
    moved = tmp_path / "adapter"
    shutil.copytree(adapter, moved)
    renamed(moved, base_model_name_or_path=name)
    if name == "base":
        monkeypatch.chdir(base.parent)
    else:
        (tmp_path / "base").symlink_to(base)
        monkeypatch.chdir("/")
    expected = EndoRewardModel.from_pretrained(adapter, device="cpu").score(ROWS[:1])
    assert EndoRewardModel.from_pretrained(moved, device="cpu").score(ROWS[:1]) == expected


def test_a_whole_model_beside_its_adapter(base, adapter, tmp_path):
    """transformers loads both from one folder. So do we, and the model's checkpoint is still checked."""
    shutil.copytree(base, tmp_path / "both")
    shutil.copytree(adapter, tmp_path / "both", dirs_exist_ok=True)
    renamed(tmp_path / "both", base_model_name_or_path="/elsewhere")
    expected = EndoRewardModel.from_pretrained(adapter, device="cpu").score(ROWS[:1])
    assert EndoRewardModel.from_pretrained(tmp_path / "both", device="cpu").score(ROWS[:1]) == expected
    LlamaForCausalLM.from_pretrained(base).model.save_pretrained(tmp_path / "both")
    renamed(tmp_path / "both", "config.json", architectures=None)
    refused(tmp_path / "both", "checkpoint lacks 'lm_head.weight'")


def renamed(folder, file="adapter_config.json", **changes):
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(name, said, load=EndoRewardModel.from_pretrained, **options):
    with pytest.raises(EndoRewardError, match=said) as caught:
        load(name, device="cpu", **options)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert name.name in str(caught.value)


def test_a_faulty_adapter_is_an_error_of_one_line(base, adapter, tmp_path, monkeypatch):
    def changed(name, **changes):
        shutil.copytree(adapter, tmp_path / name)
        renamed(tmp_path / name, **changes)
        return tmp_path / name

    refused(changed("lost", base_model_name_or_path="/lost/base"), "adapter of '/lost/base'.*no such folder")
    refused(changed("nameless", base_model_name_or_path=None), "names no base_model_name_or_path")
    refused(changed("over", base_model_name_or_path=str(adapter)), "is an adapter itself")
    refused(changed("shape", r=3), "does not fit")
    refused(changed("other layers", target_modules=["c_attn"]), "does not fit")
    refused(changed("more layers", target_modules=["q_proj", "v_proj", "k_proj"]), "does not fit.*lacks.*k_proj")
    refused(changed("fewer layers", target_modules=["q_proj"]), "does not fit.*v_proj")
    refused(changed("type", peft_type="HOUSE"), "does not fit.*HOUSE")
    refused(changed("prompt", peft_type="PROMPT_TUNING", num_virtual_tokens=3), "is a PROMPT_TUNING")
    refused(changed("classifier", task_type="SEQ_CLS"), "of a classifier")
    (changed("torn") / "adapter_model.safetensors").write_bytes(b"\0" * 100)
    refused(tmp_path / "torn", "does not fit")
    (changed("empty") / "adapter_model.safetensors").unlink()
    refused(tmp_path / "empty", "does not fit")
    larger = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 400}))
    trained(larger, tmp_path / "larger", modules_to_save=["lm_head"])
    renamed(tmp_path / "larger", base_model_name_or_path=str(base))
    refused(tmp_path / "larger", "does not fit.*(400|lm_head)")
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    refused(adapter, r"peft is not installed: pip install peft")
    assert importlib.util.find_spec("peft")


@pytest.mark.parametrize("of", ["causal", "classifier"])
def test_the_adapter_of_a_reward_model(base, tmp_path, of):
    """TRL's RewardTrainer puts a head on a causal model, and saves it with the adapter."""
    start = base
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    if of == "classifier":
        start = tmp_path / "start"
        model.save_pretrained(start)
        TOKENIZER.save_pretrained(start)
    found = trained(model, tmp_path / "rm", task_type="SEQ_CLS", modules_to_save=["score"])
    renamed(tmp_path / "rm", base_model_name_or_path=str(start))
    scorer = RewardModel.from_pretrained(tmp_path / "rm", device="cpu")
    rows = [{"prompt": "a", "completion": "bc"}, {"prompt": "What", "completion": " is it?"}]
    for row, result in zip(rows, scorer.score(rows), strict=True):
        ids = TOKENIZER(row["prompt"] + row["completion"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = found(input_ids=ids).logits[0, 0].item()
        assert result.error is None and result.score == pytest.approx(expected, rel=1e-4, abs=1e-4)
    refused(tmp_path / "rm", "of a classifier, not of a causal")
    of_base(base, tmp_path / "causal")
    refused(tmp_path / "causal", "LlamaForCausalLM, which is not a reward model", RewardModel.from_pretrained)


def test_an_adapter_and_its_base_in_the_cache_of_the_hub(base, adapter, tmp_path, monkeypatch):
    from huggingface_hub import constants

    from endoreward_fast.model.checkpoint import weights_of

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def cached(name, folder, commit):
        repository = tmp_path / f"models--me--{name}"
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        return repository / "snapshots" / commit

    one, two = "1" * 40, "2" * 40
    cached("base", base, one)
    renamed(cached("adapter", adapter, two), base_model_name_or_path="me/base")
    found = EndoRewardModel.from_pretrained("me/adapter", device="cpu", cache_dir=str(tmp_path))
    assert found.score(ROWS[:1]) == EndoRewardModel.from_pretrained(adapter, device="cpu").score(ROWS[:1])
    assert weights_of("me/adapter", cache_dir=str(tmp_path)) == f"commit {two} on commit {one}"
    renamed(tmp_path / "models--me--adapter" / "snapshots" / two, base_model_name_or_path="me/gone")
    with pytest.raises(EndoRewardError, match=r"me/gone") as caught:
        EndoRewardModel.from_pretrained("me/adapter", device="cpu", cache_dir=str(tmp_path))
    assert "\n" not in str(caught.value) and "me/adapter" in str(caught.value)


def resized(model, rows, folder, **config):
    """Save an adapter of a base whose vocabulary was resized to `rows` before training."""
    model.resize_token_embeddings(rows, mean_resizing=False)
    return trained(model, folder, **config)


@pytest.mark.filterwarnings("ignore:.*its output head is a peft", "ignore:.*tied")
@pytest.mark.parametrize("rows", [370, 400, 448])
@pytest.mark.parametrize(
    "config",
    [
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {},  # PEFT saves embeddings that were resized
        {"target_modules": ["q_proj", "embed_tokens", "lm_head"]},
    ],
    ids=str,
)
def test_an_adapter_whose_vocabulary_was_resized(base, tmp_path, rows, config):
    merged = resized(AutoModelForCausalLM.from_pretrained(base), rows, tmp_path / "a", **config).merge_and_unload()
    scorer = EndoRewardModel.from_pretrained(tmp_path / "a", device="cpu")
    assert scorer.vocab_size == rows and scorer.max_positions == 128
    expected = EndoRewardModel(merged.double(), TOKENIZER).score(ROWS)
    for one, other in zip(scorer.score(ROWS), expected, strict=True):
        assert one.error is None and one.score == pytest.approx(other.score, rel=1e-4, abs=1e-3)


@pytest.mark.filterwarnings("ignore:.*tied")
@pytest.mark.parametrize(
    "config", [{}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}], ids=str
)
def test_an_adapter_whose_tied_vocabulary_was_resized(base, tmp_path, config):
    torch.manual_seed(0)
    tied = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True))
    tied.save_pretrained(tmp_path / "tied")
    TOKENIZER.save_pretrained(tmp_path / "tied")
    found = resized(LlamaForCausalLM.from_pretrained(tmp_path / "tied"), 400, tmp_path / "a", **config)
    expected = EndoRewardModel(found, TOKENIZER).score(ROWS)
    for one, other in zip(
        EndoRewardModel.from_pretrained(tmp_path / "a", device="cpu").score(ROWS), expected, strict=True
    ):
        assert one.error is None and one.score == pytest.approx(other.score, rel=1e-4, abs=1e-3)


def test_a_vocabulary_that_was_resized_but_not_saved_is_refused(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    resized(model, 400, tmp_path / "half", modules_to_save=["embed_tokens"])
    weights = load_file(tmp_path / "half" / "adapter_model.safetensors")
    kept = {key: x for key, x in weights.items() if "lm_head" not in key}
    save_file(kept, tmp_path / "half" / "adapter_model.safetensors", metadata={"format": "pt"})
    refused(tmp_path / "half", "holds 400 rows of .model.embed_tokens.*384.*save_embedding_layers")


def test_a_base_that_cannot_be_found_is_named_with_its_adapter(adapter, tmp_path, monkeypatch):
    def unreachable():
        raise EndoRewardError("no network")

    monkeypatch.setattr("huggingface_hub.get_session", unreachable)
    for base, said in (
        ("meta-llama/Llama-3.2-1B", "it is not in the cache"), ("gpt2", "it is not in the cache"),
        ("no name", "no model of the Hub has that name"), ("pockett", "did you mean 'pocket'"),
    ):  # fmt: skip
        shutil.copytree(adapter, tmp_path / base)
        renamed(tmp_path / base, base_model_name_or_path=base)
        refused(tmp_path / base, f"is an adapter of '{base}', and .*{said}.*base_model_name_or_path")
