"""The trainers that a served judge is a reward for, their own code as installed. Skipped where they are not."""

import asyncio
import math

import pytest

from spct_ray.serve.rewards import trl_reward, verl_reward
from tests.test_serve_client import Log, app_of, engine, served
from tests.tiny import make_tiny_model

pytestmark = pytest.mark.slow


def test_trl_trains_on_verdicts(tmp_path, monkeypatch):
    trl = pytest.importorskip("trl")
    monkeypatch.delenv("LOCAL_RANK", raising=False)  # from a trainer before this test: accelerate would join it
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_tiny_model(tmp_path / "policy")
    log = Log(bad="a sad query")
    prompts = ["a glad query", "a sad query"] * 2
    with served(app_of(engine(log))) as url:
        trainer = trl.GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(tmp_path / "policy"),
            processing_class=AutoTokenizer.from_pretrained(tmp_path / "policy"),
            reward_funcs=[trl_reward(url, k=1)],
            train_dataset=Dataset.from_dict({"prompt": prompts}),
            args=trl.GRPOConfig(
                str(tmp_path / "out"), max_steps=2, num_generations=4, per_device_train_batch_size=8,
                max_completion_length=4, use_cpu=True, bf16=False, report_to=[], logging_steps=1, save_strategy="no",
            ),
        )  # fmt: skip
        trainer.train()
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(rewards) == 2
    assert all(math.isfinite(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    assert all(text.count("[Response ") == 4 for text in log.prompts)


def test_openais_client_lists_the_models():
    openai = pytest.importorskip("openai")
    with served(app_of(engine(Log()), name="j")) as url:
        models = openai.OpenAI(base_url=f"{url}/v1", api_key="any").models.list().data
    assert [(model.id, model.object) for model in models] == [("j", "model")]


def test_openrlhf_reads_the_reward_route():
    agent = pytest.importorskip("openrlhf.utils.agent")
    prompts = ["<|user|>one<|assistant|>", "<|user|>two<|assistant|>"]
    with served(app_of(engine(Log(bad="two")))) as url:
        executor = agent.SingleTurnAgentExecutor(f"{url}/v1/reward")
        (both,) = asyncio.run(executor._fetch_rewards_via_http([prompts[0], prompts[1] + "a"], prompts, ["", ""]))
    assert both["rewards"][0] == 1.0  # an empty completion
    assert math.isnan(both["rewards"][1])
    assert both["extra_logs"] == {"judge_failed": [0.0, 1.0]}


def test_verl_calls_the_reward_function():
    import torch

    batch = pytest.importorskip("verl.workers.reward_manager.batch")
    from verl import DataProto

    class Words:
        """Decodes ids to as many letters."""

        def decode(self, ids, skip_special_tokens=True):
            return "x" * int((ids > 0).sum())

    responses = torch.tensor([[1, 1, 0], [1, 0, 0]])
    data = DataProto.from_dict(
        tensors={"prompts": responses[:, :1], "responses": responses, "attention_mask": torch.ones(2, 4).int()},
        non_tensors={
            "data_source": ["d", "d"],
            "reward_model": [{"ground_truth": ""}] * 2,
            "extra_info": [{"question": "q"}, {"question": "q"}],
        },
    )
    with served(app_of(engine(Log()))) as url:
        manager = batch.BatchRewardManager(Words(), 0, verl_reward, base_url=url, k=1)
        rewards = manager(data, return_dict=True)
    assert rewards["reward_tensor"].sum(-1).tolist() == [3.0, 2.0]
    assert rewards["reward_extra_info"]["judge_failed"] == [0.0, 0.0]
