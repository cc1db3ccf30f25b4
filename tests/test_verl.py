"""R2VPO as a policy loss of verl, through verl's own registry and averages; and by import path, for prime-rl and slime."""

import sys
from dataclasses import dataclass
from importlib.metadata import entry_points
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch as th

from sb3_r2vpo.core import r2vpo, r2vpo_sequence, sequence_mean, token_mean

N, N_TOKENS, VAR_COEF = 4, 6, 0.7


def make_batch() -> dict[str, th.Tensor]:
    generator = th.Generator().manual_seed(0)
    old, step = th.randn(2, N, N_TOKENS, generator=generator)
    mask = th.arange(N_TOKENS) < th.tensor([[6], [3], [1], [4]])
    advantages = th.randn(N, 1, generator=generator).expand(N, N_TOKENS)
    return {"old": old, "new": old + 0.3 * step, "mask": mask, "advantages": advantages}


def core_losses(objective: str, new: th.Tensor, batch: dict[str, th.Tensor]) -> tuple[th.Tensor, th.Tensor]:
    log_ratio = th.where(batch["mask"], new - batch["old"], 0.0)
    if objective == "r2vpo":
        return r2vpo(log_ratio, batch["advantages"], var_coef=VAR_COEF)
    total = log_ratio.sum(-1, keepdim=True)
    return r2vpo_sequence(log_ratio, batch["advantages"], var_coef=VAR_COEF, sequence_log_ratio=total)


class TestVerl:
    @pytest.fixture(autouse=True)
    def algos(self) -> Any:
        self.core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", reason="needs verl, see docs/llm/verl.md")
        self.plugin = pytest.importorskip("sb3_r2vpo.llm.verl")

    def actor(self, **options: Any) -> Any:
        policy_loss = self.plugin.R2VPOPolicyLossConfig(**{"var_coef": VAR_COEF, **options})
        info = {"dp_size": 1, "batch_num_tokens": None, "global_batch_size": None, "loss_scale_factor": None}
        return SimpleNamespace(policy_loss=policy_loss, global_batch_info=info)

    def loss(self, actor: Any, batch: dict[str, th.Tensor], new: th.Tensor, mode: str = "token-mean", **options: Any) -> Any:
        function = self.core_algos.get_policy_loss_fn(actor.policy_loss.get("loss_mode", "vanilla"))
        return function(
            old_log_prob=batch["old"],
            log_prob=new,
            advantages=batch["advantages"],
            response_mask=batch["mask"],
            loss_agg_mode=mode,
            config=actor,
            **{"rollout_is_weights": None, **options},
        )

    def test_the_entry_point_registers(self) -> None:
        # What `import verl` does with each of the group, of this package as it is installed
        self.core_algos.POLICY_LOSS_REGISTRY.pop("r2vpo")
        sys.modules.pop("sb3_r2vpo.llm.verl")
        entry_points(group="verl.plugins")["r2vpo"].load()
        assert self.core_algos.get_policy_loss_fn("r2vpo").__module__ == "sb3_r2vpo.llm.verl"
        assert self.core_algos.get_policy_loss_fn("r2vpo_sequence").__name__ == "r2vpo_sequence"

    @pytest.mark.parametrize("objective", ["r2vpo", "r2vpo_sequence"])
    @pytest.mark.parametrize(
        ("mode", "average"), [("token-mean", token_mean), ("seq-mean-token-mean", sequence_mean)], ids=["token", "sequence"]
    )
    def test_loss_and_gradient_are_the_core_s(self, objective: str, mode: str, average: Any) -> None:
        batch = make_batch()
        ours, theirs = (batch["new"].clone().requires_grad_() for _ in range(2))
        losses, deviation = core_losses(objective, ours, batch)
        expected = average(losses, batch["mask"])
        loss, metrics = self.loss(self.actor(loss_mode=objective), batch, theirs, mode)
        th.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
        expected.backward()
        loss.backward()
        th.testing.assert_close(theirs.grad, ours.grad, atol=1e-6, rtol=1e-6)
        assert metrics["actor/ratio_variance"] == pytest.approx(token_mean(deviation.square(), batch["mask"]).item())
        assert metrics["actor/var_coef"] == pytest.approx(VAR_COEF)

    def test_micro_batches_of_two_processes_add_up(self) -> None:
        batch = make_batch()
        whole, _ = self.loss(self.actor(), batch, batch["new"])
        actor, parts = self.actor(), []
        actor.global_batch_info |= {"dp_size": 2, "batch_num_tokens": batch["mask"].sum()}
        for rows in (slice(0, 1), slice(1, 4)):
            part = {name: value[rows] for name, value in batch.items()}
            parts.append(self.loss(actor, part, part["new"])[0])
        # Gradients are averaged over the processes
        th.testing.assert_close(sum(parts) / 2, whole)

    def test_an_adaptive_multiplier_makes_one_step_for_all_micro_batches(self) -> None:
        batch = make_batch()
        actor = self.actor(var_coef="auto_0.5", target_variance=0.01, dual_learning_rate=0.1)
        actor.global_batch_info["batch_num_tokens"] = batch["mask"].sum()
        for rows in (slice(0, 1), slice(1, 4)):
            part = {name: value[rows] for name, value in batch.items()}
            new = part["new"].clone().requires_grad_()
            self.loss(actor, part, new)[0].backward()
        deviation = core_losses("r2vpo", batch["new"], batch)[1]
        expected = 0.5 + 0.1 * (token_mean(deviation.square(), batch["mask"]).item() - 0.01)
        _, metrics = self.loss(actor, batch, batch["new"])
        assert metrics["actor/var_coef"] == pytest.approx(expected, rel=1e-6)
        assert expected > 0.5

    def test_weights_of_the_inference_engine_multiply_the_losses(self) -> None:
        batch = make_batch()
        weights = th.full_like(batch["old"], 0.5)
        loss, _ = self.loss(self.actor(), batch, batch["new"])
        weighted, _ = self.loss(self.actor(), batch, batch["new"], rollout_is_weights=weights)
        th.testing.assert_close(weighted, loss / 2)

    def test_verl_s_own_configuration_gives_the_defaults(self) -> None:
        from omegaconf import OmegaConf
        from verl.workers.config import PolicyLossConfig

        batch = make_batch()
        for policy_loss in (PolicyLossConfig(loss_mode="r2vpo"), OmegaConf.create({"loss_mode": "r2vpo"})):
            actor = self.actor()
            actor.policy_loss = policy_loss
            _, metrics = self.loss(actor, batch, batch["new"])
            assert metrics["actor/var_coef"] == pytest.approx(0.3)
            assert dict(policy_loss).keys() == dict(policy_loss).keys() - {"_r2vpo"}

    def test_the_command_line_names_the_configuration(self) -> None:
        from hydra import compose, initialize_config_module
        from verl.utils.config import omega_conf_to_dataclass

        key = "actor_rollout_ref.actor.policy_loss"
        target = "sb3_r2vpo.llm.verl.R2VPOPolicyLossConfig"
        options = [f"{key}.loss_mode=r2vpo_sequence", f"{key}._target_={target}", f"+{key}.var_coef=auto_0.1"]
        with initialize_config_module("verl.trainer.config", version_base=None):
            composed = compose("ppo_trainer", options)
        config = omega_conf_to_dataclass(composed.actor_rollout_ref.actor.policy_loss)
        assert isinstance(config, self.plugin.R2VPOPolicyLossConfig)
        assert (config.var_coef, config.loss_mode, config.target_variance) == ("auto_0.1", "r2vpo_sequence", 0.016)

    def test_bad_coefficients_are_refused(self) -> None:
        batch = make_batch()
        with pytest.raises(ValueError, match="`var_coef` is -1"):
            self.loss(self.actor(var_coef=-1.0), batch, batch["new"])
        with pytest.raises(ValueError, match="`target_variance` is 0"):
            self.loss(self.actor(target_variance=0), batch, batch["new"])


@dataclass
class LossInputs:
    """As documented in prime-rl's docs/algorithms.md at 559b447 (21 August 2026)."""

    trainer_logprobs: th.Tensor
    inference_logprobs: th.Tensor
    ref_logprobs: th.Tensor | None
    advantages: th.Tensor
    loss_mask: th.Tensor
    loss_weights: th.Tensor | None = None


@dataclass
class LossOutputs:
    """As above."""

    loss: th.Tensor
    metrics: dict[str, th.Tensor]


def install(monkeypatch: pytest.MonkeyPatch, name: str, **attributes: Any) -> None:
    """A module of an engine that is on no package index, with what the adapter takes from it."""
    parts = name.split(".")
    for i in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:i]))
        monkeypatch.setitem(sys.modules, module.__name__, module)
    vars(module).update(attributes)


@pytest.mark.parametrize("objective", ["r2vpo", "r2vpo_sequence"])
def test_prime_rl_takes_the_loss_by_its_path(monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    from sb3_r2vpo.llm.by_path import prime_rl_loss

    install(monkeypatch, "prime_rl.trainer.rl.loss", LossInputs=LossInputs, LossOutputs=LossOutputs)
    batch = make_batch()
    ours, theirs = (batch["new"].clone().requires_grad_() for _ in range(2))
    losses, deviation = core_losses(objective, ours, batch)
    expected = token_mean(losses, batch["mask"])
    # As prime-rl's `compute_loss` does: one response after the other, divided by the number of all tokens
    total = th.zeros(())
    for i in range(N):
        inputs = LossInputs(theirs[i], batch["old"][i], None, batch["advantages"][i], batch["mask"][i])
        outputs = prime_rl_loss(inputs, objective=objective, var_coef=VAR_COEF)
        total = total + outputs.loss / batch["mask"].sum()
        variance = deviation[i][batch["mask"][i]].square().mean()
        th.testing.assert_close(outputs.metrics["ratio_variance"], variance)
    th.testing.assert_close(total, expected, atol=1e-6, rtol=1e-6)
    expected.backward()
    total.backward()
    th.testing.assert_close(theirs.grad, ours.grad, atol=1e-6, rtol=1e-6)
    inputs.loss_weights = th.full((N_TOKENS,), 2.0)
    th.testing.assert_close(prime_rl_loss(inputs, objective, VAR_COEF).loss, 2 * outputs.loss)
    with pytest.raises(ValueError, match="`objective` is 'ppo'"):
        prime_rl_loss(inputs, objective="ppo")
    with pytest.raises(ValueError, match="`var_coef` is 'auto'"):
        prime_rl_loss(inputs, var_coef="auto")  # type: ignore[arg-type]


def slime_arguments(**options: Any) -> SimpleNamespace:
    defaults = {"use_rollout_logprobs": True, "rollout_top_p": 1.0, "use_kl_loss": False, "use_tis": False, "use_opsm": False}
    return SimpleNamespace(
        **{**defaults, "entropy_coef": 0.0, "context_parallel_size": 1, "r2vpo_var_coef": VAR_COEF, **options}
    )


@pytest.mark.parametrize("objective", ["r2vpo", "r2vpo_sequence"])
def test_slime_takes_the_loss_by_its_path(monkeypatch: pytest.MonkeyPatch, objective: str) -> None:
    """Against slime/backends/megatron_utils/loss.py at 624b824 (21 August 2026)."""
    from sb3_r2vpo.llm.by_path import slime_loss

    batch = make_batch()
    ours, theirs = (batch["new"].clone().requires_grad_() for _ in range(2))

    def get_log_probs_and_entropy(
        logits: th.Tensor, *, args: Any, unconcat_tokens: Any, total_lengths: Any, response_lengths: Any, with_entropy: bool
    ) -> Any:
        return th.empty(0), {"log_probs": list(logits)}

    def get_rollout_top_p_logprob_kwargs(args: Any, batch: dict[str, Any]) -> dict[str, Any]:
        return {}

    functions = {f.__name__: f for f in (get_log_probs_and_entropy, get_rollout_top_p_logprob_kwargs)}
    install(monkeypatch, "slime.backends.megatron_utils.loss", **functions)
    lists = {name: list(batch[key]) for name, key in (("advantages", "advantages"), ("loss_masks", "mask"))}
    lists |= {"unconcat_tokens": [], "total_lengths": [], "response_lengths": [], "rollout_log_probs": list(batch["old"])}

    def sum_of_sample_mean(values: th.Tensor) -> th.Tensor:
        return N * sequence_mean(values.view(N, N_TOKENS), batch["mask"])

    args = slime_arguments(r2vpo_objective=objective)
    loss, log = slime_loss(args, lists, theirs, sum_of_sample_mean)
    losses, deviation = core_losses(objective, ours, batch)
    expected = N * sequence_mean(losses, batch["mask"])
    th.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    expected.backward()
    loss.backward()
    th.testing.assert_close(theirs.grad, ours.grad, atol=1e-6, rtol=1e-6)
    # slime makes one tensor of what is logged
    assert th.tensor(list(log.values())).shape == (2,)
    th.testing.assert_close(log["ratio_variance"], N * sequence_mean(deviation.square(), batch["mask"]))

    for options, match in [
        ({"use_kl_loss": True}, "use_kl_loss"),
        ({"custom_pg_loss_reducer_function_path": "my.reducer"}, "custom_pg_loss_reducer_function_path"),
        ({"r2vpo_objective": "r2vpo_sequence", "context_parallel_size": 2}, "context-parallel-size 1"),
        ({"use_rollout_logprobs": False}, "all ratios would be one"),
    ]:
        with pytest.raises(ValueError, match=match):
            slime_loss(slime_arguments(**options), lists, theirs, sum_of_sample_mean)
