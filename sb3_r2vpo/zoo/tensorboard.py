"""What belongs together in TensorBoard, side by side: the tab "Custom Scalars"."""

from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import TensorBoardOutputFormat

#: Groups of charts, and the curves of each, as regular expressions
GROUPS: dict[str, dict[str, list[str]]] = {
    "Progress": {
        "Return": ["rollout/ep_rew_mean", "eval/mean_reward"],
        "Episode length": ["rollout/ep_len_mean", "eval/mean_ep_length"],
        "Success rate": ["rollout/success_rate", "eval/success_rate"],
        "Steps per second": ["time/fps"],
    },
    "Constraint": {
        "Variance of the ratio, and its tolerance": ["train/ratio_variance$", "train/target_variance"],
        "Multiplier": ["train/var_coef"],
        "Variance of the ratio in replayed rollouts": [r"train/ratio_variance_stale_\d+"],
        "Largest ratio": ["train/ratio_max"],
        "Effective sample size": ["train/ess"],
        "Approximate KL divergence": ["train/approx_kl"],
        "Share of ratios that PPO would clip": ["train/clip_fraction"],
    },
    "Policy": {
        "Loss": ["train/loss", "train/policy_gradient_loss"],
        "Entropy": ["train/entropy_loss"],
        "Entropy coefficient": ["train/ent_coef"],
        "Standard deviation": ["train/std"],
        "Learning rate": ["train/learning_rate", "train/policy_learning_rate"],
        "Gradient norm": ["train/policy_grad_norm"],
    },
    "Critic": {
        "Loss": ["train/value_loss"],
        "Explained variance": ["train/explained_variance"],
        "Gradient norm": ["train/value_grad_norm"],
    },
}


class TensorBoardLayout(BaseCallback):
    """Write :data:`GROUPS` into the run's event file when training starts."""

    def _on_training_start(self) -> None:
        layout = {group: {title: ["Multiline", tags] for title, tags in charts.items()} for group, charts in GROUPS.items()}
        for output in self.logger.output_formats:
            if isinstance(output, TensorBoardOutputFormat):
                output.writer.add_custom_scalars(layout)

    def _on_step(self) -> bool:
        return True
