"""The Bellman-residual losses against their formulas in float64 from the logits, and against exact token MDPs."""

from itertools import product

import numpy as np
import pytest
import torch

from bench.paper import mdp as tabular
from endoreward_fast import TokenRewards, linear_token_rewards, token_rewards
from endoreward_fast.losses import BellmanLoss, reval_loss, tbrm_loss
from loss_cases import BETA, LOSSES, B, T, V, both, case, exact

SETTINGS = {
    "paper": {},
    "temperature": {"alpha": 2.5},
    "discount": {"gamma": 0.8},
    "tokens": {"level": "token"},
    "truncated": {"bootstrap": True},
    "everything": {"alpha": 0.6, "gamma": 0.7, "level": "token", "bootstrap": True},
    "discounted and truncated": {"gamma": 0.7, "bootstrap": True},
}  # fmt: skip


def by_hand(name, z, z_ref, tokens, mask, terminal, reward, alpha=1.0, gamma=1.0, level="trajectory", bootstrap=False):
    """Return the loss and its residuals step by step from logits, by the definition of Q, V and pi."""
    squares, residuals = [], []
    for b in range(len(tokens)):
        places = [t for t in mask[b].nonzero().flatten().tolist() if t]
        if not places:
            continue

        def state(logits, place, t, b=b):
            x = logits[b, place] / (alpha[b, t] if isinstance(alpha, torch.Tensor) else alpha)
            return x, torch.logsumexp(x, 0)

        deltas = []
        for h, t in enumerate(places):
            x, _ = state(z, t - 1, t)
            y, v_ref = state(z_ref, t - 1, t)
            final = h == len(places) - 1
            after = t if final else places[h + 1] - 1  # the state in which the next token is chosen
            then = t if final else places[h + 1]
            ends = final and (not bootstrap or terminal[b, t])
            v_next, v_ref_next = (0.0, 0.0) if ends else (state(z, after, then)[1], state(z_ref, after, then)[1])
            r = (reward[b] if final else 0.0) if reward.ndim == 1 else reward[b, t]
            target = r / BETA + torch.log_softmax(y, 0)[tokens[b, t]]
            if name == "reval":
                target = target + v_ref - gamma * v_ref_next
            deltas.append(x[tokens[b, t]] - target - gamma * v_next)
        weights = [1.0 if level == "token" else gamma**h for h in range(len(places))]
        total = sum(w * delta for w, delta in zip(weights, deltas, strict=True))
        squares.append(sum(delta**2 for delta in deltas) if level == "token" else total**2)
        residuals.append(torch.stack(deltas) if level == "token" else total[None])
    return torch.stack(squares).mean(), torch.cat(residuals)


def shown(out: BellmanLoss, mask):
    return out.residual[mask if out.residual.ndim == 2 else mask.any(1)]


every = pytest.mark.parametrize(("name", "settings"), list(product(LOSSES, SETTINGS)))


@every
@pytest.mark.parametrize("per_token", [False, True])
def test_losses_match_their_formulas(name, settings, per_token):
    heads, tokens, mask, terminal, reward = case()
    if per_token:
        reward = torch.randn(B, T)
    options, (z, z_ref) = SETTINGS[settings], both(heads, torch.float64)
    alpha = options.get("alpha", 1.0)
    policy, fixed = (exact(x, tokens, mask, terminal, alpha) for x in (z, z_ref))
    out = LOSSES[name](policy, fixed, mask, reward, beta=BETA, **options)
    loss, residual = by_hand(name, z, z_ref, tokens, mask, terminal, reward.double(), **options)
    torch.testing.assert_close(out.loss, loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(shown(out, mask), residual, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (out.loss, loss))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("name", "level", "bootstrap"), list(product(LOSSES, ("trajectory", "token"), (False, True))))
def test_every_token_may_have_its_temperature(name, level, bootstrap):
    heads, tokens, mask, terminal, reward = case()
    z, z_ref = both(heads, torch.float64)
    alpha = 0.5 + torch.rand(mask.shape)
    options = {"level": level, "bootstrap": bootstrap, "gamma": 0.8}
    policy, fixed = (exact(x, tokens, mask, terminal, alpha) for x in (z, z_ref))
    odd = alpha.masked_fill(~mask, torch.nan)
    out = LOSSES[name](policy, fixed, mask, reward, beta=BETA, alpha=odd, **options)
    loss, residual = by_hand(name, z, z_ref, tokens, mask, terminal, reward.double(), alpha.double(), **options)
    torch.testing.assert_close(shown(out, mask), residual, rtol=1e-12, atol=1e-12)
    ours, theirs = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (out.loss, loss))
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def gradients(name, settings, dtype, spoil=lambda policy: policy):
    """Return the loss, and its gradients in hidden and weight: of ours, through one pass from hidden states, or, in
    float64 and `eager`, of the formula from logits."""
    heads, tokens, mask, terminal, reward = case()
    options = SETTINGS[settings]
    (hidden, weight), (h_ref, w_ref) = heads
    hidden, weight = (x.to(dtype or torch.float32).requires_grad_() for x in (hidden, weight))
    if dtype is None:
        common = {"mask": mask, "terminal": terminal, "alpha": options.get("alpha", 1.0)}
        policy = spoil(linear_token_rewards(hidden, weight, tokens, **common))
        fixed = linear_token_rewards(h_ref, w_ref, tokens, **common)
        loss = LOSSES[name](policy, fixed, mask, reward, beta=BETA, **options).loss
    else:
        z, z_ref = hidden @ weight.T, h_ref.to(dtype) @ w_ref.to(dtype).T
        loss, _ = by_hand(name, z, z_ref, tokens, mask, terminal, reward.to(dtype), **options)
    return loss, *torch.autograd.grad(loss, (hidden, weight))


def check_gradients(assert_within_budget, name, settings, **options):
    ours, eager, precise = (gradients(name, settings, d, **options) for d in (None, torch.float32, torch.float64))
    for field, *three in zip(("loss", "hidden", "weight"), ours, eager, precise, strict=True):
        assert_within_budget(*three, scale=three[-1].abs().max().item(), name=field)


@every
def test_gradients_through_hidden_states_are_within_the_budget(assert_within_budget, name, settings):
    check_gradients(assert_within_budget, name, settings)


@pytest.mark.parametrize("name", LOSSES)
def test_a_value_without_its_gradient_breaks_the_budget(assert_within_budget, name):
    with pytest.raises(AssertionError, match="hidden: error"):
        check_gradients(
            assert_within_budget, name, "paper", spoil=lambda policy: policy._replace(value=policy.value.detach())
        )


@every
def test_gradcheck(name, settings):
    heads, tokens, mask, terminal, reward = case()
    options = SETTINGS[settings]
    policy, fixed = (exact(z, tokens, mask, terminal, options.get("alpha", 1.0)) for z in both(heads, torch.float64))
    leaves = [x.detach()[:, :5].requires_grad_() for x in (policy.reward, policy.logprob, policy.value)]
    fixed = TokenRewards(*(None if x is None else x.detach()[:, :5] for x in fixed))

    def loss(*fields):
        return LOSSES[name](TokenRewards(*fields, None), fixed, mask[:, :5], reward, beta=BETA, **options).loss

    assert torch.autograd.gradcheck(loss, leaves)


def test_only_the_policy_gets_a_gradient_and_the_parts_add_up():
    heads, tokens, mask, _, reward = case()
    z, z_ref = (x.detach().requires_grad_() for x in both(heads, torch.float32))
    for loss in LOSSES.values():
        out = loss(
            token_rewards(z, tokens, mask=mask), token_rewards(z_ref, tokens, mask=mask), mask, reward, beta=BETA
        )
        assert torch.autograd.grad(out.loss, z_ref, retain_graph=True, allow_unused=True) == (None,)
        assert out.residual.requires_grad and not any(x.requires_grad for x in out[2:])
        torch.testing.assert_close(out.residual.detach(), out.value + out.log_ratio - out.target)
        again = out.residual.square().sum() / mask.any(1).sum()
        one, other = (torch.autograd.grad(x, z, retain_graph=True)[0] for x in (out.loss, again))
        torch.testing.assert_close(one, other)


# --- the minimum, on exact MDPs


def written(mdp, start, table):
    """Return the logits and tokens of every completion, as a model with logits `table` would give them."""
    completions = tabular.all_completions(mdp)
    rows = tabular.along(mdp, start, completions, table)
    z = torch.cat([rows, torch.zeros_like(rows[:, :1])], 1)
    return z, torch.cat([torch.zeros_like(completions[:, :1]), completions], 1)


def losses_of(mdp, table, base, level="trajectory"):
    """{name: loss of the model `table` against the reference `base` on every completion, with the MDP's rewards}."""
    z, tokens = written(mdp, 0, table)
    z_ref, _ = written(mdp, 0, base)
    mask = torch.arange(mdp.horizon + 1).expand(tokens.shape) > 0
    completions = tokens[:, 1:]
    steps = tabular.per_token(mdp, 0, completions, mdp.reward)
    reward = torch.cat([torch.zeros_like(steps[:, :1]), steps], 1) if level == "token" else steps.sum(1)
    policy, fixed = (exact(x, tokens, mask, None) for x in (z, z_ref))
    return {name: f(policy, fixed, mask, reward, beta=BETA, level=level) for name, f in LOSSES.items()}


@pytest.fixture(scope="module")
def mdp():
    return tabular.random_mdp(np.random.default_rng(3), horizon=3, states=4, vocab=3)


def optimum(mdp, base, name):
    """Return Q of the policy that is optimal under the KL penalty, by soft value iteration on the loss's own reward."""
    shaped = mdp.reward / BETA + torch.log_softmax(base, -1)
    if name == "reval":
        v = torch.cat([torch.logsumexp(base, -1), torch.zeros_like(base[:1, :, 0])])
        h = torch.arange(mdp.horizon)[:, None, None]
        shaped = shaped + v[:-1, :, None] - v[1:][h, mdp.next_state]
    return tabular.action_values(mdp, shaped, 1.0)[0]


@pytest.mark.parametrize("level", ["trajectory", "token"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_zero_at_the_policy_that_is_optimal_under_the_penalty(mdp, name, level):
    base = torch.randn(mdp.reward.shape, dtype=torch.float64)
    table = optimum(mdp, base, name).requires_grad_()
    loss = losses_of(mdp, table, base, level)[name].loss
    assert loss.item() < 1e-24
    assert torch.autograd.grad(loss, table)[0].abs().max() < 1e-10
    completions = tabular.all_completions(mdp)
    log_pi, log_ref, gained = (
        tabular.per_token(mdp, 0, completions, x).sum(1)
        for x in (torch.log_softmax(table, -1), torch.log_softmax(base, -1), mdp.reward)
    )
    torch.testing.assert_close(log_pi, torch.log_softmax(log_ref + gained / BETA, 0))
    moved = losses_of(mdp, table + 0.1 * torch.randn_like(table), base, level)[name].loss
    assert moved.item() > 1e-3


@pytest.mark.parametrize("name", LOSSES)
def test_minimising_the_loss_finds_that_policy(mdp, name):
    base = torch.randn(mdp.reward.shape, dtype=torch.float64)
    table = base.clone().requires_grad_()
    optimiser = torch.optim.LBFGS([table], max_iter=300, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def step():
        optimiser.zero_grad()
        loss = losses_of(mdp, table, base)[name].loss
        loss.backward()
        return loss

    assert step().item() > 1
    optimiser.step(step)
    log_pi, best = (
        tabular.per_token(mdp, 0, tabular.all_completions(mdp), torch.log_softmax(x, -1)).sum(1)
        for x in (table.detach(), optimum(mdp, base, name))
    )
    torch.testing.assert_close(log_pi, best, rtol=0, atol=1e-4)


def test_without_a_reward_only_reval_leaves_the_reference_alone():
    """Calibrated Initialization, propositions 1 and 2 of arXiv 2603.23355."""
    heads, tokens, mask, terminal, _ = case()
    z, _ = both(heads, torch.float64)
    model = exact(z, tokens, mask, terminal)
    still, moving = (f(model, model, mask, torch.zeros(B), beta=BETA) for f in (reval_loss, tbrm_loss))
    assert still.loss == 0 and not torch.autograd.grad(still.loss, z, retain_graph=True)[0].any()
    torch.testing.assert_close(moving.loss, moving.value[mask.any(1)].square().mean())
    assert torch.autograd.grad(moving.loss, z)[0].any()


def test_at_the_start_reval_is_a_policy_gradient_with_the_mean_reward_as_baseline():
    """Completions of one prompt share V(s_1). With rewards that sum to 0, its gradient cancels."""
    z = torch.randn(4, 6, V, dtype=torch.float64)
    z[:, :3] = z[:1, :3]  # the prompt, and the state after it
    z.requires_grad_()
    tokens, mask = torch.randint(0, V, (4, 6)), torch.arange(6).expand(4, -1) > 2
    reward = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    model, advantage = exact(z, tokens, mask, None), reward - reward.mean()
    ours = torch.autograd.grad(reval_loss(model, model, mask, advantage, beta=BETA).loss, z, retain_graph=True)[0]
    theirs = torch.autograd.grad(-2 / BETA * (advantage * model.logprob.sum(1)).mean(), z)[0]
    ours, theirs = (torch.cat([g[:, :3].sum(0), g[:, 3:].flatten(0, 1)]) for g in (ours, theirs))  # shared parameters
    torch.testing.assert_close(ours, theirs)
