"""The peer of train_bench: the same steps in PyTorch with transformers and peft.

train_peer.py MODEL_DIR IDS.json THREADS RANK STEPS prints one JSON object: seconds of each step, losses, peak memory.
"""
import json
import resource
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

folder, ids, threads, rank, steps = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
torch.set_num_threads(threads)
imports = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
batches = [torch.tensor(batch) for batch in json.load(open(ids))]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=modules, lora_dropout=0.0, task_type="CAUSAL_LM")
model = get_peft_model(model, config)
model.train()
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-4, weight_decay=0.0)
times, losses = [], []
for step in range(steps):
    began = time.perf_counter()
    batch = batches[step % len(batches)]
    loss = model(input_ids=batch, labels=batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    times.append(time.perf_counter() - began)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": times, "losses": losses, "peak_bytes": peak, "imports_bytes": imports,
                  "version": torch.__version__}))
