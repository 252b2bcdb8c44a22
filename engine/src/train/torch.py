"""The second trainer: PyTorch with transformers and peft, spoken to in lines of JSON on standard input and output.

It holds a base model, a low-rank adapter and AdamW, and does what `engine/src/train/learner.rs` asks for. Tokens, rates,
seeds and the numbers to begin with come from there; checkpoints, too, are written there. It opens no connection and
runs no code of a model.

With the argument `probe` it says what it found, and ends.
"""
import json
import math
import os
import resource
import sys

REPLIES = os.fdopen(os.dup(1), "w", buffering=1)
# Whatever a library prints must not end up between replies.
os.dup2(2, 1)

# Elements of logits that are there at once.
LOGITS_MAX = 16 << 20


def say(message):
    usage = resource.getrusage(resource.RUSAGE_SELF)
    message["cpu_us"] = int((usage.ru_utime + usage.ru_stime) * 1e6)
    message["peak_rss"] = usage.ru_maxrss * 1024
    REPLIES.write(json.dumps(message, allow_nan=False) + "\n")
    REPLIES.flush()


def number(value):
    """What JSON has no word for is nothing."""
    value = float(value)
    return value if math.isfinite(value) else None


def versions():
    import peft
    import torch
    import transformers

    found = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__,
             "peft": peft.__version__, "gpus": []}
    if torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(at) for at in range(torch.cuda.device_count())]
    return found


def folders():
    """Where everything lies that Python reads."""
    places = {sys.prefix, sys.base_prefix, sys.exec_prefix, os.path.dirname(os.path.realpath(sys.executable))}
    places.update(sys.path)
    return sorted({os.path.realpath(place) for place in places if place and os.path.exists(place)})


class Run:
    """One base model with an adapter."""

    def __init__(self, q):
        import torch
        import transformers
        from peft import LoraConfig, get_peft_model
        from safetensors.torch import load_file, save_file
        import torch.utils.checkpoint

        self.torch, self.load_file, self.save_file = torch, load_file, save_file
        torch.set_num_threads(q["threads"])
        torch.use_deterministic_algorithms(True, warn_only=True)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if q["bf16"] else torch.float32
        named = "dtype" if int(transformers.__version__.split(".")[0]) >= 5 else "torch_dtype"
        model = transformers.AutoModelForCausalLM.from_pretrained(
            q["model"], local_files_only=True, use_safetensors=True, trust_remote_code=False,
            attn_implementation="sdpa", **{named: dtype})
        model.config.use_cache = False
        lora = LoraConfig(r=q["rank"], lora_alpha=q["alpha"], lora_dropout=q["dropout"], target_modules=q["modules"],
                          bias="none", task_type="CAUSAL_LM")
        self.model = get_peft_model(model, lora).to(self.device)
        if q["recompute"]:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.params = {name.replace(".default.", "."): param for name, param in self.model.named_parameters()
                       if param.requires_grad}
        for param in self.params.values():
            param.data = param.data.float()
        self.clip = q["clip"]
        self.optimizer = torch.optim.AdamW(self.params.values(), lr=0.0, betas=(q["beta1"], q["beta2"]),
                                           eps=q["epsilon"], weight_decay=q["weight_decay"])
        where = torch.cuda.get_device_name(0) if self.device.type == "cuda" else "cpu"
        self.where = where

    def take_up(self, q):
        torch = self.torch
        numbers = self.load_file(q["file"])
        expected = {name + suffix for name in self.params for suffix in ("", ".mean", ".square")}
        if expected != set(numbers):
            odd = sorted(expected ^ set(numbers))[0]
            raise ValueError(f"the adapter of this version of peft and the one asked for differ in {odd}")
        self.optimizer.state.clear()
        with torch.no_grad():
            for name, param in self.params.items():
                param.copy_(numbers[name])
                param.grad = None
                if q["steps"] > 0:
                    self.optimizer.state[param] = {
                        "step": torch.tensor(float(q["steps"])),
                        "exp_avg": numbers[name + ".mean"].to(self.device),
                        "exp_avg_sq": numbers[name + ".square"].to(self.device),
                    }

    def save(self, q):
        numbers, torch = {}, self.torch
        for name, param in self.params.items():
            state = self.optimizer.state.get(param, {})
            for suffix, value in (("", param), (".mean", state.get("exp_avg")), (".square", state.get("exp_avg_sq"))):
                value = torch.zeros_like(param) if value is None else value
                numbers[name + suffix] = value.detach().float().cpu().contiguous()
        self.save_file(numbers, q["file"])

    def begin(self):
        self.optimizer.zero_grad(set_to_none=True)

    def nats(self, q, train):
        """Summed cross-entropy of the targets. Sequences lie in rows, and see themselves only."""
        torch, device = self.torch, self.device
        self.model.train(train)
        lengths, ids = q["lengths"], torch.tensor(q["ids"])
        width = max(lengths)
        rows, used = [[]], 0
        for length in lengths:
            if rows[-1] and used + length > width:
                rows.append([])
                used = 0
            rows[-1].append(length)
            used += length
        tokens = torch.zeros(len(rows), width, dtype=torch.long)
        positions = torch.zeros(len(rows), width, dtype=torch.long)
        owner = torch.full((len(rows), width), -1, dtype=torch.long)
        place = torch.zeros(len(ids), dtype=torch.long)
        start = 0
        for row, inside in enumerate(rows):
            column = 0
            for which, length in enumerate(inside):
                tokens[row, column:column + length] = ids[start:start + length]
                positions[row, column:column + length] = torch.arange(length)
                owner[row, column:column + length] = which
                place[start:start + length] = torch.arange(length) + (row * width + column)
                start, column = start + length, column + length
        mask = None
        if any(len(inside) > 1 for inside in rows):
            dtype = next(self.model.get_base_model().model.parameters()).dtype
            owner = owner.to(device)
            seen = (owner[:, :, None] == owner[:, None, :]) & torch.ones(width, width, dtype=torch.bool,
                                                                         device=device).tril()
            mask = torch.zeros(len(rows), 1, width, width, dtype=dtype, device=device)
            mask.masked_fill_(~seen[:, None], torch.finfo(dtype).min)
        base = self.model.get_base_model()
        hidden = base.model(input_ids=tokens.to(device), attention_mask=mask, position_ids=positions.to(device),
                            use_cache=False).last_hidden_state
        at, right = (torch.tensor(part) for part in zip(*q["targets"]))
        picked = hidden.reshape(-1, hidden.shape[-1])[place[at].to(device)]
        right = right.to(device)

        def part(states, targets):
            logits = base.lm_head(states).float()
            return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")

        most = max(16, LOGITS_MAX // base.lm_head.weight.shape[0])
        total = 0.0
        for begin in range(0, len(right), most):
            some = (picked[begin:begin + most], right[begin:begin + most])
            if train and len(right) > most:
                total = total + torch.utils.checkpoint.checkpoint(part, *some, use_reentrant=False)
            else:
                total = total + part(*some)
        return total

    def add(self, q):
        self.torch.manual_seed(q["seed"])
        nats = self.nats(q, True)
        (nats * q["scale"]).backward()
        return {"nats": number(nats.detach())}

    def loss(self, q):
        with self.torch.no_grad():
            return {"nats": number(self.nats(q, False))}

    def apply(self, q):
        torch = self.torch
        grads = []
        for name, param in self.params.items():
            if param.grad is None:
                raise ValueError(f"{name} received no gradient")
            grads.append(param.grad)
        norm = math.sqrt(sum(float(grad.double().pow(2).sum()) for grad in grads))
        if math.isfinite(norm):
            if norm > self.clip:
                for grad in grads:
                    grad.mul_(self.clip / norm)
            for group in self.optimizer.param_groups:
                group["lr"] = q["rate"]
            self.optimizer.step()
        self.begin()
        return {"norm": number(norm)}


def main():
    if sys.argv[1:] == ["probe"]:
        say({"ok": True, **versions(), "reads": folders()})
        return
    try:
        import ctypes
        # The kernel ends this process with its parent, whatever it is doing: PR_SET_PDEATHSIG, SIGKILL.
        ctypes.CDLL(None).prctl(1, 9)
    except (OSError, AttributeError):
        pass
    run = None
    for line in sys.stdin.buffer:
        try:
            q = json.loads(line)
            do = q.pop("do")
            answer = {}
            if do == "open":
                run = None
                run = Run(q)
                answer = {**versions(), "where": run.where}
            elif do in ("take_up", "save", "add", "loss", "apply"):
                if do == "add" and q["first"]:
                    run.begin()
                answer = getattr(run, do)(q) or {}
            else:
                raise ValueError(f"cannot {do}")
            say({"ok": True, **answer})
        except Exception as error:
            import traceback
            traceback.print_exc()
            full = type(error).__name__ in ("OutOfMemoryError", "MemoryError") or "allocate memory" in str(error)
            text = f"{type(error).__name__}: {error}".split("\n")[0]
            say({"ok": False, "memory": full, "error": text[:400]})


main()
