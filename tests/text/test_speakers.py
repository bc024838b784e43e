"""Preference pairs that are dialogues in one text, as in hh-rlhf."""

import pytest

from cli_harness import LengthScorer, put, rows_of, run
from endoreward_fast.command.run import pipeline
from endoreward_fast.data.columns import plan
from endoreward_fast.text.row_flags import FLAGS

ASKED = "\n\nHuman: Why?\n\nAssistant: Which one?\n\nHuman: The sky.\n\nAssistant:"


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        (" It scatters blue.", " It scatters red."),  # shared words belong to the answers, not to the prompt
        (" Blue.", " Blue"),
        (" Blue.", ""),
        (" Blue.", " Blue."),
        (" Blue.", " Red.\n\nHuman: Thanks.\n\nAssistant: No."),
        (" The Assistant: says so.", " The Assistant: says no."),
    ],
)
def test_what_follows_the_last_shared_speaker_is_scored(chosen, rejected):
    task = plan({"chosen": ASKED + chosen, "rejected": ASKED + rejected})
    assert [(s["prompt"], s["completion"]) for s in task.samples] == [(ASKED, chosen), (ASKED, rejected)]
    assert task.flags == ("split_at_speaker",) and set(task.flags) <= set(FLAGS)


def test_answers_that_differ_earlier_are_split_at_the_speaker_before():
    first = "\n\nHuman: Why?\n\nAssistant:"
    task = plan({"chosen": f"{first} Blue.\n\nHuman: So?\n\nAssistant: a", "rejected": f"{first} Red."})
    assert [s["prompt"] for s in task.samples] == [first, first] and task.flags == ("split_at_speaker",)


def test_text_without_speakers_or_with_a_prompt_is_not_split_at_one():
    task = plan({"chosen": "Human: hi Assistant: there", "rejected": "Human: hi Assistant: then so"})
    assert task.samples[0]["prompt"] == "Human: hi Assistant:" and task.flags == ()
    assert plan({"prompt": ASKED, "chosen": " a", "rejected": " b"}).flags == ()


def test_the_flag_reaches_the_output(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "load_scorer", lambda flags: LengthScorer())
    source = put(tmp_path, {"chosen": f"{ASKED} a", "rejected": ASKED})
    (row,) = rows_of(run("score", source).stdout)
    assert row["score"]["chosen"] == -2.0
    assert row["flags"] == {"chosen": ["split_at_speaker"], "rejected": ["split_at_speaker", "empty"]}
    (row,) = rows_of(run("rank", source).stdout)
    assert row["flags"] == [["split_at_speaker"], ["split_at_speaker", "empty"]]
