"""R2VPO with replay on mathematics in TRL: Qwen3-1.7B and DAPO-Math-17K, with the paper's settings.

    accelerate launch --num_processes 8 examples/llm/trl_math.py --use_vllm true --vllm_mode colocate

8 processes of 8 responses, accumulated twice, are the paper's batch of 128. Every argument of `R2VPOConfig` can be given,
and `--model`. The paper does not tell the learning rate, the initial multiplier and the tolerance: TRL's and ours stand in.

The same script on a laptop, offline, in seconds, with a model of a few thousand parameters that learns to write small digits:

    accelerate launch --multi_gpu --num_processes 2 examples/llm/trl_math.py --tiny        # two processes on CPUs
"""

from dataclasses import dataclass
from typing import Any

import torch as th
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.rewards import accuracy_reward

from sb3_r2vpo.llm.trl import R2VPOConfig, R2VPOTrainer

INSTRUCTION = "{prompt}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."

PAPER = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "num_generations": 8,
    "max_grad_norm": 1.0,
    "temperature": 1.0,
    "max_completion_length": 16384,
    "replay_capacity": 4,
    "utd_ratio": 2,
    "lr_scheduler_type": "constant",
    "max_steps": 400,
}
TINY = {
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "learning_rate": 1e-2,
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 6,
    "max_steps": 8,
    "logging_steps": 1,
    "report_to": "none",
}


@dataclass
class ScriptArguments:
    """What is no argument of the trainer."""

    model: str = "Qwen/Qwen3-1.7B"
    tiny: bool = False


def math_data() -> Dataset:
    """Prompts as conversations, and solutions that `accuracy_reward` verifies."""
    data = load_dataset("open-r1/DAPO-Math-17k-Processed", "en", split="train")

    def conversation(row: dict[str, Any]) -> dict[str, Any]:
        content = INSTRUCTION.format(prompt=row["prompt"])
        return {"prompt": [{"role": "user", "content": content}], "solution": f"${row['solution']}$"}

    return data.map(conversation, remove_columns=data.column_names)


def tiny_model() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """An untrained model whose tokens are characters."""
    characters = "0123456789+=."
    tokenizer = Tokenizer(models.WordLevel({character: i for i, character in enumerate(characters)}, unk_token="."))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    th.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(characters),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=True,
        eos_token_id=characters.index("."),
        bos_token_id=None,
    )
    return LlamaForCausalLM(config), PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=".", pad_token=".")


def small_digits(completions: list[str], **kwargs: Any) -> list[float]:
    """Number of digits below four in each response."""
    return [float(sum(character in "0123" for character in completion)) for completion in completions]


def main(arguments: list[str] | None = None) -> R2VPOTrainer:
    parser = HfArgumentParser((ScriptArguments, R2VPOConfig))
    parser.set_defaults(output_dir="runs/trl_math", **PAPER)
    if parser.parse_known_args(arguments)[0].tiny:
        parser.set_defaults(**TINY)
    script, config = parser.parse_args_into_dataclasses(arguments)
    if script.tiny:
        model, tokenizer = tiny_model()
        # Prompts of two lengths
        data = Dataset.from_list([{"prompt": f"{a}+{b}="} for a in range(8, 12) for b in range(8)])
        trainer = R2VPOTrainer(model, small_digits, config, data, processing_class=tokenizer)
    else:
        trainer = R2VPOTrainer(script.model, accuracy_reward, config, math_data())
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    return trainer


if __name__ == "__main__":
    main()
