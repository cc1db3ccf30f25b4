"""Peak memory of an update's log-probabilities and their gradient, against the size of all its logits in float32.

    python benchmarks/speed/llm_memory.py

One layer of width 32, so that logits are nearly all of it. Each row is a process of its own: how far its resident memory rises
above that of an update on one token before. `slices` is the policy; `whole` computes all logits at once.
"""

import csv
import ctypes
import resource
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch as th
from transformers import LlamaConfig, LlamaForCausalLM

from sb3_r2vpo.llm import PADDING, CausalLMPolicy, ResponseSpace, readout
from sb3_r2vpo.llm.spaces import prompt_space

RESULTS = Path(__file__).parent / "results" / "llm_memory.csv"
N_NEW_TOKENS = 64

#: Of the C library's ``malloc.h``
M_MMAP_THRESHOLD = -3

#: Vocabulary and tokens of a minibatch
SIZES = [(32_768, 512), (131_072, 512)]


def peak_bytes() -> int:
    """Of the process's resident memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(vocab_size: int, n_tokens: int, top_p: float, arm: str) -> float:
    """Bytes above those of an update on one token."""
    # Memory of 1 MiB and more goes back to the system once it is free: else the C library keeps some, and the peak is its own
    ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, 2**20)
    th.manual_seed(0)
    th.set_num_threads(1)
    if arm == "whole":
        readout.WHOLE_BYTES = 2**60
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **sizes))
    observation_space = prompt_space(vocab_size, 4)
    action_space = ResponseSpace(vocab_size, N_NEW_TOKENS, [0])
    policy = CausalLMPolicy(observation_space, action_space, lambda _: 0.0, model=model, top_p=top_p)

    def update(n_responses: int, length: int) -> None:
        obs = {name: th.ones(n_responses, 4, dtype=th.long) for name in ("input_ids", "attention_mask")}
        tokens = th.full((n_responses, N_NEW_TOKENS), PADDING)
        tokens[:, :length] = th.randint(1, vocab_size, (n_responses, length))
        policy.evaluate_actions(obs, tokens)[1].mean().backward()

    update(1, length=1)
    before = peak_bytes()
    update(n_tokens // N_NEW_TOKENS, N_NEW_TOKENS)
    return peak_bytes() - before


def main() -> None:
    with RESULTS.open("w", newline="") as file, get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        writer = csv.writer(file)
        writer.writerow(["vocab_size", "n_tokens", "top_p", "arm", "peak_mib", "ratio", "torch"])
        for (vocab_size, n_tokens), top_p, arm in product(SIZES, (1.0, 0.95), ("slices", "whole")):
            peak = pool.apply(measure, (vocab_size, n_tokens, top_p, arm))
            ratio = round(peak / (4 * vocab_size * n_tokens), 2)
            row = [vocab_size, n_tokens, top_p, arm, round(peak / 2**20), ratio, th.__version__]
            writer.writerow(row)
            file.flush()
            print(*row, flush=True)


if __name__ == "__main__":
    main()
