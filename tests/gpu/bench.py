#!/usr/bin/env python3
"""The peer of `phalanx bench gpu`: transformers' LlamaForCausalLM of the same shape, with random weights made on the device.

    tests/gpu/bench.py --phalanx target/release/phalanx          # ours, then theirs, on one GPU: both at once do not fit
    tests/gpu/bench.py --ours report.json --out theirs.json      # theirs beside a report of `phalanx bench gpu --json report.json`

Needs torch and transformers 5. Decoding is timed with a static KV cache in several ways: as it is (eager), recorded as a CUDA graph, and
through torch.compile; a row has the fastest. What does not fit, fails or has no time left is told and left out.
The JSON has the keys of ours, and `ratios`: their time over ours, above 1 where ours is faster.
"""
import argparse
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SHAPES = {  # hidden, layers, heads, KV heads, head_dim, FFN, vocabulary: as `phalanx bench gpu --shape`
    "yi-34b": (7168, 60, 56, 8, 128, 20480, 64000),
    "yi-6b": (4096, 32, 32, 4, 128, 11008, 64000),
    "yi-1b": (2048, 16, 16, 4, 128, 5632, 64000),
    "tiny": (128, 2, 8, 2, 32, 512, 512),
}
REPEATS = 5
BF16_BYTES = 2


class OutOfTime(BaseException):
    """Not an Exception: the compiler takes every one of those for a reason to go on in another way."""


def arguments():
    numbers = lambda text: [int(number) for number in text.split(",")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="yi-34b")
    parser.add_argument("--config", metavar="FILE", help="a config.json in place of --shape")
    parser.add_argument("--batch", type=numbers, default=[1, 8], metavar="N,…")
    parser.add_argument("--context", type=numbers, default=[4096], metavar="N,…")
    parser.add_argument("--prefill", type=numbers, default=[4096], metavar="N,…")
    parser.add_argument("--steps", type=int, default=32, help="decoding steps of each measurement")
    parser.add_argument("--modes", default="eager,graph,compile", help="ways of decoding, in this order")
    parser.add_argument("--budget", type=float, default=150, metavar="SECONDS", help="for the peer, not for ours")
    parser.add_argument("--device", default="cuda:0", help="a GPU, or cpu to try the script")
    parser.add_argument("--phalanx", metavar="PROGRAM", help="runs `PROGRAM bench gpu` first, with bf16 weights and the same sizes")
    parser.add_argument("--ours", metavar="FILE", help="a report of `phalanx bench gpu --json FILE` to compare with")
    parser.add_argument("--out", metavar="FILE", help="write JSON to a file; else to the standard output")
    parser.add_argument("--tiny", action="store_true", help="try the script: a tiny shape on the CPU, as `phalanx bench gpu --shape tiny`")
    args = parser.parse_args()
    if args.tiny:
        args.shape, args.device, args.modes = "tiny", "cpu", "eager"
        args.batch, args.context, args.prefill, args.steps = [1, 2], [64], [32], 4
    return args


def run_ours(args):
    """The report of a run of our benchmark, which has the GPU to itself."""
    with tempfile.TemporaryDirectory() as folder:
        report = str(Path(folder) / "ours.json")
        shape = ["--config", args.config] if args.config else ["--shape", args.shape]
        joined = lambda numbers: ",".join(map(str, numbers))
        sizes = ["--batch", joined(args.batch), "--context", joined(args.context), "--prefill", joined(args.prefill)]
        command = [args.phalanx, "bench", "gpu", *shape, "--weights", "bf16", *sizes, "--device", args.device, "--json", report]
        ended = subprocess.run(command, stdout=sys.stderr)
        if not Path(report).exists():
            sys.exit(f"{args.phalanx} bench gpu ended with {ended.returncode} and without a report")
        return json.loads(Path(report).read_text())


class Peer:
    def __init__(self, args, told):
        """`told` is given the report after every part."""
        import torch
        import transformers

        self.torch, self.transformers, self.args, self.told = torch, transformers, args, told
        self.device = torch.device(args.device)
        self.on_gpu = self.device.type == "cuda"
        self.deadline = time.monotonic() + args.budget
        name = torch.cuda.get_device_name(self.device) if self.on_gpu else "cpu"
        self.report = {
            "engine": "transformers",
            "version": f"{transformers.__version__}, torch {torch.__version__}",
            "device": name,
            "shape": args.config or args.shape,
            "ceilings": {},
            "decode": [],
            "prefill": [],
            "skipped": [],
            "failures": [],
        }

    def left(self):
        return self.deadline - time.monotonic()

    def part(self, what, measure):
        """Does a part of the measurements, within the time that is left; tells why where it gives nothing."""
        print(f"{self.args.budget - self.left():6.1f} s  {what}", file=sys.stderr, flush=True)
        skip = lambda why: self.report["skipped"].append({"what": what, "why": why})
        if self.left() <= 0:
            return skip("no time left")

        def alarm(*_):
            raise OutOfTime

        signal.signal(signal.SIGALRM, alarm)
        signal.setitimer(signal.ITIMER_REAL, self.left())
        try:
            return measure()
        except OutOfTime:
            skip("no time left")
        except self.torch.OutOfMemoryError as error:
            skip(f"out of memory: {str(error).splitlines()[0]}")
        except Exception as error:  # Whatever a peer dies of, the other figures count.
            # The compiler wraps what interrupts it.
            if self.left() <= 0:
                skip("no time left")
            else:
                text = f"{what}: {type(error).__name__}: {str(error).strip().splitlines()[:1]}"
                print(f"failed: {text}", file=sys.stderr)
                self.report["failures"].append(text)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            if self.on_gpu:
                self.torch.cuda.empty_cache()
            self.told(self.report)

    def synchronize(self):
        if self.on_gpu:
            self.torch.cuda.synchronize(self.device)

    def milliseconds(self, work, count=1):
        """Of one of `count` runs of `work`, begun one behind the other."""
        self.synchronize()
        started = time.perf_counter()
        for _ in range(count):
            work()
        self.synchronize()
        return 1e3 * (time.perf_counter() - started) / count

    def ceilings(self):
        torch, (bytes_, size) = self.torch, (4 << 30, 8192) if self.on_gpu else (1 << 24, 256)
        source = torch.rand(bytes_ // BF16_BYTES, device=self.device, dtype=torch.bfloat16)
        target = torch.empty_like(source)
        a, b = (torch.randn(size, size, device=self.device, dtype=torch.bfloat16) for _ in range(2))
        copy = lambda: target.copy_(source)
        rates = {"copy_gb_s": (copy, 1, 2 * bytes_ / 1e6), "gemm_tflop_s": (lambda: a @ b, 20, 2 * size**3 / 1e9)}
        for key, (work, count, amount) in rates.items():
            times = [self.milliseconds(work, count) for _ in range(2 * REPEATS + 1)][1:]
            self.report["ceilings"][key] = spread([amount / ms for ms in times])
        self.report["ceilings"]["bandwidth_gb_s"] = self.report["ceilings"]["copy_gb_s"]["median"]

    def load(self):
        torch, transformers = self.torch, self.transformers
        if self.args.config:
            config = transformers.LlamaConfig.from_json_file(self.args.config)
        else:
            hidden, layers, heads, kv_heads, head_dim, ffn, vocab = SHAPES[self.args.shape]
            config = transformers.LlamaConfig(
                hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
                head_dim=head_dim, intermediate_size=ffn, vocab_size=vocab, max_position_embeddings=200_000,
                rms_norm_eps=1e-5, tie_word_embeddings=False,
            )
        config._attn_implementation = "sdpa"
        started = time.perf_counter()
        with torch.device(self.device):
            self.model = transformers.LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).eval()
        self.synchronize()
        self.config = config
        matrices = sum(p.numel() for name, p in self.model.named_parameters() if p.dim() == 2 and "embed" not in name)
        self.weight_bytes = BF16_BYTES * matrices
        self.report["parameters"] = sum(parameter.numel() for parameter in self.model.parameters())
        self.report["loads"] = [
            {"weights": "bf16", "seconds": time.perf_counter() - started, "weight_bytes": self.weight_bytes, "memory": ""}
        ]
        return self.model

    def prefill(self, tokens):
        ids = self.torch.randint(0, self.config.vocab_size, (1, tokens), device=self.device)
        work = lambda: self.model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
        self.milliseconds(work)
        ms = spread([self.milliseconds(work) for _ in range(REPEATS)])
        config, layers = self.config, self.config.num_hidden_layers
        head = config.vocab_size * config.hidden_size
        projections = self.weight_bytes // BF16_BYTES - head
        attention = 4 * layers * config.num_attention_heads * config.head_dim * tokens * (tokens + 1) / 2
        tflop = (2 * projections * tokens + attention + 2 * head) / 1e12
        rate = 1e3 * tflop / ms["median"]
        self.report["prefill"].append({
            "weights": "bf16", "deterministic": False, "tokens": tokens, "chunk": tokens, "ms": ms,
            "tokens_per_second": 1e3 * tokens / ms["median"], "tflop": tflop, "tflop_s": rate,
            "share": self.share(rate, "gemm_tflop_s"), "mode": "eager",
        })

    def decode(self):
        """Times every way of decoding, the slow one to prepare after the others for all sizes; a row has the fastest."""
        found = {(batch, context): {} for batch in self.args.batch for context in self.args.context}
        for mode in self.args.modes.split(","):
            if mode == "graph" and not self.on_gpu:
                continue
            for (batch, context), modes in found.items():
                what = f"decoding, batch {batch} at context {context}, {mode}"
                ms = self.part(what, lambda: self.decode_by(mode, batch, context))
                if ms:
                    modes[mode] = ms
                    rows = [(size, modes) for size, modes in found.items() if modes]
                    self.report["decode"] = [self.decode_row(*size, modes) for size, modes in rows]

    def decode_row(self, batch, context, modes):
        mode, ms = min(modes.items(), key=lambda item: item[1]["median"])
        config = self.config
        kv_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * BF16_BYTES
        kv_bytes = batch * context * kv_token
        rate = (self.weight_bytes + kv_bytes) / ms["median"] / 1e6
        return {
            "weights": "bf16", "deterministic": False, "batch": batch, "context": context, "ms": ms,
            "tokens_per_second": 1e3 * batch / ms["median"], "weight_bytes": self.weight_bytes, "kv_bytes": kv_bytes,
            "gb_s": rate, "share": self.share(rate, "bandwidth_gb_s"), "mode": mode, "modes": modes,
        }

    def decode_by(self, mode, batch, context):
        """Each step is greedy and feeds the next. The cache has exactly `context` places, the last of which the last step fills;
        attention over a static cache reads all of them in every step."""
        torch, device, steps = self.torch, self.device, min(self.args.steps, max(1, context // 2))
        cache = self.transformers.StaticCache(config=self.config, max_cache_len=context)
        cache.early_initialization(batch, self.config.num_key_value_heads, self.config.head_dim, torch.bfloat16, device)
        ids = torch.full((batch, 1), 11, device=device)
        position = torch.zeros(1, 1, dtype=torch.long, device=device)

        def rewind():
            position.fill_(context - steps)
            for layer in cache.layers:
                layer.cumulative_length.fill_(context - steps)

        def token(ids, position):
            out = self.model(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True)
            return out.logits[:, -1].argmax(-1, keepdim=True)

        if mode == "compile":
            torch._dynamo.reset()
            token = torch.compile(token, mode="reduce-overhead" if self.on_gpu else "default", fullgraph=True)

        def step():
            if mode == "compile" and self.on_gpu:
                torch.compiler.cudagraph_mark_step_begin()
            ids.copy_(token(ids, position))
            position.add_(1)

        rewind()
        if mode == "graph":
            # What the first step prepares must not be recorded; it runs on a stream of its own, as recording wants it.
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                step()
            torch.cuda.current_stream(device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            step = graph.replay
            rewind()
        for _ in range(min(3, steps)):
            step()
        times = []
        for _ in range(REPEATS):
            rewind()
            times.append(self.milliseconds(step, steps))
        return spread(times)

    def share(self, rate, key):
        ceiling = self.report["ceilings"].get(key)
        ceiling = ceiling["median"] if isinstance(ceiling, dict) else ceiling
        return rate / ceiling if ceiling else None

    def run(self):
        with self.torch.inference_mode():
            self.part("ceilings", self.ceilings)
            if self.part(f"making {self.report['shape']}", self.load) is not None:
                for tokens in self.args.prefill:
                    self.part(f"prefill of {tokens} tokens", lambda: self.prefill(tokens))
                self.decode()
        return self.report


def read(report):
    try:
        return json.loads(Path(report).read_text())
    except (OSError, ValueError) as error:
        sys.exit(f"--ours {report}: {error}")


def spread(values):
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(ours, theirs):
    """Their time over ours, for every row that both have."""
    found = []
    for kind, keys in (("decode", ("batch", "context")), ("prefill", ("tokens",))):
        for row in ours[kind]:
            for peer in theirs[kind]:
                if all(row[key] == peer[key] for key in keys):
                    size = {key: row[key] for key in keys}
                    times = {"ours_ms": row["ms"]["median"], "theirs_ms": peer["ms"]["median"]}
                    found.append({
                        "kind": kind, "weights": row["weights"], "deterministic": row["deterministic"], **size, **times,
                        "ratio": times["theirs_ms"] / times["ours_ms"], "mode": peer["mode"],
                    })
    return found


def table(report):
    """The ratios as Markdown; ours may have fewer bits than theirs, which always has bf16."""
    yield f"{report['shape']} on {report['device']}: transformers {report['version']}"
    yield ""
    yield "| | our weights | deterministic | ratio | ours, ms | theirs, ms | their mode |"
    yield "|---|---|---|---|---|---|---|"
    for row in report["ratios"]:
        size = f"prefill of {row['tokens']}" if row["kind"] == "prefill" else f"batch {row['batch']} at {row['context']}"
        mode = "on" if row["deterministic"] else "off"
        times = f"{row['ours_ms']:.2f} | {row['theirs_ms']:.2f} | {row['mode']}"
        yield f"| {size} | {row['weights']} | {mode} | {row['ratio']:.2f} | {times} |"
    for skipped in report["skipped"]:
        yield f"* not measured: {skipped['what']}: {skipped['why']}"
    for failure in report["failures"]:
        yield f"* failed: {failure}"


def main():
    args = arguments()
    ours = read(args.ours) if args.ours else run_ours(args) if args.phalanx else None

    def written(report):
        if ours:
            report["ratios"] = ratios(ours, report)
        text = json.dumps(report, indent=2)
        if args.out:
            Path(args.out).write_text(text + "\n")
        return text

    # What was measured is kept, whatever becomes of the rest.
    report = Peer(args, written).run()
    text = written(report)
    if ours:
        print("\n".join(table(report)), file=sys.stdout if args.out else sys.stderr)
    if not args.out:
        print(text)
    return 0 if report["decode"] or report["prefill"] else 1


if __name__ == "__main__":
    sys.exit(main())
