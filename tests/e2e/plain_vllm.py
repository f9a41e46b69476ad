"""Greedy answers of plain vLLM, for comparison: python plain_vllm.py MODEL PROMPTS.json ANSWERS.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm import LLM, SamplingParams


def main() -> None:
    model, prompts, answers = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    llm = LLM(
        model, max_model_len=2048, max_num_seqs=64, max_num_batched_tokens=1024, dtype="float32", enforce_eager=True
    )
    params = [SamplingParams(temperature=0.0, max_tokens=prompt["max_tokens"]) for prompt in prompts]
    chats = [[{"role": "user", "content": prompt["content"]}] for prompt in prompts]
    outputs = llm.chat(chats, params, use_tqdm=False)
    answers.write_text(json.dumps([output.outputs[0].text for output in outputs]))


if __name__ == "__main__":
    main()
