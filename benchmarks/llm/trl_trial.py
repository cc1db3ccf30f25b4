"""R2VPO with replay in TRL against this library's own loop, on the biased teacher: five seeds at equal settings.

    python benchmarks/llm/trl_trial.py        appends to results/trl_trial.csv what is not there yet, and prints the means

The settings are those that `biased_teacher.py` chose for replay of 4: 25 iterations of 32 prompts with 8 responses, UTD 4.
"""

import math
import statistics
import tempfile
import time
from typing import Any

import biased_teacher as own
import numpy as np
import torch as th
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sb3_r2vpo import R2VPOOff
from sb3_r2vpo.llm import CausalLMPolicy
from sb3_r2vpo.llm.tasks.biased_teacher import CHARACTERS, EOS, BiasedTeacherTask
from sb3_r2vpo.llm.trl import R2VPOConfig, R2VPOTrainer

RESULT = own.RESULTS / "trl_trial.csv"
SEEDS = (0, 1, 2, 3, 4)
LEARNING_RATE = 1e-4
TOKEN = {"objective": "r2vpo", "var_coef": 0.3}
SEQUENCE = {"objective": "r2vpo_sequence", "var_coef": 0.1}

#: Of this library's loop: the objective, and whether groups of equal scores are left out, which TRL does not do
OWN_ARMS: dict[str, tuple[dict[str, Any], bool]] = {
    "own": (TOKEN, False),
    "own, uniform groups left out": (TOKEN, True),
    "own sequence": (SEQUENCE, False),
}
#: Of TRL, with what differs from this library's loop: the arms after the first two have one of TRL's defaults each
TRL_ARMS: dict[str, dict[str, Any]] = {
    "trl": {},
    "trl sequence": {**SEQUENCE, "loss_type": "grpo"},
    "trl, learning rate to zero": {"lr_scheduler_type": "linear"},
    "trl, bf16": {"bf16": True},
}
#: TRL divides advantages by the standard deviation of a sample, this library by that of a population: they are smaller by this
#: factor, and so is the multiplier that has the same effect
ADVANTAGE_SCALE = math.sqrt(1 - 1 / own.GROUP_SIZE)


#: In the order in which they are run: first the two that are to agree
ARMS = ["own", "trl", *sorted((OWN_ARMS.keys() | TRL_ARMS.keys()) - {"own", "trl"})]


def tokenizer() -> PreTrainedTokenizerFast:
    """The task's characters as tokens; padding is masked, and may be any token."""
    model = Tokenizer(models.WordLevel({character: i for i, character in enumerate(CHARACTERS)}, unk_token=EOS))
    model.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    model.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=model, eos_token=EOS, pad_token=EOS)


def train_trl(task: BiasedTeacherTask, seed: int, options: dict[str, Any]) -> Any:
    rng = np.random.default_rng(seed)
    problems = [task.sample(rng) for _ in range(own.N_PROMPTS * own.HALF)]
    data = Dataset.from_list([{"prompt": task.decode(p.prompt), "answer": p.answer} for p in problems])

    def right(completion_ids: list[list[int]], answer: list[int], **_: Any) -> list[float]:
        rows = zip(completion_ids, answer, strict=True)
        return [float(task.decode(ids).endswith(f"={number}{EOS}")) for ids, number in rows]

    with tempfile.TemporaryDirectory() as folder:
        arguments: dict[str, Any] = {
            "output_dir": folder,
            "per_device_train_batch_size": own.N_PROMPTS * own.GROUP_SIZE // own.N_MINIBATCHES,
            "steps_per_generation": own.N_MINIBATCHES,
            "num_generations": own.GROUP_SIZE,
            "replay_capacity": own.TUNED_CAPACITY,
            "utd_ratio": int(own.UTD_RATIO),
            "max_steps": own.HALF * own.N_MINIBATCHES * int(own.UTD_RATIO),
            "max_completion_length": task.max_new_tokens,
            "learning_rate": LEARNING_RATE,
            # Those of this library's policy, and of PyTorch
            "lr_scheduler_type": "constant",
            "weight_decay": 0.01,
            "bf16": False,
            "use_cpu": True,
            "gradient_checkpointing": False,
            "seed": seed,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 100,
        }
        arguments |= {**TOKEN, **options}
        arguments["var_coef"] *= ADVANTAGE_SCALE
        config = R2VPOConfig(**arguments)
        trainer = R2VPOTrainer(own.base_model(task), right, config, data, processing_class=tokenizer())
        trainer.train()
    return trainer.model.float()


def train_own(task: BiasedTeacherTask, seed: int, options: dict[str, Any], leave_out: bool) -> Any:
    env = own.make_env(task, own.N_PROMPTS, own.GROUP_SIZE)
    normalization = "sequence" if "sequence" in options["objective"] else "token"
    model = R2VPOOff(
        CausalLMPolicy,
        env,
        learning_rate=LEARNING_RATE,
        n_steps=1,
        batch_size=env.num_envs // own.N_MINIBATCHES,
        n_epochs=1,
        normalize_advantage=False,
        max_grad_norm=1.0,
        replay_capacity=own.TUNED_CAPACITY,
        utd_ratio=own.UTD_RATIO,
        critic_kwargs={"recompute_advantages": False},
        rollout_buffer_kwargs={"filter_uniform_groups": leave_out, "loss_normalization": normalization},
        policy_kwargs={"model": own.base_model(task)},
        seed=seed,
        device="cpu",
        **options,
    )
    model.learn(env.num_envs * own.HALF, log_interval=None)
    return model.policy.model


def main() -> None:
    th.set_num_threads(1)
    task = BiasedTeacherTask()
    held_out = own.HeldOut(task)
    done = {(row["arm"], int(row["seed"])) for row in own.read(RESULT)}
    for arm in ARMS:
        for seed in SEEDS:
            if (arm, seed) in done:
                continue
            start = time.process_time()
            trained = train_own(task, seed, *OWN_ARMS[arm]) if arm in OWN_ARMS else train_trl(task, seed, TRL_ARMS[arm])
            seconds = round(time.process_time() - start, 1)
            spaces = held_out.env.observation_space, held_out.env.action_space
            accuracy = held_out(CausalLMPolicy(*spaces, lambda _: LEARNING_RATE, model=trained))
            is_new = not RESULT.exists()
            with RESULT.open("a") as file:
                file.write("arm,seed,held_out,cpu_seconds\n" if is_new else "")
                file.write(f'"{arm}",{seed},{accuracy:.5f},{seconds}\n')
    for arm in ARMS:
        values = [float(row["held_out"]) for row in own.read(RESULT) if row["arm"] == arm]
        print(f"{arm:32} {statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f}), {len(values)} seeds")


if __name__ == "__main__":
    main()
