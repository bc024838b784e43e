"""What `endoreward tune` chose: found by `auto` and by nothing else, and never a reason to fail."""

import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import endoreward_fast as er
from endoreward_fast.vocab import choice, chunked, compiled, machine, tuned, workspace
from endoreward_fast.vocab.tuned import Choice, Entry, Head

N, D, V = 12, 24, 333
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SMALL = Choice("chunked", {"tile": 64, "product": 16})


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """An empty cache folder that `auto` looks into."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(tuned.SWITCH, "1")
    choice.forget()
    yield tmp_path / "endoreward_fast" / "tuned"
    choice.forget()


def entry(found=SMALL, dtype="float32", **about):
    where = replace(machine.machine_of(CPU), **about)
    return Entry(Head(dtype, D, V), where, found, {"candidates": []})


def put(folder, *args, **about):
    path = tuned.write(entry(*args, **about), folder)
    choice.forget()
    return path


@pytest.fixture
def ran(monkeypatch):
    """The (implementation, setting) of every forward that an operator runs."""
    seen = []
    for name, module in (("chunked", chunked), ("compiled", compiled)):
        run = module.linear_forward

        def forward(*args, run=run, name=name, limits=None, **kwargs):
            seen.append((name, limits))
            return run(*args, limits=limits, **kwargs)

        monkeypatch.setattr(module, "linear_forward", forward)
    return seen


def head(dtype=torch.float32):
    torch.manual_seed(0)
    return torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype), torch.randint(0, V, (N,))


def test_without_a_tuning_the_rule_holds(folder, ran):
    er.linear_vocab_stats(*head())
    assert ran == [("chunked", None)] and not folder.exists()


def test_auto_runs_what_was_chosen_for_the_head(folder, ran):
    put(folder)
    limits = replace(chunked.limits_for(CPU), tile=64, product=16)
    hidden, weight, targets = head()
    out = er.linear_vocab_stats(hidden, weight, targets, entropy=True)
    assert ran == [("chunked", limits)]
    torch.testing.assert_close(out, er.linear_vocab_stats(hidden, weight, targets, entropy=True, impl="reference"))
    er.linear_token_rewards(hidden[None], weight, targets[None])
    assert ran[1:] == [("chunked", limits)]


def test_one_choice_holds_for_every_number_of_rows(folder, ran):
    put(folder)
    hidden, weight, targets = head()
    for rows in range(1, N + 1):
        er.linear_vocab_stats(hidden[:rows], weight, targets[:rows])
    assert len(ran) == N and len(set(ran)) == 1


def test_a_named_implementation_another_head_and_another_dtype_are_left_alone(folder, ran):
    put(folder)
    hidden, weight, targets = head()
    er.linear_vocab_stats(hidden, weight, targets, impl="chunked")
    er.linear_vocab_stats(hidden, weight[:-1], targets.clamp(max=V - 2))
    er.linear_vocab_stats(hidden.bfloat16(), weight.bfloat16(), targets)
    er.linear_vocab_stats(hidden, weight.bfloat16(), targets)
    assert ran == [("chunked", None)] * 4
    assert er.vocab_stats(hidden, targets.clamp(max=D - 1)).lse.isfinite().all()


@pytest.fixture
def library():
    """The C++ library, from the machine's own cache folder: a request before `folder` saves building it again."""
    return compiled.library()


@pytest.mark.skipif(compiled.find_compiler() is None, reason="impl='compiled' needs a C++ compiler")
def test_auto_takes_compiled_if_it_was_chosen(library, folder, ran):
    put(folder, Choice("compiled"))
    hidden, weight, targets = head()
    hidden.requires_grad_()
    er.linear_vocab_stats(hidden, weight, targets).lse.sum().backward()
    assert ran == [("compiled", None)]
    expected = torch.autograd.grad(er.linear_vocab_stats(hidden, weight, targets, impl="reference").lse.sum(), hidden)
    torch.testing.assert_close(hidden.grad, expected[0])


def test_a_choice_runs_under_torch_compile(folder, ran):
    put(folder)
    hidden, weight, targets = head()
    step = torch.compile(lambda h: er.linear_vocab_stats(h, weight, targets).lse, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(step(hidden), er.linear_vocab_stats(hidden, weight, targets).lse)
    assert len(set(ran)) == 1 and ran[0][1] is not None


def test_the_operator_passes_opcheck_with_auto():
    hidden, weight, targets = head()
    args = (hidden.requires_grad_(), weight, None, targets, None, None, 1.0, None, 1.0, True, True, "auto", None, None)
    torch.library.opcheck(torch.ops.endoreward_fast.linear_stats.default, args)


def test_a_file_is_looked_for_once_a_head(folder, monkeypatch):
    put(folder)
    hidden, weight, targets = head()
    er.linear_vocab_stats(hidden, weight, targets)
    for name in ("read", "file_name", "tuned_folder"):
        monkeypatch.setattr(tuned, name, lambda *_: pytest.fail("looked again"))
    er.linear_vocab_stats(hidden, weight, targets)


@pytest.mark.parametrize(("value", "used"), [("0", False), ("1", True), ("", True)])
def test_the_environment_variable_ignores_tunings(folder, ran, monkeypatch, value, used):
    monkeypatch.setenv(tuned.SWITCH, value)
    put(folder)
    er.linear_vocab_stats(*head())
    assert (ran[0][1] is not None) is used


def test_another_value_of_the_environment_variable_is_refused(folder, monkeypatch):
    monkeypatch.setenv(tuned.SWITCH, "no")
    with pytest.raises(ValueError, match="ENDOREWARD_TUNED='no': expected 0 "):
        er.linear_vocab_stats(*head())


@pytest.mark.parametrize("field", ["device", "driver", "torch", "triton", "source"])
def test_a_tuning_of_another_machine_is_not_found(folder, ran, field):
    put(folder, **{field: "another"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        er.linear_vocab_stats(*head())
    assert ran == [("chunked", None)]


DAMAGED = {
    "nothing": "",
    "half of it": lambda text: text[: len(text) // 2],
    "no JSON": "\0\xff",
    "a list": "[]",
    "another program's": '{"choice": 1}',
    "an unknown implementation": lambda text: text.replace('"chunked"', '"magic"'),
    "an unknown setting": lambda text: text.replace('"product"', '"magic"'),
    "a setting that is no number": lambda text: text.replace("16", '"many"'),
    "a setting of nothing": lambda text: text.replace("16", "0"),
    "another head's": lambda text: text.replace(f'"vocab": {V}', '"vocab": 7'),
    "another machine's": lambda text: text.replace('"torch": "', '"torch": "0'),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_named_once_and_ignored(folder, ran, case):
    path = put(folder)
    change = DAMAGED[case]
    path.write_text(change if isinstance(change, str) else change(path.read_text()))
    hidden, weight, targets = head()
    with pytest.warns(UserWarning, match=r"\.json is ignored: .*`endoreward tune` measures again") as said:
        er.linear_vocab_stats(hidden, weight, targets)
        er.linear_vocab_stats(hidden, weight, targets)
    assert len(said) == 1 and str(path) in str(said[0].message)
    assert ran == [("chunked", None)] * 2


def test_a_file_that_cannot_be_opened_is_named_and_ignored(folder, ran):
    path = put(folder)
    path.unlink()
    path.mkdir()
    with pytest.warns(UserWarning, match="is ignored"):
        er.linear_vocab_stats(*head())
    assert ran == [("chunked", None)]


def test_compiled_is_ignored_where_the_compiler_has_gone(folder, ran, monkeypatch):
    put(folder, Choice("compiled"))
    monkeypatch.setattr(compiled, "find_compiler", lambda: None)
    with pytest.warns(UserWarning, match=r"'compiled' cannot run: there is no C\+\+ compiler"):
        er.linear_vocab_stats(*head())
    assert ran == [("chunked", None)]


def test_a_machine_without_a_home_folder_has_no_tunings(monkeypatch, ran):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setenv(tuned.SWITCH, "1")
    monkeypatch.setattr(tuned, "cache_folder", homeless)
    choice.forget()
    er.linear_vocab_stats(*head())
    choice.forget()
    assert ran == [("chunked", None)]


def test_files_are_written_whole_and_replace_older_ones(folder):
    first, second = put(folder), put(folder, Choice("compiled"))
    assert first == second and [path.name for path in folder.iterdir()] == [first.name]
    assert tuned.read(first) == entry(Choice("compiled"))
    assert json.loads(first.read_text())["head"] == {"dtype": "float32", "dim": D, "vocab": V}


def test_settings_reach_the_kernels_of_a_gpu(monkeypatch):
    """A choice for a device that is not here becomes the arguments of its backend."""
    from endoreward_fast.kernels.config import LINEAR_SEARCH

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    hidden = SimpleNamespace(device=CUDA, dtype=torch.bfloat16)
    for config in LINEAR_SEARCH:
        run = choice.configured(Choice("fused", vars(config)), hidden, torch.empty(0)).linear_forward
        assert run.keywords == {"config": config}
    run = choice.configured(Choice("chunked", {"tile": 4096}), hidden, torch.empty(0)).linear_forward
    assert run.func is workspace.linear_forward and run.keywords == {"tile": 4096}
    with pytest.raises(TypeError, match="unknown setting of 'chunked' on a GPU: magic"):
        Choice("chunked", {"magic": 1}).arguments(CUDA)
