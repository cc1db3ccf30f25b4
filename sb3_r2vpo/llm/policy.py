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

from sb3_r2vpo.llm.models import Generation, kl_divergence, load_model, mask_prompts
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
    :param model_kwargs: Arguments of ``from_pretrained``, such as ``{"dtype": torch.bfloat16}``.
    :param temperature: see :class:`~sb3_r2vpo.llm.sampling.Sampling`, as the next two
    :param top_k: see there
    :param top_p: see there
    :param lora: Arguments of peft's ``LoraConfig``, such as ``{"r": 16, "target_modules": "all-linear"}``, to train low-rank
        adapters only. ``None`` (default) trains all weights.
    :param gradient_checkpointing: Recompute the activations within the model in the backward pass: less memory, more time.
    :param micro_batch_size: Responses in one forward pass; a minibatch of more is evaluated in parts, whose activations are
        recomputed in the backward pass. It needs the memory that gradient accumulation needs, and, unlike it, averages over
        all tokens of the minibatch at once. ``None`` (default) for no limit.
    :param value_head: Learn the value of a prompt, with a linear head on its last token; for ``advantage="gae"``. By default
        there is no critic, and values are zero.
    :param reference_kl: Keep a frozen copy of the initial model (with LoRA: the model without adapters), and return
        ``-KL(pi || pi_ref)``, the entropy relative to it, in place of the entropy: the algorithm's ``ent_coef`` is then the
        coefficient of a KL penalty, and its ``entropy_loss`` the KL. It is exact for each token, over the whole vocabulary,
        and compares the models themselves, before temperature, top-k and top-p.
    :param optimizer_class: The optimizer; AdamW as in the paper
    :param optimizer_kwargs: Its arguments, excluding the learning rate
    :param use_sde: Not supported
    :raises ValueError: The action space is another one, or its vocabulary is larger than the model's; or the longest
        conversation exceeds the model's context.
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
        self.micro_batch_size = micro_batch_size
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
        self._check_sizes(model)
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
        self._takes_logits_to_keep = "logits_to_keep" in parameters
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        self.optimizer = self.optimizer_class(trainable, lr=lr_schedule(1), **self.optimizer_kwargs)  # type: ignore[call-arg]

    def _check_sizes(self, model: PreTrainedModel) -> None:
        vocab_size, model_vocab_size = self.vocab_size, model.config.vocab_size
        if vocab_size > model_vocab_size:
            raise ValueError(
                f"The task has {vocab_size} token ids, but the model knows {model_vocab_size}: they do not belong together. "
                "Load the tokenizer from where the model comes from, or call `model.resize_token_embeddings()`."
            )
        longest = self.observation_space["input_ids"].shape[0] + self.max_new_tokens  # type: ignore[index]
        context = getattr(model.config, "max_position_embeddings", None)
        if context is not None and longest > context:
            raise ValueError(
                f"Prompt and response may take {longest} tokens, but the model's context is {context}: "
                "lower `max_prompt_tokens` or `max_new_tokens`."
            )

    @property
    def vocab_size(self) -> int:
        """Number of token ids of the task; a model may know more, which are never sampled"""
        space = self.action_space
        return space.vocab_size if isinstance(space, ResponseSpace) else int(space.n)  # type: ignore[attr-defined]

    @property
    def max_new_tokens(self) -> int:
        """Longest response"""
        return self.action_space.max_new_tokens if isinstance(self.action_space, ResponseSpace) else 1

    def _token_logits(self, logits: th.Tensor) -> th.Tensor:
        """Logits of the tokens that the task has, ``-inf`` for those that it does not allow."""
        # Models pad their vocabulary to a round number
        logits = logits[..., : self.vocab_size]
        allowed = getattr(self.action_space, "allowed_tokens", None)
        return logits if allowed is None else logits.masked_fill(~th.as_tensor(allowed, device=logits.device), -th.inf)

    def _model_inputs(self, input_ids: th.Tensor, attention_mask: th.Tensor, n_logits: int) -> dict[str, Any]:
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._takes_position_ids:
            # Positions count from the first token of the prompt, wherever padding puts it
            inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        if self._takes_logits_to_keep:
            inputs["logits_to_keep"] = n_logits
        return inputs

    @th.no_grad()
    def generate(self, obs: PyTorchObs, sampling: Sampling | None = None) -> Generation:
        """
        Sample responses with a KV cache.

        Equal prompts are read once, and responses leave the batch when they end, so that nothing is computed for padding.
        Rows of padding only get empty responses.

        :param obs: Prompts, padded on the left
        :param sampling: How to sample; ``None`` takes the policy's own way, that of training
        :return: The responses
        """
        sampling = sampling or self.sampling
        prompts, attention_mask = obs["input_ids"].long(), obs["attention_mask"].long()  # type: ignore[index]
        tokens = th.full((len(prompts), self.max_new_tokens), PADDING, device=prompts.device)
        log_probs, entropies = th.zeros(2, *tokens.shape, device=prompts.device)
        eos_token_ids = th.tensor(getattr(self.action_space, "eos_token_ids", ()), device=prompts.device)

        rows = attention_mask.any(-1).nonzero().flatten()
        if len(rows) == 0:
            return Generation(tokens, log_probs, entropies)
        width = int(attention_mask.sum(-1).max())
        unique, owners = th.stack([prompts, attention_mask])[:, rows, -width:].unique(dim=1, return_inverse=True)
        outputs = self.model(**self._model_inputs(unique[0], unique[1], 1), use_cache=True)
        logits, cache, attention_mask = outputs.logits[owners, -1], outputs.past_key_values, unique[1][owners]
        cache.batch_select_indices(owners)
        for step in range(self.max_new_tokens):
            logits = truncate_logits(self._token_logits(logits), sampling)
            probabilities = logits.softmax(-1)
            new_tokens = th.multinomial(probabilities, num_samples=1)
            tokens[rows, step] = new_tokens.flatten()
            log_probs[rows, step] = token_log_prob(logits, new_tokens.flatten())
            entropies[rows, step] = th.special.entr(probabilities).sum(-1)
            unfinished = (~th.isin(new_tokens.flatten(), eos_token_ids)).nonzero().flatten()
            if step + 1 == self.max_new_tokens or len(unfinished) == 0:
                break
            attention_mask = nn.functional.pad(attention_mask, (0, 1), value=1)
            if len(unfinished) < len(rows):
                rows, new_tokens, attention_mask = rows[unfinished], new_tokens[unfinished], attention_mask[unfinished]
                cache.batch_select_indices(unfinished)
            inputs = self._model_inputs(new_tokens, attention_mask, 1)
            logits = self.model(**inputs, past_key_values=cache, use_cache=True).logits[:, -1]
        return Generation(tokens, log_probs, entropies)

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
        outputs = self.model(**self._model_inputs(prompts, attention_mask, 1), output_hidden_states=True)
        return self.value_net(outputs.hidden_states[-1][:, -1].float())

    def evaluate_actions(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """
        Evaluate stored responses in teacher-forced passes.

        :param obs: Prompts, padded on the left
        :param actions: Responses, padded with ``PADDING`` on the right
        :return: values, log-probabilities of the responses' tokens (zero at padding), and, of the same shape, minus the KL
            divergence to the reference model, if there is one. There is no closed-form entropy: its memory, one number for
            each entry of the vocabulary, would exceed the model's.
        """
        prompts, attention_mask = mask_prompts(obs)
        responses = actions.long().reshape(len(prompts), -1)
        # Sorted by length, so that responses that share a pass need little padding
        lengths = attention_mask.sum(-1) + (responses != PADDING).sum(-1)
        order = lengths.argsort(descending=True)
        splits = order.split(self.micro_batch_size or len(order))
        parts = []
        for rows in splits:
            arguments = prompts[rows], attention_mask[rows], responses[rows]
            if len(splits) > 1 and th.is_grad_enabled():
                parts.append(checkpoint(self._evaluate_part, *arguments, use_reentrant=False))
            else:
                parts.append(self._evaluate_part(*arguments))
        restore = order.argsort()
        values, log_prob, relative_entropy = (th.cat(tensors)[restore] for tensors in zip(*parts, strict=True))
        if isinstance(self.action_space, spaces.Discrete):
            log_prob, relative_entropy = log_prob.flatten(), relative_entropy.flatten()
        return values, log_prob, relative_entropy if self.has_reference else None

    def _evaluate_part(
        self, prompts: th.Tensor, attention_mask: th.Tensor, responses: th.Tensor
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """Values, log-probabilities and minus KL of responses that fit into one pass."""
        mask = responses != PADDING
        # No column that is padding in all rows is computed
        prompt_width, width = int(attention_mask.sum(-1).max()), max(1, int(mask.sum(-1).max()))
        prompts, attention_mask = prompts[:, -prompt_width:], attention_mask[:, -prompt_width:]
        mask, tokens = mask[:, :width], responses[:, :width].clamp(min=0)
        inputs = self._model_inputs(
            th.cat([prompts, tokens], dim=1), th.cat([attention_mask, mask.long()], dim=1), n_logits=width + 1
        )
        outputs = self.model(**inputs, output_hidden_states=self.value_net is not None)
        # The logits at one position are for the token at the next
        logits = self._token_logits(outputs.logits[:, -width - 1 : -1])
        truncated = truncate_logits(logits, self.sampling, keep=tokens)
        padding = (0, responses.shape[1] - width)
        log_prob = nn.functional.pad(th.where(mask, token_log_prob(truncated, tokens), 0.0), padding)
        relative_entropy = th.zeros_like(log_prob)
        if self.has_reference:
            reference_logits = self._token_logits(self._reference_logits(inputs)[:, -width - 1 : -1])
            kl = kl_divergence(logits, reference_logits)
            relative_entropy = nn.functional.pad(th.where(mask, -kl, 0.0), padding)
        values = th.zeros(len(prompts), 1, device=prompts.device)
        if self.value_net is not None:
            values = self.value_net(outputs.hidden_states[-1][:, prompt_width - 1].float())
        return values, log_prob, relative_entropy

    @th.no_grad()
    def _reference_logits(self, inputs: dict[str, Any]) -> th.Tensor:
        if self.reference is not None:
            return self.reference(**inputs).logits
        with self.model.disable_adapter():  # type: ignore[operator]
            return self.model(**inputs).logits

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
