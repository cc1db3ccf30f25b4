"""R2VPO in TRL, offline, with the tiny model of the example."""

import importlib.util
import inspect
import subprocess
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch as th

pytest.importorskip("trl", reason="needs the extra: pip install 'sb3-r2vpo[llm,trl]'")

from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import HfArgumentParser, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import utils

from sb3_r2vpo.core import OBJECTIVES, constant_length_mean, sequence_mean, token_mean
from sb3_r2vpo.llm.trl import R2VPOConfig, R2VPOTrainer

EXAMPLE = Path(__file__).parents[1] / "examples" / "llm" / "trl_math.py"
PROMPT_LENGTHS, MAX_TOKENS, N_ROWS, N_STEPS = (4, 5), 6, 8, 6


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("trl_math", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["trl_math"] = module  # data classes look their module up
    spec.loader.exec_module(module)
    return module


example = load_example()


def make_config(folder: Path, **options: Any) -> R2VPOConfig:
    """Two minibatches of four responses for each generated batch."""
    defaults = {"output_dir": str(folder), "steps_per_generation": 2, "max_steps": N_STEPS, "save_strategy": "no", "seed": 1}
    return R2VPOConfig(**{**example.TINY, **defaults, "disable_tqdm": True, **options})


def make_trainer(folder: Path, callbacks: tuple[TrainerCallback, ...] = (), **options: Any) -> R2VPOTrainer:
    model, tokenizer = example.tiny_model()
    data = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(8, 12) for b in range(8)])
    config = make_config(folder, **options)
    return R2VPOTrainer(model, example.small_digits, config, data, processing_class=tokenizer, callbacks=list(callbacks))


def logged(trainer: GRPOTrainer, name: str) -> list[float]:
    return [row[f"r2vpo/{name}"] for row in trainer.state.log_history if f"r2vpo/{name}" in row]


def test_trains_on_policy_and_moves_the_multiplier(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, var_coef="auto_0.3", target_variance=0.01, max_steps=24)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    trainer.train()
    assert not any(th.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert sum(rewards[-4:]) > sum(rewards[:4])
    variances, multipliers = logged(trainer, "ratio_variance"), logged(trainer, "var_coef")
    # Of the first of the four minibatches of each generated batch, all ratios are one
    assert max(variances[::4]) < 1e-10 < min(variances[1::4])
    # Eq. 10, with the default step size
    steps = [b - a for a, b in pairwise(multipliers)]
    assert steps == pytest.approx([0.02 * (v - 0.01) for v in variances[:-1]], abs=1e-6)
    assert logged(trainer, "target_variance") == pytest.approx([0.01] * 24)
    assert not logged(trainer, "replay_age")
    assert not [name for row in trainer.state.log_history for name in row if "clip_ratio" in name]


def test_replay_trains_on_old_batches(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, replay_capacity=3, utd_ratio=2, max_steps=20)
    drawn: list[th.Tensor] = []
    draw = trainer._draw

    def watch(n_responses: int) -> dict[str, Any]:
        batch = draw(n_responses)
        drawn.append(batch["generated_at"])
        return batch

    trainer._draw = watch  # type: ignore[method-assign]
    trainer.train()
    # A batch every four optimizer steps, of which the last three are kept
    assert [batch["generated_at"].unique().tolist() for batch in trainer.replay] == [[8], [12], [16]]
    assert len(drawn) == 10
    assert all(len(ages) == N_ROWS for ages in drawn)
    # Two passes each: two thirds of the three batches, of all 24 responses none twice
    assert set(th.cat(drawn[-2:]).tolist()) <= {8, 12, 16}
    assert sorted(th.cat(drawn[:2]).tolist()) == [0] * 16
    assert sorted(th.cat(drawn[2:4]).tolist()) == [0] * 8 + [4] * 8
    ages = logged(trainer, "replay_age")
    assert ages[0] == 0
    assert ages[-1] == pytest.approx(18 - drawn[-1].double().mean().item())
    assert min(logged(trainer, "ratio_variance")[8:]) > 0


def test_replayed_responses_are_padded_anew_and_keep_what_belongs_to_them(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, replay_capacity=2)
    pad = trainer._tokenizer.pad_token_id
    for prompt_width, width, first in ((2, 3, 10), (4, 1, 20)):
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "old_per_token_logps")
        batch = {name: th.ones(2, prompt_width if "prompt" in name else width) for name in names}
        batch["prompt_ids"] = batch["completion_ids"] = th.arange(first, first + 2).unsqueeze(1)
        batch["prompt_ids"] = batch["prompt_ids"].expand(2, prompt_width).clone()
        batch["completion_ids"] = batch["completion_ids"].expand(2, width).clone()
        batch |= {"advantages": th.arange(first, first + 2), "generated_at": th.zeros(2), "num_items_in_batch": th.tensor(9)}
        trainer.replay.append(batch)
    drawn = trainer._draw(4)
    assert sorted(drawn["advantages"].tolist()) == [10, 11, 20, 21]
    for row, number in enumerate(drawn["advantages"].tolist()):
        prompt_width, width = (2, 3) if number < 20 else (4, 1)
        assert drawn["prompt_ids"][row].tolist() == [pad] * (4 - prompt_width) + [number] * prompt_width
        assert drawn["prompt_mask"][row].tolist() == [0] * (4 - prompt_width) + [1] * prompt_width
        assert drawn["completion_ids"][row].tolist() == [number] * width + [pad] * (3 - width)
        assert drawn["completion_mask"][row].tolist() == [1] * width + [0] * (3 - width)
        assert drawn["old_per_token_logps"][row].tolist() == [1] * width + [0] * (3 - width)
    assert drawn["num_items_in_batch"] == 2 * 3 + 2 * 1


def make_inputs(trainer: R2VPOTrainer, n: int = 4) -> dict[str, th.Tensor]:
    generator = th.Generator().manual_seed(3)
    lengths = th.tensor([6, 1, 3, 5])
    return {
        "prompt_ids": th.randint(12, (n, 4), generator=generator),
        "prompt_mask": th.ones(n, 4, dtype=th.long),
        "completion_ids": th.randint(12, (n, MAX_TOKENS), generator=generator),
        "completion_mask": (th.arange(MAX_TOKENS) < lengths.unsqueeze(1)).long(),
        "advantages": th.tensor([1.0, -0.5, 0.3, -2.0]),
        "old_per_token_logps": -2.5 + 0.3 * th.randn(n, MAX_TOKENS, generator=generator),
        "num_items_in_batch": lengths.sum(),
    }


def evaluate(trainer: R2VPOTrainer, inputs: dict[str, th.Tensor]) -> th.Tensor:
    ids = th.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = th.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    return trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, MAX_TOKENS)[0]


AVERAGES = {
    "grpo": sequence_mean,
    "bnpo": token_mean,
    "dapo": token_mean,
    "dr_grpo": partial(constant_length_mean, max_length=MAX_TOKENS),
}


@pytest.mark.parametrize("objective", ["r2vpo", "r2vpo_sequence"])
@pytest.mark.parametrize("loss_type", AVERAGES)
def test_loss_gradient_and_variance_are_the_core_s(tmp_path: Path, objective: str, loss_type: str) -> None:
    trainer = make_trainer(
        tmp_path, objective=objective, loss_type=loss_type, var_coef=0.7, steps_per_generation=1, num_iterations=2
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    inputs, parameters = make_inputs(trainer), list(trainer.model.parameters())
    kept = {name: value.clone() for name, value in inputs.items()}
    loss = trainer._compute_loss(trainer.model, inputs)
    gradients = th.autograd.grad(loss, parameters)

    mask = inputs["completion_mask"].bool()
    log_ratio = th.where(mask, evaluate(trainer, inputs) - inputs["old_per_token_logps"], 0.0)
    options = {"sequence_log_ratio": log_ratio.sum(-1, keepdim=True)} if objective == "r2vpo_sequence" else {}
    losses, deviation = OBJECTIVES[objective](log_ratio, inputs["advantages"].unsqueeze(1), var_coef=0.7, **options)
    expected = AVERAGES[loss_type](losses, mask)
    th.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    for ours, core in zip(gradients, th.autograd.grad(expected, parameters), strict=True):
        th.testing.assert_close(ours, core, atol=1e-6, rtol=1e-5)
    # What TRL keeps for the next pass over the batch is untouched
    assert all(th.equal(inputs[name], kept[name]) for name in kept | inputs)
    trainer._dual_step(trainer._metrics["train"])
    variance = AVERAGES[loss_type](deviation.square(), mask).item()
    assert trainer._metrics["train"]["r2vpo/ratio_variance"] == pytest.approx([variance], rel=1e-5)
    largest = deviation[mask].max().item() + 1
    assert trainer._metrics["train"]["r2vpo/ratio_max"] == pytest.approx([largest], rel=1e-5)


@pytest.mark.parametrize("objective", ["gspo", "dppo", "m2po"])
def test_other_objectives_are_the_core_s_too(tmp_path: Path, objective: str) -> None:
    """One takes the mean over a response without its padding, one the probabilities themselves."""
    trainer = make_trainer(tmp_path, objective=objective, loss_type="bnpo")
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    inputs = make_inputs(trainer)
    mask = inputs["completion_mask"].bool()
    old = inputs["old_per_token_logps"]
    log_ratio = th.where(mask, evaluate(trainer, inputs) - old, 0.0)
    options = {
        "gspo": {"mean_log_ratio": log_ratio.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True)},
        "dppo": {"old_log_prob": old},
    }
    losses, _ = OBJECTIVES[objective](log_ratio, inputs["advantages"].unsqueeze(1), **options.get(objective, {}))
    th.testing.assert_close(trainer._compute_loss(trainer.model, inputs), token_mean(losses, mask), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("loss_type", AVERAGES)
def test_accumulated_minibatches_weigh_as_one_batch(tmp_path: Path, loss_type: str) -> None:
    options = {"loss_type": loss_type, "var_coef": 0.7, "num_iterations": 2}
    trainer = make_trainer(tmp_path, gradient_accumulation_steps=2, **options)
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train()
    inputs = make_inputs(trainer)
    halves = utils.split_tensor_dict(inputs, 2)
    losses = [trainer._compute_loss(trainer.model, half) for half in halves]
    trainer._dual_step(trainer._metrics["train"])
    variance = trainer._metrics["train"]["r2vpo/ratio_variance"][0]
    whole = make_trainer(tmp_path, **options, steps_per_generation=1)
    whole.current_gradient_accumulation_steps = 1
    whole.model.train()
    expected = whole._compute_loss(whole.model, inputs)
    whole._dual_step(whole._metrics["train"])
    if loss_type != "bnpo":  # which TRL averages over each minibatch by itself
        th.testing.assert_close(sum(losses), expected, atol=1e-6, rtol=1e-6)
    assert variance == pytest.approx(whole._metrics["train"]["r2vpo/ratio_variance"][0], rel=1e-5)


def test_the_kl_penalty_and_the_entropy_bonus_stay_trl_s(tmp_path: Path) -> None:
    plain = make_trainer(tmp_path, var_coef=0.7, loss_type="bnpo")
    full = make_trainer(tmp_path, var_coef=0.7, loss_type="bnpo", entropy_coef=0.05)
    full.beta = 0.1  # in the configuration, it would make TRL look for the reference model's name
    inputs = make_inputs(plain)
    inputs["ref_per_token_logps"] = th.full((4, MAX_TOKENS), -2.0)
    for trainer in (plain, full):
        trainer.current_gradient_accumulation_steps = 1
        trainer.model.train()
    difference = full._compute_loss(full.model, inputs) - plain._compute_loss(plain.model, inputs)
    mask, ids = inputs["completion_mask"], th.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = th.cat([inputs["prompt_mask"], mask], 1)
    log_prob, entropy, _ = plain._get_per_token_logps_and_entropies(
        plain.model, ids, attention, MAX_TOKENS, compute_entropy=True
    )
    log_ratio = inputs["ref_per_token_logps"] - log_prob
    expected = 0.1 * token_mean(log_ratio.exp() - log_ratio - 1, mask) - 0.05 * token_mean(entropy, mask)
    th.testing.assert_close(difference, expected, atol=1e-6, rtol=1e-5)


def test_the_inference_engine_s_log_probabilities_are_the_behaviour_policy_s(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, var_coef=0.7)
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    inputs = make_inputs(trainer)
    expected = trainer._compute_loss(trainer.model, inputs)
    sampling = inputs["old_per_token_logps"].clone()
    sampling[0, 0] = th.nan  # what vLLM could not tell
    other = {**inputs, "sampling_per_token_logps": sampling}
    other["old_per_token_logps"] = th.full_like(sampling, -9.0)
    other["old_per_token_logps"][0, 0] = inputs["old_per_token_logps"][0, 0]
    th.testing.assert_close(trainer._compute_loss(trainer.model, other), expected)


def test_masked_tokens_of_tools_do_not_count(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, objective="r2vpo_sequence", var_coef=0.7, loss_type="bnpo")
    trainer.current_gradient_accumulation_steps = 1
    trainer.model.train()
    inputs = make_inputs(trainer)
    tool_mask = th.ones(4, MAX_TOKENS, dtype=th.long)
    tool_mask[0, 2] = 0
    changed = inputs["old_per_token_logps"].clone()
    changed[0, 2] += 5.0
    results = [
        trainer._compute_loss(trainer.model, {**inputs, "tool_mask": tool_mask, "old_per_token_logps": old})
        for old in (inputs["old_per_token_logps"], changed)
    ]
    th.testing.assert_close(*results)


def test_a_ratio_that_is_no_number_ends_the_run_before_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path)
    inputs = make_inputs(trainer)
    inputs["old_per_token_logps"][2, 1] = th.nan
    monkeypatch.setattr(trainer, "_prepare_inputs", lambda batch: inputs)
    before = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    with pytest.raises(ValueError, match="A ratio is NaN or infinite"):
        trainer.train()
    assert all(th.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    assert trainer.policy_loss.multiplier.value == pytest.approx(0.3)


class Killed(Exception):
    """Stands for what ends a process."""


class KillAt(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise Killed


@pytest.mark.parametrize("replay_capacity", [1, 3])
def test_a_resumed_run_is_bit_equal(tmp_path: Path, replay_capacity: int) -> None:
    # Saved in the middle of the two passes over a generated batch, and between two minibatches of one
    options = {"replay_capacity": replay_capacity, "utd_ratio": 2, "max_steps": 10, "save_strategy": "steps", "save_steps": 7}
    whole = make_trainer(tmp_path / "whole", **options)
    whole.train()
    killed = make_trainer(tmp_path / "killed", (KillAt(7),), **options)
    with pytest.raises(Killed):
        killed.train()
    checkpoint = tmp_path / "killed" / "checkpoint-7"
    assert not list(checkpoint.glob("*.partial"))
    resumed = make_trainer(tmp_path / "killed", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert th.equal(a, b)
    assert th.equal(whole.policy_loss.multiplier.value, resumed.policy_loss.multiplier.value)
    assert whole.policy_loss.multiplier.value != 0.3
    assert len(whole.replay) == len(resumed.replay) == (3 if replay_capacity == 3 else 0)
    for ours, theirs in zip(whole.replay, resumed.replay, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(th.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    options = {"replay_capacity": 2, "max_steps": 2, "save_strategy": "steps", "save_steps": 2}
    make_trainer(tmp_path, **options).train()
    checkpoint = str(tmp_path / "checkpoint-2")
    other = make_trainer(tmp_path, **options, per_device_train_batch_size=8, steps_per_generation=1)
    with pytest.raises(ValueError, match=r"were \[1, 4, 2\], and are \[1, 8, 1\] now"):
        other.train(resume_from_checkpoint=checkpoint)
    (tmp_path / "checkpoint-2" / "r2vpo_rank0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"There is no .*r2vpo_rank0\.safetensors"):
        make_trainer(tmp_path, **options).train(resume_from_checkpoint=checkpoint)


def test_a_run_goes_on_with_a_smaller_replay(tmp_path: Path) -> None:
    options = {"utd_ratio": 2, "save_strategy": "steps", "save_steps": 10}
    make_trainer(tmp_path, replay_capacity=3, max_steps=10, **options).train()
    # On-policy, nothing replayed is left
    for replay_capacity, kept in ((1, []), (2, [[8], [12]])):
        resumed = make_trainer(tmp_path, replay_capacity=replay_capacity, max_steps=14, **{**options, "save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
        assert [batch["generated_at"].unique().tolist() for batch in resumed.replay] == kept


def test_lora(tmp_path: Path) -> None:
    model, tokenizer = example.tiny_model()
    data = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(8, 12) for b in range(8)])
    config = make_config(tmp_path, replay_capacity=2, max_steps=6)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = R2VPOTrainer(model, example.small_digits, config, data, processing_class=tokenizer, peft_config=lora)
    before = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, parameter in trainer.model.named_parameters() if not th.equal(parameter, before[name])}
    assert changed
    assert all("lora_" in name for name in changed)
    assert logged(trainer, "ratio_variance")[-1] > 0


@pytest.mark.slow
def test_two_processes_have_one_multiplier_and_replay_of_their_own(tmp_path: Path) -> None:
    launch = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0"]  # gloo, as the script is told to use CPUs
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch]
    options = ["--tiny", "--output_dir", str(tmp_path), "--save_steps", "4", "--disable_tqdm", "true"]
    subprocess.run([*command, str(EXAMPLE), *options], check=True, capture_output=True, timeout=300)
    states = [load_file(tmp_path / "checkpoint-8" / f"r2vpo_rank{rank}.safetensors") for rank in (0, 1)]
    assert th.equal(states[0]["multiplier"], states[1]["multiplier"])
    assert states[0]["multiplier"] != th.tensor(0.3)
    name = "replay/3/completion_ids"
    assert states[0][name].shape != states[1][name].shape or not th.equal(states[0][name], states[1][name])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_iterations": 1, "steps_per_generation": 1}, "all ratios would be one"),
        ({"utd_ratio": 1, "gradient_accumulation_steps": 4, "steps_per_generation": 4}, "all ratios would be one"),
        ({"replay_capacity": 0}, "`replay_capacity` is 0"),
        ({"utd_ratio": 1.5}, "`num_iterations` is 1.5"),
        ({"loss_type": "cispo"}, "`loss_type` is 'cispo'"),
        ({"importance_sampling_level": "sequence"}, "objective='r2vpo_sequence'"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
        ({"vllm_importance_sampling_correction": True}, "vllm_importance_sampling_correction"),
        ({"use_bias_correction_kl": True}, "use_bias_correction_kl"),
        ({"objective": "ppo"}, "Unknown `objective` 'ppo'"),
        ({"var_coef": "automatic"}, "`var_coef` is 'automatic'"),
        ({"var_coef": -0.1}, "`var_coef` is -0.1"),
        ({"target_variance": 0.0}, "`target_variance` is 0.0"),
        ({"objective_kwargs": {"eta": 1}}, r"`objective_kwargs` \['eta'\]"),
    ],
)
def test_settings_without_meaning_are_refused(tmp_path: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make_config(tmp_path, **options)


def test_one_step_a_batch_is_no_fault_with_replay(tmp_path: Path) -> None:
    """TRL leaves out the behaviour log-probabilities there."""
    trainer = make_trainer(tmp_path, num_iterations=1, steps_per_generation=1, replay_capacity=2, max_steps=4)
    trainer.train()
    assert "old_per_token_logps" in trainer.replay[0]
    assert logged(trainer, "ratio_variance")[0] < 1e-10 < logged(trainer, "ratio_variance")[-1]


def test_evaluation_leaves_replay_and_multiplier_alone(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, replay_capacity=2, max_steps=4, per_device_eval_batch_size=8)
    trainer.train()
    multiplier, n_batches = trainer.policy_loss.multiplier.value.clone(), len(trainer.replay)
    kept = [batch["generated_at"].clone() for batch in trainer.replay]
    metrics = trainer.evaluate(Dataset.from_list([{"prompt": "8+1="}, {"prompt": "9+1="}]))
    assert metrics["eval_reward"] >= 0
    assert trainer.policy_loss.multiplier.value == multiplier
    assert len(trainer.replay) == n_batches
    assert all(th.equal(a, b["generated_at"]) for a, b in zip(kept, trainer.replay, strict=True))


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    model, tokenizer = example.tiny_model()
    config = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False)
    with pytest.raises(ValueError, match="takes an R2VPOConfig"):
        R2VPOTrainer(model, example.small_digits, config, processing_class=tokenizer)


def test_the_command_line_takes_numbers_and_auto() -> None:
    parser = HfArgumentParser(R2VPOConfig)
    rest = ["--use_cpu", "true", "--bf16", "false", "--report_to", "none"]
    parse = lambda *arguments: parser.parse_args_into_dataclasses([*arguments, *rest])[0].policy_loss()  # noqa: E731
    assert parse("--var_coef", "0.1").multiplier.fixed == 0.1
    assert parse("--var_coef", "auto_0.2").multiplier.value == pytest.approx(0.2)
    options = parse("--objective_kwargs", '{"dual_learning_rate": 0.5}', "--target_variance", "0.1")
    assert options.dual_learning_rate == 0.5
    options.follow_schedules(1.0)
    assert options.target_variance == pytest.approx(0.1)


def test_a_loss_of_trl_s_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(GRPOTrainer, "_compute_loss", lambda self, model, inputs: th.zeros(()))
    with pytest.raises(RuntimeError, match=r"TRL \d.* has computed a loss of its own"):
        trainer._compute_loss(trainer.model, make_inputs(trainer))


def test_trl_has_what_the_trainer_builds_on() -> None:
    """If this fails, TRL has moved: read its `GRPOTrainer` again before changing the test."""
    parameters = {
        "_compute_loss": ["self", "model", "inputs"],
        "_prepare_inputs": ["self", "generation_batch"],
        "_generate_and_score_completions": ["self", "inputs"],
        "training_step": ["self", "model", "inputs", "num_items_in_batch"],
        "_save_checkpoint": ["self", "model", "trial"],
        "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    }
    for name, expected in parameters.items():
        assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == expected, name
    evaluation = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
    assert list(evaluation)[:6] == ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    assert list(inspect.signature(GRPOTrainer.__init__).parameters)[:5] == [
        "self",
        "model",
        "reward_funcs",
        "args",
        "train_dataset",
    ]
    assert list(inspect.signature(utils.pad).parameters) == [
        "tensors",
        "padding_value",
        "padding_side",
        "pad_to_multiple_of",
    ]
    assert list(inspect.signature(utils.split_tensor_dict).parameters) == ["tensor_dict", "num_chunks"]
    source = inspect.getsource(GRPOTrainer._compute_loss)
    # The log-probabilities are evaluated before what the trainer puts in the place of these is read
    order = ["self._get_per_token_logps_and_entropies(", 'inputs["advantages"]', 'inputs.get("old_per_token_logps")']
    assert sorted(order, key=source.index) == order
    assert source.count(order[0]) == 1
    # The surrogate that the objective's loss is handed through
    for line in (
        "coef_1 = torch.exp(log_importance_weights)",
        "per_token_loss = -torch.min(per_token_loss1, per_token_loss2)",
    ):
        assert line in source
    source = inspect.getsource(GRPOTrainer._prepare_inputs)
    for line in ("generate_every = self.args.steps_per_generation * self.num_iterations", "self._buffered_inputs["):
        assert line in source
