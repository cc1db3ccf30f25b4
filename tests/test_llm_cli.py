"""The command line of language models, and checkpoints from which training goes on exactly."""

import json
import os
import signal

import pytest
import torch as th
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

transformers = pytest.importorskip("transformers")

from test_llm_tasks import byte_tokenizer  # noqa: E402

from sb3_r2vpo import R2VPO, R2VPOOff  # noqa: E402
from sb3_r2vpo.common.checkpoint import CheckpointCallback, list_checkpoints, remaining_timesteps, resume  # noqa: E402
from sb3_r2vpo.llm import CausalLMPolicy, TokenVecEnv, cli  # noqa: E402
from sb3_r2vpo.llm.cli import load_config, main, make_task  # noqa: E402
from sb3_r2vpo.llm.tasks import BiasedTeacherTask  # noqa: E402
from sb3_r2vpo.llm.tasks.biased_teacher import tiny_model  # noqa: E402


def reward(prompt: str, response: str) -> float:
    return float(len(response) < 4)


calls = 0


def terminating_reward(prompt: str, response: str) -> float:
    """Of whose training the second batch of responses is broken off, once."""
    global calls
    calls += 1
    if calls == 12:
        os.kill(os.getpid(), signal.SIGTERM)
    return reward(prompt, response)


@pytest.fixture
def config_path(tmp_path):
    """A training of a few seconds, from a model and a tokenizer on disk."""
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "base")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(
        tmp_path / "base"
    )
    config = {
        "algorithm": {"name": "r2vpo_off", "batch_size": 8, "learning_rate": 1e-3, "seed": 0, "device": "cpu"},
        "policy": {"model": str(tmp_path / "base")},
        "task": {"type": "reward", "prompts": ["one", "two", "three", "four"], "reward_function": "test_llm_cli:reward"},
        "env": {"n_prompts": 4, "group_size": 2, "max_prompt_tokens": 5, "max_new_tokens": 6},
        "n_responses": 32,
        "eval": {"n_problems": 2, "k": 2, "eval_freq": 2, "save_freq": 1},
    }
    path = tmp_path / "config.yml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_train_resume_eval_generate(config_path, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    devices = []

    def load(*args, device, **kwargs):
        devices.append(device)
        return resume(*args, device=device, **kwargs)

    monkeypatch.setattr(cli, "resume", load)
    main(["train", str(config_path), "--folder", str(folder)])
    assert [path.name for path in list_checkpoints(folder)] == ["checkpoint_16.zip", "checkpoint_24.zip"]
    events = EventAccumulator(str(folder)).Reload()
    [name] = events.Tags()["tensors"]
    assert name.startswith("eval/conversation")
    assert "three" in events.Tensors(name)[0].tensor_proto.string_val[0].decode()
    weights = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()

    # Once more from the checkpoint before the last rollout: the same weights
    main(["train", str(config_path), "--folder", str(folder)])
    assert "Going on from" in capsys.readouterr().out
    assert devices == ["cpu"], "on the device that the file names, not on a GPU that happens to be there"
    resumed = transformers.AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    th.testing.assert_close(resumed, weights, atol=0, rtol=0)

    main(["eval", str(config_path), "--model", str(folder / "model")])
    assert set(json.loads(capsys.readouterr().out)) == {
        *("mean_at_k", "pass_at_k", "length", "truncated", "entropy"),
        *("temperature", "top_k", "top_p"),
    }
    main(["generate", str(config_path), "-n", "1"])
    assert capsys.readouterr().out.startswith("four")


@pytest.mark.parametrize("algorithm", [R2VPO, R2VPOOff])
def test_training_goes_on_exactly_from_a_checkpoint(algorithm, tmp_path):
    task = BiasedTeacherTask(n_operations=1)

    def make_env() -> TokenVecEnv:
        return TokenVecEnv(task, 4, 4, max_prompt_tokens=task.max_prompt_tokens, max_new_tokens=task.max_new_tokens)

    tiny_model(task).save_pretrained(tmp_path / "base")
    arguments = {"n_steps": 1, "batch_size": 8, "n_epochs": 1, "seed": 1, "device": "cpu"}
    model = algorithm(CausalLMPolicy, make_env(), policy_kwargs={"model": str(tmp_path / "base")}, **arguments)
    model.learn(16 * 6, callback=CheckpointCallback(tmp_path, save_freq=16 * 3, keep=1))
    resumed = resume(tmp_path, make_env(), device="cpu")
    assert resumed.num_timesteps == remaining_timesteps(resumed) == 48
    resumed.learn(48, reset_num_timesteps=False)
    assert resumed.num_timesteps == model.num_timesteps
    th.testing.assert_close(resumed.policy.state_dict(), model.policy.state_dict(), atol=0, rtol=0)
    assert resumed.policy_loss.multiplier.value == model.policy_loss.multiplier.value


def test_sigterm_ends_training_and_the_same_command_goes_on(config_path, tmp_path, capsys):
    config = yaml.safe_load(config_path.read_text())
    config["eval"] |= {"eval_freq": 100, "save_freq": 100}
    config_path.write_text(yaml.safe_dump(config))
    main(["train", str(config_path), "--folder", str(tmp_path / "alone")])
    config["task"]["reward_function"] = "test_llm_cli:terminating_reward"
    config_path.write_text(yaml.safe_dump(config))
    command = ["train", str(config_path), "--folder", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as caught:
        main(command)
    assert caught.value.code == 128 + signal.SIGTERM
    assert "checkpoint_8.zip" in capsys.readouterr().out
    assert not (tmp_path / "run" / "model").exists()
    main(command)
    models = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("alone", "run")]
    th.testing.assert_close(models[0].state_dict(), models[1].state_dict(), atol=0, rtol=0)


def test_other_settings_are_not_taken_for_those_of_the_training(config_path, tmp_path):
    folder = tmp_path / "run"
    main(["train", str(config_path), "--folder", str(folder)])
    kept = (folder / "config.yml").read_bytes()
    config = yaml.safe_load(config_path.read_text())

    config_path.write_text(yaml.safe_dump({**config, "algorithm": {**config["algorithm"], "learning_rate": 1e-2}}))
    with pytest.raises(ValueError, match="has other settings in algorithm"):
        main(["train", str(config_path), "--folder", str(folder)])
    assert (folder / "config.yml").read_bytes() == kept

    # As many environments, but other groups: what `config.yml` does not prevent, the state does
    env = TokenVecEnv(make_task(config["task"], byte_tokenizer()), **{**config["env"], "n_prompts": 2, "group_size": 4})
    with pytest.raises(ValueError, match="`n_prompts` was 4, and is 2, `group_size` was 2, and is 4"):
        resume(folder, env, device="cpu")

    # More responses, and other evaluations, are the same training
    config_path.write_text(yaml.safe_dump({**config, "n_responses": 40}))
    main(["train", str(config_path), "--folder", str(folder)])
    assert list_checkpoints(folder)[-1].name == "checkpoint_32.zip"


def test_bad_configs_are_refused(config_path):
    config = yaml.safe_load(config_path.read_text())
    for broken in ({}, {**config, "typo": 1}, [1]):
        config_path.write_text(yaml.safe_dump(broken))
        with pytest.raises(ValueError, match="must have the sections"):
            load_config(config_path)
    with pytest.raises(ValueError, match="type is 'chess'"):
        make_task({"type": "chess"}, byte_tokenizer())
