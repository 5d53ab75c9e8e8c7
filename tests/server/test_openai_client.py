"""Every endpoint of OpenAI's through the official client."""

from __future__ import annotations

import json
import math

import openai
import pytest

from qwen1m_ext import LLM, SamplingParams, demo_model_path

MODEL = "demo_model"
MESSAGES = [{"role": "user", "content": "Tell me about the river."}]


@pytest.fixture(scope="module")
def llm():
    return LLM(demo_model_path(), dtype="float32", max_model_len=4096)


def test_models(client):
    (model,) = client.models.list().data
    assert (model.id, model.object) == (MODEL, "model")
    assert model.max_model_len == 65536 and model.attention["type"] == "dual_chunk"
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_chat_is_what_the_engine_says(client, llm):
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=24, temperature=0
    )
    (expected,) = llm.chat(MESSAGES, SamplingParams(max_tokens=24, temperature=0))
    (choice,) = answer.choices
    assert choice.message.content == expected.outputs[0].text != ""
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert answer.usage.prompt_tokens == len(expected.prompt_token_ids)
    assert answer.usage.completion_tokens == 24
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 24


def test_chat_streams_the_same(client):
    options = dict(model=MODEL, messages=MESSAGES, max_tokens=24, seed=7, temperature=1.2)
    whole = client.chat.completions.create(**options)
    chunks = list(
        client.chat.completions.create(
            **options, stream=True, stream_options={"include_usage": True}
        )
    )
    deltas = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert deltas[0].delta.role == "assistant"
    text = "".join(d.delta.content or "" for d in deltas)
    assert text == whole.choices[0].message.content
    reasons = [d.finish_reason for d in deltas if d.finish_reason]
    assert reasons == [whole.choices[0].finish_reason]
    assert chunks[-1].choices == [] and chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_messages_in_parts_and_the_developer_role(client):
    def ids(messages):
        return client.post("/../tokenize", body={"messages": messages}, cast_to=object)["tokens"]

    parts = [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "more."}]
    assert ids([{"role": "user", "content": parts}]) == ids(
        [{"role": "user", "content": "Tell me more."}]
    )
    assert ids([{"role": "developer", "content": "x"}]) == ids([{"role": "system", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match="messages"):
        client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        )


def test_samples_differ_and_a_seed_repeats_them(client):
    options = dict(model=MODEL, messages=MESSAGES, max_tokens=16, temperature=1.5, n=4)
    first = client.chat.completions.create(**options, seed=1)
    second = client.chat.completions.create(**options, seed=1)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2, 3]
    assert len(set(texts)) > 1
    assert texts == [choice.message.content for choice in second.choices]
    assert first.usage.completion_tokens == 64
    stream = client.chat.completions.create(**options, seed=1, stream=True)
    streamed = [""] * 4
    for chunk in stream:
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_a_stop_string_ends_the_text_before_it(client, llm):
    free = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=40))
    text = free[0].outputs[0].text
    stop = text[10:13]
    answer = client.completions.create(
        model=MODEL, prompt="Once upon a time", temperature=0, max_tokens=40, stop=[stop, "@@"]
    )
    (choice,) = answer.choices
    assert choice.text == text[: text.index(stop)] and choice.finish_reason == "stop"
    shown = client.completions.create(
        model=MODEL, prompt="Once upon a time", temperature=0, max_tokens=40, stop=stop,
        extra_body={"include_stop_str_in_output": True},
    )  # fmt: skip
    assert shown.choices[0].text == text[: text.index(stop)] + stop


def test_chat_logprobs(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == 8
    assert "".join(entry.token for entry in content) == answer.choices[0].message.content
    for entry in content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == max(top.logprob for top in entry.top_logprobs) < 0
        assert bytes(entry.bytes).decode() == entry.token
        assert sum(math.exp(top.logprob) for top in entry.top_logprobs) < 1 + 1e-6
    chunks = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0, logprobs=True, top_logprobs=3,
        stream=True,
    )  # fmt: skip
    streamed = [
        entry
        for chunk in chunks
        if chunk.choices and chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == content


def test_echo_scores_the_prompt(client, llm):
    """What evaluation harnesses ask for: no new text, log probabilities of the prompt."""
    tokens = llm.get_tokenizer().encode("The magic number")
    answer = client.completions.create(
        model=MODEL, prompt=tokens, max_tokens=0, echo=True, logprobs=2, temperature=0
    )
    (choice,) = answer.choices
    assert choice.text == "The magic number"
    assert answer.usage.completion_tokens == 0
    (expected,) = llm.generate(
        {"prompt_token_ids": tokens},
        SamplingParams(prompt_logprobs=2, max_tokens=1, temperature=0),
    )
    assert choice.logprobs.token_logprobs[0] is None
    for token, value, row in zip(
        tokens[1:], choice.logprobs.token_logprobs[1:], expected.prompt_logprobs[1:], strict=True
    ):
        assert value == pytest.approx(row[token].logprob, abs=1e-5)
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset == list(range(len(tokens)))
    more = client.completions.create(
        model=MODEL, prompt=tokens, max_tokens=3, echo=True, logprobs=2, temperature=0
    ).choices[0]
    assert more.logprobs.token_logprobs[: len(tokens)] == choice.logprobs.token_logprobs
    assert len(more.logprobs.tokens) == len(tokens) + 3
    assert "".join(more.logprobs.tokens) == more.text
    assert more.logprobs.text_offset == [
        len("".join(more.logprobs.tokens[:i])) for i in range(len(tokens) + 3)
    ]


def test_several_prompts_of_text_and_of_tokens(client, llm):
    texts = ["The river ", "A house of ", "In the morning "]
    tokens = [llm.get_tokenizer().encode(text) for text in texts]
    options = dict(model=MODEL, max_tokens=6, temperature=0)
    by_text = client.completions.create(prompt=texts, **options)
    by_tokens = client.completions.create(prompt=tokens, **options)
    alone = [client.completions.create(prompt=text, **options).choices[0].text for text in texts]
    assert [choice.text for choice in by_text.choices] == alone
    assert [choice.text for choice in by_tokens.choices] == alone
    assert [choice.index for choice in by_text.choices] == [0, 1, 2]
    streamed = [""] * 3
    for chunk in client.completions.create(prompt=texts, stream=True, **options):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == alone


def test_penalties_bias_and_extra_parameters_reach_the_sampler(client):
    plain = dict(model=MODEL, prompt="aaaa", max_tokens=12, temperature=0)
    base = client.completions.create(**plain).choices[0].text
    biased = client.completions.create(**plain, logit_bias={"66": 100}).choices[0].text
    assert biased == "B" * 12 != base
    two = {"66": 100, "67": 100}
    free = client.completions.create(**plain, logit_bias=two, frequency_penalty=0)
    penalised = client.completions.create(**plain, logit_bias=two, frequency_penalty=2)
    assert len(set(free.choices[0].text)) == 1
    assert set(penalised.choices[0].text) == {"B", "C"}
    one = client.completions.create(
        **{**plain, "temperature": 2.0}, extra_body={"top_k": 1}
    )  # the likeliest only
    assert one.choices[0].text == base
    ended = client.completions.create(**plain, extra_body={"stop_token_ids": [ord(base[0])]})
    assert ended.choices[0].text == "" and ended.choices[0].finish_reason == "stop"


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "size": {"type": "integer", "minimum": 1, "maximum": 99},
        "kind": {"enum": ["old", "new"]},
    },
    "required": ["city", "size", "kind"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("stream", [False, True])
def test_structured_output_follows_the_schema(client, stream):
    options = dict(
        model=MODEL, messages=MESSAGES, max_tokens=400, temperature=1.0, seed=3, n=3,
        response_format={"type": "json_schema",
                         "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}},
    )  # fmt: skip
    if stream:
        texts, reasons = [""] * 3, [None] * 3
        for chunk in client.chat.completions.create(**options, stream=True):
            choice = chunk.choices[0]
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    else:
        choices = client.chat.completions.create(**options).choices
        texts = [choice.message.content for choice in choices]
        reasons = [choice.finish_reason for choice in choices]
    assert reasons == ["stop"] * 3
    for text in texts:
        value = json.loads(text)
        assert set(value) == {"city", "size", "kind"} and value["kind"] in ("old", "new")
        assert 1 <= value["size"] <= 99 and len(value["city"]) <= 12


def test_json_object_and_a_schema_that_is_none(client):
    answer = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=30, temperature=1, seed=1,
        response_format={"type": "json_object"},
    )  # fmt: skip
    assert answer.choices[0].message.content.lstrip().startswith("{")
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(
            model=MODEL, messages=MESSAGES,
            response_format={"type": "json_schema",
                             "json_schema": {"name": "x", "schema": {"type": "strin"}}},
        )  # fmt: skip


def test_tokenize_and_back(server, llm):
    tokenizer = llm.get_tokenizer()
    reply = server.post("/tokenize", {"prompt": "Füße und 日本", "return_token_strs": True})
    assert reply["tokens"] == tokenizer.encode("Füße und 日本")
    assert reply["count"] == len(reply["tokens"]) == len(reply["token_strs"])
    assert reply["max_model_len"] == 65536
    assert server.post("/detokenize", {"tokens": reply["tokens"]}) == {"prompt": "Füße und 日本"}
    chat = server.post("/tokenize", {"messages": MESSAGES})["tokens"]
    assert chat == tokenizer.encode(tokenizer.apply_chat_template(MESSAGES))


# --- errors ---------------------------------------------------------------------------------------


def test_too_long_is_refused_with_both_numbers(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x" * 70000, max_tokens=4)
    assert caught.value.code == "context_length_exceeded"
    assert "65536" in str(caught.value) and "70000" in str(caught.value)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="x" * 100, max_tokens=65500)
    assert all(number in str(caught.value) for number in ("65536", "100", "65500"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": -1}, ["temperature", "-1"]),
        ({"top_p": 0}, ["top_p"]),
        ({"n": 0}, ["n", "0"]),
        ({"n": 4000}, ["n", "128", "4000"]),
        ({"max_tokens": 0}, ["max_tokens", "0"]),
        ({"stop": ["a", ""]}, ["stop"]),
        ({"logit_bias": {"x": 1}}, ["logit_bias", "'x'"]),
        ({"logit_bias": {"99999": 1}}, ["logit_bias", "99999"]),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, ["tools"]),
        ({"extra_body": {"tempature": 1}}, ["tempature", "unknown"]),
        ({"extra_body": {"session": "nowhere"}}, ["nowhere"]),
        ({"messages": []}, ["messages"]),
        ({"top_logprobs": 2}, ["top_logprobs"]),
        ({"extra_body": {"min_tokens": 3}, "response_format": {"type": "json_object"}},
         ["min_tokens"]),
    ],
    ids=str,
)  # fmt: skip
def test_a_bad_request_names_what_is_wrong(client, change, words):
    options = dict(model=MODEL, messages=MESSAGES, max_tokens=4) | change
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(**options)
    assert caught.value.status_code in (400, 404)
    assert caught.value.body["type"] in ("invalid_request_error", "not_found_error")
    for word in words:
        assert word in caught.value.body["message"], caught.value.body


def test_too_many_samples_of_many_prompts(client):
    with pytest.raises(openai.BadRequestError, match="n: .*1024.* 100 prompts times 11"):
        client.completions.create(model=MODEL, prompt=["x"] * 100, n=11)


def test_another_model_and_another_path(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=MESSAGES)
    assert caught.value.code == "model_not_found" and "demo_model" in str(caught.value)
    with pytest.raises(openai.NotFoundError, match="embeddings"):
        client.embeddings.create(model=MODEL, input="x")
