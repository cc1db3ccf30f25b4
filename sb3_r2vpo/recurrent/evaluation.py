"""A recurrent policy's evaluation of a minibatch of sequences."""

from copy import copy
from typing import Any

import torch as th
from sb3_contrib.common.recurrent.policies import RecurrentActorCriticPolicy
from torch import nn

from sb3_r2vpo.common.mlp import Layers, MlpEvaluation, Networks, networks
from sb3_r2vpo.core.update import Evaluation
from sb3_r2vpo.recurrent.sequences import SequenceSamples


def run_lstm(lstm: nn.LSTM, features: th.Tensor, states: tuple[th.Tensor, ...], samples: SequenceSamples) -> th.Tensor:
    """
    :param lstm: The LSTM
    :param features: Of each step, shape ``(n, n_features)``
    :param states: Before the first step of each sequence
    :param samples: The steps' sequences
    :return: Outputs for each step, shape ``(n, n_outputs)``
    """
    features = features.flatten(1)
    padded = features if samples.padded is None else features.index_select(0, samples.padded)
    outputs = []
    for part, (n_steps, n_seq) in zip(padded.split([t * n for t, n in samples.parts]), samples.parts, strict=True):
        hidden, cell = (state if state.shape[1] == n_seq else state[:, :n_seq].contiguous() for state in states)
        output, states = lstm(part.view(n_steps, n_seq, -1), (hidden, cell))
        outputs.append(output.flatten(0, 1))
    output = outputs[0] if len(outputs) == 1 else th.cat(outputs)
    return output if samples.kept is None else output.index_select(0, samples.kept)


def evaluate(policy: RecurrentActorCriticPolicy, samples: SequenceSamples, actions: th.Tensor) -> Evaluation:
    """
    ``RecurrentActorCriticPolicy.evaluate_actions``, with one call of the LSTM for all steps of the sequences.

    :param policy: The policy
    :param samples: A minibatch
    :param actions: Its actions, integers of shape ``(n,)`` if they are discrete
    :return: The evaluation
    """
    features: Any = policy.extract_features(samples.observations)
    pi_features, vf_features = (features, features) if policy.share_features_extractor else features
    latent_pi = run_lstm(policy.lstm_actor, pi_features, samples.lstm_states.pi, samples)
    if policy.lstm_critic is not None:
        latent_vf = run_lstm(policy.lstm_critic, vf_features, samples.lstm_states.vf, samples)
    elif policy.shared_lstm:
        latent_vf = latent_pi.detach()
    else:
        latent_vf = policy.critic(vf_features)  # type: ignore[misc]
    net = networks(policy) if th.is_grad_enabled() else None
    critic = policy.critic if policy.lstm_critic is None else policy.lstm_critic
    inner = [*policy.lstm_actor.parameters(), *(() if critic is None else critic.parameters())]
    if net is not None and net.are_trained() and all(parameter.requires_grad for parameter in inner):
        written = HeadsEvaluation(net, inner, latent_pi, latent_vf, actions)
        return Evaluation(written.values, written.log_prob, written.entropy, written.backward)
    distribution = policy._get_action_dist_from_latent(policy.mlp_extractor.forward_actor(latent_pi))
    values = policy.value_net(policy.mlp_extractor.forward_critic(latent_vf))
    return Evaluation(values, distribution.log_prob(actions), distribution.entropy())


class _InnerLayers(Layers):
    """Layers whose inputs have a gradient, too."""

    input_gradient: th.Tensor

    def backward(self, gradient: th.Tensor, inputs: list[th.Tensor]) -> None:
        for (weight, bias), features in zip(reversed(self.parameters), reversed(inputs), strict=True):
            th.mm(gradient.t(), features, out=weight.grad)
            th.sum(gradient, 0, out=bias.grad)
            gradient = gradient.mm(weight)
            if features is not inputs[0]:
                gradient = self.activation_backward(gradient, features)
        self.input_gradient = gradient


class HeadsEvaluation(MlpEvaluation):
    """
    What follows the LSTM, written out; the LSTM itself, and what precedes it, is left to autograd.

    :param net: The layers after the LSTM
    :param inner: The parameters before them
    :param latent_pi: Outputs of the actor's LSTM
    :param latent_vf: Of the critic's
    :param actions: Actions
    """

    def __init__(
        self,
        net: Networks,
        inner: list[Any],
        latent_pi: th.Tensor,
        latent_vf: th.Tensor,
        actions: th.Tensor,
    ) -> None:
        net = copy(net)
        net.actor, net.critic = map(_InnerLayers, net.layers)
        super().__init__(net, latent_pi.detach(), actions, with_values=False)
        with th.inference_mode():
            values, self.critic_inputs = net.critic.forward(latent_vf.detach())
        self.values = values.clone().requires_grad_()
        self.latents: tuple[th.Tensor, ...] = (latent_pi, latent_vf)
        self.inner = inner

    def backward(self, loss: th.Tensor) -> None:
        super().backward(loss)
        trained = [
            (latent, layers.input_gradient)  # type: ignore[attr-defined]
            for latent, layers in zip(self.latents, (self.net.actor, self.net.critic), strict=True)
            if latent.requires_grad
        ]
        latents, latent_gradients = zip(*trained, strict=True)
        gradients = th.autograd.grad(latents, self.inner, latent_gradients)
        th._foreach_copy_([parameter.grad for parameter in self.inner], gradients)
