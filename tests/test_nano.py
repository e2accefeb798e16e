"""The nano judge as the three libraries compute it: transformers, our trainer's packed rows, vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from spct_ray.data.program import exercises
from spct_ray.engines.base import EngineConfig
from spct_ray.judge.prompt import JudgeConfig
from spct_ray.learn.batch import make_batch
from spct_ray.learn.model import TokenLogprobs, load_model
from spct_ray.stages.student import phrases, write_nano


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_log_probs_agree(tmp_path: Path) -> None:
    from spct_ray.engines.vllm import VllmEngine

    directory = str(tmp_path)
    write_nano(directory, phrases(), 1)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    rows = exercises(8, JudgeConfig(template="compact"), 1)
    sequences = [tokenizer.encode(r["prompt"] + r["completion"], add_special_tokens=False) for r in rows]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    batch = make_batch(sequences, [1] * len(sequences))
    with torch.no_grad():
        logits = [model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1) for ids in sequences]
        expected = [x.gather(1, torch.tensor(ids[1:])[:, None])[:, 0] for x, ids in zip(logits, sequences, strict=True)]
        ours = batch.split(TokenLogprobs(load_model(directory, "lm", torch.float32, False)).eval()(batch))
    engine = VllmEngine(directory, EngineConfig(max_model_len=256, dtype="float32", kv_cache_gib=0.25, threads=1))
    try:
        theirs = engine.prompt_logprobs(sequences)
    finally:
        engine.close()
    for mine, other, truth in zip(ours, theirs, expected, strict=True):
        torch.testing.assert_close(mine, truth, atol=1e-5, rtol=0)
        torch.testing.assert_close(torch.tensor(other), truth, atol=1e-4, rtol=0)
