"""R2VPO in TRL: its GRPO trainer with the ratio-variance objective, the multiplier, and replay of generated batches.

args = R2VPOConfig("out", replay_capacity=4, utd_ratio=2)
R2VPOTrainer("Qwen/Qwen3-1.7B", reward_functions, args, train_dataset=prompts).train()

Generation, rewards, advantages, vLLM, LoRA, DeepSpeed and FSDP are TRL's.
"""

import os
from collections import deque
from pathlib import Path
from typing import Any

import torch as th
from safetensors.torch import load_file, save_file

try:
    from trl import GRPOTrainer, __version__
    from trl.trainer.utils import pad, split_tensor_dict
except ModuleNotFoundError as error:
    message = f"sb3_r2vpo.llm.trl needs {error.name}, an extra: pip install 'sb3-r2vpo[llm,trl]'"
    raise ModuleNotFoundError(message, name=error.name) from error

from sb3_r2vpo.llm.trl_config import R2VPOConfig as R2VPOConfig

Batch = dict[str, Any]


class R2VPOTrainer(GRPOTrainer):
    """
    TRL's ``GRPOTrainer`` with R2VPO's objective in place of the clipped one, and replay.

    It is logged besides what TRL logs, without its clip ratios: ``r2vpo/ratio_variance``, averaged as the loss is,
    ``r2vpo/ratio_max``, ``r2vpo/var_coef``, ``r2vpo/target_variance``, and with replay ``r2vpo/replay_age``, the mean number
    of optimizer steps since the responses were generated.

    Checkpoints hold the multiplier and each process's replay in ``r2vpo_rank<i>.safetensors``, so that a run goes on as if it
    had not been interrupted, also between two generations.

    :param model: As in ``GRPOTrainer``, as all other arguments
    :param reward_funcs: As there
    :param args: The configuration; by default an ``R2VPOConfig`` without arguments but a folder
    :raises ValueError: ``args`` is no ``R2VPOConfig``.
    """

    args: R2VPOConfig
    model: Any
    max_completion_length: int
    pad_to_multiple_of: Any
    _buffered_inputs: Any

    _name = "R2VPO"
    _tag_names = ["trl", "r2vpo"]  # noqa: RUF012
    _paper = {  # noqa: RUF012
        "title": "Ratio-Variance Regularized Policy Optimization",
        "id": "2605.26784",
        "citation": "@article{r2vpo, title={Ratio-Variance Regularized Policy Optimization}, eprint={arXiv:2605.26784}}",
    }

    def __init__(
        self, model: Any, reward_funcs: Any = None, args: R2VPOConfig | None = None, *rest: Any, **kwargs: Any
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = R2VPOConfig(f"{name.rstrip('/').split('/')[-1]}-R2VPO")
        if not isinstance(args, R2VPOConfig):
            raise ValueError(f"`args` is a {type(args).__name__}; an R2VPOTrainer takes an R2VPOConfig.")
        self.policy_loss = args.policy_loss()
        #: Generated batches of this process, the newest last
        self.replay: deque[Batch] = deque(maxlen=args.replay_capacity)
        #: Which responses of the replay come next, by their number
        self._order = th.empty(0, dtype=th.int64)
        self._minibatch: Batch | None = None
        #: Of each minibatch since the last optimizer step: sum of the squared deviations, what it is divided by, largest ratio
        self._window: list[th.Tensor] = []
        super().__init__(model, reward_funcs, args, *rest, **kwargs)
        self.policy_loss.multiplier.to(self.accelerator.device)
        self.policy_loss.follow_schedules(1.0)

    # The objective and the multiplier

    def training_step(self, *args: Any, **kwargs: Any) -> th.Tensor:
        loss = super().training_step(*args, **kwargs)
        # After the backward pass, and before the optimizer's step
        if self.accelerator.sync_gradients:
            self._dual_step(self._metrics["train"])
        return loss

    def _compute_loss(self, model: Any, inputs: Batch) -> th.Tensor:
        self._minibatch = minibatch = dict(inputs)
        loss = super()._compute_loss(model, minibatch)
        if self._minibatch is not None:
            raise RuntimeError(
                f"TRL {__version__} has computed a loss of its own: it evaluates log-probabilities where R2VPO cannot set its "
                "objective. Install the version in this package's constraints.txt."
            )
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in [name for name in metrics if name.startswith("clip_ratio/")]:
            del metrics[name]
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        minibatch, self._minibatch = self._minibatch, None
        outputs = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if minibatch is not None:
            self._set_objective(minibatch, outputs[0])
        return outputs

    def _set_objective(self, batch: Batch, log_prob: th.Tensor) -> None:
        """
        Make TRL's clipped surrogate ``-min(r A, clip(r) A)`` the objective's loss of each token.

        With the current log-probabilities, gradient and all, for the old ones, ``r`` is one and has no gradient; with the
        negative loss for ``A`` the surrogate is the loss. So its average, the KL penalty and the entropy bonus remain TRL's.
        """
        mask = batch["completion_mask"]
        mask = (mask if "tool_mask" not in batch else mask * batch["tool_mask"]).bool()
        old_log_prob, advantages = behaviour_log_prob(batch, log_prob.detach()), batch["advantages"]
        advantages = advantages.unsqueeze(1) if advantages.ndim == 1 else advantages
        losses, deviation = self.policy_loss(log_prob - old_log_prob, advantages, mask=mask, old_log_prob=old_log_prob)
        batch["old_per_token_logps"], batch["advantages"] = log_prob, -losses
        if self.model.training:
            squares = th.where(mask, deviation.square(), 0.0)
            lengths = mask.sum(-1)
            match self.args.loss_type:
                case "grpo":
                    terms, count = squares.sum(-1) / lengths.clamp(min=1), len(mask)
                case "dr_grpo":
                    terms, count = squares, len(mask) * self.max_completion_length
                case _:
                    terms, count = squares, lengths.sum()
            sums = [terms.sum(), th.as_tensor(count, device=mask.device), deviation.max() + 1.0]
            self._window.append(th.stack([value.float() for value in sums]))

    def _dual_step(self, metrics: dict[str, list[float]]) -> None:
        """One step on the multiplier, with the ratio variance over all processes' minibatches of an optimizer step."""
        window = th.stack(self._window)
        self._window.clear()
        total, count = self.accelerator.reduce(window[:, :2].sum(0), reduction="sum")
        ratio_variance = total / count.clamp(min=1)
        ratio_max = self.accelerator.gather(window[:, 2].max()).max()
        if not th.isfinite(ratio_variance):
            raise ValueError(
                "A ratio is NaN or infinite, and so are the model's weights or its log-probabilities. Go on from the last "
                "checkpoint with a smaller learning rate, and in float32 or bfloat16 if this is float16."
            )
        coefficients = self.policy_loss.logged()
        self.policy_loss.dual_step(ratio_variance, accepted=True)
        for name, value in {"ratio_variance": ratio_variance, "ratio_max": ratio_max, **coefficients}.items():
            metrics[f"r2vpo/{name}"].append(float(value))

    # Replay

    def _generate_and_score_completions(self, inputs: Any) -> Batch:
        batch = super()._generate_and_score_completions(inputs)
        if not self.model.training or self.args.replay_capacity == 1:
            return batch
        if "num_images" in batch:
            raise ValueError("Replay holds text only: pass replay_capacity=1 to train on images.")
        if not batch.keys() & {"old_per_token_logps", "sampling_per_token_logps"}:
            # TRL leaves them out where its own ratios would be one
            ids = th.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
            mask = th.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
            width, size = batch["completion_ids"].shape[1], self.args.per_device_train_batch_size
            with th.no_grad():
                outputs = self._get_per_token_logps_and_entropies(self.model, ids, mask, width, batch_size=size)
            batch["old_per_token_logps"] = outputs[0]
        batch["generated_at"] = th.full((len(batch["prompt_ids"]),), self.state.global_step)
        self.replay.append({name: value.cpu() for name, value in batch.items()})
        self._order = self._order[:0]
        return batch

    def _prepare_inputs(self, generation_batch: Any) -> Batch:
        inputs = super()._prepare_inputs(generation_batch)
        n_minibatches: Any = self.args.steps_per_generation
        if self.model.training and self.replay and self._step % n_minibatches == 0:
            # Another pass of TRL's over its buffer of minibatches: fill it with replayed responses
            drawn = self._draw(self._train_batch_size * n_minibatches)
            self._buffered_inputs = split_tensor_dict(drawn, n_minibatches)
            inputs = self._buffered_inputs[0]
        return inputs

    def _draw(self, n_responses: int) -> Batch:
        """
        The next responses of an order that is random over all of the replay, padded anew. Until the replay changes, none comes
        twice before all others have come.
        """
        rows = [(batch, row) for batch in self.replay for row in range(len(batch["prompt_ids"]))]
        while len(self._order) < n_responses:
            self._order = th.cat([self._order, th.randperm(len(rows))])
        chosen = [rows[i] for i in self._order[:n_responses].tolist()]
        self._order = self._order[n_responses:]
        drawn: Batch = {}
        for name in self.replay[-1].keys() - {"num_items_in_batch"}:
            values = [batch[name][row] for batch, row in chosen]
            if values[0].ndim:
                padding = self._tokenizer.pad_token_id if name.endswith("_ids") else 0
                side = "left" if name.startswith("prompt") else "right"
                drawn[name] = pad(values, padding, side, self.pad_to_multiple_of)
            else:
                drawn[name] = th.stack(values)
        device = self.accelerator.device
        drawn = {name: value.to(device) for name, value in drawn.items()}
        mask = drawn["completion_mask"] * drawn.get("tool_mask", 1)
        drawn["num_items_in_batch"] = self.accelerator.gather(mask.sum()).sum()
        age = (self.state.global_step - drawn["generated_at"]).double().mean()
        self._metrics["train"]["r2vpo/replay_age"].append(self.accelerator.gather(age).mean().item())
        return drawn

    # Checkpoints

    def _state_file(self, folder: str | Path) -> Path:
        return Path(folder) / f"r2vpo_rank{self.accelerator.process_index}.safetensors"

    def _layout(self) -> th.Tensor:
        """What a process's batches depend on"""
        steps: Any = self.args.steps_per_generation
        return th.tensor([self.accelerator.num_processes, self.args.per_device_train_batch_size, steps])

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if not self.args.save_only_model:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            folder.mkdir(parents=True, exist_ok=True)
            multiplier = self.policy_loss.multiplier.value
            state = {"multiplier": multiplier, "step": th.tensor(self._step), "order": self._order, "layout": self._layout()}
            buffered = self._buffered_inputs or []
            if any("num_images" in batch for batch in buffered):
                buffered = []  # not only tensors. TRL generates anew after a resume
            for kind, batches in (("replay", self.replay), ("buffered", buffered)):
                for i, batch in enumerate(batches):
                    state |= {f"{kind}/{i}/{name}": value for name, value in batch.items()}
            # Before TRL's own files, of which the last one tells that the checkpoint is complete; whole or not at all
            path = self._state_file(folder)
            save_file({name: value.contiguous().clone() for name, value in state.items()}, f"{path}.partial")
            os.replace(f"{path}.partial", path)
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = self._state_file(checkpoint)
        if not path.exists():
            raise ValueError(
                f"There is no {path}: the checkpoint is not R2VPO's, was saved with `save_only_model`, or by fewer processes. "
                "Resume with as many processes, or start from its weights as a new run."
            )
        batches: dict[str, dict[int, Batch]] = {"replay": {}, "buffered": {}}
        state = load_file(path)
        saved, layout = state.pop("layout").tolist(), self._layout().tolist()
        if saved != layout:
            raise ValueError(
                "The checkpoint's generated batches do not fit: the number of processes, per_device_train_batch_size and "
                f"steps_per_generation were {saved}, and are {layout} now. Resume with the same, or start from its weights as "
                "a new run."
            )
        self.policy_loss.multiplier.set_value(state.pop("multiplier").to(self.accelerator.device))
        self._step, self._order = int(state.pop("step")), state.pop("order")
        for name, value in state.items():
            kind, index, key = name.split("/", 2)
            batches[kind].setdefault(int(index), {})[key] = value
        if self.args.replay_capacity > 1:
            self.replay.extend(batches["replay"][i] for i in sorted(batches["replay"]))
        if len(self.replay) < len(batches["replay"]):
            self._order = self._order[:0]  # of a larger replay
        device = self.accelerator.device
        buffered = [{k: v.to(device) for k, v in batches["buffered"][i].items()} for i in sorted(batches["buffered"])]
        # TRL itself generates anew, and out of step with its sampler, where a checkpoint was saved between two generations
        self._buffered_inputs = buffered or None


def behaviour_log_prob(batch: Batch, current: th.Tensor) -> th.Tensor:
    """
    :param batch: A batch of TRL's
    :param current: Log-probabilities of the current policy, without gradient
    :return: Those of the policy that generated the tokens, of the same shape: the inference engine's where there are any (NaN
        where it could not tell), else the model's own before the update, else the current ones
    """
    old = batch.get("old_per_token_logps")
    old = current if old is None else old
    sampling = batch.get("sampling_per_token_logps")
    return old if sampling is None else th.where(sampling.isnan(), old, sampling)
