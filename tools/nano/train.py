"""Trains yi-nano on the CPU for a given number of minutes, from the token ids that prepare.py wrote.

The learning rate follows the elapsed part of the time budget, not the step count, so a busy machine means fewer steps but
still a complete decay. Sequences start short, because attention is more than half of the work on a CPU, and grow; near the
end some steps read long ones. Checkpoints go to --work; export.py turns one into a model.
"""

import argparse
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads stall for seconds on a busy machine

import numpy as np
import torch
from torch.nn import functional as F

from model import Shape, Yi

TOKENS_A_STEP = 4096
VALIDATION_LENGTH = 512
CORPORA = ["english", "chinese", "chat"]


def load_documents(path):
    with np.load(path) as file:
        return np.split(file["ids"].astype(np.int64), np.cumsum(file["lengths"])[:-1])


class Reader:
    """Endless shuffled epochs of all documents, end to end."""

    def __init__(self, documents, seed):
        self.documents = documents
        self.rng = np.random.default_rng(seed)
        self.ids = np.empty(0, np.int64)

    def batch(self, rows, length):
        need = rows * length + 1
        while len(self.ids) < need:
            order = self.rng.permutation(len(self.documents))
            self.ids = np.concatenate([self.ids] + [self.documents[i] for i in order])
        taken, self.ids = torch.from_numpy(self.ids[:need].copy()), self.ids[need - 1:]
        return taken[:-1].view(rows, length), taken[1:].view(rows, length)


def loss_of(model, inputs, targets):
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


@torch.no_grad()
def validation_loss(model, documents):
    """Mean loss a token over held-out documents laid end to end, in windows of VALIDATION_LENGTH."""
    ids = torch.from_numpy(np.concatenate(documents))
    rows = (len(ids) - 1) // VALIDATION_LENGTH
    inputs, targets = (ids[at:at + rows * VALIDATION_LENGTH].view(rows, -1) for at in (0, 1))
    return torch.stack([loss_of(model, i[None], t[None]) for i, t in zip(inputs, targets)]).mean().item()


def make_optimizers(model, args):
    """Muon for the matrices of the layers, AdamW for the embeddings, the head and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.dim() == 2 and ".layers." in n]
    others = [p for n, p in model.named_parameters() if p.dim() != 2 or ".layers." not in n]
    return [torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=args.muon_decay),
            torch.optim.AdamW(others, lr=args.adam_lr, betas=(0.9, 0.95), weight_decay=args.adam_decay)]


def learning_rate_factor(fraction):
    """Warm up for 1%, hold, then linearly to zero over the last 60% of the time."""
    return max(0.0, min(1.0, fraction / 0.01, (1 - fraction) / 0.6))


def sequence_length(fraction, step):
    if fraction < 0.6:
        return 256
    return 2048 if fraction > 0.8 and step % 4 == 0 else 512


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/nano"))
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--muon-decay", type=float, default=0.05)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--adam-decay", type=float, default=0.03)
    args = parser.parse_args()
    torch.manual_seed(1)
    torch.set_num_threads(args.threads)

    reader = Reader([d for c in CORPORA for d in load_documents(args.work / f"{c}.npz")], seed=1)
    held_out = {c: load_documents(args.work / f"held_out_{c}.npz") for c in ("english", "chinese")}
    model = Yi(Shape())
    print(sum(p.numel() for p in model.parameters()), "parameters", flush=True)
    step_loss = torch.compile(lambda inputs, targets: loss_of(model, inputs, targets), dynamic=False)
    optimizers = make_optimizers(model, args)
    base_rates = [g["lr"] for o in optimizers for g in o.param_groups]

    step, recent, start = 0, [], time.time()
    last_report = last_checkpoint = start
    while True:
        fraction = (time.time() - start) / (args.minutes * 60)
        done = fraction >= 1
        if done or time.time() - last_checkpoint > 240:
            losses = {c: validation_loss(model, d) for c, d in held_out.items()}
            state = {"model": model.state_dict(), "step": step, "tokens": step * TOKENS_A_STEP,
                     "minutes": (time.time() - start) / 60, "validation": losses}
            torch.save(state, args.work / "checkpoint.tmp")
            (args.work / "checkpoint.tmp").rename(args.work / "checkpoint.pt")
            print(f"checkpoint: step {step}, validation {losses}", flush=True)
            last_checkpoint = time.time()
        if done:
            break
        for group, rate in zip((g for o in optimizers for g in o.param_groups), base_rates):
            group["lr"] = rate * learning_rate_factor(fraction)
        length = sequence_length(fraction, step)
        loss = step_loss(*reader.batch(TOKENS_A_STEP // length, length))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        recent.append(loss.item())
        step += 1
        if time.time() - last_report > 15:
            print(f"step {step} {fraction:.3f} loss {np.mean(recent):.4f} "
                  f"{len(recent) * TOKENS_A_STEP / (time.time() - last_report):.0f} tokens/s", flush=True)
            recent, last_report = [], time.time()


if __name__ == "__main__":
    main()
