"""Tasks of language models: text, reasoning-gym, mathematics, the biased teacher."""

import json
import math
import sys
import types

import numpy as np
import pytest
import torch as th

transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers  # noqa: E402

from sb3_r2vpo import R2VPO  # noqa: E402
from sb3_r2vpo.llm import PADDING, CausalLMPolicy, Conversation, TokenVecEnv  # noqa: E402
from sb3_r2vpo.llm.evaluation import ResponseEvalCallback, evaluate_responses  # noqa: E402
from sb3_r2vpo.llm.policy import Generation  # noqa: E402
from sb3_r2vpo.llm.tasks import BiasedTeacherTask, MathTask, ReasoningGymTask, RewardTask  # noqa: E402
from sb3_r2vpo.llm.tasks.biased_teacher import imitate, tiny_model  # noqa: E402
from sb3_r2vpo.llm.tasks.math import MATH_DATASETS  # noqa: E402

CHAT_TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[bot]{% endif %}"
)


def byte_tokenizer(**kwargs) -> transformers.PreTrainedTokenizerFast:
    """One token for each byte, and an end-of-sequence token; no pad token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{"eos_token": "</s>", **kwargs})


def respond(task, problem, text: str) -> float:
    return task.reward(Conversation(problem, turns=[[*task.tokenizer(text)["input_ids"], *task.eos_token_ids]]))


def test_text_task_applies_template_and_thinking():
    tokenizer = byte_tokenizer()
    plain = RewardTask(["1+1"], lambda prompt, response: 0.0, tokenizer)
    assert plain.decode(plain.problem(0).prompt) == "1+1"
    tokenizer.chat_template = CHAT_TEMPLATE
    for thinking, suffix in ((None, ""), ("fast", "<think></think>"), ("slow", "<think>")):
        task = RewardTask(["1+1"], lambda prompt, response: 0.0, tokenizer, thinking=thinking, system_prompt="Be brief.")
        assert task.decode(task.problem(0).prompt) == f"[system]Be brief.[user]1+1[bot]{suffix}"


def test_reward_function_gets_prompt_and_response():
    calls = []
    task = RewardTask(["1+1"], lambda prompt, response: calls.append((prompt, response)) or 0.5, byte_tokenizer())
    assert respond(task, task.problem(0), "2") == 0.5
    assert calls == [("1+1", "2")]


def test_failing_reward_function_is_named():
    def reward(prompt: str, response: str) -> float:
        raise KeyError("verifier")

    task = RewardTask(["1+1"], reward, byte_tokenizer())
    with pytest.raises(RuntimeError, match=r"response '2' to '1\+1'") as error:
        respond(task, task.problem(0), "2")
    assert isinstance(error.value.__cause__, KeyError)


@pytest.mark.parametrize("result", [[1.0, 0.0], np.zeros(2), [], math.nan, "1", None])
def test_reward_function_must_return_one_finite_number(result):
    """A function written for whole batches returns one number too many; the environment stays where it was."""
    task = RewardTask(["1+1"], lambda prompt, response: result, byte_tokenizer())
    env = TokenVecEnv(task, n_prompts=1, group_size=2, max_prompt_tokens=3, max_new_tokens=2, seed=0)
    before = env.reset()
    response = [*task.tokenizer("2")["input_ids"], *task.eos_token_ids]
    with pytest.raises(ValueError, match="one finite number") as error:
        env.step(np.array([response, response]))
    assert "'2" in str(error.value)
    np.testing.assert_equal(env._observations(), before)


@pytest.mark.parametrize(
    ("prompts", "tokenizer_kwargs", "kwargs", "message"),
    [
        ([], {}, {}, "no problems"),
        (["a", " "], {}, {}, "at index 1, an empty prompt"),
        (["a"], {"eos_token": None}, {}, "no end-of-sequence token"),
        (["a"], {}, {"thinking": "deep"}, "`thinking`"),
        (["a"], {}, {"system_prompt": "b"}, "chat template"),
    ],
)
def test_bad_text_tasks_are_refused(prompts, tokenizer_kwargs, kwargs, message):
    with pytest.raises(ValueError, match=message):
        RewardTask(prompts, lambda prompt, response: 0.0, byte_tokenizer(**tokenizer_kwargs), **kwargs)


def test_reasoning_gym():
    pytest.importorskip("reasoning_gym")
    task = ReasoningGymTask("chain_sum", byte_tokenizer(), size=5, config={"max_terms": 2})
    problem = task.problem(0)
    answer = problem.answer[1]["answer"]
    assert respond(task, problem, answer) == 1.0
    assert respond(task, problem, f"So it is <answer>{answer}</answer>!") == 1.0
    assert respond(task, problem, f"{answer}7") < 1.0
    with pytest.raises(ValueError, match="nonsense"):
        ReasoningGymTask("nonsense", byte_tokenizer())


def test_math_from_json_lines(tmp_path):
    pytest.importorskip("math_verify")
    path = tmp_path / "problems.jsonl"
    rows = [{"question": "Half of one?", "answer": "\\frac{1}{2}"}, {"question": "6 * 7?", "answer": "6 * 7 #### 42"}]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    task = MathTask(path, byte_tokenizer(), prompt="question")
    assert respond(task, task.problem(0), "It is \\boxed{0.5}.") == 1.0
    assert respond(task, task.problem(0), "It is \\boxed{2}.") == 0.0
    assert respond(task, task.problem(1), "so the answer is 42.") == 1.0
    assert respond(task, task.problem(1), "") == 0.0
    with pytest.raises(ValueError, match=r"Row 1 .* has no \['problem'\]"):
        MathTask(path, byte_tokenizer())
    with pytest.raises(ValueError, match="neither"):
        MathTask("aime1984", byte_tokenizer())


@pytest.mark.parametrize("name", MATH_DATASETS)
def test_data_sets_by_name(name, monkeypatch):
    """Rows come from the hub with the columns that it has; without a connection, the error says what else to do."""
    pytest.importorskip("math_verify")
    dataset = MATH_DATASETS[name]
    rows = [{dataset.prompt: "6 * 7?", dataset.answer: "42"}]

    def load_dataset(path, config, split):
        assert (path, config, split) == (dataset.path, dataset.name, dataset.split)
        return rows

    hub = types.ModuleType("datasets")
    hub.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", hub)
    task = MathTask(name, byte_tokenizer())
    assert respond(task, task.problem(0), "42") == 1.0

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route to host")

    hub.load_dataset = unreachable
    with pytest.raises(RuntimeError, match=rf"'{name}'.* could not be loaded .*no route to host.*\.jsonl"):
        MathTask(name, byte_tokenizer())
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match="pip install datasets"):
        MathTask(name, byte_tokenizer())


def test_biased_teacher_knows_what_it_was_taught():
    task = BiasedTeacherTask(n_operations=3, seed=1)
    rng = np.random.default_rng(0)
    problem = task.sample(rng)
    right = {fact: 1.0 for fact in task.truth}
    task.truth_probability = right
    response = task.demonstrate(problem, rng)
    assert len(problem.prompt) == task.max_prompt_tokens
    assert len(response) == task.max_new_tokens
    assert task.reward(Conversation(problem, turns=[response])) == 1.0
    task.truth_probability = dict.fromkeys(right, 0.0)
    assert task.demonstrate(problem, rng) != response
    # Cut off before the end-of-sequence token
    assert task.reward(Conversation(problem, turns=[response[:-1]])) == 0.0


def test_biased_teacher_is_imitated_and_trained():
    task = BiasedTeacherTask(n_operations=1)
    model = tiny_model(task)
    assert imitate(model, task, n_updates=60, batch_size=64) < 1.0 < math.log(task.vocab_size)
    env = TokenVecEnv(task, 4, 4, max_prompt_tokens=task.max_prompt_tokens, max_new_tokens=task.max_new_tokens)
    R2VPO(CausalLMPolicy, env, n_steps=1, batch_size=8, n_epochs=1, policy_kwargs={"model": model}).learn(16)


def test_evaluation_on_known_problems():
    """A policy that imitates a truthful teacher, and one that cannot know: their averages, over each problem once."""
    task = BiasedTeacherTask(n_operations=1, truth_probabilities=(1.0,))
    env = TokenVecEnv(task, 4, 3, max_prompt_tokens=task.max_prompt_tokens, max_new_tokens=task.max_new_tokens, seed=0)
    rng = np.random.default_rng(0)
    problems = [task.sample(rng) for _ in range(10)]
    policy = CausalLMPolicy(env.observation_space, env.action_space, lambda _: 1e-3, model=tiny_model(task))

    class Truthful:
        device = policy.device
        set_training_mode = policy.set_training_mode

        def generate(self, obs, sampling):
            rows = [task.demonstrate(conversation.problem, rng) for conversation in env.conversations]
            # The second response of each group is wrong
            rows[1::3] = [task.encode("0") + [PADDING] * 5 for _ in rows[1::3]]
            tokens = th.tensor(rows)
            return Generation(tokens, th.zeros(tokens.shape), th.where(tokens == PADDING, 0.0, 0.5))

    evaluation, conversations = evaluate_responses(Truthful(), env, problems)
    assert [conversation.problem for conversation in conversations[::3]] == problems
    assert evaluation.mean_at_k == pytest.approx(2 / 3)
    assert evaluation.pass_at_k == 1.0
    assert evaluation.truncated == pytest.approx(1 / 3)
    assert evaluation.length == pytest.approx((6 + 1 + 6) / 3)
    assert evaluation.entropy == pytest.approx(0.5)
    untrained, _ = evaluate_responses(policy, env, problems)
    assert untrained.pass_at_k < 1
    with pytest.raises(ValueError, match="no problems"):
        evaluate_responses(policy, env, [])


def test_evaluation_callback_logs():
    task = BiasedTeacherTask(n_operations=1)
    lengths = {"max_prompt_tokens": task.max_prompt_tokens, "max_new_tokens": task.max_new_tokens}
    env, eval_env = TokenVecEnv(task, 4, 4, **lengths), TokenVecEnv(task, 2, 2, **lengths)
    model = R2VPO(CausalLMPolicy, env, n_steps=1, batch_size=8, n_epochs=1, policy_kwargs={"model": tiny_model(task)})
    problems = [task.sample(np.random.default_rng(0)) for _ in range(3)]
    callback = ResponseEvalCallback(eval_env, problems, eval_freq=2, verbose=0)
    # Without `log_interval` nothing is dumped, and so nothing is cleared
    model.learn(64, callback=callback, log_interval=None)
    assert model.logger.name_to_value["eval/entropy"] > 0
    assert ">" in model.logger.name_to_value["eval/conversation"]
