"""Compare bench.cost's formulas with torch's flop counter and with measurements, on random weights of real shapes.

Flops of whole models, up to 405B, are counted on the meta device without computing anything. Times are measured on the
CPU, interleaved as in timing.py; memory is measured in a fresh process for each call.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)

from bench.cost import formulas, tables
from bench.cost.formulas import Batch, Decoder
from bench.harness import timing
from bench.harness.cases import DTYPES
from bench.harness.memory import _status_kib
from endoreward_fast import EndoRewardModel, linear_token_rewards

FAMILIES = {
    "Qwen2.5": Qwen2Config, "Qwen3": Qwen3MoeConfig, "Llama": LlamaConfig, "Gemma-2": Gemma2Config,
    "Gemma-3": Gemma3TextConfig,
}  # fmt: skip
WHOLE, BODY, HEAD, EAGER = "whole", "body", "head", "eager"


@dataclass(frozen=True)
class Point:
    """One measurement: a published shape, with `changes` such as fewer layers or another vocabulary."""

    shape: str
    batch: Batch
    changes: dict[str, int] = field(default_factory=dict)
    dtype: str = "fp32"

    @property
    def model(self) -> Decoder:
        return replace(formulas.find(self.shape), **self.changes)

    @property
    def name(self) -> str:
        said = "".join(f", {name} {value}" for name, value in self.changes.items())
        return f"{self.shape}{said}, {self.dtype}"


POINTS = (
    Point("Qwen2.5-0.5B", Batch(1, 512, 511)),
    Point("Qwen2.5-0.5B", Batch(1, 512, 128)),
    Point("Qwen2.5-0.5B", Batch(1, 512, 511), {"vocab": 32768}),
    Point("Qwen2.5-0.5B", Batch(1, 512, 511), dtype="bf16"),
    Point("Qwen2.5-0.5B", Batch(8, 256, 255), {"layers": 6, "vocab": 32768}),
    Point("Qwen2.5-0.5B", Batch(1, 2048, 2047), {"layers": 6, "vocab": 32768}),
    Point("Qwen2.5-1.5B", Batch(1, 256, 255)),
    Point("Gemma-3-1B", Batch(1, 256, 255)),
    Point("Llama-3.1-8B", Batch(1, 256, 255), {"layers": 4}, "bf16"),
    Point("Qwen3-30B-A3B", Batch(1, 512, 511), {"layers": 2}, "bf16"),
)
UNSETTLED = 1.5
"""ratio of upper to lower quartile above which a point is measured again"""
WEIGHED = Point("Qwen2.5-0.5B", Batch(4, 512, 256), {"layers": 4})


def config_of(model: Decoder) -> PreTrainedConfig:
    """Return a transformers config with these sizes, of the family that the name starts with."""
    family = next(kind for name, kind in FAMILIES.items() if model.name.startswith(name))
    more = {}
    if model.window:
        more = {"sliding_window": model.window}
    if model.experts:
        more = {
            "num_experts": model.experts, "num_experts_per_tok": model.active, "moe_intermediate_size": model.mlp
        }  # fmt: skip
    return family(
        vocab_size=model.vocab, hidden_size=model.hidden, intermediate_size=model.mlp, num_hidden_layers=model.layers,
        num_attention_heads=model.heads, num_key_value_heads=model.kv_heads, head_dim=model.head_dim,
        tie_word_embeddings=model.tied, max_position_embeddings=32768, **more,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- flops


def counted(config: PreTrainedConfig, batch: Batch) -> tuple[int, int]:
    """Return (flops of the body, flops of the head at the batch's states) by torch's counter, with dense attention."""
    model = on_meta(config)
    ids = torch.zeros(batch.rows, batch.length, dtype=torch.long, device="meta")
    mask = torch.zeros(batch.rows, 1, batch.length, batch.length, dtype=model.dtype, device="meta")
    by_kind = getattr(config, "layer_types", None)  # models with layer types take one mask for each type
    given = {"full_attention": mask, "sliding_attention": mask} if by_kind else mask
    states = torch.zeros(batch.states, config.hidden_size, dtype=model.dtype, device="meta")
    body, head = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with torch.no_grad():
        with body:
            model.get_decoder()(input_ids=ids, attention_mask=given, use_cache=False)
        with head:
            model.get_output_embeddings()(states)
    return body.get_total_flops(), head.get_total_flops()


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model on the meta device. Only batched_mm experts work there, because they do not read the routing."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            config, attn_implementation="eager", experts_implementation="batched_mm", dtype=torch.bfloat16
        ).eval()


def flops_of(model: Decoder) -> dict:
    batch = Batch(2, 64, 32)
    body, head = counted(config_of(model), batch)
    found = formulas.cost(model, batch, dense=True)
    numel = sum(p.numel() for p in on_meta(config_of(model)).parameters())
    return {
        "name": model.name, "counted_body": body, "formula_body": found.body, "counted_head": head,
        "formula_head": found.head, "parameters": numel, "formula_weights": model.weights,
    }  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- times


def calls_of(point: Point) -> dict:
    """Return {peer: call}; the first is the baseline. Exit if our rewards differ from eager's."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(point.model), dtype=DTYPES[point.dtype]).eval()
    scorer, batch = EndoRewardModel(model), point.batch
    ids = torch.randint(0, point.model.vocab, (batch.rows, batch.length))
    scored = (torch.arange(batch.length) >= batch.length - batch.scored).expand(batch.rows, -1)
    terminal = torch.zeros_like(scored)
    terminal[:, -1] = not batch.cut
    decoder, weight = model.get_decoder(), scorer.head.weight

    def body():
        return decoder(input_ids=ids, use_cache=False).last_hidden_state

    def eager():
        logits = model(input_ids=ids, use_cache=False).logits.float()
        value = torch.logsumexp(logits, -1)
        q = logits[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        after = torch.where(terminal[:, 1:], 0.0, value[:, 1:])
        return torch.where(scored[:, 1:], q - after, 0.0)

    states = body()
    calls = {
        WHOLE: lambda: scorer.rewards_of_padded(ids, scored, terminal).reward,
        BODY: body,
        HEAD: lambda: linear_token_rewards(states, weight, ids, mask=scored, terminal=terminal),
        EAGER: eager,
    }
    gap = (calls[WHOLE]()[:, 1:] - eager()).abs().max().item()
    if gap > (1e-3 if point.dtype == "fp32" else 0.25):
        raise SystemExit(f"{point.name}: rewards differ from eager's by {gap}; nothing was timed")
    return calls


def settled(number: int, rounds: int) -> dict:
    """Run `timed` in a separate process. If the quartiles are far apart, run it again and keep the second result."""
    found = in_a_process("time", str(number), str(rounds))
    head = found["peers"][HEAD]
    if head["ratio_high"] > UNSETTLED * head["ratio_low"]:
        found = in_a_process("time", str(number), str(rounds)) | {"earlier": [found["measured_share"]]}
    return found


def timed(point: Point, rounds: int) -> dict:
    """Time the whole pass, the body, the head and eager, each once in every round."""
    with torch.inference_mode():
        times = timing.interleave(calls_of(point), rounds)
    peers = {name: timing.spread(t, times[WHOLE]) for name, t in times.items()}
    found = formulas.cost(point.model, point.batch, element=DTYPES[point.dtype].itemsize)
    return {
        "name": point.name, **asdict(point.batch), "rounds": rounds, "baseline": WHOLE,
        "body_flops": found.body, "head_flops": found.head, "predicted_share": found.head_share,
        "measured_share": peers[HEAD]["ratio"], "body_gflops_per_s": found.body / peers[BODY]["median_s"] / 1e9,
        "head_gflops_per_s": found.head / peers[HEAD]["median_s"] / 1e9, "peers": peers,
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- memory


def weighed(point: Point) -> dict:
    """Measure the extra memory of one call in MiB, beside the formulas' values."""
    found = formulas.cost(point.model, point.batch, element=DTYPES[point.dtype].itemsize)
    return {
        "name": point.name, **asdict(point.batch),
        "extra_mib": {name: in_a_process("weigh", name) for name in (BODY, WHOLE, EAGER)},
        "formula_mib": {"activations": found.activation_bytes / 2**20, "logits": found.eager_bytes / 2**20},
    }  # fmt: skip


def extra_mib(point: Point, name: str) -> float:
    with torch.inference_mode():
        call = calls_of(point)[name]
        call()
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
        before = _status_kib("VmRSS")
        call()
    return (_status_kib("VmHWM") - before) / 1024


def in_a_process(*arguments: str) -> Any:
    """Run this module with these arguments and parse its output. The process's end frees all its memory."""
    settings = dict(os.environ) | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "bench.cost.points", *arguments]
    run = subprocess.run(command, env=settings if "weigh" in arguments else None, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


# ---------------------------------------------------------------------------------------------------------- the record


def points_table(record: dict) -> tables.Table:
    headings = [
        "random weights", "N", "scored", "head's share, predicted", "measured", "quartiles",
        "body, GFLOP/s", "head, GFLOP/s", "eager / ours",
    ]  # fmt: skip
    rows = []
    for case in record["timed"]:
        head, eager = case["peers"][HEAD], case["peers"][EAGER]
        rows.append([
            case["name"], f"{case['rows']} x {case['length']}", f"{case['rows']} x {case['scored']}",
            f"{case['predicted_share']:.1%}", f"{case['measured_share']:.1%}",
            f"{head['ratio_low']:.1%} to {head['ratio_high']:.1%}", f"{case['body_gflops_per_s']:.0f}",
            f"{case['head_gflops_per_s']:.0f}", f"{eager['ratio']:.2f}",
        ])  # fmt: skip
    return headings, rows


def read(folder: Path | None = None) -> dict:
    """Read the record: {"environment", "counted", "timed", "weighed"}."""
    cases = json.loads(((folder or timing.RESULTS) / "cost.json").read_text())
    return {"environment": cases["environment"]} | cases["cases"][0]


def run(folder: Path | None, rounds: int, *, tables_only: bool) -> None:
    """Measure, write the record and print the tables. With `tables_only`, print them from the existing record."""
    shown = {"Shapes": tables.shapes_table(), "One change at a time": tables.growth_table()}
    if tables_only:
        print("\n\n".join(tables.markdown(t) for t in (*shown.values(), points_table(read(folder)))))
        return
    record = {"counted": [flops_of(model) for model in formulas.MODELS], "timed": [], "weighed": None}
    environment = timing.environment()
    for i, point in enumerate(POINTS):
        record["timed"].append(settled(i, rounds))
        print(point.name, f"{record['timed'][-1]['measured_share']:.1%}", flush=True)
        timing.write("cost", environment, [record], folder)
    record["weighed"] = weighed(WEIGHED)
    path = timing.write("cost", environment, [record], folder)
    for title, table in (shown | {"Measured": points_table(read(folder))}).items():
        tables.show(title, table)
    print(record["weighed"], path, sep="\n")


if __name__ == "__main__":
    what, *said = sys.argv[1:]
    print(json.dumps(extra_mib(WEIGHED, *said) if what == "weigh" else timed(POINTS[int(said[0])], int(said[1]))))
