"""bench/paper's tabular claims: values and losses against brute force, and known properties of the measures."""

import importlib
import json
import math

import numpy as np
import pytest
import torch

from bench.paper import instances, iterate, policy, reward
from bench.paper import mdp as tabular
from bench.paper.output import RESULTS
from bench.paper.scaling import exponent

ALPHA = 0.7


@pytest.fixture
def mdp():
    return tabular.random_mdp(np.random.default_rng(5), horizon=4, states=5, vocab=3, prompts=2)


def sums(mdp, start, table):
    """Return the sum of `table` along every completion."""
    return tabular.per_token(mdp, start, tabular.all_completions(mdp), table).sum(-1)


def test_soft_values_match_all_completions(mdp):
    """exp(V(prompt) / alpha) = sum over completions of exp(R / alpha), and pi(completion) = exp((R - V) / alpha)."""
    q, v = tabular.action_values(mdp, mdp.reward, ALPHA)
    log_pi = torch.log(tabular.policy_of(q, ALPHA))
    best = tabular.action_values(mdp, mdp.reward, 0)[1]
    for start in mdp.starts.tolist():
        total = sums(mdp, start, mdp.reward)
        assert v[0, start].item() == pytest.approx(ALPHA * torch.logsumexp(total / ALPHA, 0).item())
        torch.testing.assert_close(sums(mdp, start, log_pi), (total - v[0, start]) / ALPHA)
        assert best[0, start].item() == pytest.approx(total.max().item())


def test_returns_and_visits_match_all_completions(mdp):
    pi = torch.softmax(torch.randn(mdp.reward.shape, dtype=torch.float64), -1)
    by_hand, seen = 0.0, torch.zeros(mdp.horizon, mdp.states, dtype=torch.float64)
    completions = tabular.all_completions(mdp)
    for start in mdp.starts.tolist():
        p = tabular.per_token(mdp, start, completions, pi).prod(-1) / len(mdp.starts)
        by_hand += (p * sums(mdp, start, mdp.reward)).sum().item()
        state = torch.full((len(completions),), start)
        for h in range(mdp.horizon):
            seen[h].index_add_(0, state, p)
            state = mdp.next_state[h, state, completions[:, h]]
    assert tabular.expected_return(mdp, pi) == pytest.approx(by_hand)
    torch.testing.assert_close(tabular.visits(mdp, pi), seen)


def test_demonstrations_have_the_policys_distribution(mdp):
    pi = torch.softmax(torch.randn(mdp.reward.shape, dtype=torch.float64), -1)
    n = 100_000
    counts = tabular.demonstrations(mdp, pi, n, np.random.default_rng(0))
    assert (counts.sum((1, 2)) == n).all()
    p = tabular.visits(mdp, pi)[..., None] * pi
    assert ((counts / n - p).abs() <= 5 * (p * (1 - p) / n).sqrt() + 1e-12).all()


def test_the_fit_is_maximum_likelihood_with_pseudo_counts(mdp):
    counts = tabular.demonstrations(mdp, torch.full_like(mdp.reward, 1 / 3), 50, np.random.default_rng(0)).double()
    z = tabular.fit(counts, ALPHA).requires_grad_()
    likelihood = ((counts + 0.5) * torch.log_softmax(z / ALPHA, -1)).sum()
    (slope,) = torch.autograd.grad(likelihood, z)
    assert slope.abs().max() < 1e-9  # a maximum: the likelihood is concave
    assert z.mean(-1).abs().max() < 1e-12


def test_the_experts_logits_give_the_true_reward(mdp):
    q, _ = tabular.action_values(mdp, mdp.reward, ALPHA)
    torch.testing.assert_close(tabular.endogenous(mdp, q, ALPHA, exact=True), mdp.reward)
    torch.testing.assert_close(tabular.endogenous(mdp, q, ALPHA), mdp.reward, rtol=1e-5, atol=1e-5)
    for start in mdp.starts.tolist():
        completions = tabular.all_completions(mdp)
        ours = tabular.completion_rewards(mdp, start, completions, q, ALPHA)
        truth = tabular.per_token(mdp, start, completions, mdp.reward)
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


def test_a_constant_per_state_is_shaping(mdp):
    """They change the reward of every token, but no difference between two completions."""
    q, _ = tabular.action_values(mdp, mdp.reward, ALPHA)
    shifted = q + torch.randn(*q.shape[:2], 1, dtype=q.dtype)
    found = tabular.endogenous(mdp, shifted, ALPHA, exact=True)
    assert (found - mdp.reward).abs().max() > 0.1
    for start in mdp.starts.tolist():
        difference = sums(mdp, start, found) - sums(mdp, start, mdp.reward)
        torch.testing.assert_close(difference, difference[:1].expand_as(difference))
    errors = reward.errors(mdp, q, shifted, ALPHA)
    assert errors["raw"] > 0.1 and max(errors["difference"], errors["unshaped"], errors["largest"]) < 1e-4
    assert errors["order"] == 1.0


def test_errors_of_completions_follow_their_definitions(mdp):
    """Check the rms over two completions drawn from the expert, and the largest over all pairs of a prompt."""
    q, _ = tabular.action_values(mdp, mdp.reward, ALPHA)
    logits = q + 0.3 * torch.randn_like(q)
    found = reward.completion_errors(mdp, q, logits, ALPHA)
    squares, largest = [], []
    for start in mdp.starts.tolist():
        p = tabular.per_token(mdp, start, tabular.all_completions(mdp), tabular.policy_of(q, ALPHA)).prod(-1)
        off = sums(mdp, start, tabular.endogenous(mdp, logits, ALPHA, exact=True)) - sums(mdp, start, mdp.reward)
        pairs = off[:, None] - off[None, :]
        squares.append((p[:, None] * p[None, :] * pairs**2).sum().item())
        largest.append(pairs.abs().max().item())
    assert found["difference"] == pytest.approx(math.sqrt(sum(squares) / 2), rel=1e-4)
    assert found["largest"] == pytest.approx(max(largest), rel=1e-4)


def test_the_cliffs_loss_follows_from_its_exit_probability():
    """Leaving the track at step h, with probability eps per step, costs the H - h steps left."""
    horizon, n = 12, 400
    instance = instances.cliff(horizon, n, np.random.default_rng(0))
    model = tabular.policy_of(instance.logits, instance.alpha)
    leave = model[:, 0, instances.RIGHT :].sum(-1)
    assert leave.tolist() == pytest.approx([6 * 0.5 / (n + 4)] * horizon)
    stay = model[:, 0, : instances.RIGHT] @ instance.mdp.reward[0, 0, : instances.RIGHT]
    wanted, alive = 0.0, 1.0
    for h in range(horizon):
        wanted, alive = wanted + alive * stay[h].item(), alive * (1 - leave[h].item())
    assert tabular.expected_return(instance.mdp, model) == pytest.approx(wanted)


def test_losses_of_policies_match_all_completions(mdp):
    """Compute each of policy.errors from all completions, without dynamic programming."""
    q, _ = tabular.action_values(mdp, mdp.reward, ALPHA)
    logits = q + 2 * torch.randn(q.shape, dtype=q.dtype, generator=torch.Generator().manual_seed(2))
    found = policy.errors(instances.Instance(mdp, ALPHA, q, logits))
    completions, losses = tabular.all_completions(mdp), []
    for start in mdp.starts.tolist():
        total = sums(mdp, start, mdp.reward)
        log_model = sums(mdp, start, torch.log_softmax(logits / ALPHA, -1))
        log_expert = torch.log_softmax(total / ALPHA, 0)
        greedy = tabular.along(mdp, start, completions, logits).argmax(-1)
        (followed,) = (greedy == completions).all(-1).nonzero(as_tuple=True)
        best = sums(mdp, start, tabular.endogenous(mdp, logits, ALPHA, exact=True)).argmax()
        model, expert = ((log.exp() * total).sum() for log in (log_model, log_expert))
        losses.append(
            {
                "imitation": expert - model,
                "imitation_soft": ALPHA * (log_model.exp() * (log_model - log_expert)).sum(),  # alpha KL
                "imitation_optimum": total.max() - model,
                "endogenous": total.max() - total[best],
                "greedy": total.max() - total[followed.item()],
                "expert": total.max() - expert,
            }
        )
    for name in losses[0]:
        assert found[name] == pytest.approx(np.mean([loss[name].item() for loss in losses])), name
    assert len({round(found[name], 6) for name in losses[0]}) == len(
        losses[0]
    )  # all differ, so that a mix-up would fail


def test_the_maximiser_fails_where_the_model_is_confident_off_its_data():
    sure, modest = (
        policy.errors(build(32, 4000, np.random.default_rng(0))) for build in (instances.confident, instances.cliff)
    )
    assert sure["endogenous"] == pytest.approx(32)  # it leaves at once and earns nothing
    assert modest["endogenous"] < modest["imitation"] == pytest.approx(sure["imitation"])
    assert sure["greedy"] == modest["greedy"] < 0.2


def test_imitation_compounds_on_the_cliff_and_the_maximiser_does_not():
    horizons = (8, 16, 32, 64, 128)
    found = policy.measure(range(16), {"cliff": horizons, "walk": (10, 18, 34, 66)})
    fits = found["cliff"]["exponents"]
    assert 1.9 < fits["imitation"].value < 2.05
    assert fits["endogenous"].high < 1.5 < fits["imitation"].low
    assert found["walk"]["exponents"]["imitation"].value == pytest.approx(1.5, abs=0.05)
    assert (found["walk"]["errors"]["endogenous"] == 0).all()


def test_the_walk_has_its_stated_error_in_every_state():
    walk = instances.walk(18)
    ratio = torch.log_softmax(walk.logits / walk.alpha, -1) - torch.log_softmax(walk.values / walk.alpha, -1)
    assert ratio.abs().max().item() == pytest.approx(instances.WALK_ERROR)
    with pytest.raises(ValueError, match="twice an odd number"):
        instances.walk(16)


def test_a_second_round_changes_rewards_by_shaping_only():
    found = iterate.measure(range(2), horizon=4, rounds=3, sampled_rounds=3, samples=(300, 30_000))
    identities = found["identities"]
    assert identities.pop("unchanged") > 0.1
    assert identities.pop("float32") < 1e-5
    assert max(identities.values()) < 1e-12, identities
    losses = found["losses"]
    assert np.ptp(losses["same temperature"], axis=1).max() < 1e-12
    assert (np.diff(losses["KL, beta = 2 alpha"], axis=1) < 0).all()
    assert (found["sampled"][300] > found["sampled"][30_000]).all()
    for errors in found["sampled"].values():  # a round adds its error: sqrt(3) = 1.7 after three
        assert 1.3 < errors[:, 2].mean() / errors[:, 0].mean() < 2.2


def test_exponents_of_a_power_law():
    x = np.array([1, 2, 4, 8, 16])
    noisy = 3.0 * x**1.7 * np.random.default_rng(0).lognormal(0, 0.05, size=(20, 5))
    fit = exponent(x, noisy, np.random.default_rng(0))
    assert fit.low < 1.7 < fit.high
    # for normal noise: 2 * 1.96 * 0.05 / sqrt(20 seeds) / sqrt(sum (log x - mean)^2) = 0.020
    assert fit.high - fit.low == pytest.approx(0.020, rel=0.4)
    alone = exponent(x, noisy[:1] * 0 + x**1.5, np.random.default_rng(0))
    assert (alone.value, alone.low) == (pytest.approx(1.5), None)
    assert exponent(x, noisy * (x != 2), np.random.default_rng(0)).value is None


@pytest.mark.parametrize("name", ["reward", "policy", "iterate"])
def test_commands_write_a_record_and_a_picture(name, tmp_path, capsys, monkeypatch):
    module = importlib.import_module(f"bench.paper.{name}")
    if name == "policy":
        monkeypatch.setattr(module, "HORIZONS", {key: hs[:3] for key, hs in module.HORIZONS.items()})
        monkeypatch.setattr(module, "VARIANTS", module.VARIANTS[:1])
    threads = torch.get_num_threads()
    try:
        module.main(["--seeds", "2", "--seed", "7", "--out", str(tmp_path)])
    finally:
        torch.set_num_threads(threads)
    record = json.loads((tmp_path / f"paper-{name}.json").read_text())
    assert record["command"] == f"python -m bench.paper.{name}" and record["settings"]["seed"] == 7
    assert record["results"]["sentence"] in capsys.readouterr().out
    assert (tmp_path / f"paper-{name}.png").stat().st_size > 10_000


@pytest.mark.parametrize("name", ["reward", "policy", "iterate"])
def test_the_stored_record_has_these_settings(name):
    module = importlib.import_module(f"bench.paper.{name}")
    settings = json.loads((RESULTS / f"paper-{name}.json").read_text())["settings"]
    ours = module.settings_of(0, 0) if name == "policy" else module.SETTINGS
    now = json.loads(json.dumps(ours))
    assert {key: settings[key] for key in now if key not in ("seed", "seeds")} == {
        key: value for key, value in now.items() if key not in ("seed", "seeds")
    }
