"""Chat encoding, the scripted engine, and vLLM itself on a tiny random model."""

import asyncio
import gc
import json
from concurrent.futures import ThreadPoolExecutor
from threading import Event, Thread

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spct_ray.chat import encode_example, encode_prompt, end_of_turn
from spct_ray.engines.base import EngineConfig, Request, SamplingParams
from spct_ray.engines.engine_judge import EngineJudge
from spct_ray.errors import ConfigError, EngineError, RequestError
from spct_ray.judge.judge import JudgeTask, part_of
from spct_ray.judge.modes import MODES
from spct_ray.judge.prompt import JudgeConfig, judge_messages
from spct_ray.records import Item, Message
from tests.scripted_engine import ScriptedEngine
from tests.tiny import CONTROL, make_tiny_model, make_tiny_tokenizer

PIECES = [*CONTROL, *CONTROL, "<|", "im_end", "|>", " ", "\n", "Scores: ", "é"]
TEXTS = st.lists(st.sampled_from(PIECES) | st.text()).map("".join)


def ask(text, **params):
    return Request((Message("user", text),), SamplingParams(**{"max_tokens": 16, **params}))


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_tokenizer()


class TestChat:
    @given(text=TEXTS, answer=TEXTS)
    def test_text_round_trips_and_never_becomes_control_tokens(self, tokenizer, text, answer):
        messages = [Message("user", text), Message("assistant", answer), Message("user", text)]
        ids = encode_prompt(tokenizer, messages)
        turns = [("user", text), ("assistant", answer), ("user", text)]
        expected = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
        assert tokenizer.decode(ids) == expected + "<|im_start|>assistant\n"
        assert [ids.count(i) for i in range(3)] == [0, 4, 3]
        example, num_prompt = encode_example(tokenizer, messages, answer)
        assert example[:num_prompt] == ids
        assert tokenizer.decode(example[num_prompt:]) == f"{answer}<|im_end|>"
        assert [example[num_prompt:].count(i) for i in range(3)] == [0, 0, 1]

    @given(text=st.text().filter(lambda text: not any(token in text for token in CONTROL)))
    def test_plain_text_is_encoded_as_transformers_does(self, tokenizer, text):
        ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        assert encode_prompt(tokenizer, [Message("user", text)]) == ids["input_ids"]

    def test_end_of_turn_is_found_where_it_is_not_eos(self):
        tokenizer = make_tiny_tokenizer()
        tokenizer.eos_token = CONTROL[0]
        assert end_of_turn(tokenizer) == 2

    def test_unusable_templates_are_refused_with_the_remedy(self):
        tokenizer, user = make_tiny_tokenizer(), [Message("user", "a")]
        tokenizer.chat_template = tokenizer.chat_template.split("{% if")[0]
        with pytest.raises(ConfigError, match=r"ignores add_generation_prompt.*<\|im_start\|>assistant"):
            encode_prompt(tokenizer, user)
        tokenizer.chat_template = None
        with pytest.raises(ConfigError, match=r"no chat template: put a chat_template.jinja"):
            encode_prompt(tokenizer, user)

    def test_template_that_closes_the_user_turn_needs_no_generation_prompt(self):
        tokenizer = make_tiny_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
            "{% else %} {{ m.content }}<|im_end|>{% endif %}{% endfor %}"
        )
        assert tokenizer.decode(encode_prompt(tokenizer, [Message("user", "a")])) == "[INST] a [/INST]"

    def test_template_that_knows_no_system_role(self):
        tokenizer = make_tiny_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
            "{% endfor %}" + tokenizer.chat_template
        )
        with pytest.raises(RequestError, match=r"refuses turns \(system, user\): no system role"):
            encode_prompt(tokenizer, [Message("system", "a"), Message("user", "b")])


class TestScripted:
    def test_answers_counts_and_cuts(self):
        engine = ScriptedEngine(lambda request: [request.messages[0].content.upper()] * request.params.n)
        ((first, second),) = engine.generate([ask("hello", n=2, max_tokens=3, logprobs=True)])
        assert first == second
        assert (first.text, first.stop_reason, first.completion_tokens, len(first.logprobs)) == ("HEL", "length", 3, 3)
        engine.reload("anywhere", 5)
        assert engine.submit(ask("x")).result()[0].weight_version == engine.weight_version == 5

    def test_dies_when_told(self):
        engine = ScriptedEngine(lambda request: ["ok"], calls_to_live=2)
        engine.generate([ask("a"), ask("b")])
        for call in (lambda: engine.submit(ask("c")), lambda: engine.prompt_logprobs([[1]])):
            with pytest.raises(EngineError):
                call()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tiny")
    make_tiny_model(directory, tied=False)
    defaults = {"do_sample": True, "top_k": 1, "temperature": 0.1, "repetition_penalty": 2.0}  # must not matter
    (directory / "generation_config.json").write_text(json.dumps(defaults))
    return str(directory)


@pytest.fixture(scope="module")
def engine(model_dir):
    from spct_ray.engines.vllm import VllmEngine

    engine = VllmEngine(model_dir, EngineConfig(max_model_len=128, kv_cache_gib=0.1, max_num_seqs=64))
    yield engine
    engine.close()


@pytest.mark.slow
def test_compiled_graphs_are_shared_by_directories_of_equal_config(tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    import spct_ray.engines.vllm  # noqa: F401

    make_tiny_model(tmp_path / "one")
    make_tiny_model(tmp_path / "same", seed=1)
    make_tiny_model(tmp_path / "other", hidden=96)
    options = {"max_model_len": 256, "kv_cache_memory_bytes": 2**28, "dtype": "float32", "enforce_eager": True}
    one, same, other = (
        EngineArgs(model=str(tmp_path / name), **options).create_engine_config() for name in ("one", "same", "other")
    )
    assert one.compute_hash() == same.compute_hash() != other.compute_hash()
    assert one.model_config.model == str(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.timeout(300)
class TestVllm:
    def test_samples_follow_the_models_own_distribution(self, engine, model_dir):
        """Mean log p of 2,000 first tokens at T = 0.5 against its exact value: no top-k, top-p or model defaults."""
        from transformers import AutoModelForCausalLM

        request = ask("Name a prime", n=2000, max_tokens=1, temperature=0.5, seed=1, logprobs=True)
        (completions,) = engine.generate([request])
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16)
        with torch.no_grad():
            logits = model(torch.tensor([completions[0].prompt_token_ids])).logits[0, -1].float()
        logps, sampled_from = logits.log_softmax(-1), (logits / 0.5).softmax(-1)
        mean = (sampled_from * logps).sum().item()
        spread = ((sampled_from * logps**2).sum() - mean**2).sqrt().item()
        found = sum(c.logprobs[0] for c in completions) / len(completions)
        assert abs(found - mean) < 4 * spread / 2000**0.5 + 0.02
        assert len({c.token_ids for c in completions}) > 50

    def test_seeds_decide_whatever_else_runs(self, engine):
        alone = engine.generate([ask("Name a prime", seed=2**63 - 1, n=2)])
        beside = engine.generate(
            [*(ask(f"word {i}", seed=i) for i in range(9)), ask("Name a prime", seed=2**63 - 1, n=2)]
        )
        assert [c.token_ids for c in alone[0]] == [c.token_ids for c in beside[-1]]
        assert alone[0][0].token_ids != alone[0][1].token_ids

    def test_completion_tells_tokens_stop_and_counts(self, engine, tokenizer):
        request = ask("<|im_end|> quoted", guide="(yes|no)", logprobs=True, seed=0)
        ((completion,),) = engine.generate([request])
        assert completion.text in ("yes", "no")
        assert completion.stop_reason == "stop"
        assert completion.token_ids[-1] == end_of_turn(tokenizer)
        assert completion.prompt_token_ids == tuple(encode_prompt(tokenizer, request.messages))
        assert completion.prompt_tokens == len(completion.prompt_token_ids)
        assert completion.completion_tokens == len(completion.token_ids) == len(completion.logprobs)
        ((cut,),) = engine.generate([ask("count", max_tokens=5, temperature=0.0, guide="[a-z ]{90}")])
        assert (cut.stop_reason, cut.completion_tokens, cut.logprobs) == ("length", 5, ())

    def test_batch_limits_are_vllms_for_throughput_where_they_are_not_set(self, engine):
        limits = []
        engine._alone(lambda core: limits.append(core.vllm_config.scheduler_config))
        assert (limits[0].max_num_batched_tokens, limits[0].max_num_seqs) == (4096, 64)  # as `LLM` has it on CPU

    def test_more_prompt_tokens_than_one_batch_with_seeds(self, engine):
        """vLLM's chunked prefill would kill the engine here: CPU generators cannot be rewound."""
        results = engine.generate([ask(f"{i} " + "prime number " * 25, seed=i) for i in range(300)])
        assert all(len(completions) == 1 for completions in results)

    def test_refused_requests_leave_the_engine_alive(self, engine):
        cases = [
            (ask("long " * 200), r"a prompt of \d+ tokens \+ max_tokens 16 exceeds the engine's max_model_len of 128"),
            (ask("greedy", n=2, temperature=0.0), "n must be 1"),
            (ask("regex", guide="(unclosed"), "vLLM refuses the request"),
            (ask("none", max_tokens=0), "max_tokens"),
        ]
        futures = [engine.submit(request) for request, _ in cases]
        good = engine.submit(ask("good"))
        for future, (_, message) in zip(futures, cases, strict=True):
            with pytest.raises(RequestError, match=message):
                future.result()
        assert len(good.result()) == 1
        with pytest.raises(RequestError, match="a sequence of 128 tokens"):
            engine.prompt_logprobs([[5] * 128])

    def test_a_cancelled_request_is_no_longer_worked_on(self, engine, monkeypatch):
        from vllm.v1.engine.llm_engine import LLMEngine

        aborted, abort = [], LLMEngine.abort_request

        def record(core, request_ids, *rest):
            aborted.extend(request_ids)
            abort(core, request_ids, *rest)

        monkeypatch.setattr(LLMEngine, "abort_request", record)
        given, submit = [], engine.submit
        monkeypatch.setattr(engine, "submit", lambda request: given.append(submit(request)) or given[-1])
        judge = EngineJudge(engine, JudgeConfig(template="compact", max_tokens=90), "m", guided=False)
        item = Item("i", (Message("user", "q"),), ("a", "b"))

        async def judged(sample):
            """A judgement that the engine was asked for."""
            num = len(given)
            task = asyncio.create_task(judge.judge_one(JudgeTask(item, (0, 1), sample, 1.0, sample)))
            while len(given) == num:
                await asyncio.sleep(0)
            return task

        async def cancel(task):
            task.cancel()
            await asyncio.wait([task])
            await asyncio.sleep(0)  # in which the engine is told

        async def scenario():
            shut, gate = Event(), Event()
            idle = Thread(target=engine._alone, args=(lambda core: shut.set() or gate.wait(),))
            idle.start()
            shut.wait()  # no request is begun from here on
            unwanted = [await judged(sample) for sample in range(3)]
            wanted = submit(ask("go on", max_tokens=40, guide="[a-z ]{90}"))
            for task in unwanted:
                await cancel(task)
            gate.set()
            idle.join()
            assert all(future.cancelled() for future in given)
            assert wanted.result()[0].completion_tokens
            assert engine.generate([ask("and on")])[0][0].completion_tokens
            assert not aborted  # what was not even begun needs no abort
            started = await judged(4)
            begun = given[-1]
            engine.generate([ask("a step", max_tokens=1)])  # so that it has begun
            await cancel(started)
            engine.generate([ask("another", max_tokens=1)])
            assert not begun.cancelled() or aborted

        asyncio.run(scenario())

    @pytest.mark.parametrize("mode", ["single", "pairwise"])
    def test_a_judgement_of_several_prompts_reads_what_each_of_them_does(self, engine, mode):
        config = JudgeConfig(template="compact", max_tokens=12, mode=mode)
        task = JudgeTask(Item("i", (Message("user", "q"),), ("a", "bb", "ccc")), (2, 0, 1), 0, 0.0, 1)
        (made,) = EngineJudge(engine, config, "m").judge([task])
        parts = [part_of(task, part) for part in MODES[mode].parts(task.order)]
        messages = [judge_messages(part.item, part.order, config) for part in parts]
        alone = engine.generate([Request(one, SamplingParams(12, temperature=0.0)) for one in messages])
        assert made.num_prompts == len(alone) == 3
        assert made.prompt_tokens == sum(one.prompt_tokens for (one,) in alone)
        assert made.completion_tokens <= 36
        assert made.failure in ("truncated", "no_box")  # a random model
        assert made.text.count("(response ") == 3

    def test_principles_from_the_query_are_asked_for_first(self, engine):
        config = JudgeConfig(template="compact", max_tokens=12, mode="query_principles")
        tasks = [JudgeTask(Item("i", (Message("user", "q"),), ("a", "b")), (0, 1), k, 1.0, k) for k in range(3)]
        made = EngineJudge(engine, config, "m").judge(tasks)
        assert {one.failure for one in made} <= {"no_principles", "truncated"}  # a random model
        assert len({one.text for one in made}) == 1  # written once, for all samples

    def test_responses_that_do_not_fit_are_judged_in_chunks(self, engine):
        config = JudgeConfig(template="compact", max_tokens=12)
        task = JudgeTask(Item("i", (Message("user", "q"),), tuple("abcdefgh")), tuple(range(8)), 0, 0.0, 1)
        (whole,) = EngineJudge(engine, config, "m").judge([task])
        (parts,) = EngineJudge(engine, config, "m", in_chunks=True).judge([task])
        assert (whole.failure, whole.num_prompts) == ("too_long", 1)
        assert "max_model_len of 128" in whole.text
        assert parts.failure in ("truncated", "no_box")  # of the random model
        assert parts.num_prompts > 1

    def test_many_threads_share_one_batch(self, engine):
        requests = [ask(f"word {i}", temperature=0.0) for i in range(40)]
        together = engine.generate(requests)
        with ThreadPoolExecutor(8) as threads:
            apart = list(threads.map(lambda request: engine.submit(request).result(), requests))
        assert [c.prompt_token_ids for (c,) in apart] == [c.prompt_token_ids for (c,) in together]

    def test_prompt_logprobs_of_short_sequences(self, engine):
        assert [len(row) for row in engine.prompt_logprobs([[5], [5, 6], [5, 6, 7]])] == [0, 1, 2]

    def test_freed_memory_goes_back_to_the_system_now_and_then(self, engine, monkeypatch):
        from spct_ray.engines import vllm

        trims = []
        monkeypatch.setattr(vllm, "give_back_freed", lambda: trims.append(1))
        monkeypatch.setattr(vllm, "_TRIM_PERIOD_S", 3600.0)
        engine.generate([ask("at once")])
        assert not trims
        monkeypatch.setattr(vllm, "_TRIM_PERIOD_S", 0.0)
        engine.generate([ask("and later")])
        assert trims

    def test_settings_and_templates_that_cannot_work(self, tmp_path):
        from spct_ray.engines.vllm import VllmEngine

        with pytest.raises(ConfigError, match="no tensor parallelism"):
            VllmEngine(str(tmp_path), EngineConfig(tensor_parallel=2))
        with pytest.raises(EngineError, match="did not start"):
            VllmEngine(str(tmp_path / "nothing"), EngineConfig())

    def test_death_reaches_every_caller_and_no_later_engine(self, model_dir, tmp_path):
        """It ends the engine: a reload that fails half-way leaves no usable weights. vLLM's finalizer of a core, which
        the collector runs at any time, would end the process groups of engines that start afterwards."""
        from spct_ray.engines.vllm import VllmEngine

        config = EngineConfig(max_model_len=128, kv_cache_gib=0.1, max_num_seqs=64)
        engine = VllmEngine(model_dir, config)
        running = engine.submit(ask("before"))
        with ThreadPoolExecutor(1) as threads:
            reload = threads.submit(engine.reload, str(tmp_path / "no-weights"), 9)
            with pytest.raises(EngineError, match=r"died: .*no-weights"):
                reload.result()
        assert len(running.result()) == 1
        for call in (lambda: engine.submit(ask("after")), lambda: engine.generate([ask("after")])):
            with pytest.raises(EngineError, match=r"died: .*no-weights"):
                call()
        assert engine.weight_version == 0
        later = VllmEngine(model_dir, config)
        try:
            gc.collect()
            assert len(later.generate([ask("go on")])) == 1
        finally:
            later.close()
