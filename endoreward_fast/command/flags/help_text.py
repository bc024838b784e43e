"""Text that --help prints below the flags: examples, and the columns that a file needs."""

from __future__ import annotations

ROOT = """\
Examples:
  endoreward demo
  endoreward score rows.jsonl -m Qwen/Qwen2.5-0.5B-Instruct -o scored.jsonl
  endoreward COMMAND --help     flags, examples and columns of a command

Exit codes: 0 success; 1 doctor found wrong numbers; 2 bad input or a row without a score; 130 Ctrl-C."""

_SINGLE = """\
  prompt and completion           aliases: question; response, answer
  messages                        a chat; its last turn is scored
  prompt_ids and completion_ids   token ids as they were sampled"""
_SEVERAL = """\
  prompt and completions          a list for one prompt; alias: responses"""
_PAIR = """\
  prompt, chosen and rejected     each one completion, or a list of them
  chosen and rejected             two chats; their common start is the prompt"""
_SIGNALS = """\
  answer_span, reference_answer,  optional; some of --signals need them
  privileged"""
_HEADING = "Columns of FILE (a text may also be a list of chat messages):"

SCORE = f"""\
Examples:
  endoreward score rows.jsonl -m Qwen/Qwen2.5-0.5B-Instruct -o scored.jsonl
  zcat rows.jsonl.gz | endoreward score - -m MODEL --per-token --signals all

{_HEADING}
{_SINGLE}
{_SEVERAL}
{_PAIR}
{_SIGNALS}"""

RANK = f"""\
Examples:
  endoreward rank rows.jsonl -m Qwen/Qwen2.5-0.5B-Instruct -o ranked.jsonl
  endoreward rank rows.jsonl -m MODEL --reduction mean

{_HEADING}
{_SEVERAL}
{_PAIR}"""

EVAL = f"""\
Examples:
  endoreward eval pairs.jsonl -m Qwen/Qwen2.5-0.5B-Instruct -o found.json
  endoreward eval pairs.jsonl -m MODEL --signals all --judge verifier

{_HEADING}
{_PAIR}
  subset                          optional; results are also given by subset
Files of benchmarks, recognised by their columns:
  RM-Bench, RewardBench           as published
  RewardBench 2                   the same, and num_correct
  JudgeBench                      question, response_A, response_B, label
  RMGAP                           domain, responses, prompt_groups
  ProcessBench                    problem, steps, label
{_SIGNALS}"""

SHOW = f"""\
Examples:
  endoreward show --prompt "2 + 3 =" --completion 5 --completion 6
  endoreward show rows.jsonl -m MODEL --html out.html

{_HEADING}
{_SINGLE}
{_SEVERAL}
{_PAIR}"""

PLOT = f"""\
Examples:
  endoreward plot rows.jsonl -m MODEL
  endoreward plot pairs.jsonl -m MODEL -o rewards.svg

{_HEADING}
{_SINGLE}
{_SEVERAL}
{_PAIR}"""

DEMO = """\
Examples:
  endoreward demo
  endoreward demo -m Qwen/Qwen2.5-0.5B-Instruct

Without --model it needs no network, because the package contains the model."""

SERVE = """\
Examples:
  endoreward serve -m Qwen/Qwen2.5-0.5B-Instruct
  curl -H 'Content-Type: application/json' http://127.0.0.1:8000/v1/rewards \\
    -d '{"rows": [{"prompt": "What is 2 + 3?", "completions": ["5", "6"]}]}'
  endoreward serve -m MODEL --host 0.0.0.0 --token-file token.txt

Paths: /v1/rewards, /get_reward (OpenRLHF), /slime, /classify and /pooling
(vLLM's, as verl asks); /docs explains them; /health, /ready, /metrics."""

TUNE = """\
Examples:
  endoreward tune -m Qwen/Qwen2.5-0.5B-Instruct
  endoreward tune --shape 1024,151936 --dtype bf16
  endoreward tune --show

The choice holds for one device, dtype and shape of the head, and for any
number of rows. Named implementations, such as impl="fused", do not change.
ENDOREWARD_TUNED=0 ignores all choices."""

DOCTOR = """\
Examples:
  endoreward doctor
  endoreward doctor --json > report.json

Exit codes: 0 everything that should run gives right numbers; 1 otherwise."""
