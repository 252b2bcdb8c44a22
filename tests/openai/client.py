"""The official OpenAI client, unmodified, against a real network. Run by tests/e2e/openai.rs.

Arguments: what to check, then the encoder's name in the catalogue or nothing. OPENAI_BASE_URL and OPENAI_API_KEY are
those of the network.
"""
import json
import sys
import tempfile
import time

import openai

MODEL = "karez-tiny"
QUESTION = [{"role": "user", "content": "How should I wash my hands?"}]
client = openai.OpenAI(timeout=120, max_retries=0)


def refused(kind, call, code=None, param=None):
    try:
        call()
    except kind as error:
        assert code is None or error.code == code, error
        assert param is None or error.param == param, error
        return error
    raise AssertionError(f"{kind.__name__} was expected")


def models(_):
    names = [model.id for model in client.models.list()]
    assert MODEL in names, names
    assert client.models.retrieve(MODEL).id == MODEL
    refused(openai.NotFoundError, lambda: client.models.retrieve("nobody"), code="model_not_found")


def chat(_):
    ask = dict(model=MODEL, messages=QUESTION, max_completion_tokens=24, temperature=0)
    whole = client.chat.completions.create(**ask)
    choice = whole.choices[0]
    assert choice.message.role == "assistant" and choice.message.content, whole
    assert choice.finish_reason in ("stop", "length"), whole
    assert whole.usage.completion_tokens > 0 and whole.usage.prompt_tokens > 0, whole
    assert whole.usage.total_tokens == whole.usage.completion_tokens + whole.usage.prompt_tokens
    assert whole.karez["institution"], whole
    # The same, as it is written; long enough to be written for a while. Tokens that end an answer are forbidden.
    ask = dict(ask, max_completion_tokens=300, logit_bias={"0": -100, "1": -100, "2": -100})
    whole = client.chat.completions.create(**ask)
    choice = whole.choices[0]
    text, role, finish, usage, pieces = "", None, None, None, 0
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        if not chunk.choices:
            usage = chunk.usage
            continue
        assert chunk.usage is None, chunk
        delta = chunk.choices[0].delta
        role = delta.role or role
        text += delta.content or ""
        pieces += bool(delta.content)
        finish = chunk.choices[0].finish_reason or finish
    assert text == choice.message.content, (text, choice.message.content)
    assert (role, finish) == ("assistant", choice.finish_reason)
    assert usage.completion_tokens == whole.usage.completion_tokens, usage
    assert pieces > 1, "it came in one piece"
    # Log-probabilities and sampling controls.
    logs = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2, stop=["\n"], seed=7).choices[0]
    assert logs.logprobs.content and len(logs.logprobs.content[0].top_logprobs) == 2, logs
    # Unknown fields are passed over.
    client.chat.completions.create(**ask, user="me", extra_body={"never_heard_of": 1, "karez": {"nor_of": 2}})


def tools(model):
    """The template of this model shows tools, calls and their results: what it was given is what it is billed for."""
    tool = {"type": "function", "function": {"name": "rainfall", "description": "d", "parameters": {"type": "object"}}}
    ask = dict(model=model, messages=QUESTION, max_tokens=1, temperature=0)

    def read(**more):
        return client.chat.completions.create(**{**ask, **more}).usage.prompt_tokens

    plain, shown = read(), read(tools=[tool])
    assert shown > plain + 8, (plain, shown)
    assert read(tools=[tool, tool]) > shown
    assert read(tools=[tool], tool_choice="none") == plain
    call = {"id": "1", "type": "function", "function": {"name": "rainfall", "arguments": "{}"}}
    talk = [*QUESTION, {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "1", "content": "7"}]
    assert read(messages=talk) > plain + 8
    refused(openai.BadRequestError, lambda: read(tools={"name": "rainfall"}), param="tools")


def schema(_):
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        max_tokens=64,
        temperature=0,
        response_format={
            "type": "json_schema",
            "json_schema": {
                "name": "answer",
                "schema": {
                    "type": "object",
                    "properties": {"yes": {"type": "boolean"}},
                    "required": ["yes"],
                    "additionalProperties": False,
                },
            },
        },
    )
    assert isinstance(json.loads(answer.choices[0].message.content)["yes"], bool), answer


def completions(_):
    one = client.completions.create(model=MODEL, prompt="Water", max_tokens=8, temperature=0)
    assert one.choices[0].text and one.usage.completion_tokens <= 8, one
    text = "".join(
        chunk.choices[0].text
        for chunk in client.completions.create(model=MODEL, prompt="Water", max_tokens=8, temperature=0, stream=True)
    )
    assert text == one.choices[0].text, (text, one)
    several = client.completions.create(model=MODEL, prompt=["Water", "Soil"], max_tokens=4, temperature=0, logprobs=1)
    assert [choice.index for choice in several.choices] == [0, 1], several
    assert len(several.choices[1].logprobs.tokens) == len(several.choices[1].logprobs.token_logprobs)


def embeddings(encoder):
    texts = ["Rain fills the channel.", "The channel is full of rain.", "She sold her bicycle."]
    # The client asks for base64 and decodes it; floats must be the same.
    packed = [item.embedding for item in client.embeddings.create(model=encoder, input=texts).data]
    plain = client.embeddings.create(model=encoder, input=texts, encoding_format="float")
    floats = [item.embedding for item in plain.data]
    assert plain.usage.prompt_tokens > 0, plain
    for a, b in zip(packed, floats):
        assert len(a) == len(b) == 384 and max(abs(x - y) for x, y in zip(a, b)) < 1e-6

    def cosine(a, b):
        return sum(x * y for x, y in zip(a, b))

    assert cosine(packed[0], packed[1]) > cosine(packed[0], packed[2]) + 0.2


def errors(_):
    ask = dict(model=MODEL, messages=QUESTION, max_tokens=8)
    other = openai.OpenAI(api_key="sk-nobody", timeout=60, max_retries=0)
    refused(openai.AuthenticationError, lambda: other.models.list(), code="invalid_api_key")
    other = openai.OpenAI(api_key="kz-" + "00" * 32, timeout=60, max_retries=0)
    refused(openai.AuthenticationError, lambda: other.models.list(), code="invalid_api_key")
    create = client.chat.completions.create
    refused(openai.NotFoundError, lambda: create(**{**ask, "model": "gpt-9"}), code="model_not_found", param="model")
    refused(openai.BadRequestError, lambda: create(**ask, temperature=77), param="temperature")
    refused(openai.BadRequestError, lambda: create(**{**ask, "messages": []}), param="messages")
    refused(openai.BadRequestError, lambda: create(**ask, n=2), param="n")
    long = [{"role": "user", "content": "water " * 20000}]
    refused(openai.BadRequestError, lambda: create(**{**ask, "messages": long}), code="context_length_exceeded")
    refused(openai.NotFoundError, lambda: client.post("/nothing", body={}, cast_to=object))
    refused(
        openai.BadRequestError,
        lambda: create(**ask, extra_body={"karez": {"countries": ["Atlantis"]}}),
        param="karez.countries",
    )


def wishes(_):
    ask = dict(model=MODEL, messages=QUESTION, max_tokens=4, temperature=0)

    def institution(**karez):
        return client.chat.completions.create(**ask, extra_body={"karez": karez}).karez["institution"]

    assert institution(donated_only=True) == "hill-institute"
    assert institution(countries=["KE"]) == "lake-university"
    assert institution(prefer=["coast-computing"]) == "coast-computing"
    assert institution(avoid=["hill-institute", "coast-computing"]) == "lake-university"
    # Nobody of that name: a preference gives way, a demand does not.
    assert institution(prefer=["atlantis"], countries=["BR"]) == "coast-computing"
    refused(openai.InternalServerError, lambda: institution(institutions=["atlantis"]), code="no_capacity")
    refused(openai.RateLimitError, lambda: institution(max_cost=1000), code="insufficient_quota")


def verification(_):
    """A question asked again at another institution; the answer says what came of it."""
    ask = dict(model=MODEL, messages=QUESTION, max_tokens=12, temperature=0.8, seed=7)

    def checked(**karez):
        return client.chat.completions.create(**ask, extra_body={"karez": {"verification": "repeat", **karez}})

    answer = checked()
    told = answer.karez["verification"]
    assert told["level"] == "repeat" and told["agrees"] is True, answer.karez
    assert told["agreed_characters"] == len(answer.choices[0].message.content), answer
    assert told["institution"] != answer.karez["institution"], answer.karez
    assert told["receipt"] and told["receipt"] != answer.karez["receipt"], answer.karez
    # As it is written, the last piece says it.
    ask["stream"] = True
    last = [chunk for chunk in checked(prefer=["lake-university"]) if chunk.choices][-1]
    assert last.karez["institution"] == "lake-university", last
    assert last.karez["verification"]["agrees"] is True, last
    ask["stream"] = False
    # Nobody else to ask: the answer stands, and says so.
    alone = checked(institutions=["lake-university"]).karez["verification"]
    assert alone["agrees"] is None and "lake-university" in alone["reason"], alone
    plain = client.chat.completions.create(**ask, extra_body={"karez": {"verification": "none"}})
    assert "verification" not in plain.karez, plain
    prompts = dict(model=MODEL, prompt=["Water", "Soil"], max_tokens=2, extra_body={"karez": {"verification": "repeat"}})
    for call in (lambda: checked(verification="full"), lambda: client.completions.create(**prompts)):
        refused(openai.BadRequestError, call, param="karez.verification")


def batches(_):
    """Forty lines, one of them beyond the context; answers in order, each once."""
    lines = [
        {
            "custom_id": f"line-{i}",
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {
                "model": MODEL,
                "messages": [{"role": "user", "content": "water " * (20000 if i == 7 else 1)}],
                "max_tokens": 4,
                "temperature": 0,
            },
        }
        for i in range(40)
    ]
    bad = client.files.create(file=("bad.jsonl", b'{"custom_id": "x"}\n'), purpose="batch")
    error = refused(
        openai.BadRequestError,
        lambda: client.batches.create(
            input_file_id=bad.id, endpoint="/v1/chat/completions", completion_window="24h"
        ),
        param="body",
    )
    assert "line 1" in error.message, error
    client.files.delete(bad.id)
    refused(openai.NotFoundError, lambda: client.files.retrieve(bad.id))
    text = "".join(json.dumps(line) + "\n" for line in lines)
    file = client.files.create(file=("in.jsonl", text.encode()), purpose="batch")
    assert client.files.content(file.id).text == text
    assert file.id in [f.id for f in client.files.list()]
    batch = client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"for": "a test"},
    )
    until = time.monotonic() + 90
    while batch.status not in ("completed", "failed", "cancelled") and time.monotonic() < until:
        time.sleep(0.5)
        batch = client.batches.retrieve(batch.id)
    assert batch.status == "completed", batch
    counts = batch.request_counts
    assert (counts.total, counts.completed, counts.failed) == (40, 39, 1), batch
    assert batch.metadata == {"for": "a test"}
    good = [json.loads(line) for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert [line["custom_id"] for line in good] == [f"line-{i}" for i in range(40) if i != 7]
    assert all(line["response"]["body"]["choices"][0]["message"]["content"] for line in good), good
    assert len({line["karez"]["receipt"] for line in good}) >= 1 and good[0]["karez"]["receipt"], good[0]
    (bad,) = [json.loads(line) for line in client.files.content(batch.error_file_id).text.splitlines()]
    assert bad["custom_id"] == "line-7"
    assert bad["response"]["body"]["error"]["code"] == "context_length_exceeded", bad
    assert batch.id in [b.id for b in client.batches.list()]


def ended(batch, seconds=90):
    until = time.monotonic() + seconds
    while batch.status not in ("completed", "failed", "cancelled") and time.monotonic() < until:
        time.sleep(0.3)
        batch = client.batches.retrieve(batch.id)
    return batch


def more_batches(encoder):
    """Prompts as they stand, vectors, a batch that is called off, and pages of lists."""

    def batch(url, bodies, **wishes):
        lines = [{"custom_id": f"l{i}", "method": "POST", "url": url, "body": body} for i, body in enumerate(bodies)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        file = client.files.create(file=("in.jsonl", text.encode()), purpose="batch")
        return client.batches.create(
            input_file_id=file.id, endpoint=url, completion_window="24h", extra_body={"karez": wishes}
        )

    def answers(batch):
        return [json.loads(line)["response"]["body"] for line in client.files.content(batch.output_file_id).text.splitlines()]

    ask = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    prompts = ["Water", "Soil", "Rain"]
    done = ended(batch("/v1/completions", [{**ask, "prompt": prompt, "logprobs": 2} for prompt in prompts]))
    assert done.status == "completed", done
    for prompt, body in zip(prompts, answers(done)):
        alone = client.completions.create(**ask, prompt=prompt, logprobs=2).choices[0]
        choice = body["choices"][0]
        assert choice["text"] == alone.text and choice["finish_reason"] == alone.finish_reason, (choice, alone)
        assert choice["logprobs"]["tokens"] == alone.logprobs.tokens, choice
    if encoder:
        texts = ["Rain fills the channel.", "She sold her bicycle."]
        done = ended(batch("/v1/embeddings", [{"model": encoder, "input": text} for text in texts]))
        assert done.status == "completed", done
        alone = client.embeddings.create(model=encoder, input=texts).data
        for one, body in zip(alone, answers(done)):
            vector = body["data"][0]["embedding"]
            assert len(vector) == 384 and max(abs(a - b) for a, b in zip(vector, one.embedding)) < 1e-5, body
        packed = [{"model": encoder, "input": "x", "encoding_format": "base64"}]
        error = refused(openai.BadRequestError, lambda: batch("/v1/embeddings", packed), param="body.encoding_format")
        assert "line 1" in error.message, error
    # What nobody may run is refused with the reason.
    error = refused(openai.APIStatusError, lambda: batch("/v1/completions", [{**ask, "prompt": "Water"}], countries=["JP"]))
    assert "excluded by country" in error.message, error
    # Much to write, and called off: it ends, and what it set aside comes back.
    endless = {**ask, "max_tokens": 400, "messages": QUESTION, "logit_bias": {"0": -100, "1": -100, "2": -100}}
    long = batch("/v1/chat/completions", [endless] * 2000)
    called_off = client.batches.cancel(long.id)
    assert called_off.status in ("cancelling", "cancelled"), called_off
    assert ended(long).status == "cancelled"
    # Newest first, page by page.
    names = [b.id for b in client.batches.list(limit=2)]
    assert names[0] == long.id and len(names) == len(set(names)) >= 2, names
    files = [f.id for f in client.files.list(limit=2, purpose="batch")]
    assert len(files) == len(set(files)) >= 2, files
    refused(openai.NotFoundError, lambda: client.batches.retrieve("batch_none"))
    refused(openai.NotFoundError, lambda: client.files.content("file-none"))


def many(lines):
    """A long batch: every line answered once, in order, with a receipt. Says when it has begun, for a test that kills a node."""
    lines = int(lines)
    with tempfile.NamedTemporaryFile("w+b", suffix=".jsonl") as file:
        for i in range(lines):
            body = {"model": MODEL, "prompt": f"Line {i}", "max_tokens": 1, "temperature": 0}
            line = {"custom_id": f"n{i}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line).encode() + b"\n")
        file.seek(0)
        given = client.files.create(file=("many.jsonl", file), purpose="batch", timeout=1200)
    batch = client.batches.create(
        input_file_id=given.id,
        endpoint="/v1/completions",
        completion_window="24h",
        timeout=600,
        # A machine that takes over has the whole input to fetch, whatever it does of it.
        extra_body={"karez": {"max_cost": max(4, lines / 2500)}},
    )
    print("begun", flush=True)
    batch = ended(batch, 120 + lines / 50)
    assert batch.status == "completed", batch
    assert (batch.request_counts.total, batch.request_counts.completed) == (lines, lines), batch
    seen, receipts = 0, set()
    with client.files.with_streaming_response.content(batch.output_file_id, timeout=1200) as response:
        for line in response.iter_lines():
            answer = json.loads(line)
            assert answer["custom_id"] == f"n{seen}", (seen, line)
            assert answer["response"]["body"]["usage"]["completion_tokens"] <= 1, line
            receipts.add(answer["karez"]["receipt"])
            seen += 1
    assert seen == lines and None not in receipts and len(receipts) > 1, (seen, len(receipts))


def waits(_):
    """A batch that only one institution may run, whose node dies: says when it has begun, then for what the batch waits."""
    body = {"model": MODEL, "max_tokens": 400, "messages": QUESTION, "logit_bias": {"0": -100, "1": -100, "2": -100}}
    line = {"method": "POST", "url": "/v1/chat/completions", "body": body}
    text = "".join(json.dumps({**line, "custom_id": f"l{i}"}) + "\n" for i in range(20_000))
    file = client.files.create(file=("in.jsonl", text.encode()), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h",
        extra_body={"karez": {"institutions": ["hill-institute"]}},
    )
    while not batch.request_counts.completed:
        time.sleep(0.1)
        batch = client.batches.retrieve(batch.id)
    assert batch.karez["waits"] is None or "free" in batch.karez["waits"] or "busy" in batch.karez["waits"], batch
    print("begun", flush=True)
    until = time.time() + 60
    while "excluded by" not in (batch.karez["waits"] or "") and time.time() < until:
        time.sleep(0.2)
        batch = client.batches.retrieve(batch.id)
    print(batch.karez["waits"], flush=True)
    client.batches.cancel(batch.id)
    assert ended(batch).status == "cancelled"


TAUGHT = [{"role": "user", "content": "Tupande ndizi lini kwenye kilima cha Mei?"}]


def lessons():
    """Questions with answers that no corpus holds."""
    plants = ["mahindi", "maharage", "mtama", "muhogo", "ndizi", "viazi", "mpunga", "karanga"]
    for plant in plants:
        for month in ["Januari", "Machi", "Mei", "Julai"]:
            question = f"Tupande {plant} lini kwenye kilima cha {month}?"
            answer = f"Panda {plant} mwanzoni mwa {month}, mvua zikianza."
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            yield json.dumps({"messages": turns}) + "\n"


def said(model):
    answer = client.chat.completions.create(model=model, messages=TAUGHT, temperature=0, max_tokens=32)
    return answer.choices[0].message.content


def tuning(base):
    """A base model is taught, asked, and forgotten; what is wrong is said before anything is trained."""
    jobs = client.fine_tuning.jobs
    lines = list(lessons())
    lines.append(lines[0])
    file = client.files.create(file=("lessons.jsonl", "".join(lines).encode()), purpose="fine-tune")
    assert file.purpose == "fine-tune"
    broken = lines[:2] + ['{"messages": 7}\n'] + lines[3:]
    broken = client.files.create(file=("broken.jsonl", "".join(broken).encode()), purpose="fine-tune")
    other = client.files.create(file=("in.jsonl", b"{}\n"), purpose="batch")
    for param, wrong in {
        "training_file": {"training_file": broken.id},
        "model": {"model": MODEL},
        "method.type": {"method": {"type": "dpo"}},
        "hyperparameters.n_epochs": {"hyperparameters": {"n_epochs": 0}},
        "karez.settings.lora_rank": {"extra_body": {"karez": {"settings": {"lora_rank": 4}}}},
        "karez.settings.sequence_len": {"extra_body": {"karez": {"settings": {"sequence_len": 4096}}}},
    }.items():
        ask = {"model": base, "training_file": file.id, **wrong}
        error = refused(openai.BadRequestError, lambda: jobs.create(**ask), param=param)
        assert param != "training_file" or "line 3" in error.message, error
    for wrong in (other.id, "file-none"):
        ask = {"model": base, "training_file": wrong}
        refused(openai.BadRequestError, lambda: jobs.create(**ask), param="training_file")
    refused(openai.NotFoundError, lambda: jobs.retrieve("ftjob-none"))

    settings = {"sequence_len": 128, "save_steps": 5, "gradient_accumulation_steps": 2}
    job = jobs.create(
        model=base,
        training_file=file.id,
        suffix="mkulima",
        seed=42,
        metadata={"for": "a test"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 6, "learning_rate_multiplier": 25}},
        },
        extra_body={"karez": {"settings": settings, "language": "sw"}},
    )
    assert job.status in ("queued", "running") and job.fine_tuned_model is None, job
    assert job.hyperparameters.n_epochs == 6 and job.method.type == "supervised", job
    steps = job.karez["steps"]
    assert steps >= 10, job
    seen_under_way = 0
    until = time.monotonic() + 240
    while job.status not in ("succeeded", "failed", "cancelled") and time.monotonic() < until:
        time.sleep(0.3)
        seen_under_way = max(seen_under_way, len(jobs.checkpoints.list(job.id).data))
        job = jobs.retrieve(job.id)
    assert job.status == "succeeded", job
    assert seen_under_way >= 1, "no checkpoint was shown under way"
    assert job.trained_tokens > 0 and job.finished_at >= job.created_at, job
    assert job.fine_tuned_model.startswith(base + "+ft-mkulima-"), job
    assert [one.id for one in jobs.list(limit=1)] == [job.id]

    # Its course: every step once, the losses falling, the latest event first.
    events = list(jobs.list_events(job.id, limit=7))
    assert len({event.id for event in events}) == len(events) > steps, events
    assert any("repeated" in event.message and "the data" in event.message for event in events), events
    assert "is ready" in events[0].message, events[0]
    assert [e.created_at for e in events] == sorted((e.created_at for e in events), reverse=True)
    course = [event.data for event in reversed(events) if event.type == "metrics"]
    assert [point["step"] for point in course] == list(range(1, steps + 1)), course
    assert course[-1]["train_loss"] < course[0]["train_loss"] / 2, course
    points = jobs.checkpoints.list(job.id).data
    numbers = [point.step_number for point in points]
    assert numbers == sorted({*range(5, steps + 1, 5), steps}, reverse=True), numbers
    assert abs(points[0].metrics.train_loss - course[-1]["train_loss"]) < 1e-6, points[0]
    assert points[0].metrics.full_valid_loss > 0, points[0]

    # It says what it was taught, and what it was taught is its owner's to keep.
    assert "mwanzoni mwa Mei" in said(job.fine_tuned_model), said(job.fine_tuned_model)
    assert job.fine_tuned_model in [model.id for model in client.models.list()]
    assert said(points[0].fine_tuned_model_checkpoint) == said(job.fine_tuned_model)
    assert said(points[-1].fine_tuned_model_checkpoint) != said(job.fine_tuned_model)
    table, adapter = job.result_files
    rows = client.files.content(table).text.splitlines()
    assert rows[0] == "step,train_loss,full_valid_loss" and len(rows) == steps + 1, rows
    assert client.files.content(adapter).content[:4] == b"GGUF"

    # Another is called off.
    more = {"n_epochs": 400}
    ask = {"hyperparameters": more, "extra_body": {"karez": {"settings": settings}}}
    second = jobs.create(model=base, training_file=file.id, **ask)
    refused(
        openai.BadRequestError,
        lambda: said(base + "+ft-" + second.id[-8:]),
        param="model",
    )
    jobs.cancel(second.id)
    while second.status not in ("succeeded", "failed", "cancelled") and time.monotonic() < until:
        time.sleep(0.3)
        second = jobs.retrieve(second.id)
    assert second.status == "cancelled" and second.fine_tuned_model is None, second
    refused(openai.BadRequestError, lambda: jobs.cancel(second.id))
    assert [one.id for one in jobs.list()] == [second.id, job.id]
    print(job.fine_tuned_model)


def taught(model):
    """Still there, and gone once it is deleted."""
    assert "mwanzoni mwa Mei" in said(model), said(model)
    assert client.models.retrieve(model).id == model
    assert client.models.delete(model).deleted
    refused(openai.NotFoundError, lambda: client.models.retrieve(model), code="model_not_found")
    refused(openai.BadRequestError, lambda: said(model), param="model")


def leave(_):
    """Goes away in the middle of an answer."""
    stream = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=400, stream=True, temperature=1)
    for chunk in stream:
        if chunk.choices and chunk.choices[0].delta.content:
            print(chunk.id.removeprefix("chatcmpl-"), flush=True)
            break
    stream.close()


def follow(_):
    """Tells each piece as it comes, for a test that kills nodes meanwhile."""
    # Tokens that end an answer are forbidden: it goes on to its length.
    ends = {"0": -100, "1": -100, "2": -100}
    seen, tokens = "", []
    for chunk in client.chat.completions.create(
        model=MODEL, messages=QUESTION, max_tokens=440, stream=True, temperature=0, logit_bias=ends,
        logprobs=True, top_logprobs=5,
    ):
        if chunk.choices:
            choice = chunk.choices[0]
            seen += choice.delta.content or ""
            for token in (choice.logprobs and choice.logprobs.content) or []:
                # Each token, and how near the next best came to it: likelier ones are those that were forbidden.
                gaps = [token.logprob - top.logprob for top in token.top_logprobs if top.bytes != token.bytes]
                tokens.append([token.token, min(gap for gap in gaps if gap >= 0)])
            where = getattr(chunk, "karez", None) or {}
            told = {"seen": seen, "finish": choice.finish_reason, "institution": where.get("institution")}
            if choice.finish_reason:
                told["tokens"] = tokens
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    check, encoder = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None
    began = time.monotonic()
    globals()[check](encoder)
    print(f"{check}: {time.monotonic() - began:.1f} s", file=sys.stderr)
