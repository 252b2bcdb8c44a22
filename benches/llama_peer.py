"""llama.cpp through llama-cpp-python, as a peer: reads [text, tokens, forbidden] a line, tells how long reading and writing took;
a list of texts is written in parallel, as llama.cpp does it: a sequence for each, all in one step.

    llama_peer.py MODEL.gguf THREADS CONTEXT
"""
import json
import sys
import time

import llama_cpp
import numpy

model, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
llama = llama_cpp.Llama(model, n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)
tell = lambda said: print(json.dumps(said), flush=True)
tell({"llama_cpp_python": llama_cpp.__version__, "system": llama_cpp.llama_print_system_info().decode()})


def likeliest(forbidden, context=None, at=-1):
    scores = llama_cpp.llama_get_logits_ith(context or llama.ctx, at)
    scores = numpy.ctypeslib.as_array(scores, shape=(llama.n_vocab(),))
    scores[forbidden] -= 100
    return int(numpy.argmax(scores))


def shared(texts):
    """A context for so many sequences, and a batch to fill."""
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.n_batch, params.n_ubatch = 256 * len(texts), len(texts), 512, 512
    params.n_threads = params.n_threads_batch = threads
    return llama_cpp.llama_init_from_model(llama._model.model, params), llama_cpp.llama_batch_init(512, 0, 1)


def together(texts, tokens, forbidden):
    """Tokens per second of all texts together, their prompts read in the same time."""
    global many
    many = many or shared(texts)
    context, batch = many
    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)

    def step(rows):
        """Rows of (token, place, sequence, whether its scores are wanted)."""
        for i, (token, place, sequence, wanted) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, place, 1, wanted
            batch.seq_id[i][0] = sequence
        batch.n_tokens = len(rows)
        assert llama_cpp.llama_decode(context, batch) == 0

    began = time.perf_counter()
    last, place = {}, {}
    waiting = [(n, llama.tokenize(text.encode(), add_bos=True, special=True)) for n, text in enumerate(texts)]
    while waiting:
        rows, ends = [], []
        while waiting and len(rows) + len(waiting[0][1]) <= 512:
            n, given = waiting.pop(0)
            rows += [(token, at, n, at + 1 == len(given)) for at, token in enumerate(given)]
            ends.append((n, len(rows) - 1))
            place[n] = len(given)
        step(rows)
        for n, end in ends:
            last[n] = likeliest(forbidden, context, end)
    for _ in range(tokens - 1):
        step([(last[n], place[n], n, True) for n in last])
        for at, n in enumerate(last):
            last[n], place[n] = likeliest(forbidden, context, at), place[n] + 1
    return len(last) * tokens / (time.perf_counter() - began)


many = None
for line in sys.stdin:
    text, tokens, forbidden = json.loads(line)
    if isinstance(text, list):
        tell({"tokens_per_s": together(text, tokens, forbidden)})
        continue
    given = llama.tokenize(text.encode(), add_bos=True, special=True)
    llama.reset()
    began = time.perf_counter()
    llama.eval(given)
    token = likeliest(forbidden)
    read, wrote = time.perf_counter(), 1
    # A model may end its answer early, here as there.
    while wrote < tokens and not llama_cpp.llama_vocab_is_eog(llama._model.vocab, token):
        llama.eval([token])
        token = likeliest(forbidden)
        wrote += 1
    tell({"read_s": read - began, "write_s": time.perf_counter() - read, "read": len(given), "wrote": wrote})
