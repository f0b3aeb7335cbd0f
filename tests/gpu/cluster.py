#!/usr/bin/env python3
"""Clusters of processes on GPUs that lose a rank: it is killed while it answers, another takes its place, and the text is the undisturbed one.

    cluster.py FOLDER RESULT [--tiny]        (--tiny: two emulated GPUs)

Two ranks. On a machine with one GPU they share it, and meet by way of the host's memory: kernels of two processes do not run side by side
there. With more, all ways to meet are tried. Each worker is killed in turn, so the one that samples is, too.
"""

import argparse
import os
import queue
import secrets
import subprocess
import sys
import threading
import time
from pathlib import Path

from probe import SUITE, Checks

PHALANX = os.environ.get("PHALANX", str(SUITE / "phalanx"))
MODEL = SUITE / "yi-nano" if (SUITE / "yi-nano").is_dir() else SUITE.parents[1] / "models/yi-nano"
PROMPT = ["--prompt", "In the beginning", "--ignore-eos", "--temperature", "0.9", "--seed", "5"]
# So many that a rank is killed in the middle.
TOKENS, TINY_TOKENS = 4000, 60
# Characters after which it is.
BEGUN = 60
PATIENCE = 120  # seconds
WIDTH = 2


class Part:
    """A process, whose output is read as it comes."""

    def __init__(self, *line, env):
        self.process = subprocess.Popen([PHALANX, *map(str, line)], env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0)
        self.said = queue.Queue()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        while piece := self.process.stdout.read(4096):
            self.said.put((time.monotonic(), piece.decode(errors="replace")))
        self.said.put(None)

    def piece(self):
        """When something was said, and what; nothing at the end."""
        try:
            return self.said.get(timeout=PATIENCE)
        except queue.Empty:
            raise RuntimeError(f"{' '.join(map(str, self.process.args))}: nothing came for {PATIENCE} s") from None

    def line_with(self, text):
        """Reads on until there is a line with `text`."""
        heard = ""
        while not (lines := [line for line in heard.split("\n")[:-1] if text in line]):
            piece = self.piece()
            if piece is None:
                raise RuntimeError(f"it ended before it said '{text}': {heard}")
            heard += piece[1]
        return lines[0]

    def text(self, characters=None):
        """The rest, or at least so many characters of it, and when its pieces came."""
        text, times = "", []
        while (characters is None or len(text) < characters) and (piece := self.piece()) is not None:
            times.append(piece[0])
            text += piece[1]
        return text, times

    def end(self):
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(PATIENCE)
        finally:
            self.process.kill()


class Cluster:
    """A coordinator and a worker for each rank, which all end with it."""

    def __init__(self, gpus, collective, env):
        self.gpus, self.collective, self.parts = gpus, collective, []
        self.env = {**env, "PHALANX_SECRET": secrets.token_hex(16)}

    def __enter__(self):
        try:
            self.coordinator = self.part("coordinator", "--model", MODEL, "--workers", WIDTH, "--grpc", "127.0.0.1:0", "--listen", "127.0.0.1:0")
            line = self.coordinator.line_with("workers join at")
            self.join, self.address = (text.split()[-1] for text in line.split(", clients connect"))
            self.workers = [self.worker(index) for index in range(WIDTH)]
            self.serves()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for part in reversed(self.parts):
            part.end()

    def part(self, *line):
        self.parts.append(Part(*line, env=self.env))
        return self.parts[-1]

    def serves(self):
        self.coordinator.line_with(f"serving yi-nano on {WIDTH} ranks")

    def worker(self, index):
        return self.part("worker", "--model", MODEL, "--coordinator", self.join, "--listen", "127.0.0.1:0", "--device", f"cuda:{index % self.gpus}",
                         "--deterministic", "--collective", self.collective, "--kv-memory", "64MiB", "--max-batch-tokens", 512)

    def answer(self, tokens):
        return self.part("generate", "--server", self.address, *PROMPT, "--max-tokens", tokens)


def killed(cluster, index, tokens):
    """The text of an answer during which a worker is killed, how much of it was there before, and the longest time without any after."""
    stream = cluster.answer(tokens)
    begun, _ = stream.text(BEGUN)
    cluster.workers[index].process.kill()
    moment = time.monotonic()
    cluster.workers[index].end()
    cluster.workers[index] = cluster.worker(index)
    rest, times = stream.text()
    cluster.serves()
    gap = max((later - earlier for earlier, later in zip([moment, *times], times) if later > moment), default=0.0)
    return begun + rest, len(begun), gap


def devices(tiny):
    if tiny:
        return 2
    import torch

    return torch.cuda.device_count()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="not needed")
    parser.add_argument("result")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    gpus, tokens = devices(args.tiny), TINY_TOKENS if args.tiny else TOKENS
    # Emulated kernels go on beside the host, as a GPU's do.
    emulated = {"PHALANX_EMULATOR_DEVICES": str(gpus), "PHALANX_EMULATOR_BESIDE": "1", "PHALANX_EMULATOR_MEMORY": str(1 << 30)}
    env = {**os.environ, **(emulated if args.tiny else {})}
    checks, figures = Checks(), {}

    def same(name, found, expected):
        checks.within(name, float(found != expected), 0.0, " (equal)")

    alone = ["--model", MODEL, "--device", "cuda:0", "--workers", 1, "--deterministic", "--kv-memory", "64MiB"]
    one = Part("generate", *alone, *PROMPT, "--max-tokens", tokens, env=env)
    whole, _ = one.text()
    one.end()
    for way in ["host"] if gpus == 1 else ["host", "nccl", "peer"]:
        with Cluster(gpus, way, env) as cluster:
            same(f"{WIDTH} ranks by {way}: the text of one rank", cluster.answer(tokens).text()[0], whole)
            for index in range(WIDTH):
                text, before, gap = killed(cluster, index, tokens)
                same(f"worker {index} is killed, by {way}: the undisturbed text", text, whole)
                checks.within(f"worker {index} is killed, by {way}: characters before", before, len(whole) - 1)
                figures[f"seconds without text when worker {index} is killed and started anew, by {way}"] = round(gap, 3)
    checks.within("characters that every answer has at least", BEGUN, len(whole) - 1)
    return checks.end(args.result, figures)


if __name__ == "__main__":
    sys.exit(main())
