"""bench/cost against torch's flop counter, against the package's sizes, and against docs/scale.md, which quotes it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DeepseekV3Config, GPT2Config, Qwen3MoeConfig

from bench.cost import formulas, page, points, tables
from bench.cost.formulas import Batch, Decoder
from endoreward_fast import EndoRewardModel
from endoreward_fast.kernels.combine import Partials
from endoreward_fast.model.checkpoint import pocket_path
from endoreward_fast.scoring.batching import Budget
from endoreward_fast.scoring.options import ScoreOptions
from endoreward_fast.vocab import chunked, sharded, workspace

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()
RECORD = points.read()
MODEL, BATCH = formulas.find("Qwen2.5-7B"), tables.TYPICAL


def share(model=MODEL, batch=BATCH, **options):
    return formulas.cost(model, batch, **options).head_share


# ------------------------------------------------------------------------------------------------ torch's flop counter


@pytest.mark.parametrize("model", formulas.MODELS, ids=lambda model: model.name)
def test_the_formulas_give_the_flops_that_torch_counts(model):
    """Count whole models on the meta device, and compare their parameters with the formula."""
    config = points.config_of(model)
    assert formulas.of_config(config, model.name) == model
    found = points.flops_of(model)
    assert found["counted_body"] == found["formula_body"]
    assert found["counted_head"] == found["formula_head"]
    assert 0 <= found["parameters"] / found["formula_weights"] - 1 < 2e-4  # norms and biases


@pytest.mark.parametrize(
    ("name", "billions"),
    [("Qwen2.5-0.5B", 0.494), ("Gemma-3-1B", 1.0), ("Qwen2.5-1.5B", 1.54), ("Qwen2.5-7B", 7.62), ("Llama-3.1-8B", 8.03),
     ("Gemma-2-9B", 9.24), ("Qwen3-30B-A3B", 30.5), ("Llama-3.1-70B", 70.6), ("Llama-3.1-405B", 406)],
)  # fmt: skip
def test_published_shapes_have_the_published_number_of_parameters(name, billions):
    assert formulas.find(name).weights / 1e9 == pytest.approx(billions, rel=5e-3)


TINY = dict(
    vocab_size=600, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=24, max_position_embeddings=128, pad_token_id=0,
)  # fmt: skip
MORE = {
    "mixtral": {"num_local_experts": 5, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "gemma2": {"final_logit_softcapping": 5.0, "sliding_window": 8},
    "gemma3_text": {"sliding_window": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]},
}


def tiny(family, **changes):
    config = AutoConfig.for_model(family, **TINY | MORE.get(family, {}) | changes)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()


def of_operator(hidden, weight, bias, targets, mask, *others, out_val=None, **options):
    """Return the flops of the package's operator, whose matmul covers the rows that the mask keeps."""
    return 2 * int(mask.sum()) * hidden.shape[1] * weight.shape[0]


of_operator._get_raw = True  # makes the counter pass tensors instead of shapes


@pytest.mark.parametrize(("count", "cut"), [(7, False), (7, True), (0, True)])
@pytest.mark.parametrize("family", formulas.UNDERSTOOD)
def test_scoring_takes_the_flops_of_the_formula(family, count, cut):
    """Count a whole scoring pass of a tiny model, including the head."""
    model, batch = tiny(family), Batch(rows=3, length=20, scored=count, cut=cut)
    scored = (torch.arange(20) >= 20 - count).expand(3, -1)
    terminal = torch.zeros_like(scored)
    terminal[:, -1] = not cut
    scorer, ids = EndoRewardModel(model), torch.randint(0, 600, (3, 20))
    operator = torch.ops.endoreward_fast.linear_stats
    counter = FlopCounterMode(display=False, custom_mapping={operator: of_operator})
    with torch.inference_mode(), counter:
        scorer.rewards_of_padded(ids, scored, terminal)
    found = formulas.cost(formulas.of_config(model.config), batch, dense=True)
    by_operator = counter.get_flop_counts()["Global"]
    assert by_operator[operator] == found.head
    assert counter.get_total_flops() == found.body + found.head


def test_the_packages_matmuls_take_the_heads_flops():
    """The operator computes one matmul in tiles, which together read each state and each weight row once."""
    config = formulas.of_config(tiny("llama").config)
    matmul = {torch.ops.aten.addmm_: lambda out, a, b, **options: 2 * a[0] * a[1] * b[1]}
    for batch in (Batch(2, 9, 3), Batch(2, 9, 3, cut=True), Batch(1, 9, 8), Batch(3, 9, 0, cut=True)):
        hidden, weight = torch.ones(batch.states, 64), torch.ones(600, 64)
        with FlopCounterMode(display=False, custom_mapping=matmul) as counter:
            chunked.linear_forward(
                hidden, weight, torch.zeros(batch.states, dtype=torch.long), bias=None, logit_scale=1.0, softcap=None,
                alpha=1.0, entropy=False, logit_mean=False,
            )  # fmt: skip
        assert counter.get_total_flops() == formulas.cost(config, batch).head


def test_attention_counts_the_keys_that_the_mask_keeps():
    length, window = 20, 6
    far = torch.ones(length, length).tril()
    near = far - far.tril(-window)
    model = Decoder("windowed", 5, 64, 4, 2, 16, 96, 600, window=window, windowed=2)
    expected = 4 * 3 * (2 * int(near.sum()) + 3 * int(far.sum())) * 4 * 16
    assert formulas.cost(model, Batch(3, length, 1)).attention == expected
    assert formulas.cost(model, Batch(3, length, 1), dense=True).attention == 4 * 3 * 5 * length**2 * 4 * 16


def test_families_that_the_formulas_do_not_cover_are_refused():
    for config in (GPT2Config(), DeepseekV3Config()):
        with pytest.raises(ValueError, match=f"model_type '{config.model_type}': the formulas cover only llama"):
            formulas.of_config(config)
    with pytest.raises(ValueError, match="some layers without experts"):
        formulas.of_config(Qwen3MoeConfig(mlp_only_layers=[0]))
    with pytest.raises(ValueError, match="scored=8: expected 0 to 7 for rows of 8 tokens"):
        Batch(1, 8, 8)


def test_the_line_of_any_model_can_be_printed(capsys):
    page.main(["--model", str(pocket_path())])
    assert "0.000524" in capsys.readouterr().out  # 2 x 256 x 1024 flops a state


# ------------------------------------------------------------------------------------------ sizes in the package


def test_constants_equal_the_packages():
    per_shard = {"start", "size", "mask"}  # one number for each shard, not for each row
    assert len({*sharded.Shards._fields} - per_shard) == formulas.WIRE_FLOATS
    assert (4 * workspace.FORWARD_TILE, workspace.PIECE) == (formulas.TILE, formulas.PIECE)
    assert Budget.of(ScoreOptions().max_tokens_per_batch, torch.device("cuda")).computed == BATCH.tokens


def test_memory_formulas_equal_the_allocations():
    found, states = formulas.cost(MODEL, BATCH), BATCH.states
    left = Partials.empty(-(-MODEL.vocab // workspace.PIECE), states, "meta", entropy=False, logit_mean=False)
    assert found.workspace_bytes == 4 * (workspace.FORWARD_TILE + left.m.numel() + left.s.numel())
    assert formulas.cost(MODEL, Batch(1, 8, 7)).workspace_bytes == 4 * 7 * (MODEL.vocab + 2 * 75)  # less than a tile
    assert found.eager_bytes == 4 * 8192 * 152064


def test_measured_memory_fits_the_formulas():
    """The extra memory of a process includes the matmul library's buffers, some MiB.

    Eager allocates its logits, and logsumexp as much again. Ours allocates neither.
    """
    weighed = RECORD["weighed"]
    found = formulas.cost(points.WEIGHED.model, points.WEIGHED.batch, element=4)
    activations, logits = found.activation_bytes / 2**20, found.eager_bytes / 2**20
    assert activations < weighed["extra_mib"]["body"] < activations + 16
    assert weighed["extra_mib"]["eager"] == pytest.approx(2 * logits, rel=0.01)
    assert weighed["extra_mib"]["whole"] < weighed["extra_mib"]["body"] + 1


def test_shards_split_the_head_and_ranks_split_the_rows():
    whole = formulas.cost(MODEL, BATCH)
    shard, rank = formulas.cost(MODEL, BATCH, shards=8), formulas.cost(MODEL, BATCH, ranks=8)
    assert (8 * shard.head, shard.body) == (whole.head, whole.body)
    assert (8 * rank.head, 8 * rank.body) == (whole.head, whole.body)
    assert whole.head_share + whole.body / (whole.body + whole.head) == pytest.approx(1)
    assert 8 * shard.head_bytes == whole.head_bytes == rank.head_bytes
    assert shard.wire_bytes == 24 * BATCH.states and rank.wire_bytes == whole.wire_bytes == 0
    assert formulas.cost(MODEL, BATCH, ranks=3).projections == whole.projections * 3 // 8  # the rank with the most rows


# ------------------------------------------------------------------------------------------ growth


def test_the_heads_share_grows_with_the_vocabulary_and_the_scored_tokens():
    assert share(replace(MODEL, vocab=2 * MODEL.vocab)) > share()
    assert share(batch=replace(BATCH, scored=2 * BATCH.scored - 1)) > share()
    assert share(batch=replace(BATCH, cut=True)) > share()


def test_the_heads_share_falls_with_width_layers_and_length():
    assert share(replace(MODEL, layers=2 * MODEL.layers)) < share()
    assert share(replace(MODEL, hidden=2 * MODEL.hidden, heads=2 * MODEL.heads, mlp=2 * MODEL.mlp)) < share()
    assert share(batch=replace(BATCH, length=2 * BATCH.length, scored=2 * BATCH.scored)) < share()
    by_size = [share(formulas.find(name)) for name in ("Llama-3.1-8B", "Llama-3.1-70B", "Llama-3.1-405B")]
    assert by_size == sorted(by_size, reverse=True)


def test_the_heads_share_does_not_depend_on_rows_and_ranks():
    assert share(batch=replace(BATCH, rows=3 * BATCH.rows)) == share(ranks=8) == share()


def test_weights_are_read_once_for_each_batch_and_experts_if_used():
    one, two = (formulas.cost(MODEL, replace(BATCH, rows=rows)) for rows in (1, 2))
    assert one.weight_bytes == two.weight_bytes == 2 * (MODEL.weights - MODEL.head_weights)  # without the embedding
    experts = formulas.find("Qwen3-30B-A3B")
    assert experts.experts_met(1) == pytest.approx(experts.active)
    assert 127.9 < experts.experts_met(256) < 128
    assert formulas.cost(experts, Batch(1, 2, 1)).weight_bytes < formulas.cost(experts, BATCH).weight_bytes / 5


# ------------------------------------------------------------------------------------------------------- measurements

SMALL = {"layers": 1, "hidden": 64, "heads": 2, "kv_heads": 1, "head_dim": 32, "mlp": 64, "vocab": 500}


@pytest.mark.parametrize("batch", [Batch(2, 16, 5), Batch(2, 16, 5, cut=True)])
def test_a_point_with_wrong_rewards_is_not_timed(batch, monkeypatch):
    point = points.Point("Qwen2.5-0.5B", batch, SMALL)
    found = points.timed(point, rounds=2)
    assert found["peers"]["whole"]["ratio"] == 1.0
    assert found["measured_share"] == found["peers"]["head"]["ratio"] > 0
    assert found["predicted_share"] == formulas.cost(point.model, batch).head_share
    right = EndoRewardModel.rewards_of_padded
    monkeypatch.setattr(
        EndoRewardModel, "rewards_of_padded", lambda self, ids, scored, end: right(self, ids, scored, ~end)
    )
    with pytest.raises(SystemExit, match="rewards differ from eager's by"):
        points.timed(point, rounds=2)


@pytest.mark.parametrize(("first", "kept"), [((0.2, 0.29), 0.1), ((0.2, 0.31), 0.3)])
def test_a_point_with_quartiles_far_apart_is_measured_again(first, kept, monkeypatch):
    def case(share, low, high):
        return {"measured_share": share, "peers": {"head": {"ratio_low": low, "ratio_high": high}}}

    results = iter([case(0.1, *first), case(0.3, 0.1, 0.9)])
    monkeypatch.setattr(points, "in_a_process", lambda *arguments: next(results))
    found = points.settled(0, 7)
    assert found["measured_share"] == kept
    assert found.get("earlier", []) == ([0.1] if kept == 0.3 else [])


# --------------------------------------------------------------------------------------------------------- the page


@pytest.mark.parametrize(
    "table", [tables.shapes_table(), tables.growth_table(), points.points_table(RECORD)],
    ids=["shapes", "growth", "measured"],
)  # fmt: skip
def test_the_pages_tables_equal_the_generated_ones(table):
    assert tables.markdown(table) + "\n\n" in PAGE


def test_the_pages_tables_are_printed(capsys):
    page.main(["--markdown"])
    assert all(part in PAGE for part in capsys.readouterr().out.strip().split("\n\n"))


def test_a_models_line_is_printed_and_an_uncovered_model_raises_one_line(capsys, tmp_path):
    page.main(["--model", "pocket"])
    config = AutoConfig.from_pretrained(pocket_path())
    [line] = [line for line in capsys.readouterr().out.splitlines() if "pocket" in line]
    assert f" {2e-9 * config.hidden_size * config.vocab_size:.3g} " in line
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match=f"^bench.cost: {re.escape(str(tmp_path))}: [^\n]*$"):
        page.main(["--model", str(tmp_path)])


def test_the_record_follows_these_formulas():
    assert [case["name"] for case in RECORD["timed"]] == [point.name for point in points.POINTS]
    for case, point in zip(RECORD["timed"], points.POINTS, strict=True):
        found = formulas.cost(point.model, point.batch)
        assert (case["body_flops"], case["head_flops"]) == (found.body, found.head)
        assert case["predicted_share"] == found.head_share
    for case in RECORD["counted"]:
        assert (case["counted_body"], case["counted_head"]) == (case["formula_body"], case["formula_head"])


def measured_shares():
    return [(case, case["measured_share"]) for case in RECORD["timed"]]


def by_rates(case):
    """Return the predicted share, corrected for the different speeds of head and body."""
    f, relative = case["predicted_share"], case["head_gflops_per_s"] / case["body_gflops_per_s"]
    return f / (f + (1 - f) * relative)


def test_the_pages_claims_on_measured_shares_hold():
    timed, page = RECORD["timed"], PAGE.replace("\n", " ")
    off = [abs(share / case["predicted_share"] - 1) for case, share in measured_shares()]
    assert len(off) == 10 and sum(one <= 0.2 for one in off) == 6
    assert f"six are within a fifth of the predicted ones, and all within {max(off):.0%}" in page
    nearer = [abs(by_rates(case) - share) < abs(case["predicted_share"] - share) for case, share in measured_shares()]
    assert sum(nearer) == 8 and "of ten measured shares eight are nearer" in page
    farthest = max(abs(by_rates(case) / share - 1) for case, share in measured_shares())
    assert f"and all within {farthest:.0%} of it" in page
    rates = [case["body_gflops_per_s"] / case["head_gflops_per_s"] for case in timed]
    assert f"{1 - rates[-1]:.0%} fewer with experts" in page and f"up to {1 - min(rates[:-1]):.0%} fewer" in page
    again = [case for case in timed if "earlier" in case]
    assert [case["name"] for case in again] == ["Qwen2.5-0.5B, bf16", "Qwen3-30B-A3B, layers 2, bf16"]
    small, experts = ((case["earlier"][0], case["measured_share"]) for case in again)
    assert f"was {small[0]:.1%} when first measured and {small[1]:.1%} then" in page
    assert f"that of the experts {experts[0]:.1%} and {experts[1]:.1%}" in page
    parts = [case["peers"]["head"]["ratio"] + case["peers"]["body"]["ratio"] for case in timed]
    assert f"between {1 - 1 / max(parts):.0%} less and {1 / min(parts) - 1:.0%} more than its two parts" in page
    eager = [case["peers"]["eager"]["ratio"] for case in timed]
    assert f"{min(eager):.2f} to {max(eager):.2f} of our time" in page
    assert timed[eager.index(max(eager))]["name"] == "Qwen2.5-0.5B, bf16"
    extra = RECORD["weighed"]["extra_mib"]
    said = f"body {extra['body']:.0f} MiB", f"whole pass {extra['whole']:.0f}", f"eager {extra['eager']:.0f} "
    assert all(text in PAGE.replace("\n", " ") for text in said)


def test_the_pages_claims_on_the_models_hold():
    shares = {
        m.name: [formulas.cost(m, replace(BATCH, scored=n)).head_share for n in (512, 1023)] for m in formulas.MODELS
    }
    assert all(0.15 < s < 0.3 for name in ("Qwen2.5-0.5B", "Gemma-3-1B") for s in shares[name])
    assert all(s < 0.02 for name in ("Llama-3.1-70B", "Llama-3.1-405B") for s in shares[name])
    assert all(4e9 < formulas.cost(m, BATCH).eager_bytes < 9e9 for m in formulas.MODELS)
