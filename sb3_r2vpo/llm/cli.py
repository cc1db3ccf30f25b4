"""Train, evaluate and sample language models.

examples:
  r2vpo llm train config.yml --folder logs/llm/chain_sum
  r2vpo llm eval config.yml --model logs/llm/chain_sum/model
  r2vpo llm generate config.yml --model logs/llm/chain_sum/model

All of them read a YAML file; see examples/llm/*.yml. Its sections:
  algorithm      name (r2vpo or r2vpo_off) and arguments of R2VPO or R2VPOOff
  policy         arguments of CausalLMPolicy; `model` is a folder, a GGUF file, or a name on the Hugging Face hub
  task           type (reasoning_gym, math or reward) and arguments of the task; `reward_function` is module:function, or a
                 list of these; modules are also looked for beside the file
  env            arguments of TokenVecEnv
  n_responses    responses to train on
  eval           n_problems and k; temperature, top_k and top_p, by default those of the paper's tests (0.6, 20, 0.95);
                 eval_freq and save_freq, in batches of responses
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch as th
import yaml
from stable_baselines3.common.logger import configure
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sb3_r2vpo.common.archive import written_atomically
from sb3_r2vpo.common.checkpoint import CheckpointCallback, list_checkpoints, newest_readable, resume
from sb3_r2vpo.llm.evaluation import TEST_SAMPLING, ResponseEvalCallback, evaluate_responses
from sb3_r2vpo.llm.importing import load_function
from sb3_r2vpo.llm.policy import CausalLMPolicy
from sb3_r2vpo.llm.sampling import Sampling
from sb3_r2vpo.llm.task import Problem
from sb3_r2vpo.llm.tasks import MathTask, ReasoningGymTask, RewardTask, TextTask
from sb3_r2vpo.llm.token_vec_env import TokenVecEnv
from sb3_r2vpo.r2vpo import R2VPO
from sb3_r2vpo.r2vpo_off import R2VPOOff

ALGORITHMS: dict[str, type[R2VPO]] = {"r2vpo": R2VPO, "r2vpo_off": R2VPOOff}
TASKS: dict[str, type[TextTask]] = {"reasoning_gym": ReasoningGymTask, "math": MathTask, "reward": RewardTask}
SECTIONS = {"algorithm", "policy", "task", "env", "n_responses", "eval"}

#: What differs from R2VPO's defaults for robots: one batch of responses a rollout, read once, with the groups' advantages.
ALGORITHM_DEFAULTS = {"n_steps": 1, "n_epochs": 1, "normalize_advantage": False, "max_grad_norm": 1.0}
EVAL_DEFAULTS = {"n_problems": 64, "k": 8, "eval_freq": 10, "save_freq": 10, **asdict(TEST_SAMPLING)}


def load_config(path: Path) -> dict[str, Any]:
    """
    :param path: A YAML file
    :return: Its sections, with the defaults of ``algorithm`` and ``eval``
    :raises ValueError: A section is missing or unknown, or a name in `eval`, or the algorithm.
    """
    config = yaml.safe_load(path.read_text())
    if not isinstance(config, dict) or set(config) - SECTIONS or SECTIONS - {"eval"} - set(config):
        found = sorted(config) if isinstance(config, dict) else config
        raise ValueError(f"{path} must have the sections {', '.join(sorted(SECTIONS))}; it has {found}.")
    if (name := (config["algorithm"] or {}).get("name")) not in ALGORITHMS:
        raise ValueError(f"`name` of `algorithm` in {path} is {name!r}; it must be one of {', '.join(ALGORITHMS)}.")
    config["algorithm"] = {**ALGORITHM_DEFAULTS, **config["algorithm"]}
    config["eval"] = {**EVAL_DEFAULTS, **(config.get("eval") or {})}
    if unknown := sorted(set(config["eval"]) - set(EVAL_DEFAULTS)):
        raise ValueError(f"`eval` in {path} has {unknown}; it takes {', '.join(EVAL_DEFAULTS)}.")
    return config


def eval_sampling(config: dict[str, Any]) -> Sampling:
    """
    :param config: From :func:`load_config`
    :return: How to sample in evaluations
    """
    return Sampling(**{name: config["eval"][name] for name in asdict(TEST_SAMPLING)})


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """
    :param model: A folder, a GGUF file, or a name on the Hugging Face hub
    :return: The model's tokenizer
    """
    if model.endswith(".gguf"):
        return AutoTokenizer.from_pretrained(Path(model).parent, gguf_file=Path(model).name)
    return AutoTokenizer.from_pretrained(model)


def make_task(settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path | None = None) -> TextTask:
    """
    :param settings: The section ``task``
    :param tokenizer: The model's tokenizer
    :param folder: Where modules of reward functions may lie, beside Python's own path; of the YAML file
    :return: The task
    :raises ValueError: Its type is unknown, or a reward function is not found.
    """
    settings = dict(settings)
    kind = settings.pop("type", None)
    if kind not in TASKS:
        raise ValueError(f"The task's type is {kind!r}; it must be one of {', '.join(TASKS)}.")
    if "reward_function" in settings:
        names = settings["reward_function"]
        functions = [load_function(name, folder) for name in ([names] if isinstance(names, str) else names)]
        settings["reward_function"] = functions[0] if isinstance(names, str) else functions
    return TASKS[kind](tokenizer=tokenizer, **settings)


def held_out_problems(task: TextTask, n_problems: int) -> list[Problem]:
    """
    Take the last problems away from a task, to evaluate on.

    :param task: The task; left with the others
    :param n_problems: How many to take
    :return: These
    :raises ValueError: None would be left.
    """
    n_training = len(task.problems) - n_problems
    if n_training < 1:
        raise ValueError(f"The task has {len(task.problems)} problems; {n_problems} for evaluation leave none to train on.")
    held_out = [task.problem(index) for index in range(n_training, len(task.problems))]
    task.problems = task.problems[:n_training]
    return held_out


def train(config: dict[str, Any], folder: Path, config_folder: Path | None = None) -> int:
    """
    Train, or go on from the folder's latest checkpoint; then write the model as a Hugging Face folder ``model``.

    :param config: From :func:`load_config`
    :param folder: For checkpoints, TensorBoard and the model
    :param config_folder: Where the YAML file lies
    :return: The exit status: 0, or 143 if SIGTERM has ended training, which has saved a checkpoint
    :raises ValueError: There is a checkpoint of a training with other settings.
    """
    tokenizer = load_tokenizer(config["policy"]["model"])
    task = make_task(config["task"], tokenizer, config_folder)
    settings = config["eval"]
    # Environments leave out prompts that are too long: those held out are not among them
    env, eval_env = TokenVecEnv(task, **config["env"]), TokenVecEnv(task, **{**config["env"], "group_size": settings["k"]})
    problems = held_out_problems(task, settings["n_problems"])
    arguments = dict(config["algorithm"])
    algorithm = ALGORITHMS[arguments.pop("name")]
    checkpoint = newest_readable(folder)
    if checkpoint is not None:
        print(f"Going on from {checkpoint}")
        model = resume(checkpoint, env, algorithm, device=arguments.get("device", "auto"))
    else:
        model = algorithm(CausalLMPolicy, env, policy_kwargs=config["policy"], **arguments)
    model.set_logger(configure(str(folder), ["stdout", "tensorboard"]))
    save_freq = settings["save_freq"] * model.n_steps * env.num_envs
    remaining = config["n_responses"] - model.num_timesteps
    with CheckpointCallback(folder, save_freq, every=None, keep_best=False) as checkpoints:
        if remaining > 0:
            evaluation = ResponseEvalCallback(eval_env, problems, settings["eval_freq"], eval_sampling(config))
            callbacks = [evaluation, checkpoints]
            model.learn(remaining, callback=callbacks, reset_num_timesteps=checkpoint is None)
    if checkpoints.stopped_by is not None:
        print(f"Stopped by a signal; the same command goes on from {checkpoints.last_path}")
        return 128 + checkpoints.stopped_by
    model.policy.export(folder / "model", tokenizer)
    return 0


def keep_settings(config_path: Path, folder: Path) -> None:
    """
    Keep a copy of the settings with what they have trained.

    :param config_path: The YAML file
    :param folder: The training's folder, made if it does not exist
    :raises ValueError: The folder has checkpoints of a training with others; ``n_responses`` and ``eval`` may change.
    """
    kept = folder / "config.yml"
    if kept.is_file() and list_checkpoints(folder):
        old, new = ({**load_config(path), "n_responses": None, "eval": None} for path in (kept, config_path))
        if changed := sorted(section for section in old if old[section] != new[section]):
            raise ValueError(
                f"The training in {folder} has other settings in {', '.join(changed)} than {config_path}: see {kept}. Go on "
                "with those, or begin a new training with another `--folder`."
            )
    folder.mkdir(parents=True, exist_ok=True)
    if not (kept.exists() and kept.samefile(config_path)):
        with written_atomically(kept) as file:
            file.write(config_path.read_bytes())


def evaluation_setup(
    config: dict[str, Any], model: str | None, config_folder: Path | None = None
) -> tuple[CausalLMPolicy, TokenVecEnv, list[Problem]]:
    """
    :param config: From :func:`load_config`
    :param model: A model instead of the policy's own
    :param config_folder: Where the YAML file lies
    :return: A policy, environments of ``k`` responses a problem, and the held-out problems
    """
    # What training adds to a model is merged into the exported one
    source, model_kwargs = model or config["policy"]["model"], config["policy"].get("model_kwargs")
    task = make_task(config["task"], load_tokenizer(source), config_folder)
    env = TokenVecEnv(task, **{**config["env"], "group_size": config["eval"]["k"]})
    problems = held_out_problems(task, config["eval"]["n_problems"])
    spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
    policy = CausalLMPolicy(**spaces, lr_schedule=lambda _: 0.0, model=source, model_kwargs=model_kwargs)  # type: ignore[arg-type]
    return policy.to("cuda" if th.cuda.is_available() else "cpu"), env, problems


def main(arguments: Sequence[str] | None = None) -> None:
    """
    :param arguments: Of the command line; ``None`` takes the process's own
    """
    parser = argparse.ArgumentParser(
        prog="r2vpo llm", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["train", "eval", "generate"])
    parser.add_argument("config", type=Path, help="YAML file")
    parser.add_argument("--folder", type=Path, help="train: where to write; training goes on from what it finds there")
    parser.add_argument("--model", help="eval, generate: a model instead of the one that training starts from")
    parser.add_argument("-n", "--n-problems", type=int, help="eval, generate: number of held-out problems")
    parser.add_argument("--temperature", type=float, help="eval, generate: in place of that of the file's section `eval`")
    parser.add_argument("--top-k", type=int, help="eval, generate: likewise; 0 for all tokens")
    parser.add_argument("--top-p", type=float, help="eval, generate: likewise; 1 for all tokens")
    parser.add_argument("--num-threads", type=int, help="PyTorch threads; by default as many as PyTorch takes")
    options = parser.parse_args(arguments)
    if options.num_threads is not None:
        th.set_num_threads(options.num_threads)
    config = load_config(options.config)
    for name in ("n_problems", "temperature", "top_k", "top_p"):
        if (value := getattr(options, name)) is not None:
            config["eval"][name] = value
    # No limit is 0 in a shell, and None in YAML and in Python
    config["eval"]["top_k"] = config["eval"]["top_k"] or None
    if options.command == "train":
        folder = options.folder or Path("logs/llm") / options.config.stem
        keep_settings(options.config, folder)
        if status := train(config, folder, options.config.parent):
            raise SystemExit(status)
        return
    if options.command == "generate":
        config["eval"]["k"] = 1
    policy, env, problems = evaluation_setup(config, options.model, options.config.parent)
    sampling = eval_sampling(config)
    evaluation, conversations = evaluate_responses(policy, env, problems, sampling)
    if options.command == "generate":
        for conversation in conversations:
            print(env.task.decode(conversation.tokens), end="\n\n")
    else:
        print(json.dumps({**asdict(evaluation), **asdict(sampling)}, indent=2))
