"""A Hugging Face causal language model as an SB3 policy."""

import inspect
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from sb3_r2vpo.common.checks import check_whole_number
from sb3_r2vpo.llm.checks import check_model, check_training
from sb3_r2vpo.llm.generation import Generation, generate
from sb3_r2vpo.llm.models import kl_divergence, load_model, mask_prompts, set_precision
from sb3_r2vpo.llm.readout import Readout, in_slices
from sb3_r2vpo.llm.sampling import Sampling, token_log_prob, truncate_logits
from sb3_r2vpo.llm.sequence_buffer import PADDING
from sb3_r2vpo.llm.spaces import ResponseSpace


class CausalLMPolicy(ActorCriticPolicy):
    """
    Policy over any Hugging Face causal language model.

    On a :class:`~sb3_r2vpo.llm.token_vec_env.TokenVecEnv` an action is a whole response, sampled with a KV cache and evaluated
    in one teacher-forced pass; its log-probability has one entry for each token. On a
    :class:`~sb3_r2vpo.llm.token_env.TokenEnv` an action is one token, by the same code: a response of length one.

    Log-probabilities are those of the distribution that was sampled from: after temperature, top-k, top-p and the action
    space's allowed tokens, in float32.

    :param observation_space: Observation space, see :func:`~sb3_r2vpo.llm.spaces.prompt_space`
    :param action_space: A ``ResponseSpace``, or a ``Discrete`` one of token ids
    :param lr_schedule: Learning rate schedule (could be constant)
    :param model: A model, a folder or a name on the Hugging Face hub, or a GGUF file. A path keeps saved algorithms small; a
        model is used as it is, not copied.
    :param model_kwargs: Arguments of ``from_pretrained``, such as ``{"dtype": torch.bfloat16}``. Weights that are trained are
        held in float32; a bfloat16 model computes in bfloat16, see :func:`~sb3_r2vpo.llm.models.set_precision`.
    :param temperature: see :class:`~sb3_r2vpo.llm.sampling.Sampling`, as the next two
    :param top_k: see there
    :param top_p: see there
    :param lora: Arguments of peft's ``LoraConfig``, such as ``{"r": 16, "target_modules": "all-linear"}``, to train low-rank
        adapters only. ``None`` (default) trains all weights.
    :param gradient_checkpointing: Recompute the activations within the model in the backward pass: less memory, more time.
    :param micro_batch_size: Responses in one forward pass; a minibatch of more is evaluated in parts, whose activations are
        recomputed in the backward pass. It needs the memory that gradient accumulation needs, and, unlike it, averages over
        all tokens of the minibatch at once. ``None`` (default) for no limit.
    :param max_cache_tokens: Tokens, of prompts and responses, whose keys and values are held at once: more responses than fit
        are generated in chunks. A token takes ``2 * num_hidden_layers * num_key_value_heads * head_dim`` numbers. ``None``
        (default) for no limit.
    :param value_head: Learn the value of a prompt, with a linear head on its last token; for ``advantage="gae"``. By default
        there is no critic, and values are zero.
    :param reference_kl: Keep a frozen copy of the initial model (with LoRA: the model without adapters), and return
        ``-KL(pi || pi_ref)``, the entropy relative to it, in place of the entropy: the algorithm's ``ent_coef`` is then the
        coefficient of a KL penalty, and its ``entropy_loss`` the KL. It is exact for each token, over the whole vocabulary,
        and compares the models themselves, before temperature, top-k and top-p.
    :param optimizer_class: The optimizer; AdamW as in the paper
    :param optimizer_kwargs: Its arguments, excluding the learning rate
    :param use_sde: Not supported
    :raises ValueError: The action space is another one, or its vocabulary is larger than the model's; the longest
        conversation exceeds the model's context; or the model has no cache of keys and values, as Mamba.
    """

    def __init__(
        self,
        observation_space: spaces.Dict,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        model: str | Path | PreTrainedModel,
        model_kwargs: dict[str, Any] | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float = 1.0,
        lora: dict[str, Any] | None = None,
        gradient_checkpointing: bool = False,
        micro_batch_size: int | None = None,
        max_cache_tokens: int | None = None,
        value_head: bool = False,
        reference_kl: bool = False,
        optimizer_class: type[th.optim.Optimizer] = th.optim.AdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
        use_sde: bool = False,
    ) -> None:
        if not isinstance(action_space, ResponseSpace | spaces.Discrete):
            raise ValueError(
                f"The actions of a CausalLMPolicy are responses or tokens, but the action space is {action_space}."
            )
        if use_sde:
            raise ValueError("`use_sde` is for continuous actions; a CausalLMPolicy samples tokens.")
        self.sampling = Sampling(temperature, top_k, top_p)
        self.lora = lora
        self.gradient_checkpointing = gradient_checkpointing
        for name, number in (("micro_batch_size", micro_batch_size), ("max_cache_tokens", max_cache_tokens)):
            if number is not None:
                check_whole_number(name, number)
        self.micro_batch_size = micro_batch_size
        self.max_cache_tokens = max_cache_tokens
        self.has_value_head = value_head
        self.has_reference = reference_kl
        # `nn.Module` takes no submodule before its own `__init__`, which calls `_build`
        self._source = (model, model_kwargs or {})
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=[],
            optimizer_class=optimizer_class,
            optimizer_kwargs=optimizer_kwargs,
        )

    def _build(self, lr_schedule: Schedule) -> None:
        source, model_kwargs = self._source
        model = load_model(source, **model_kwargs)
        check_model(model, self.observation_space, self.action_space)  # type: ignore[arg-type]
        #: What it computes in
        self.compute_dtype = set_precision(model, frozen=self.lora is not None)
        self.readout = Readout(model)
        # Dropout would make ratios differ from one before any update
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        self.reference = None
        if self.lora is not None:
            from peft import LoraConfig, get_peft_model

            model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **self.lora))  # type: ignore[assignment]
        elif self.has_reference:
            self.reference = deepcopy(model).requires_grad_(False)
        self.model = model
        self.value_net = nn.Linear(model.config.hidden_size, 1) if self.has_value_head else None  # type: ignore[assignment]
        # Architectures without one of these arguments do without
        parameters = inspect.signature((model.get_base_model() if self.lora else model).forward).parameters  # type: ignore[operator]
        self._takes_position_ids = "position_ids" in parameters
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.optimizer = self.optimizer_class(trainable, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def check_algorithm(self, algorithm: Any) -> None:
        """
        :param algorithm: That the policy is for, when it has been set up
        :raises ValueError: Its settings leave nothing to learn from; those of robots get a warning.
        """
        check_training(algorithm)

    @property
    def vocab_size(self) -> int:
        """Number of token ids of the task; a model may know more, which are never sampled"""
        space = self.action_space
        return space.vocab_size if isinstance(space, ResponseSpace) else int(space.n)  # type: ignore[attr-defined]

    @property
    def max_new_tokens(self) -> int:
        """Longest response"""
        return self.action_space.max_new_tokens if isinstance(self.action_space, ResponseSpace) else 1

    def token_logits(self, logits: th.Tensor) -> th.Tensor:
        """
        :param logits: The model's, shape ``(..., model's vocab_size)``
        :return: Those of the tokens that the task has, ``-inf`` for tokens that it does not allow
        """
        # Models pad their vocabulary to a round number
        logits = logits[..., : self.vocab_size]
        allowed = getattr(self.action_space, "allowed_tokens", None)
        return logits if allowed is None else logits.masked_fill(~th.as_tensor(allowed, device=logits.device), -th.inf)

    def model_inputs(self, input_ids: th.Tensor, attention_mask: th.Tensor) -> dict[str, Any]:
        """
        :param input_ids: New tokens, shape ``(n, n_tokens)``
        :param attention_mask: Of all tokens so far, shape ``(n, n_tokens so far)``
        :return: Arguments of the model
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._takes_position_ids:
            # Positions count from the first token of the prompt, wherever padding puts it
            inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        return inputs

    def _precision(self) -> th.autocast:
        return th.autocast(self.device.type, dtype=th.bfloat16, enabled=self.compute_dtype == th.bfloat16)

    @th.no_grad()
    def generate(self, obs: PyTorchObs, sampling: Sampling | None = None) -> Generation:
        """
        Sample responses with a cache of keys and values, see :func:`~sb3_r2vpo.llm.generation.generate`.

        :param obs: Prompts, padded on the left
        :param sampling: How to sample; ``None`` takes the policy's own way, that of training
        :return: The responses
        """
        with self._precision():
            return generate(self, obs, sampling or self.sampling)

    def forward(self, obs: PyTorchObs, deterministic: bool = False) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param obs: Prompts
        :param deterministic: Whether to take the most probable token each time
        :return: responses, values and log-probabilities
        """
        tokens, log_prob, _ = self.generate(obs, Sampling(temperature=0) if deterministic else None)
        values = self.predict_values(obs)
        if isinstance(self.action_space, spaces.Discrete):
            return tokens.flatten(), values, log_prob.flatten()
        return tokens, values, log_prob

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self.generate(observation, Sampling(temperature=0) if deterministic else None).tokens

    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        """
        :param obs: Prompts
        :return: Their values, shape ``(n, 1)``; zero without a value head
        """
        prompts, attention_mask = mask_prompts(obs)
        if self.value_net is None:
            return th.zeros(len(prompts), 1, device=prompts.device)
        with self._precision():
            hidden = self.readout(self.model, self.model_inputs(prompts, attention_mask), with_hidden=True).hidden
        return self.value_net(hidden[:, -1].float())  # type: ignore[index]

    def evaluate_actions(  # type: ignore[override]
        self, obs: PyTorchObs, actions: th.Tensor
    ) -> tuple[th.Tensor | None, th.Tensor, th.Tensor | None]:
        """
        Evaluate stored responses in teacher-forced passes.

        :param obs: Prompts, padded on the left
        :param actions: Responses, padded with ``PADDING`` on the right
        :return: values, ``None`` without a value head; log-probabilities of the responses' tokens (zero at padding); and, of
            the same shape, minus the KL divergence to the reference model, if there is one. There is no closed-form entropy:
            its memory, one number for each entry of the vocabulary, would exceed the model's.
        """
        prompts, attention_mask = mask_prompts(obs)
        responses = actions.long().reshape(len(prompts), -1)
        # Sorted by length, so that responses that share a pass need little padding
        lengths = attention_mask.sum(-1) + (responses != PADDING).sum(-1)
        order = lengths.argsort(descending=True)
        splits = order.split(self.micro_batch_size or len(order))
        parts = []
        with self._precision():
            for rows in splits:
                arguments = prompts[rows], attention_mask[rows], responses[rows]
                if len(splits) > 1 and th.is_grad_enabled():
                    parts.append(checkpoint(self._evaluate_part, *arguments, use_reentrant=False))
                else:
                    parts.append(self._evaluate_part(*arguments))
        restore = order.argsort()
        hidden, log_prob, relative_entropy = (th.cat(tensors)[restore] for tensors in zip(*parts, strict=True))
        if isinstance(self.action_space, spaces.Discrete):
            log_prob, relative_entropy = log_prob.flatten(), relative_entropy.flatten()
        values = None if self.value_net is None else self.value_net(hidden)
        return values, log_prob, relative_entropy if self.has_reference else None

    def _evaluate_part(
        self, prompts: th.Tensor, attention_mask: th.Tensor, responses: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Of responses that fit into one pass: what their values are read from, log-probabilities and minus KL."""
        mask = responses != PADDING
        # No column that is padding in all rows is computed
        prompt_width, width = int(attention_mask.sum(-1).max()), max(1, int(mask.sum(-1).max()))
        prompts, attention_mask = prompts[:, -prompt_width:], attention_mask[:, -prompt_width:]
        tokens = responses[:, :width].clamp(min=0)
        inputs = self.model_inputs(th.cat([prompts, tokens], dim=1), th.cat([attention_mask, mask[:, :width].long()], dim=1))
        features, hidden, _ = self.readout(self.model, inputs, with_hidden=self.value_net is not None)

        def of_tokens(features: th.Tensor) -> th.Tensor:
            # The logits at one position are for the token at the next
            return features[:, -width - 1 : -1][mask[:, :width]]

        tensors: tuple[th.Tensor, ...] = (of_tokens(features), responses[mask])
        if self.has_reference:
            tensors += (of_tokens(self._reference_features(inputs)),)
        results = in_slices(self._evaluate_tokens, tensors, self.model.config.vocab_size)
        log_prob, *kl = (th.zeros(mask.shape, device=mask.device).masked_scatter(mask, result) for result in results)
        last_hidden = th.zeros(len(prompts), 1, device=mask.device)
        if self.value_net is not None:
            last_hidden = hidden[:, prompt_width - 1].float()  # type: ignore[index]
        return last_hidden, log_prob, -kl[0] if kl else th.zeros_like(log_prob)

    def _evaluate_tokens(
        self, features: th.Tensor, tokens: th.Tensor, reference: th.Tensor | None = None
    ) -> tuple[th.Tensor, ...]:
        """Log-probabilities of some tokens, and KL if there is a reference, each of shape ``(n_tokens,)``."""
        logits = self.token_logits(self.readout.logits(self.model, features))
        log_prob = token_log_prob(truncate_logits(logits, self.sampling, keep=tokens), tokens)
        if reference is None:
            return (log_prob,)
        with th.no_grad():
            model = self.model if self.reference is None else self.reference
            reference_logits = self.token_logits(self.readout.logits(model, reference, adapted=False))
        return log_prob, kl_divergence(logits, reference_logits)

    @th.no_grad()
    def _reference_features(self, inputs: dict[str, Any]) -> th.Tensor:
        if self.reference is not None:
            return self.readout(self.reference, inputs).features
        with self.model.disable_adapter():  # type: ignore[operator]
            return self.readout(self.model, inputs).features

    def _get_constructor_parameters(self) -> dict[str, Any]:
        model, model_kwargs = self._source
        return {
            "observation_space": self.observation_space,
            "action_space": self.action_space,
            "lr_schedule": self._dummy_schedule,
            "model": model,
            "model_kwargs": model_kwargs,
            "temperature": self.sampling.temperature,
            "top_k": self.sampling.top_k,
            "top_p": self.sampling.top_p,
            "lora": self.lora,
            "gradient_checkpointing": self.gradient_checkpointing,
            "micro_batch_size": self.micro_batch_size,
            "max_cache_tokens": self.max_cache_tokens,
            "value_head": self.has_value_head,
            "reference_kl": self.has_reference,
            "optimizer_class": self.optimizer_class,
            "optimizer_kwargs": self.optimizer_kwargs,
        }

    def export(self, folder: str | Path, tokenizer: Any = None) -> None:
        """
        Write the model as a Hugging Face folder (safetensors) that ``AutoModelForCausalLM.from_pretrained`` opens. LoRA
        adapters are merged into a copy.

        :param folder: Where to write
        :param tokenizer: Its tokenizer, to be written beside it
        """
        model = self.model if self.lora is None else deepcopy(self.model).merge_and_unload()  # type: ignore[operator]
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
