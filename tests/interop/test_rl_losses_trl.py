"""Losses of policies and preferences, and their gradients, equal those of TRL's source code.

TRL has most of them in the middle of long methods. So the lines themselves are cut out of its source and run, with
random tensors under the names that they read.
"""

import inspect
import textwrap
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.losses import policy_gradient, preference

torch = pytest.importorskip("torch")
pytest.importorskip("trl")

pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's own, of its experimental parts and of what it imports

N, T = 5, 9
LENGTHS = (9, 4, 1, 6, 8)  # of the responses; TRL puts the score behind the last token, where a row has room for it


def draw(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def run_lines(function: Any, first: str, last: str, **names: Any) -> dict[str, Any]:
    """Runs a function's lines from the one that begins with `first` to the next that begins with `last`.

    Returns all names afterwards, the module's own apart.
    """
    lines = inspect.getsource(function).splitlines()
    begins = [line.strip().startswith(first) for line in lines]
    assert sum(begins) == 1, (function, first)
    start = begins.index(True)
    stop = next(i for i in range(start, len(lines)) if lines[i].strip().startswith(last)) + 1
    while True:  # to the end of the statement
        text = textwrap.dedent("\n".join(lines[start:stop]))
        try:
            program = compile(text, "trl", "exec")
            break
        except SyntaxError:
            stop += 1
            assert stop <= len(lines)
    found: dict[str, Any] = dict(names)
    exec(program, dict(vars(inspect.getmodule(function))), found)
    return found


def close(ours: Any, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-5, atol=1e-6)


def to_torch(array: Any, *, learned: bool = False) -> Any:
    return torch.tensor(np.asarray(array), requires_grad=learned)


def mask(extra: int = 0) -> np.ndarray:
    """(N, T): the tokens of the responses, and `extra` behind them."""
    return np.arange(T)[None] < np.array(LENGTHS)[:, None] + extra


@pytest.fixture(scope="module")
def ppo() -> Any:
    from trl.experimental.ppo import ppo_trainer

    return ppo_trainer


@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_penalised_rewards_advantages_and_returns(ppo, whiten_rewards):
    scores, values = draw(N, seed=0), np.where(mask(1), draw(N, T, seed=1), 0)
    logprobs, reference = (np.where(mask(), draw(N, T, seed=seed), 1.0) for seed in (2, 3))
    found = run_lines(
        ppo.PPOTrainer.train,
        "logr = ref_logprobs - logprobs",
        "advantages = torch.masked_fill(",
        args=SimpleNamespace(kl_estimator="k1", kl_coef=0.07, whiten_rewards=whiten_rewards, gamma=0.9, lam=0.8),
        logprobs=to_torch(logprobs),
        ref_logprobs=to_torch(reference),
        values=to_torch(values),
        scores=to_torch(scores),
        responses=torch.zeros(N, T),
        padding_mask=to_torch(~mask()),
        padding_mask_p1=to_torch(~mask(1)),
        sequence_lengths=torch.tensor(LENGTHS) - 1,
        sequence_lengths_p1=torch.tensor(LENGTHS),
    )
    rewards = policy_gradient.penalised_rewards(*map(jnp.asarray, (scores, logprobs, reference, mask(1))), 0.07)
    if whiten_rewards:
        rewards = policy_gradient.whiten(rewards, jnp.asarray(mask(1)), shift_mean=False)
    close(rewards, found["rewards"])
    advantages, returns = policy_gradient.gae(rewards, jnp.asarray(values), jnp.asarray(mask(1)), 0.9, 0.8)
    close(returns, found["returns"])
    close(policy_gradient.whiten(advantages, jnp.asarray(mask())), found["advantages"])


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whitening(ppo, shift_mean):
    x = 3 + 5 * draw(N, T, seed=4)
    ours = policy_gradient.whiten(jnp.asarray(x), jnp.asarray(mask()), shift_mean=shift_mean)
    close(ours[mask()], ppo.masked_whiten(to_torch(x), to_torch(mask()), shift_mean)[mask()])


@pytest.mark.parametrize(("name", "estimator"), [("k1", policy_gradient.kl_k1), ("k3", policy_gradient.kl_k3)])
def test_estimators_of_the_divergence(ppo, name, estimator):
    logprobs, reference = draw(N, T, seed=5), draw(N, T, seed=6)
    found = run_lines(
        ppo.PPOTrainer.train,
        "logr = ref_logprobs - logprobs",
        "kl = ",
        args=SimpleNamespace(kl_estimator=name),
        logprobs=to_torch(logprobs),
        ref_logprobs=to_torch(reference),
    )
    close(estimator(jnp.asarray(logprobs), jnp.asarray(reference)), found["kl"])


def test_policy_and_value_loss_with_their_gradients(ppo):
    old, advantages, old_values, returns = (draw(N, T, seed=seed) for seed in (7, 8, 9, 10))
    new, values = old + 0.3 * draw(N, T, seed=11), old_values + 0.3 * draw(N, T, seed=12)
    their_new, their_values = to_torch(new, learned=True), to_torch(values, learned=True)
    found = run_lines(
        ppo.PPOTrainer.train,
        "vpredclipped = torch.clamp(",
        "pg_loss = masked_mean(",
        args=SimpleNamespace(cliprange_value=0.2, cliprange=0.1),
        vpred=their_values,
        mb_values=to_torch(old_values),
        mb_return=to_torch(returns),
        new_logprobs=their_new,
        mb_logprobs=to_torch(old),
        mb_advantage=to_torch(advantages),
        padding_mask=to_torch(~mask()),
        padding_mask_p1=to_torch(~mask(1)),
        micro_batch_inds=slice(None),
    )
    (found["pg_loss"] + found["vf_loss"]).backward()

    def policy(new: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses, clipped = policy_gradient.policy_loss(new, jnp.asarray(old), jnp.asarray(advantages), 0.1)
        return losses[mask()].mean(), clipped[mask(1)].mean()

    def value(values: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses, clipped = policy_gradient.value_loss(values, jnp.asarray(old_values), jnp.asarray(returns), 0.2)
        return losses[mask(1)].mean(), clipped[mask(1)].mean()

    (policy_loss, _), policy_derivative = jax.value_and_grad(policy, has_aux=True)(jnp.asarray(new))
    (value_loss, clipped), value_derivative = jax.value_and_grad(value, has_aux=True)(jnp.asarray(values))
    close(policy_loss, found["pg_loss"])
    close(value_loss, found["vf_loss"])
    close(clipped, found["vf_clipfrac"])
    close(policy_derivative, their_new.grad)
    close(value_derivative, their_values.grad)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_advantages_of_groups(scale):
    from trl import GRPOTrainer

    rewards = draw(N, 4, seed=13)
    rewards[2] = 0.7  # all of a group are equally good
    found = run_lines(
        GRPOTrainer._generate_and_score_completions,
        "mean_grouped_rewards = torch.nanmean(",
        "advantages = advantages / (std_rewards",
        self=SimpleNamespace(scale_rewards=scale),
        rewards=to_torch(rewards.reshape(-1)),
        num_generations=4,
    )
    ours = policy_gradient.group_advantages(jnp.asarray(rewards), by_std=scale == "group")
    close(ours.reshape(-1), found["advantages"])


def test_the_loss_of_grpo_for_each_token():
    from trl import GRPOTrainer

    old, reference, advantages = draw(N, T, seed=14), draw(N, T, seed=15), draw(N, seed=16)
    new = old + 0.3 * draw(N, T, seed=17)
    found = run_lines(
        GRPOTrainer._compute_loss,
        "coef_1 = torch.exp(log_importance_weights)",
        "per_token_loss = -torch.min(",
        self=SimpleNamespace(
            beta=0.04,
            loss_type="grpo",
            epsilon_low=0.2,
            epsilon_high=0.2,
            args=SimpleNamespace(delta=None, use_bias_correction_kl=False),
        ),
        log_importance_weights=to_torch(new - old),
        advantages=to_torch(advantages[:, None]),
        per_token_logps=to_torch(new),
        inputs={"ref_per_token_logps": to_torch(reference)},
    )
    ours, _ = policy_gradient.policy_loss(
        jnp.asarray(new), jnp.asarray(old), jnp.asarray(np.tile(advantages[:, None], T)), 0.2
    )
    close(ours, found["per_token_loss"])
    close(policy_gradient.kl_k3(jnp.asarray(new), jnp.asarray(reference)), found["per_token_kl"])


def dpo_gradients(arrays: list[np.ndarray], label_smoothing: float) -> tuple[jax.Array, Any]:
    def loss(*arrays: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses = preference.dpo_loss(*arrays, 0.3, label_smoothing)[0]
        return losses.sum(), losses

    (_, losses), gradients = jax.value_and_grad(loss, (0, 1), has_aux=True)(*map(jnp.asarray, arrays))
    return losses, gradients


def test_dpo():
    from trl import DPOTrainer

    arrays = [10 * draw(N, 1, seed=seed) for seed in range(18, 22)]
    chosen, rejected = (to_torch(array, learned=True) for array in arrays[:2])
    found = run_lines(
        DPOTrainer._compute_loss,
        "chosen_logratios = chosen_logps - ref_chosen_logps",
        "delta_score = chosen_scores - rejected_scores",
        self=SimpleNamespace(f_divergence_type="reverse_kl"),
        chosen_logps=chosen,
        rejected_logps=rejected,
        ref_chosen_logps=to_torch(arrays[2]),
        ref_rejected_logps=to_torch(arrays[3]),
    )
    found = run_lines(
        DPOTrainer._compute_loss,
        "per_sequence_loss = -F.logsigmoid(self.beta * delta_score)",
        "per_sequence_loss",
        self=SimpleNamespace(beta=0.3),
        delta_score=found["delta_score"],
    )
    found["per_sequence_loss"].sum().backward()
    losses, gradients = dpo_gradients(arrays, 0.0)
    close(losses, found["per_sequence_loss"])
    close(gradients[0], chosen.grad)
    close(gradients[1], rejected.grad)


def test_label_smoothing():
    """TRL has it in CPO, which is DPO without a reference: given the log-ratios for log-probabilities, it has one."""
    from trl.experimental.cpo import CPOTrainer

    arrays = [10 * draw(N, 1, seed=seed) for seed in range(22, 26)]
    chosen, rejected = (to_torch(array, learned=True) for array in arrays[:2])
    settings = {"beta": 0.3, "label_smoothing": 0.15, "loss_type": "sigmoid", "alpha": 0.0}
    losses, *_ = CPOTrainer.cpo_loss(
        SimpleNamespace(**settings, accelerator=SimpleNamespace(device="cpu")),
        chosen - to_torch(arrays[2]),
        rejected - to_torch(arrays[3]),
    )
    losses.sum().backward()
    ours, gradients = dpo_gradients(arrays, 0.15)
    close(ours, losses)
    close(gradients[0], chosen.grad)
    close(gradients[1], rejected.grad)


def test_reward_loss():
    from trl import RewardTrainer

    scores = 3 * draw(2, N, seed=26)
    rewards = to_torch(scores, learned=True)
    found = run_lines(
        RewardTrainer.compute_loss,
        "loss = -nn.functional.logsigmoid(rewards_chosen - rewards_rejected).mean()",
        "loss",
        rewards_chosen=rewards[0],
        rewards_rejected=rewards[1],
    )
    found["loss"].backward()
    ranks = jnp.tile(jnp.array([[1, 2]]), (N, 1))
    loss, gradient = jax.value_and_grad(lambda s: preference.ranking_loss(s.T, ranks)[0].mean())(jnp.asarray(scores))
    close(loss, found["loss"])
    close(gradient, rewards.grad)
