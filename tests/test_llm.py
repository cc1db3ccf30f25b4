"""Language models: environments, policy, the sequence path against the step path, bad input."""

import importlib
import math
import sys
from copy import deepcopy
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from stable_baselines3 import PPO
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_r2vpo import R2VPO, R2VPOOff
from sb3_r2vpo.common.rollout import passes
from sb3_r2vpo.core.objectives import OBJECTIVES

transformers = pytest.importorskip("transformers")

from sb3_r2vpo.llm import (  # noqa: E402
    PADDING,
    CausalLMPolicy,
    Problem,
    ResponseSpace,
    Sampling,
    SequenceRolloutBuffer,
    Task,
    TokenEnv,
    TokenVecEnv,
)
from sb3_r2vpo.llm.models import kl_divergence  # noqa: E402
from sb3_r2vpo.llm.sampling import truncate_logits  # noqa: E402
from sb3_r2vpo.llm.sequence_buffer import group_advantages  # noqa: E402

EOS = 5
N_TOKENS = 6

LENGTHS = {"max_prompt_tokens": 4, "max_new_tokens": 6}
SEQUENCES = {"n_steps": 1, "batch_size": 8, "n_epochs": 2, "normalize_advantage": False, "seed": 0, "device": "cpu"}


@pytest.fixture(autouse=True)
def seeds():
    """Models and responses are drawn from the global generators, and some tests need a response that ends early."""
    th.manual_seed(0)
    np.random.seed(0)


class Echo(Task):
    """Write the prompt's last token, then stop; prompts of 1 to 4 tokens."""

    def __init__(self) -> None:
        super().__init__(vocab_size=N_TOKENS, eos_token_ids=[EOS])

    def sample(self, rng):
        return Problem(rng.integers(0, EOS, size=rng.integers(1, 5)).tolist())

    def reward(self, conversation):
        return float(conversation.response[0] == conversation.problem.prompt[-1])


class ThreeTokens(Task):
    """Answer 0 with 1 and 1 with 0; token 2 ends."""

    def __init__(self) -> None:
        super().__init__(vocab_size=3, eos_token_ids=[2])

    def sample(self, rng):
        return Problem([int(rng.integers(2))])

    def reward(self, conversation):
        answer = 1 - conversation.problem.prompt[0]
        return 0.5 * (conversation.response[0] == answer) + 0.5 * (conversation.response == [answer, 2])


class Countdown(Task):
    """Two questions: the reply after the first turn is token 4, and the score counts turns that begin with token 0."""

    def __init__(self) -> None:
        super().__init__(vocab_size=N_TOKENS, eos_token_ids=[EOS])

    def sample(self, rng):
        return Problem([int(rng.integers(3))])

    def token_reward(self, conversation):
        return 0.25 if conversation.response == [0] else 0.0

    def reward(self, conversation):
        return float(all(turn[0] == 0 for turn in conversation.turns))

    def reply(self, conversation):
        return None if conversation.problem.prompt == [2] else [4]


def tiny_model(vocab_size: int = 8, seed: int = 0, **kwargs) -> transformers.LlamaForCausalLM:
    th.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=vocab_size, max_position_embeddings=64, initializer_range=0.5, **sizes)
    for name, value in kwargs.items():
        setattr(config, name, value)
    return transformers.LlamaForCausalLM(config)


def vec_env(task: Task | None = None, n_prompts: int = 4, **kwargs) -> TokenVecEnv:
    return TokenVecEnv(task or Echo(), n_prompts, group_size=4, **{**LENGTHS, "seed": 0, **kwargs})


def make_policy(env: TokenVecEnv | TokenEnv, model=None, **kwargs) -> CausalLMPolicy:
    return CausalLMPolicy(env.observation_space, env.action_space, lambda _: 1e-3, model=model or tiny_model(), **kwargs)


def as_tensors(obs: dict[str, np.ndarray]) -> dict[str, th.Tensor]:
    return {key: th.as_tensor(value) for key, value in obs.items()}


def logged(model) -> dict[str, float]:
    return dict(model.logger.name_to_value)


# --- environments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", [Echo(), ThreeTokens(), Countdown()])
def test_token_env_passes_check_env(task):
    env = gym.make("TokenEnv-v0", task=task, max_turns=2, max_reply_tokens=1, **LENGTHS)
    check_env(env.unwrapped)


def test_token_env_tells_the_end_from_the_length_limit():
    env = TokenEnv(Echo(), max_prompt_tokens=4, max_new_tokens=2)
    obs, _ = env.reset(seed=0)
    prompt = obs["input_ids"][obs["attention_mask"] == 1].tolist()
    obs, reward, terminated, truncated, _ = env.step(np.int64(prompt[-1]))
    assert (reward, terminated, truncated) == (0.0, False, False)
    assert obs["input_ids"][obs["attention_mask"] == 1].tolist() == [*prompt, prompt[-1]]
    assert env.step(np.int64(EOS))[1:4] == (1.0, True, False)
    env.reset()
    env.step(np.int64(0))
    assert env.step(np.int64(0))[2:4] == (True, True), "Cut off, but judged: nothing to bootstrap from"


def test_multi_turn_conversation_on_both_paths():
    """The reply is read, not written; rewards of tokens and of the whole add up; conversations that are over wait."""
    step_env = TokenEnv(Countdown(), max_turns=2, max_reply_tokens=1, **LENGTHS)
    step_env.reset(seed=0)
    while step_env.conversation.problem.prompt == [2]:
        step_env.reset()
    rewards = [step_env.step(np.int64(token))[1] for token in (0, EOS, 0, EOS)]
    assert rewards == [0.25, 0.0, 0.25, 1.0]
    prompt = list(step_env.conversation.problem.prompt)
    assert step_env.conversation.tokens == [*prompt, 0, EOS, 4, 0, EOS]

    env = vec_env(Countdown(), n_prompts=8, max_turns=2, max_reply_tokens=1, seed=0)
    obs = env.reset()
    single = np.array([list(c.problem.prompt) == [2] for c in env.conversations])
    assert single.any()
    assert not single.all()
    response = np.array([[0, EOS] + [PADDING] * 4] * env.num_envs)
    obs, first, dones, _ = env.step(response)
    assert not dones.any()
    np.testing.assert_array_equal(obs["attention_mask"].sum(axis=1), np.where(single, 0, 4))
    _, second, dones, infos = env.step(np.where(single[:, None], PADDING, response))
    assert dones.all()
    np.testing.assert_allclose(first, np.where(single, 1.25, 0.25))
    np.testing.assert_allclose(second, np.where(single, 0.0, 1.25))
    assert [info["episode"]["r"] for info in infos] == [*np.where(single, 1.25, 1.5)]


def test_response_space():
    space = ResponseSpace(N_TOKENS, 4, [EOS], allowed_tokens=np.arange(N_TOKENS) != 2)
    space.seed(0)
    samples = [space.sample() for _ in range(100)]
    assert all(space.contains(sample) for sample in samples)
    assert 2 not in np.unique(samples)
    assert not space.contains(np.array([1, PADDING, 1, PADDING]))
    assert not space.contains(np.array([EOS, 1, PADDING, PADDING]))


@pytest.mark.parametrize("algorithm", [R2VPO, PPO])
def test_step_path_learns_three_token_toy(algorithm):
    env = TokenEnv(ThreeTokens(), max_prompt_tokens=1, max_new_tokens=3)
    model = algorithm("MultiInputPolicy", env, n_steps=256, batch_size=64, learning_rate=3e-3, seed=0, device="cpu")
    model.learn(6_000)
    assert evaluate_policy(model, env, n_eval_episodes=20)[0] > 0.95


# --- sampling --------------------------------------------------------------------------------------------------------


def test_truncate_logits_by_hand():
    logits = th.tensor([0.5, 0.3, 0.15, 0.05]).log()
    kept = lambda **kwargs: truncate_logits(logits, Sampling(**kwargs)).isfinite().tolist()  # noqa: E731
    assert kept(top_k=2) == [True, True, False, False]
    assert kept(top_p=0.5) == [True, False, False, False]
    assert kept(top_p=0.6) == [True, True, False, False]
    assert kept(temperature=0.0) == [True, False, False, False]
    # 0.5 and 0.3 renormalised are 0.625 and 0.375: top-k comes first
    assert kept(top_k=2, top_p=0.6) == [True, False, False, False]
    th.testing.assert_close(truncate_logits(logits, Sampling(temperature=2.0)), logits / 2)
    stored_token = truncate_logits(logits, Sampling(top_k=1), keep=th.tensor(3))
    assert stored_token.isfinite().tolist() == [True, False, False, True]


@pytest.mark.parametrize("kwargs", [{"temperature": -1.0}, {"temperature": math.nan}, {"top_k": 0}, {"top_p": 0.0}])
def test_bad_sampling_is_refused(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        Sampling(**kwargs)


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0.7}, {"temperature": 1.3, "top_k": 3}, {"top_p": 0.8}, {"top_k": 4, "top_p": 0.9}]
)
@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_sampled_log_probs_are_teacher_forced_ones(sampling, micro_batch_size):
    env = vec_env()
    policy = make_policy(env, micro_batch_size=micro_batch_size, **sampling)
    obs = as_tensors(env.reset())
    assert len(obs["attention_mask"].sum(-1).unique()) > 1, "The test needs left padding"
    tokens, values, sampled = policy(obs)
    assert all(env.action_space.contains(row.numpy()) for row in tokens)
    _, log_prob, entropy = policy.evaluate_actions(obs, tokens)
    assert entropy is None
    assert values.shape == (env.num_envs, 1)
    th.testing.assert_close(log_prob, sampled, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kwargs", [{}, {"temperature": 0.6, "top_k": 3}])
def test_entropies_are_those_of_the_distributions_sampled_from(kwargs):
    """Exact for each token: at the first, equal for all that share a prompt; over many samples, minus the log-probability."""
    # A prompt that leaves the model uncertain: after others, all but a few samples are the same
    env = TokenVecEnv(Echo(), 1, 4096, **LENGTHS, seed=5)
    policy = make_policy(env)
    tokens, log_probs, entropies = policy.generate(as_tensors(env.reset()), Sampling(**kwargs))
    th.testing.assert_close(entropies[:, 0], entropies[:1, 0].expand(4096), atol=1e-5, rtol=0)
    assert (entropies[tokens == PADDING] == 0).all()
    assert entropies.max() <= math.log(kwargs.get("top_k", N_TOKENS)) + 1e-5
    assert entropies.sum().item() == pytest.approx(-log_probs.sum().item(), rel=0.05)


@pytest.mark.parametrize("dtype", [th.float32, th.bfloat16])
def test_other_architectures_and_half_precision(dtype):
    """GPT-2 has absolute positions, which left padding must not shift, and dropout, which must not change ratios."""
    th.manual_seed(0)
    sizes = {"vocab_size": 8, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, initializer_range=0.5, bos_token_id=None, eos_token_id=None)
    env = vec_env()
    model = R2VPO(CausalLMPolicy, env, **SEQUENCES, policy_kwargs={"model": transformers.GPT2LMHeadModel(config).to(dtype)})
    obs = as_tensors(env.reset())
    tokens, _, sampled = model.policy(obs)
    model.policy.set_training_mode(True)
    log_prob = model.policy.evaluate_actions(obs, tokens)[1]
    assert log_prob.dtype == th.float32
    th.testing.assert_close(log_prob, sampled, atol=1e-4 if dtype == th.float32 else 0.1, rtol=0)
    model.learn(32)
    assert math.isfinite(logged(model)["train/ratio_variance"])


def test_sampled_frequencies_are_the_models_probabilities():
    """A step of the KV cache would shift if positions, masks or retired rows were confused: compare with brute force."""
    env = TokenVecEnv(Echo(), 1, 4096, max_prompt_tokens=4, max_new_tokens=2)
    policy = make_policy(env)
    tokens, _, _ = policy.generate(as_tensors(env.reset()))
    prompt = list(env.conversations[0].problem.prompt)
    for first in range(N_TOKENS - 1):
        seconds = tokens[tokens[:, 0] == first, 1]
        if len(seconds) > 200:
            probabilities = policy.model(th.tensor([[*prompt, first]])).logits[0, -1, :N_TOKENS].softmax(-1)
            frequencies = seconds.bincount(minlength=N_TOKENS) / len(seconds)
            assert (frequencies - probabilities).abs().max() < 4 / math.sqrt(len(seconds))
    assert (tokens[tokens[:, 0] == EOS, 1] == PADDING).all()


def test_greedy_prediction_and_allowed_tokens():
    task = Echo()
    task.allowed_tokens = np.isin(np.arange(N_TOKENS), [1, 3])
    env = vec_env(task)
    policy = make_policy(env)
    obs = env.reset()
    tokens, _ = policy.predict(obs, deterministic=True)
    np.testing.assert_array_equal(tokens, policy.predict(obs, deterministic=True)[0])
    assert set(np.unique(tokens)) <= {1, 3}


def test_evaluation_with_a_newer_policy_is_finite_outside_its_top_k():
    env = vec_env()
    policy, newer = make_policy(env, top_k=2), make_policy(env, tiny_model(seed=1), top_k=2)
    obs = as_tensors(env.reset())
    tokens, _, log_prob = policy(obs)
    assert (newer.evaluate_actions(obs, tokens)[1] - log_prob).isfinite().all()


# --- the sequence path -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["r2vpo", "ppo_clip", "gppo"])
def test_sequence_path_equals_step_path(objective):
    """Log-probabilities, ratios and the token-mean loss of whole responses are those of one-token steps."""
    env = vec_env()
    policy, newer = make_policy(env), make_policy(env, tiny_model(seed=1))
    obs = env.reset()
    tokens, _, old_log_prob = policy(as_tensors(obs))
    _, log_prob, _ = newer.evaluate_actions(as_tensors(obs), tokens)
    advantages = th.randn(env.num_envs, 1)
    mask = tokens != PADDING

    # The same responses as the rows of a step path: all that was written before, and one token
    step_env = TokenEnv(env.task, **LENGTHS)
    prefixes, actions, step_advantages = [], [], []
    for index, response in enumerate(tokens.tolist()):
        step_env.reset()
        step_env.conversation.problem = env.conversations[index].problem
        for token in response[: response.index(PADDING) if PADDING in response else None]:
            prefixes.append(step_env._observation())
            actions.append(token)
            step_advantages.append(advantages[index, 0])
            step_env.step(np.int64(token))
    step_obs = as_tensors({key: np.stack([prefix[key] for prefix in prefixes]) for key in prefixes[0]})
    step_actions = th.tensor(actions)
    step_policy, step_newer = make_policy(step_env, policy.model), make_policy(step_env, newer.model)
    _, step_old_log_prob, _ = step_policy.evaluate_actions(step_obs, step_actions)
    _, step_log_prob, _ = step_newer.evaluate_actions(step_obs, step_actions)

    th.testing.assert_close(log_prob[mask], step_log_prob, atol=1e-5, rtol=1e-5)
    coefficients = {"var_coef": 1.0} if objective == "r2vpo" else {}
    losses, deviation = OBJECTIVES[objective](log_prob - old_log_prob, advantages, **coefficients)
    step_losses, step_deviation = OBJECTIVES[objective](
        step_log_prob - step_old_log_prob, th.stack(step_advantages), **coefficients
    )
    th.testing.assert_close(deviation[mask], step_deviation, atol=1e-5, rtol=1e-4)
    th.testing.assert_close(losses[mask].mean(), step_losses.mean(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("normalization", ["token", "sequence", "constant"])
def test_train_makes_the_step_written_out_by_hand(normalization):
    """One minibatch of one epoch: `train()` steps along the gradient of the masked loss computed here."""
    env = vec_env()
    model = R2VPO(
        CausalLMPolicy,
        env,
        **{**SEQUENCES, "batch_size": env.num_envs, "n_epochs": 1},
        learning_rate=0.1,
        var_coef=0.5,
        max_grad_norm=1e9,
        rollout_buffer_kwargs={"loss_normalization": normalization},
        policy_kwargs={"model": tiny_model(), "optimizer_class": th.optim.SGD},
    )
    initial = deepcopy(model.policy)
    model.learn(env.num_envs)
    batch = next(model.rollout_buffer.get(None))
    _, log_prob, _ = initial.evaluate_actions(batch.observations, batch.actions)
    # At the first step all ratios are one: the gradient of the loss is that of -A log pi
    losses = -batch.advantages * log_prob * batch.mask
    lengths = batch.mask.sum(-1)
    loss = {
        "token": losses.sum() / lengths.sum(),
        "sequence": (losses.sum(-1) / lengths).mean(),
        "constant": losses.sum(-1).mean() / LENGTHS["max_new_tokens"],
    }[normalization]
    loss.backward()
    for before, after in zip(initial.model.parameters(), model.policy.model.parameters(), strict=True):
        th.testing.assert_close(before - 0.1 * before.grad, after, atol=1e-6, rtol=1e-4)


def test_micro_batches_give_the_gradient_of_the_whole_minibatch():
    env = vec_env()
    gradients = []
    for micro_batch_size in (None, 3):
        policy = make_policy(env, tiny_model(), micro_batch_size=micro_batch_size)
        env.seed(0)
        obs = as_tensors(env.reset())
        th.manual_seed(0)
        tokens, _, _ = policy(obs)
        policy.evaluate_actions(obs, tokens)[1].square().mean().backward()
        gradients.append([parameter.grad for parameter in policy.model.parameters()])
    th.testing.assert_close(*gradients)


@pytest.mark.parametrize("algorithm", [R2VPO, R2VPOOff])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_all_objectives_train(algorithm, objective):
    kwargs = {"objective_kwargs": {"kl_coef": 1.0}} if objective == "exact_kl" else {}
    model = algorithm(
        CausalLMPolicy, vec_env(), objective=objective, **kwargs, **SEQUENCES, policy_kwargs={"model": tiny_model()}
    )
    model.learn(16 * 3)
    assert model.num_timesteps == 48, "Time is counted in responses"
    assert all(math.isfinite(value) for value in logged(model).values())


@pytest.mark.parametrize("algorithm", [R2VPO, R2VPOOff])
def test_sequence_path_learns(algorithm):
    model = algorithm(
        CausalLMPolicy,
        vec_env(n_prompts=16),
        **{**SEQUENCES, "batch_size": 16, "n_epochs": 1},
        learning_rate=3e-3,
        # Room for the staleness of old responses
        target_variance=0.05,
        policy_kwargs={"model": tiny_model(initializer_range=0.02)},
    )
    model.learn(64 * 40)
    assert np.mean([info["r"] for info in model.ep_info_buffer]) > 0.8


def test_topr_has_a_sequence_and_a_token_form():
    """Negative tokens weigh by the ratio of the whole response in one form, by their own in the other."""
    gradients = {}
    for objective in ("topr", "topr_token"):
        model = R2VPO(CausalLMPolicy, vec_env(), objective=objective, **SEQUENCES, policy_kwargs={"model": tiny_model()})
        log_ratio = th.tensor([[-0.5, -0.25, 0.0]], requires_grad=True)
        losses, _ = model.policy_loss(log_ratio, th.tensor([[-1.0]]))
        losses.sum().backward()
        gradients[objective] = log_ratio.grad[0]
    th.testing.assert_close(gradients["topr"], th.full((3,), math.exp(-0.75)))
    th.testing.assert_close(gradients["topr_token"], th.tensor([math.exp(-0.5), math.exp(-0.25), 1.0]))


def test_compilation_is_refused():
    """It would work, in pieces, but compile anew for each length of prompt and response."""
    policy_kwargs = {"model": tiny_model(), "optimizer_class": th.optim.Adam}
    with pytest.raises(ValueError, match="`compile=True` is not for sequences"):
        R2VPO(CausalLMPolicy, vec_env(), compile=True, policy_kwargs=policy_kwargs, **SEQUENCES)


def test_r2vpo_constrains_whole_responses():
    """The dual and the log get the variance of the response's ratio, not of its tokens'."""
    env = vec_env()
    kwargs = {"batch_size": env.num_envs, "rollout_buffer_kwargs": {"loss_normalization": "sequence"}}
    model = R2VPO(
        CausalLMPolicy,
        env,
        **{**SEQUENCES, **kwargs},
        objective="r2vpo_sequence",
        learning_rate=0.1,
        policy_kwargs={"model": tiny_model(), "optimizer_class": th.optim.SGD},
    )
    initial = deepcopy(model.policy)
    model.learn(env.num_envs)
    # The second epoch's only minibatch saw the ratios of the model between the two: repeat the first epoch
    batch = next(model.rollout_buffer.get(None))
    optimizer = th.optim.SGD(initial.parameters(), lr=0.1)
    log_ratio = initial.evaluate_actions(batch.observations, batch.actions)[1] - batch.old_log_prob
    # Ratios are one: the gradient is that of -A times the log-probability of the response
    (-batch.advantages.flatten() * log_ratio.sum(-1)).mean().backward()
    th.nn.utils.clip_grad_norm_(initial.parameters(), model.max_grad_norm)
    optimizer.step()
    log_prob = initial.evaluate_actions(batch.observations, batch.actions)[1].detach()
    deviation = (log_prob - batch.old_log_prob).sum(-1).expm1()
    # Each response counts once, as in the loss: the dual step is on the constraint that is penalised
    expected = deviation.square().mean().item() / 2
    assert logged(model)["train/ratio_variance"] == pytest.approx(expected, rel=1e-3)


def test_padding_takes_no_part():
    """The logged variance is that of tokens, and empty turns of conversations that are over are not trained on."""
    env = vec_env(Countdown(), n_prompts=8, max_turns=2, max_reply_tokens=1)
    model = R2VPOOff(CausalLMPolicy, env, **{**SEQUENCES, "n_steps": 2}, policy_kwargs={"model": tiny_model()})
    model.learn(env.num_envs * 4)
    buffer = model.rollout_buffer
    lengths = (model.replay_buffer.rollouts[-1].buffer.actions != PADDING).sum(-1)
    assert (lengths == 0).any()
    assert (lengths[buffer.selected_indices] > 0).all()
    assert len(buffer.selected_indices) == (lengths > 0).sum()
    for batch in next(passes(model.replay_buffer.newest(2), 8, n_passes=1)):
        assert batch.mask.any(-1).all()
        assert (batch.old_log_prob[~batch.mask] == 0).all()
    # Both turns of a conversation have one advantage
    advantages = buffer.advantages.reshape(env.num_envs, 2)
    np.testing.assert_array_equal(advantages[:, 0], advantages[:, 1])
    assert all(math.isfinite(value) for value in logged(model).values())


def test_group_advantages_by_hand():
    scores = np.array([[1.0, 0.0, 0.0, 1.0, 1.0]])
    groups = np.array([[7, 7, 7, 3, 3]])
    np.testing.assert_allclose(group_advantages(scores, groups, "group_mean")[0], [2 / 3, -1 / 3, -1 / 3, 0, 0], atol=1e-6)
    np.testing.assert_allclose(group_advantages(scores, groups, "leave_one_out")[0], [1, -0.5, -0.5, 0, 0], atol=1e-6)
    np.testing.assert_allclose(
        group_advantages(scores, groups)[0], [math.sqrt(2), -math.sqrt(0.5), -math.sqrt(0.5), 0, 0], atol=1e-5
    )


def test_uniform_groups_can_be_left_out():
    class Constant(Echo):
        def reward(self, conversation):
            return 0.1

    env = vec_env(Constant())
    kwargs = {"rollout_buffer_kwargs": {"filter_uniform_groups": True}, "policy_kwargs": {"model": tiny_model()}}
    for algorithm in (R2VPO, R2VPOOff):
        model = algorithm(CausalLMPolicy, env, **SEQUENCES, **kwargs)
        before = deepcopy(model.policy.state_dict())
        model.learn(32)
        th.testing.assert_close(model.policy.state_dict(), before, atol=0, rtol=0)


@pytest.mark.parametrize("kind", ["group", "gae"])
@pytest.mark.parametrize("max_turns", [1, 2])
def test_advantages_of_replayed_responses_are_what_they_were(kind, max_turns):
    """Computed anew with the same critic, over several steps, and turns of conversations."""
    task = Echo() if max_turns == 1 else Countdown()
    env = vec_env(task, max_turns=max_turns, max_reply_tokens=1)
    settings = {**SEQUENCES, "n_steps": 4, "learning_rate": 0.0}
    policy_kwargs = {"model": tiny_model(), "value_head": kind == "gae"}
    kwargs = {"rollout_buffer_kwargs": {"advantage": kind}, "policy_kwargs": policy_kwargs}
    model = R2VPOOff(CausalLMPolicy, env, **settings, **kwargs).learn(4 * env.num_envs)
    (rollout,) = model.replay_buffer.rollouts
    advantages, returns = rollout.buffer.advantages.copy(), rollout.buffer.returns.copy()
    assert len(np.unique(advantages)) > 2
    rollout.renew(model.predict_values, model.gamma, model.gae_lambda)
    np.testing.assert_allclose(rollout.buffer.advantages, advantages, atol=1e-5)
    np.testing.assert_allclose(rollout.buffer.returns, returns, atol=1e-5)


def test_value_head_and_gae():
    env = vec_env(max_turns=2, max_reply_tokens=1, task=Countdown())
    model = R2VPO(
        CausalLMPolicy,
        env,
        **{**SEQUENCES, "n_steps": 2},
        rollout_buffer_kwargs={"advantage": "gae"},
        policy_kwargs={"model": tiny_model(), "value_head": True},
    )
    before = model.policy.value_net.weight.clone()
    model.learn(env.num_envs * 2)
    assert not th.equal(before, model.policy.value_net.weight)
    obs = as_tensors(env.reset())
    tokens, values, _ = model.policy(obs)
    th.testing.assert_close(model.policy.evaluate_actions(obs, tokens)[0], values)


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": ["q_proj", "v_proj"]}])
def test_kl_to_the_reference(lora):
    env = vec_env()
    kwargs = {"ent_coef": 0.1, "policy_kwargs": {"model": tiny_model(), "reference_kl": True, "lora": lora}}
    model = R2VPO(
        CausalLMPolicy, env, **{**SEQUENCES, "n_epochs": 1, "batch_size": env.num_envs}, learning_rate=0.05, **kwargs
    )
    model.learn(16)
    assert logged(model)["train/entropy_loss"] == pytest.approx(0.0, abs=1e-6)
    model.learn(16, reset_num_timesteps=False)
    assert logged(model)["train/entropy_loss"] > 0
    assert logged(model)["train/entropy_loss"] < 10


def test_kl_divergence_by_hand():
    logits = th.tensor([0.5, 0.5, 0.0]).log()
    reference = th.tensor([0.25, 0.75, 0.0]).log()
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_divergence(logits, reference).item() == pytest.approx(expected, abs=1e-6)


def test_sb3_evaluates_it():
    env = vec_env()
    model = R2VPO(CausalLMPolicy, env, **SEQUENCES, policy_kwargs={"model": tiny_model()})
    mean_reward, _ = evaluate_policy(model, env, n_eval_episodes=32, warn=False)
    assert 0 <= mean_reward <= 1


# --- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", [R2VPO, R2VPOOff])
def test_save_and_load(tmp_path, algorithm):
    tiny_model().save_pretrained(tmp_path / "base")
    env = vec_env()
    model = algorithm(CausalLMPolicy, env, **SEQUENCES, policy_kwargs={"model": str(tmp_path / "base")})
    model.learn(32)
    model.save(tmp_path / "model")
    loaded = algorithm.load(tmp_path / "model", env=env, device=model.device)
    th.testing.assert_close(loaded.policy.state_dict(), model.policy.state_dict(), atol=0, rtol=0)
    loaded.learn(16)


def write_gguf(model: transformers.LlamaForCausalLM, path: Path) -> None:
    gguf = pytest.importorskip("gguf")
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        if "q_proj" in name or "k_proj" in name:
            # GGUF interleaves the two halves that rotary embeddings rotate
            heads = array.reshape(config.num_attention_heads, 2, -1, array.shape[1])
            array = np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(array.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_gguf_file_is_trained_and_exported(tmp_path):
    original = tiny_model()
    write_gguf(original, tmp_path / "tiny.gguf")
    model = R2VPO(CausalLMPolicy, vec_env(), **SEQUENCES, policy_kwargs={"model": tmp_path / "tiny.gguf"})
    ids = th.tensor([[1, 2, 3]])
    th.testing.assert_close(model.policy.model(ids).logits, original(ids).logits)
    model.learn(16)
    model.policy.export(tmp_path / "exported")
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported")
    th.testing.assert_close(exported(ids).logits, model.policy.model(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("lora", [None, {"r": 2, "target_modules": "all-linear", "init_lora_weights": False}])
def test_exported_folder_opens_in_transformers(tmp_path, lora):
    env = vec_env()
    policy = make_policy(env, lora=lora)
    policy.export(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = th.tensor([[1, 2, 3]])
    th.testing.assert_close(exported(ids).logits, policy.model(ids).logits, atol=1e-5, rtol=1e-5)


def test_lora_trains_adapters_only():
    env = vec_env()
    model = R2VPO(
        CausalLMPolicy,
        env,
        **SEQUENCES,
        policy_kwargs={
            "model": tiny_model(),
            "lora": {"r": 2, "target_modules": ["q_proj"]},
            "model_kwargs": {},
            "gradient_checkpointing": True,
        },
    )
    before = {name: value.clone() for name, value in model.policy.named_parameters()}
    model.learn(32)
    changed = {name for name, value in model.policy.named_parameters() if not th.equal(before[name], value)}
    assert changed
    assert all("lora" in name for name in changed)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_failing_reward_leaves_everything_as_it_was():
    class Failing(Echo):
        result: object = 1.0

        def reward(self, conversation):
            if isinstance(self.result, Exception):
                raise self.result
            return self.result

    task = Failing()
    model = R2VPO(CausalLMPolicy, vec_env(task), **SEQUENCES, policy_kwargs={"model": tiny_model()})
    model.learn(16)
    before = deepcopy(model.policy.state_dict())
    for result in (math.nan, math.inf, [1.0, 2.0], "1", None, RuntimeError("verifier")):
        task.result = result
        with pytest.raises((ValueError, RuntimeError), match=r"reward|verifier"):
            model.learn(16, reset_num_timesteps=False)
    th.testing.assert_close(model.policy.state_dict(), before, atol=0, rtol=0)
    assert model.num_timesteps == 16
    assert all(len(conversation.turns) == 0 for conversation in model.env.conversations)
    task.result = 1.0
    model.learn(16, reset_num_timesteps=False)


@pytest.mark.parametrize(
    ("prompt", "message"), [([], "empty prompt"), ([1] * 5, "max_prompt_tokens"), ([N_TOKENS], "outside its vocabulary")]
)
def test_bad_prompts_are_refused(prompt, message):
    class Prompts(Echo):
        def sample(self, rng):
            return Problem(prompt)

    for env in (vec_env(Prompts()), TokenEnv(Prompts(), **LENGTHS)):
        with pytest.raises(ValueError, match=message):
            env.reset()


def test_masks_that_depend_on_the_conversation_are_for_single_tokens():
    class Alternating(Echo):
        def action_mask(self, conversation):
            return np.arange(N_TOKENS) % 2 == len(conversation.response) % 2

    env = TokenEnv(Alternating(), **LENGTHS)
    env.reset()
    np.testing.assert_array_equal(env.action_masks(), [True, False] * 3)
    with pytest.raises(ValueError, match="Alternating overrides `action_mask`"):
        vec_env(Alternating())


def test_model_and_task_must_fit():
    with pytest.raises(ValueError, match="6 token ids, but the model knows 4"):
        make_policy(vec_env(), tiny_model(vocab_size=4))
    with pytest.raises(ValueError, match="context is 64"):
        make_policy(vec_env(max_new_tokens=61))
    with pytest.raises(ValueError, match="action space"):
        R2VPO(CausalLMPolicy, "Pendulum-v1", policy_kwargs={"model": tiny_model()})


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n_steps": 2048}, "n_steps=1"),
        ({"rollout_buffer_kwargs": {"advantage": "grpo"}}, "`advantage`"),
        ({"rollout_buffer_kwargs": {"loss_normalization": "mean"}}, "`loss_normalization`"),
        ({"policy_kwargs": {"model": tiny_model(), "top_p": 0.0}}, "`top_p`"),
    ],
)
def test_bad_settings_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        R2VPO(CausalLMPolicy, vec_env(), **{**SEQUENCES, "policy_kwargs": {"model": tiny_model()}, **kwargs})


def test_missing_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("sb3_r2vpo.llm")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'sb3-r2vpo\[llm\]'"):
        importlib.import_module("sb3_r2vpo.llm")


def test_rollouts_must_hold_whole_conversations():
    env = vec_env(Countdown(), max_turns=2, max_reply_tokens=1)
    model = R2VPO(CausalLMPolicy, env, **SEQUENCES, policy_kwargs={"model": tiny_model()})
    assert isinstance(model.rollout_buffer, SequenceRolloutBuffer)
    with pytest.raises(ValueError, match="multiple of the number of turns"):
        model.learn(16)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"eos_token_ids": []}, "no end-of-sequence token"),
        ({"eos_token_ids": [9]}, "outside the vocabulary"),
        ({"eos_token_ids": [1], "allowed_tokens": np.zeros(3, dtype=bool)}, "allowed_tokens"),
    ],
)
def test_bad_tasks_are_refused(kwargs, message):
    class Anything(Echo):
        def __init__(self) -> None:
            Task.__init__(self, vocab_size=3, **kwargs)

    with pytest.raises(ValueError, match=message):
        Anything()
