"""Answers through the whole network beside the worker alone: the same file, the same threads, taking turns.

    benches/serving.py KAREZ OUT.json [--lines 10000] [--trace azure_llm_conv.csv] [--requests 60]
                       [--large MODEL.gguf] [--python PYTHON]

KAREZ is the release binary. Everything runs on this machine and talks to loopback only: three nodes share its cores, which
is why three of them are no faster than one. Wants nothing but Python's own library. MODEL.gguf is a large model to measure
beside the shipped one; PYTHON has llama-cpp-python, whose llama.cpp is then the peer of the whole path. Figures are medians
unless they say otherwise; ratios are medians of neighbouring turns, and hold better than what they are made of.
"""
import argparse
import csv
import datetime
import http.client
import json
import os
import pathlib
import re
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time

QUESTION = "How should I wash my hands?"
MODEL = "karez-tiny"
NODE = "hill-institute"
MANY = 16
CONTEXT = 512
# A chunk that brings some words of an answer.
WORDS = re.compile(rb'"(?:text|content)":"[^"]')
# Tokens that end an answer are forbidden to all: every answer is as long as it was asked to be.
ENDS = [0, 1, 2]
# What the nodes of `karez up` lend here; the worker alone gets as many.
THREADS = 1


class Worker:
    """`karez worker`, spoken to in its own frames: a length in four bytes, then JSON."""

    def __init__(self, karez, model, threads):
        self.process = subprocess.Popen(
            [karez, "worker"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env={**os.environ, "GOMP_SPINCOUNT": "100"},
        )
        self.ids, self.waiting, self.lock = 0, {}, threading.Lock()
        load = {"type": "load", "model": str(model), "kind": "generate", "context_tokens": CONTEXT, "threads": threads,
                "sequences": MANY, "cache_tokens": CONTEXT * MANY, "memory_limit": None, "gpu_layers": 0}
        self.say(load)
        ready = self.hear()
        assert ready["type"] == "ready", ready
        self.engine = ready["engine"]
        threading.Thread(target=self.listen, daemon=True).start()

    def say(self, message):
        body = json.dumps(message).encode()
        with self.lock:
            self.process.stdin.write(struct.pack("<I", len(body)) + body)
            self.process.stdin.flush()

    def hear(self):
        header = self.process.stdout.read(4)
        return json.loads(self.process.stdout.read(struct.unpack("<I", header)[0])) if len(header) == 4 else None

    def listen(self):
        while (reply := self.hear()) is not None:
            run = self.waiting.get(reply.get("id"))
            if run is None:
                continue
            run["first"] = run["first"] or time.perf_counter()
            if reply["type"] in ("done", "failed"):
                run["reply"], run["last"] = reply, time.perf_counter()
                run["over"].set()

    def ask(self, text, tokens, raw=False):
        with self.lock:
            self.ids += 1
            name = self.ids
        run = self.waiting[name] = {"first": None, "over": threading.Event()}
        work = {"type": "generate", "prompt": {"type": "raw" if raw else "text", "text": text}, "max_tokens": tokens,
                "temperature": 0.0, "logit_bias": [[token, -100.0] for token in ENDS]}
        began = time.perf_counter()
        self.say({"type": "run", "id": name, "work": work})
        assert run["over"].wait(300)
        assert run["reply"]["type"] == "done", run["reply"]
        return began, run["first"], run["last"], run["reply"]["meters"]["tokens_out"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Network:
    """`karez up` with one node that takes sixteen questions at a time, and a key for its gateway."""

    def __init__(self, karez, home):
        self.karez, self.home = karez, pathlib.Path(home)
        self.run("up", "--json")
        key = json.loads(self.run("key", "new", "--name", "bench", "--budget", "50", "--json"))
        self.key, self.address = key["api_key"], key["base_url"].removeprefix("http://").split("/")[0]
        self.extra, self.reopened = [], False

    def run(self, *args):
        env = {**os.environ, "KAREZ_HOME": str(self.home), "NO_COLOR": "1"}
        said = subprocess.run([self.karez, *args], env=env, capture_output=True, text=True)
        assert said.returncode == 0, (args, said.stderr)
        return said.stdout

    def reopen(self, slots, threads=THREADS):
        """The node again, with so many slots and threads, and the memory for them."""
        for process in self.extra:
            process.kill()
            process.wait()
        self.extra = []
        folder = self.home / "up" / NODE
        settings = (folder / "node.toml").read_text()
        lines = [f"cpu_slots = {slots}\nmemory = \"16 GiB\"\nthreads = {threads}" if line.startswith("cpu_slots") else line
                 for line in settings.splitlines() if not line.startswith(("memory", "threads"))]
        (folder / "node.toml").write_text("\n".join(lines) + "\n")
        known = (self.home / "up" / "network.toml").read_text()
        for table in known.split("[[process]]")[1:]:
            if NODE in table and not self.reopened:
                pid = int(next(line for line in table.splitlines() if line.startswith("pid")).split("=")[1])
                os.kill(pid, 9)
        self.reopened = True
        env = {**os.environ, "KAREZ_HOME": str(self.home)}
        log = open(self.home / "bench.log", "ab")
        self.extra.append(subprocess.Popen([self.karez, "node", "run", "--dir", str(folder)], env=env, stdout=log, stderr=log))
        wanted = f"{slots}/{slots}" if slots > 1 else ""
        for _ in range(300):
            if NODE in (said := self.run("offers")) and wanted in said:
                return
            time.sleep(0.1)
        raise RuntimeError("the node did not come back")

    def ask(self, text, tokens, raw=False, model=MODEL):
        """Through the gateway, streamed: when it was asked, when the first and the last word came, how many."""
        body = {"model": model, "max_tokens": tokens, "temperature": 0, "stream": True,
                "stream_options": {"include_usage": True}, "karez": {"institutions": [NODE], "max_cost": 0.1},
                "logit_bias": {str(token): -100 for token in ENDS}}
        if raw:
            path, body["prompt"] = "/v1/completions", text
        else:
            path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": text}]
        link = http.client.HTTPConnection(self.address, timeout=300)
        link.connect()
        began, first, last, count = time.perf_counter(), None, None, 0
        link.request("POST", path, json.dumps(body),
                     {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"})
        answer = link.getresponse()
        assert answer.status == 200, answer.read()
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            # Whoever measures shares the cores with what is measured: only what has no words in it is taken apart.
            if WORDS.search(line):
                last = time.perf_counter()
                first = first or last
                continue
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            count = (chunk.get("usage") or {}).get("completion_tokens", count)
        link.close()
        over = time.perf_counter()
        return began, first or over, last or over, count

    def close(self):
        for process in self.extra:
            process.kill()
            process.wait()
        self.run("down")


class Peer:
    """llama.cpp itself, through llama-cpp-python in a process of its own."""

    def __init__(self, python, model, threads):
        script = pathlib.Path(__file__).with_name("llama_peer.py")
        self.process = subprocess.Popen([python, script, str(model), str(threads), str(CONTEXT)], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        self.about = self.hear()

    def hear(self):
        line = self.process.stdout.readline()
        assert line, "the peer came to nothing"
        return json.loads(line)

    def ask(self, text, tokens):
        """Seconds to read, seconds to write the rest, how many were read and written."""
        self.process.stdin.write(json.dumps([text, tokens, ENDS]) + "\n")
        self.process.stdin.flush()
        return self.hear()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def letters(length, which):
    """A text that begins like no other of this run, of so many single letters."""
    state, text = which * 7919 + 1, f"{which}."
    while len(text) < length:
        state = (state * 6364136223846793005 + 1442695040888963407) % 2**64
        text += chr(97 + (state >> 59) % 26)
    return text


def whole_path(karez, network, peer, path, name, prompt, decode, turns, threads):
    """Prompt and decode speed of one model: through gateway, scheduler, node and worker; of the worker alone; of the peer."""
    worker = Worker(karez, path, threads)
    kinds = {"through_the_network": lambda *ask: network.ask(*ask, raw=True, model=name),
             "worker_alone": lambda *ask: worker.ask(*ask, raw=True)}
    if peer:
        kinds["llama_cpp_python"] = peer.ask
    read = {kind: [] for kind in kinds}
    write = {kind: [] for kind in kinds}
    many = {kind: [] for kind in kinds}
    for turn in range(turns + 1):
        for at, (kind, ask) in enumerate(kinds.items()):
            # The same text for all, and new in each turn. The first turn warms up.
            one, two = letters(prompt, turn * 2), letters(16, turn * 2 + 1)
            if name == MODEL:
                two = f"<|im_start|>user\n{QUESTION} {turn}<|im_end|>\n<|im_start|>assistant\n"
            if kind == "llama_cpp_python":
                reading, writing = ask(one, 1)["read_s"], ask(two, decode)
                pace = (writing["wrote"] - 1) / writing["write_s"]
            else:
                began, first, _, _ = ask(one, 1)
                reading = first - began
                _, first, last, count = in_pieces(ask, two, decode)
                pace = (count - 1) / (last - first)
            texts = [letters(32, turn * MANY + n + 1000) for n in range(MANY)]
            if kind == "llama_cpp_python":
                all_of_them = ask(texts, decode // 2)["tokens_per_s"]
            else:
                all_of_them = together(ask, texts, decode // 2, 0.002)
            if turn:
                read[kind].append(prompt / reading)
                write[kind].append(pace)
                many[kind].append(all_of_them)
    worker.close()
    middle = statistics.median
    told = {"model": name, "threads": threads, "engine": worker.engine, "turns": turns, "aim": ">= 0.97, sixteen >= 0.95"}
    for what, values in (("prompt_tokens_per_s", read), ("decode_tokens_per_s", write), ("sixteen_tokens_per_s", many)):
        told[what] = {kind: round(middle(all), 1) for kind, all in values.items()}
        for other in kinds:
            if other != "through_the_network":
                pairs = zip(values["through_the_network"], values[other])
                told[what][f"ratio_to_{other}"] = round(middle(a / b for a, b in pairs), 3)
    return told


def in_pieces(ask, *what):
    """An answer that came in more than one piece: on a busy machine all of it may come at once, which tells no speed."""
    for _ in range(5):
        began, first, last, count = ask(*what)
        if last > first:
            return began, first, last, count
    sys.exit("each answer came in one piece, five times: this machine is too busy to tell how fast they are written")


def together(ask, texts, tokens, apart):
    """These questions, one after the other by `apart` seconds: tokens per second from the first to the last word."""
    results, threads = [None] * len(texts), []

    def one(i):
        results[i] = ask(texts[i], tokens)

    began = time.perf_counter()
    for i in range(len(texts)):
        thread = threading.Thread(target=one, args=(i,))
        thread.start()
        threads.append(thread)
        time.sleep(apart)
    for thread in threads:
        thread.join()
    assert all(results), "a question came to nothing"
    return sum(result[3] for result in results) / (max(result[2] for result in results) - began)


def questions(count):
    return [f"{QUESTION} {i}" for i in range(count)]


def percentile(values, p):
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * p))]


def replay(network, trace, requests):
    """Real arrivals and lengths. Lengths are cut to what the shipped model holds, time is stretched to what the machine
    can take: a quarter of its measured speed."""
    with open(trace) as file:
        rows = [row for _, row in zip(range(requests), csv.DictReader(file))]
    at = [datetime.datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp() for row in rows]
    speed = together(network.ask, questions(MANY), 24, 0.0)
    lengths = [(min(int(row["ContextTokens"]) // 8, 300), max(2, min(int(row["GeneratedTokens"]) // 4, 96))) for row in rows]
    span = sum(read + write for read, write in lengths) / (speed / 4)
    stretch = span / max(at[-1] - at[0], 0.001)
    firsts, paces, threads = [], [], []

    def one(read, write):
        began, first, last, count = network.ask("water " * read, write)
        firsts.append((first - began) * 1000)
        if count > 1:
            paces.append((last - first) * 1000 / (count - 1))

    zero = time.perf_counter()
    for (read, write), when in zip(lengths, at):
        time.sleep(max(0.0, zero + (when - at[0]) * stretch - time.perf_counter()))
        thread = threading.Thread(target=one, args=(read, write))
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()
    return {"requests": len(firsts), "stretched": round(stretch, 2),
            "first_token_ms": {"p50": percentile(firsts, 0.5), "p99": percentile(firsts, 0.99)},
            "per_token_ms": {"p50": percentile(paces, 0.5), "p99": percentile(paces, 0.99)}}


def batch(network, lines, institution):
    """Lines per second of one job, and its resident memory at the scheduler."""
    folder = network.home
    path = folder / "lines.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {i}"}) + "\n" for i in range(lines)))
    where = [] if institution is None else ["--institution", institution]
    began = time.perf_counter()
    network.run("generate", "--file", str(path), "-o", str(folder / "answers.jsonl"), "--max-tokens", "2", *where)
    took = time.perf_counter() - began
    with open(folder / "answers.jsonl") as answers:
        indexes = [json.loads(line)["index"] for line in answers]
    assert indexes == list(range(lines)), "a line is missing, doubled or out of order"
    (folder / "answers.jsonl").unlink()
    return lines / took


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("karez")
    parser.add_argument("out")
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--trace")
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--large", type=pathlib.Path)
    parser.add_argument("--python")
    args = parser.parse_args()
    karez = str(pathlib.Path(args.karez).resolve())
    model = pathlib.Path(__file__).resolve().parent.parent / "engine/models/karez-tiny.gguf"
    load, cores = os.getloadavg(), os.cpu_count()
    home = tempfile.mkdtemp(prefix="karez-serving-")
    figures = {}
    network = Network(karez, os.path.join(home, "home"))
    try:
        three = batch(network, args.lines, None)
        one = batch(network, args.lines, NODE)
        figures["batch_lines_per_s"] = {"three_nodes_sharing_the_cores": three, "one_node": one}
        network.reopen(MANY)
        worker = Worker(karez, model, THREADS)
        network.ask(QUESTION, 4), worker.ask(QUESTION, 4)
        direct, through, alone, many, single, whole = [], [], [], [], [], []
        for turn in range(args.turns):
            for ask, firsts, speeds in ((worker.ask, direct, single), (network.ask, through, whole)):
                for i in range(4):
                    began, first, last, count = in_pieces(ask, f"{QUESTION} {turn} {i}", 256)
                    firsts.append((first - began) * 1000)
                    speeds.append((count - 1) / (last - first))
            alone.append(together(worker.ask, questions(MANY), 48, 0.005))
            many.append(together(network.ask, questions(MANY), 48, 0.005))
        short = min(args.lines, 200)
        began = time.perf_counter()
        together(worker.ask, questions(short), 2, 0.0)
        figures["batch_lines_per_s"]["worker_alone"] = short / (time.perf_counter() - began)
        figures["batch_overhead_us_per_line"] = 1e6 / one - 1e6 / figures["batch_lines_per_s"]["worker_alone"]
        worker.close()
        middle = statistics.median
        figures["first_token_ms"] = {"worker_alone": middle(direct), "through_the_network": middle(through),
                                     "added": middle(through) - middle(direct), "aim": "<= 5 added"}
        figures["decode_tokens_per_s"] = {"worker_alone": middle(single), "through_the_network": middle(whole),
                                          "ratio": middle(whole) / middle(single), "aim": ">= 0.97"}
        figures["sixteen_tokens_per_s"] = {"worker_alone": middle(alone), "through_the_network": middle(many),
                                           "ratio": middle(many) / middle(alone), "aim": ">= 0.95 of llama.cpp's own"}
        for path, name, prompt, decode, turns in ((model, MODEL, 384, 200, 9), (args.large, "one-billion", 256, 48, 5)):
            if path is None:
                continue
            if name != MODEL:
                network.run("artifact", "add", str(path), "--model", name)
            network.reopen(MANY, cores)
            # Two of this model at once would share the processors: whoever is not asked sleeps.
            peer = Peer(args.python, path, cores) if args.python else None
            figures[f"whole_path_{name}"] = whole_path(karez, network, peer, path, name, prompt, decode, turns, cores)
            if peer:
                figures[f"whole_path_{name}"]["peer"] = peer.about
                peer.close()
        if args.python is None:
            print("llama-cpp-python is no peer here: KAREZ_BENCH_LLAMA names no Python that has it", file=sys.stderr)
        network.reopen(MANY)
        if args.trace:
            figures["trace"] = replay(network, args.trace, args.requests)
    finally:
        network.close()
        shutil.rmtree(home, ignore_errors=True)
    result = {"figures": figures, "machine": {"cores": cores, "threads_of_the_worker": THREADS, "load_before": load, "load_after": os.getloadavg()}}
    pathlib.Path(args.out).write_text(json.dumps(result, indent=1))
    for name, figure in figures.items():
        print(f"{name:28} {json.dumps(figure, default=str)}")
    print("machine:", json.dumps(result["machine"]))


if __name__ == "__main__":
    main()
