"""Faults of language-model training that were found by use; each test fails without its mend."""

import json
import math
import warnings

import numpy as np
import pytest
import torch as th
import yaml

transformers = pytest.importorskip("transformers")

from test_llm import EOS, SEQUENCES, Countdown, Echo, as_tensors, logged, make_policy, tiny_model, vec_env  # noqa: E402
from test_llm_tasks import CHAT_TEMPLATE, byte_tokenizer, respond  # noqa: E402

from sb3_r2vpo import R2VPO, R2VPOOff, presets  # noqa: E402
from sb3_r2vpo.llm import (  # noqa: E402
    PADDING,
    CausalLMPolicy,
    Conversation,
    Problem,
    Sampling,
    SequenceRolloutBuffer,
    TokenEnv,
    TokenVecEnv,
)
from sb3_r2vpo.llm.cli import eval_sampling, load_config, make_task  # noqa: E402
from sb3_r2vpo.llm.importing import load_function  # noqa: E402
from sb3_r2vpo.llm.readout import Readout, in_slices, slice_size  # noqa: E402
from sb3_r2vpo.llm.sampling import truncate_logits  # noqa: E402
from sb3_r2vpo.llm.tasks import RewardTask  # noqa: E402

LORA = {"r": 2, "target_modules": ["q_proj"]}


def no_reward(prompt, response) -> float:
    return 0.0


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LORA])
def test_small_steps_of_a_bfloat16_model_are_made(lora):
    """At AdamW's steps of 1e-6, weights of 0.5 in bfloat16 stay as they are."""
    model = tiny_model().to(th.bfloat16)
    policy = make_policy(env := vec_env(), model, lora=lora)
    trained = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trained} == {th.float32}
    obs = as_tensors(env.reset())
    with th.no_grad():
        features = policy.readout(policy.model, policy.model_inputs(obs["input_ids"].long(), obs["attention_mask"].long()))
    tokens, _, sampled = policy(obs)
    before = [parameter.detach().clone() for parameter in trained]
    optimizer = th.optim.AdamW(trained, lr=1e-6, weight_decay=0.0)
    (-policy.evaluate_actions(obs, tokens)[1].mean()).backward()
    optimizer.step()
    changed = sum(int((old != new).sum()) for old, new in zip(before, trained, strict=True) if new.grad is not None)
    moved = sum(int((parameter.grad != 0).sum()) for parameter in trained if parameter.grad is not None)
    assert changed > 0.9 * moved > 0
    assert features.features.isfinite().all()
    assert sampled.dtype == th.float32


def test_bfloat16_models_compute_in_bfloat16():
    policy = make_policy(env := vec_env(), tiny_model().to(th.bfloat16))
    seen = set()
    policy.model.model.layers[0].mlp.down_proj.register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    obs = as_tensors(env.reset())
    policy.evaluate_actions(obs, policy(obs)[0])
    assert seen == {th.bfloat16}
    assert make_policy(vec_env(), tiny_model()).compute_dtype == th.float32


@pytest.mark.parametrize("lora", [None, LORA])
def test_float16_is_trained_in_float32_with_a_warning(lora):
    with pytest.warns(UserWarning, match="float16.*trained in float32.*bfloat16"):
        policy = make_policy(vec_env(), tiny_model().to(th.float16), lora=lora)
    assert {parameter.dtype for parameter in policy.model.parameters()} == {th.float32}


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [lambda task: TokenVecEnv(task, 1, 2, max_prompt_tokens=3, max_new_tokens=2), TokenEnv])
def test_too_long_prompts_are_found_before_training(make):
    if make is TokenEnv:
        make = lambda task: TokenEnv(task, max_prompt_tokens=3, max_new_tokens=2)  # noqa: E731
    prompts = ["one", "three", "two", "seven!"]
    with pytest.raises(ValueError, match=r"2 of 4 prompts are longer .*index 3, has 6 tokens.*drop_long_prompts"):
        make(RewardTask(prompts, no_reward, byte_tokenizer()))
    task = RewardTask(prompts, no_reward, byte_tokenizer(), answers=["1", "3", "2", "7"], drop_long_prompts=True)
    with pytest.warns(UserWarning, match="2 of 4"):
        make(task)
    assert task.n_dropped == 2
    assert [(prompt, row["answer"]) for prompt, row in task.problems] == [("one", "1"), ("two", "2")]
    with pytest.raises(ValueError, match="needs one that fits"):
        make(RewardTask(["three"], no_reward, byte_tokenizer(), drop_long_prompts=True))


def test_generated_prompts_that_are_too_long_are_drawn_anew():
    class Long(Echo):
        def sample(self, rng):
            return Problem([1] * int(rng.integers(1, 9)))

    task = Long()
    with pytest.raises(ValueError, match="drop_long_prompts"):
        [vec_env(task, n_prompts=32).reset() for _ in range(3)]
    task.drop_long_prompts = True
    obs = vec_env(task, n_prompts=32).reset()
    assert obs["attention_mask"].sum(-1).max() <= 4
    assert task.n_dropped > 0


# --- the end of a response, and its text -----------------------------------------------------------------------------


def test_all_ends_of_the_generation_config_end_a_response(tmp_path):
    tokenizer = byte_tokenizer(additional_special_tokens=["<turn>"])
    tokenizer.save_pretrained(tmp_path)
    turn, eos = tokenizer.convert_tokens_to_ids(["<turn>", "</s>"])
    transformers.GenerationConfig(eos_token_id=[eos, turn, 99_999]).save_pretrained(tmp_path)
    task = RewardTask(["a"], no_reward, transformers.AutoTokenizer.from_pretrained(tmp_path))
    assert set(task.eos_token_ids) == {eos, turn}
    assert RewardTask(["a"], no_reward, tokenizer, eos_token_ids=[turn]).eos_token_ids == (turn,)


def test_a_task_that_does_not_know_the_models_end_gets_a_warning():
    model = tiny_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_policy(vec_env(), model)
    model.generation_config = transformers.GenerationConfig(eos_token_id=[3, EOS])
    with pytest.warns(UserWarning, match=r"eos_token_ids=\[3, 5\]"):
        make_policy(vec_env(), model)


def test_special_tokens_within_a_response_reach_the_reward():
    tokenizer = byte_tokenizer(additional_special_tokens=["<think>", "</think>"])
    texts = []
    task = RewardTask(["1+1"], lambda prompt, response: texts.append(response) or 1.0, tokenizer)
    respond(task, task.problem(0), "<think>hm</think>2")
    assert texts == ["<think>hm</think>2"]


def test_prompts_may_be_chat_messages():
    tokenizer = byte_tokenizer()
    chat = [{"role": "user", "content": "1+1"}]
    with pytest.raises(ValueError, match="no chat template"):
        RewardTask([chat], no_reward, tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE + "{% if loud %}!{% endif %}"
    seen = []
    task = RewardTask(
        [chat], lambda prompt, response: seen.append(prompt) or 0.0, tokenizer, chat_template_kwargs={"loud": True}
    )
    assert task.decode(task.problem(0).prompt) == "[user]1+1[bot]!"
    respond(task, task.problem(0), "2")
    assert seen == [chat]
    with pytest.raises(ValueError, match=r"index 1, .* text, or a list of messages"):
        RewardTask(["a", 7], no_reward, tokenizer)


# --- rewards ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", [th.tensor(0.5), np.float32(0.5), np.array(0.5), 0.5])
def test_numbers_of_any_library_are_rewards(result):
    task = RewardTask(["a"], lambda prompt, response: result, byte_tokenizer())
    env = TokenVecEnv(task, n_prompts=1, group_size=2, max_prompt_tokens=3, max_new_tokens=2)
    env.reset()
    _, rewards, _, _ = env.step(np.array([[*task.eos_token_ids, PADDING]] * 2))
    np.testing.assert_array_equal(rewards, [0.5, 0.5])


@pytest.mark.parametrize("result", [th.tensor([1.0, 2.0]), th.tensor(math.nan), np.array("a")])
def test_what_is_no_number_is_refused(result):
    task = RewardTask(["a"], lambda prompt, response: result, byte_tokenizer())
    env = TokenVecEnv(task, n_prompts=1, group_size=2, max_prompt_tokens=3, max_new_tokens=2)
    env.reset()
    with pytest.raises(ValueError, match="one finite number"):
        env.step(np.array([[*task.eos_token_ids, PADDING]] * 2))


def test_weighted_rewards_of_batches_with_answers():
    """Functions as TRL takes them, asked once for all responses; one does not apply to the first prompt."""
    calls = []

    def correct(prompts, completions, answer, **kwargs):
        calls.append((prompts, completions, answer, sorted(kwargs)))
        return th.tensor([float(given == wanted) for given, wanted in zip(completions, answer, strict=True)])

    def short(completions):
        return [None if len(text) > 1 else 1 for text in completions]

    class Dataset(dict):
        column_names = ("prompt", "answer", "level")

    rows = Dataset(prompt=["1+1", "2+8"], answer=["2", "10"], level=[1, 2])
    task = RewardTask(rows, [correct, short], byte_tokenizer(), batched=True, reward_weights=[1.0, 0.25])
    texts = ["2", "10", "3", "11"]
    conversations = [
        Conversation(task.problem(index % 2), turns=[[*task.tokenizer(text)["input_ids"], *task.eos_token_ids]])
        for index, text in enumerate(texts)
    ]
    assert [float(reward) for reward in task.rewards(conversations)] == [1.25, 1.0, 0.25, 0.0]
    assert calls == [(["1+1", "2+8"] * 2, texts, ["2", "10"] * 2, ["level"])]
    with pytest.raises(ValueError, match="one reward for each"):
        RewardTask(["a"], lambda prompts, completions: 1.0, byte_tokenizer(), batched=True).rewards(conversations[:1])


def test_a_function_one_by_one_gets_the_answers_that_it_asks_for():
    task = RewardTask(
        ["1+1", "2+3"], lambda prompt, response, answer: float(answer == response), byte_tokenizer(), answers=["2", "5"]
    )
    assert [respond(task, task.problem(index), "5") for index in range(2)] == [0.0, 1.0]
    for kwargs, message in (({"answers": ["2"]}, "1 of `answer`"), ({"reward_weights": [1, 2]}, "`reward_weights`")):
        with pytest.raises(ValueError, match=message):
            RewardTask(["1+1", "2+3"], no_reward, byte_tokenizer(), **kwargs)


# --- generation ------------------------------------------------------------------------------------------------------


def test_ties_are_not_drawn_among():
    logits = th.tensor([1.0, 2.0, 2.0, 2.0])
    assert truncate_logits(logits, Sampling(temperature=0)).isfinite().tolist() == [False, True, False, False]
    assert truncate_logits(logits, Sampling(top_k=2)).isfinite().sum() == 2


@pytest.mark.parametrize("kind", ["Mamba", "Rwkv"])
def test_models_without_a_cache_of_keys_and_values_are_named(kind):
    sizes = {"vocab_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}
    config = getattr(transformers, f"{kind}Config")(**sizes)
    with pytest.raises(ValueError, match=f"{kind}ForCausalLM keeps no cache"):
        make_policy(vec_env(), getattr(transformers, f"{kind}ForCausalLM")(config))


def test_generation_in_chunks_holds_fewer_rows_at_once():
    env = vec_env(n_prompts=4)
    policy = make_policy(env, max_cache_tokens=5 * 10)
    rows = []
    policy.model.model.layers[0].register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    obs = as_tensors(env.reset())
    tokens, _, sampled = policy(obs)
    assert max(rows) <= 5
    assert all(env.action_space.contains(row.numpy()) for row in tokens)
    th.testing.assert_close(policy.evaluate_actions(obs, tokens)[1], sampled, atol=1e-4, rtol=0)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kwargs", [{}, {"top_k": 3, "temperature": 0.7}, {"reference_kl": True}, {"value_head": True}])
def test_slices_give_the_log_probs_and_gradients_of_the_whole(kwargs, monkeypatch):
    results = []
    for whole_bytes in (2**24, 0):
        monkeypatch.setattr("sb3_r2vpo.llm.readout.WHOLE_BYTES", whole_bytes)
        monkeypatch.setattr("sb3_r2vpo.llm.readout.SLICE_BYTES", 3 * 8 * 4)
        policy = make_policy(env := vec_env(), tiny_model(), **kwargs)
        with th.no_grad():
            policy.model.lm_head.weight.mul_(1.1)
        env.seed(0)
        obs = as_tensors(env.reset())
        th.manual_seed(1)
        tokens, _, _ = policy(obs)
        values, log_prob, relative_entropy = policy.evaluate_actions(obs, tokens)
        loss = log_prob.square().mean() + (0 if values is None else values.mean())
        (loss if relative_entropy is None else loss + relative_entropy.mean()).backward()
        results.append([log_prob.detach(), *(parameter.grad for parameter in policy.model.parameters())])
    th.testing.assert_close(*results)


def test_a_slice_is_all_that_exists_of_the_logits():
    """At most a sixth of the tokens' logits at once, forwards and backwards, where they are many."""
    n_tokens, vocab_size, sizes = 4096, 4096, []

    def read(features):
        sizes.append(len(features))
        return (features.exp().sum(-1),)

    features = th.ones(n_tokens, 2, requires_grad=True)
    in_slices(read, (features,), vocab_size)[0].sum().backward()
    assert max(sizes) == slice_size(n_tokens, vocab_size) <= n_tokens / 6
    assert sum(sizes) == 2 * n_tokens
    th.testing.assert_close(features.grad, features.exp())


def test_models_that_change_the_heads_logits_are_read_as_a_whole():
    """Gemma 2 caps its logits: what its head makes is not what it samples from."""
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    th.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=8, num_key_value_heads=1, final_logit_softcapping=0.5, initializer_range=1.0, **sizes
    )
    model = transformers.Gemma2ForCausalLM(config)
    assert not Readout(model).splits
    assert Readout(tiny_model()).splits
    policy = make_policy(env := vec_env(), model)
    obs = as_tensors(env.reset())
    tokens, _, sampled = policy(obs)
    log_prob = policy.evaluate_actions(obs, tokens)[1]
    th.testing.assert_close(log_prob, sampled, atol=1e-4, rtol=0)
    # Logits within 0.5 of zero: no token is more than e times as likely as another
    assert log_prob[tokens != PADDING].min() >= -1 - math.log(6)


# --- settings --------------------------------------------------------------------------------------------------------


def test_settings_from_which_nothing_is_learned_are_refused():
    arguments = {**SEQUENCES, "n_epochs": 1, "policy_kwargs": {"model": tiny_model()}}
    env = TokenVecEnv(Echo(), 4, group_size=1, max_prompt_tokens=4, max_new_tokens=6)
    with pytest.raises(ValueError, match="`group_size` is 1"):
        R2VPO(CausalLMPolicy, env, **arguments)
    with pytest.raises(ValueError, match="value_head=True"):
        R2VPO(CausalLMPolicy, vec_env(), **arguments, rollout_buffer_kwargs={"advantage": "gae"})


def test_defaults_for_robots_are_warned_of():
    arguments = {"n_steps": 1, "batch_size": 8, "device": "cpu", "policy_kwargs": {"model": tiny_model()}}
    with (
        pytest.warns(UserWarning, match="normalize_advantage=False"),
        pytest.warns(UserWarning, match="`n_epochs` is 10"),
    ):
        R2VPO(CausalLMPolicy, vec_env(), **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = R2VPOOff(CausalLMPolicy, vec_env(n_prompts=16), **{**arguments, **presets.language_model()})
    assert model.rollout_buffer.filter_uniform_groups


# --- what is logged --------------------------------------------------------------------------------------------------


def test_rollouts_are_summarised_by_hand():
    env = vec_env(n_prompts=2)
    buffer = SequenceRolloutBuffer(
        1, env.observation_space, env.action_space, "cpu", n_envs=8, gamma=1.0, gae_lambda=1.0, mask_truncated=True
    )
    obs = env.reset()
    lengths = np.array([6, 6, 2, 1, 3, 3, 3, 3])
    actions = np.where(np.arange(6) < lengths[:, None], 1, PADDING)
    ended = np.array([False, True, True, True, True, True, True, True])
    actions[ended, lengths[ended] - 1] = EOS
    rewards = np.array([1, 0, 0, 0, 0.5, 0.5, 0.5, 0.5], dtype=np.float32)
    log_probs = th.as_tensor(np.where(actions == PADDING, 0.0, -0.25))
    buffer.add(obs, actions, rewards, np.ones(8), th.zeros(8), log_probs)
    buffer.compute_returns_and_advantage(th.zeros(8), np.ones(8))
    expected = {
        "reward_mean": 3 / 8,
        "reward_std": float(rewards.std()),
        "reward_std_within_groups": math.sqrt(4 * 0.1875 / 8),
        "uniform_groups": 0.5,
        "length_mean": 27 / 8,
        "length_max": 6,
        "truncated": 1 / 8,
        "entropy": 0.25,
    }
    assert buffer.statistics == pytest.approx(expected)
    # Cut off: not trained on, yet the others are judged against it
    assert buffer.selected[0].tolist() == ended.tolist()
    assert buffer.advantages[0, 1] < 0


def test_summaries_cover_whole_rollouts():
    env = vec_env(n_prompts=32)
    model = R2VPO(
        CausalLMPolicy, env, **{**SEQUENCES, "n_epochs": 1, "batch_size": 128}, policy_kwargs={"model": tiny_model()}
    )
    model.learn(env.num_envs)
    assert len(model.ep_info_buffer) == env.num_envs == 128
    values = logged(model)
    assert values["rollout/reward_mean"] == pytest.approx(np.mean([episode["r"] for episode in model.ep_info_buffer]))
    assert {"rollout/entropy", "rollout/truncated", "rollout/uniform_groups", "rollout/reward_std"} <= set(values)


def test_the_loss_has_no_values_where_there_is_no_critic():
    model = R2VPO(
        CausalLMPolicy,
        env := vec_env(),
        **{**SEQUENCES, "n_epochs": 1, "batch_size": 16},
        policy_kwargs={"model": tiny_model()},
    )
    model.learn(env.num_envs)
    values = logged(model)
    assert "train/value_loss" not in values
    assert values["train/loss"] == pytest.approx(values["train/policy_gradient_loss"], abs=1e-7)


@pytest.mark.parametrize("objective", ["r2vpo", "r2vpo_sequence"])
def test_stale_responses_are_looked_at_as_the_objective_does_and_only_some(objective, monkeypatch):
    env = vec_env(n_prompts=8)
    settings = {**SEQUENCES, "n_epochs": 1, "batch_size": 8, "learning_rate": 0.02}
    model = R2VPOOff(
        CausalLMPolicy, env, **settings, objective=objective, replay_capacity=3, policy_kwargs={"model": tiny_model()}
    )
    model.learn(3 * env.num_envs)
    seen = []
    evaluate = model.evaluate_actions
    monkeypatch.setattr(model, "evaluate_actions", lambda samples, **kw: seen.append(samples) or evaluate(samples, **kw))
    rollouts = list(model.replay_buffer.rollouts)
    model._renew_replayed(rollouts)
    assert [len(samples.actions) for samples in seen] == [4, 4], "Not all 32 of each stale rollout"
    samples = seen[0]
    with th.no_grad():
        log_ratio = evaluate(samples).log_prob - samples.old_log_prob
    ratios = log_ratio.sum(-1).exp() if objective == "r2vpo_sequence" else log_ratio[samples.mask].exp()
    expected = (ratios - 1).square().mean().item()
    assert logged(model)["train/ratio_variance_stale_1"] == pytest.approx(expected, rel=1e-3)


def test_ratios_are_logged_of_whole_responses_for_objectives_of_these():
    """One log had an effective sample size of 0.167, that of tokens, where it was 0.557."""
    kwargs = {**SEQUENCES, "n_epochs": 1, "batch_size": 16, "policy_kwargs": {"model": tiny_model()}}
    model = R2VPOOff(CausalLMPolicy, env := vec_env(), **kwargs, objective="r2vpo_sequence", replay_capacity=2)
    model.learn(env.num_envs)
    batch = model._minibatch(model.replay_buffer.rollouts[-1].samples)
    log_ratio = th.full_like(batch.samples.old_log_prob, 0.1)
    of_responses = model.policy_loss.action_log_ratio(log_ratio, batch.mask)
    th.testing.assert_close(of_responses, 0.1 * batch.mask.sum(-1))


# --- the command line ------------------------------------------------------------------------------------------------


def test_reward_modules_lie_beside_the_settings(tmp_path):
    (tmp_path / "own_rewards.py").write_text(
        "def right(prompt, response):\n    return 1.0\n\n\ndef short(prompt, response):\n    return 0.5\n"
    )
    settings = {"type": "reward", "prompts": ["a"], "reward_function": "own_rewards:right"}
    with pytest.raises(ValueError, match="no module 'own_rewards'"):
        make_task(settings, byte_tokenizer())
    assert respond(make_task(settings, byte_tokenizer(), tmp_path), Problem([1], ("a", {})), "b") == 1.0
    both = {**settings, "reward_function": ["own_rewards:right", "own_rewards:short"], "reward_weights": [1, 2]}
    assert respond(make_task(both, byte_tokenizer(), tmp_path), Problem([1], ("a", {})), "b") == 2.0
    for name, message in (("own_rewards", "module:function"), ("own_rewards:wrong", "no function 'wrong'")):
        with pytest.raises(ValueError, match=message):
            load_function(name, tmp_path)


def test_evaluations_are_sampled_as_the_settings_say(tmp_path):
    path = tmp_path / "config.yml"
    sections = {"algorithm": {"name": "r2vpo"}, "policy": {}, "task": {}, "env": {}, "n_responses": 1}
    path.write_text(yaml.safe_dump(sections))
    assert eval_sampling(load_config(path)) == Sampling(0.6, 20, 0.95)
    path.write_text(json.dumps({**sections, "eval": {"temperature": 1.0, "top_k": None, "top_p": 1.0}}))
    assert eval_sampling(load_config(path)) == Sampling()
    path.write_text(json.dumps({**sections, "eval": {"temprature": 1.0}}))
    with pytest.raises(ValueError, match="temprature"):
        load_config(path)
    path.write_text(json.dumps({**sections, "algorithm": {"name": "ppo"}}))
    with pytest.raises(ValueError, match="'ppo'; it must be one of r2vpo"):
        load_config(path)


def test_rewards_are_asked_for_together_and_only_at_the_end():
    """In conversations of several turns, those that are over have been judged once."""
    batches = []

    class Batched(Countdown):
        def rewards(self, conversations):
            batches.append(len(conversations))
            return super().rewards(conversations)

    env = vec_env(Batched(), n_prompts=8, max_turns=2, max_reply_tokens=1)
    env.reset()
    response = np.array([[0, EOS] + [PADDING] * 4] * env.num_envs)
    env.step(response)
    active = np.array(env.active)
    env.step(np.where(active[:, None], response, PADDING))
    assert batches == [(~active).sum(), active.sum()]
    assert 0 < active.sum() < env.num_envs
