"""Every op of the GPU backend against its definition in float64, by torch.

    ops.py WORK_FOLDER RESULT.json [--tiny] [--only-make]

--tiny: small shapes, for emulated GPUs and for compute-sanitizer; --only-make: writes cases and inputs, and runs nothing.
"""

import argparse
import sys

import torch

from probe import Checks, ask, put

# Sums are f32 in chains of matrix instructions, whose adders may cut off what is below 2^-22 of the largest addend: up to 32 in a
# segment of 512. This times Σ|x||w| is far above what that gives, and far below what one wrong element of thousands would.
SUM = 2.0**-16
# A weight that is rounded to bf16 after its scale, as wide products do unless --deterministic: bf16 has 8 bits, half a unit is 2^-8.
ROUNDED_WEIGHT = 2.0**-8 + SUM
# A result in bf16, and f32 before it.
BF16 = 2.0**-7.95
# Weights of the softmax are bf16 (2^-8 of Σp|v|), the result too, and keys may round the other way here and there.
ATTENTION = 2.0**-6.8

WIDE_ROWS = 512


class Suite:
    def __init__(self, tiny):
        self.tiny = tiny
        self.device = "cuda" if torch.cuda.is_available() and not tiny else "cpu"
        self.random = torch.Generator().manual_seed(7)
        self.cases, self.inputs, self.judges = [], {}, []

    def normal(self, *shape, scale=1.0):
        return torch.randn(*shape, generator=self.random) * scale

    def integers(self, low, high, *shape):
        return torch.randint(low, high, shape, generator=self.random)

    def input(self, name, tensor):
        self.inputs[name] = tensor
        return name

    def case(self, name, op, judge, **kind):
        """`judge(outputs, checks)` is called with what the probe gave."""
        self.cases.append({"name": name, "op": op, **kind})
        self.judges.append(judge)

    def double(self, tensor):
        return tensor.to(self.device, torch.float64)


def relative(found, expected, scale):
    """The largest |found − expected| / scale; infinite where a number is not finite."""
    found = found.to(expected.device, torch.float64)
    if not torch.isfinite(found).all():
        return float("inf")
    return ((found - expected).abs() / scale.clamp_min(1e-30)).max().item()


def elementwise(s):
    rows, hidden, ffn = (5, 64, 48) if s.tiny else (33, 7168, 20480)
    vocabulary = 50 if s.tiny else 64000

    table = s.normal(vocabulary // 2, hidden).bfloat16()
    ids = s.integers(0, vocabulary, rows).int()
    first = vocabulary // 4

    def embedded(outputs, checks):
        inside = (ids >= first) & (ids < first + table.shape[0])
        expected = torch.where(inside[:, None], table[(ids.long() - first).clamp(0, table.shape[0] - 1)].float(), torch.zeros(()))
        checks.equal("embed", outputs["embed"], expected)

    s.case("embed", {"embed": {"ids": s.input("embed.ids", ids), "table": s.input("embed.table", table), "first_id": first}}, embedded)

    x, residual, weight = s.normal(rows, hidden, scale=3), s.normal(rows, hidden), s.normal(1, hidden).bfloat16()
    inputs = {"x": s.input("norm.x", x), "weight": s.input("norm.weight", weight), "eps": 1e-5}

    def normed(sums):
        sums = s.double(sums)
        return sums / (sums.square().mean(1, keepdim=True) + 1e-5).sqrt() * s.double(weight)

    def rms(outputs, checks):
        expected = normed(x)
        checks.within("rms_norm", relative(outputs["rms_norm"], expected, expected.abs()), BF16)

    def add_rms(outputs, checks):
        expected = normed(x + residual)
        checks.equal("add_rms_norm, the sum", outputs["add_rms_norm.residual"], x + residual)
        checks.within("add_rms_norm", relative(outputs["add_rms_norm"], expected, expected.abs()), BF16)

    s.case("rms_norm", {"rms_norm": inputs}, rms)
    s.case("add_rms_norm", {"add_rms_norm": {**inputs, "residual": s.input("norm.residual", residual)}}, add_rms)

    widths = [ffn // 2, ffn // 2 - 2]
    gate_up = s.normal(rows, 2 * sum(widths), scale=4)

    def silu(outputs, checks):
        parts, at = [], 0
        for width in widths:
            gate, up = s.double(gate_up[:, at : at + width]), s.double(gate_up[:, at + width : at + 2 * width])
            parts.append(torch.nn.functional.silu(gate) * up)
            at += 2 * width
        expected = torch.cat(parts, 1)
        checks.within("silu_mul", relative(outputs["silu_mul"], expected, expected.abs()), BF16)

    s.case("silu_mul", {"silu_mul": {"gate_up": s.input("silu.gate_up", gate_up), "widths": widths}}, silu)

    picked = [rows - 1, 0, 2, 2]
    s.case("gather", {"gather": {"x": "norm.x", "rows": picked}},
           lambda outputs, checks: checks.equal("gather", outputs["gather"], x[picked]))


def products(s):
    k_of_unit, n = (136, 40) if s.tiny else (2560, 1040)
    hidden = 264 if s.tiny else 7168
    rows = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 64, 65, 500, 600]
    if s.tiny:
        rows = [1, 5, 8, 9, 17, 65]

    def weight(name, kind, n, k):
        """What the probe is told, and what the weight stands for."""
        if kind in ("bf16", "fp8"):
            plain = s.normal(n, k, scale=0.05).bfloat16()
            stands = plain.float()
            if kind == "fp8":
                scale = stands.abs().amax(1, keepdim=True) / 448.0
                stands = (stands / scale).to(torch.float8_e4m3fn).float().double() * scale.double()
            return {"plain": s.input(name, plain)}, stands.double()
        bits, group = {"int4": (4, 128), "int8": (8, 128), "int8 in groups of 256": (8, 256)}[kind]
        groups = -(-k // group)
        values, zeros = s.integers(0, 2**bits, n, k).byte(), s.integers(0, 2**bits, n, groups).byte()
        scales = (torch.rand(n, groups, generator=s.random) * 0.02 + 0.001).half().float()
        group_of = torch.arange(k) // group
        stands = (values.double() - zeros.double()[:, group_of]) * scales.double()[:, group_of]
        told = {"bits": bits, "group_size": group, "values": s.input(f"{name}.values", values),
                "scales": s.input(f"{name}.scales", scales), "zeros": s.input(f"{name}.zeros", zeros)}
        return {"quantized": told}, stands

    for kind in ["bf16", "int8", "int8 in groups of 256", "int4", "fp8"]:
        x = s.normal(max(rows), hidden).bfloat16()
        # Two units, the second of them narrower.
        told, stands = zip(*(weight(f"{kind}.{u}", kind, width, hidden) for u, width in enumerate([n, n - 24])))
        wide_x = s.normal(max(rows), 3 * k_of_unit).bfloat16()
        parts, part_stands = zip(*(weight(f"{kind}.part.{u}", kind, n, k_of_unit) for u in range(3)))
        for deterministic in (True, False):
            mode = "deterministic" if deterministic else "fast"

            def bound(count, kind=kind, deterministic=deterministic):
                rounds = kind != "bf16" and not deterministic and count >= WIDE_ROWS
                return ROUNDED_WEIGHT if rounds else SUM

            def column(outputs, checks, name=f"linear {kind} {mode}", x=x, stands=stands, bound=bound):
                whole, all_x = s.double(torch.cat(stands)), s.double(x)
                expected, scale = all_x @ whole.T, all_x.abs() @ whole.T.abs()
                for count in rows:
                    checks.within(f"{name}, {count} rows", relative(outputs[f"{name}.{count}"], expected[:count], scale[:count]), bound(count))
                    if "deterministic" in name:
                        checks.equal(f"{name}, {count} rows are the first of all", outputs[f"{name}.{count}"], outputs[f"{name}.{max(rows)}"][:count])

            # Units 1, 2 and 3 of 4: sub-trees {1} and {2, 3}.
            def row(outputs, checks, name=f"linear_partials {kind} {mode}", x=wide_x, stands=part_stands, bound=bound):
                places = [s.double(x[:, u * k_of_unit : (u + 1) * k_of_unit]) for u in range(3)]
                of_unit = [(p @ s.double(w).T, p.abs() @ s.double(w).T.abs()) for p, w in zip(places, stands)]
                trees = [of_unit[0], tuple(a + b for a, b in zip(of_unit[1], of_unit[2]))]
                for count in rows:
                    for index, (expected, scale) in enumerate(trees):
                        checks.within(f"{name}, {count} rows, sub-tree {index}",
                                      relative(outputs[f"{name}.{count}.{index}"], expected[:count], scale[:count]), bound(count))

            kinds = {"deterministic": deterministic, "fp8": kind == "fp8"}
            s.case(f"linear {kind} {mode}", {"linear": {"x": s.input(f"{kind}.x", x), "rows": rows, "weights": list(told)}}, column, **kinds)
            s.case(f"linear_partials {kind} {mode}",
                   {"linear_partials": {"x": s.input(f"{kind}.wide_x", wide_x), "rows": rows, "weights": list(parts), "first_unit": 1, "units": 4}},
                   row, **kinds)


def attention(s):
    units = 2
    shapes = [(1, 128), (2, 128), (7, 128), (8, 128), (7, 64), (3, 32), (2, 16)]
    lengths = [1, 63, 64, 65, 511, 513, 1025] if s.tiny else [1, 63, 64, 65, 127, 511, 512, 513, 1000, 4097]
    chunk = 21 if s.tiny else 300
    if s.tiny:
        shapes = [(7, 128), (8, 32), (2, 16)]
    for group, d in shapes:
        name = f"attend, {group} heads of {d}"
        cols = units * (group + 2) * d
        tables, blocks = [], 0
        for length in lengths:
            count = -(-(length + chunk) // 64)
            tables.append(list(range(blocks, blocks + count)))
            blocks += count
        tables = [[blocks - 1 - block for block in table] for table in tables]  # out of order
        steps = [[(i, 0, length - 1) for i, length in enumerate(lengths) if length > 1],
                 [(i, length - 1, 1) for i, length in enumerate(lengths)],
                 [(i, length, chunk) for i, length in enumerate(lengths)]]
        qkv = [s.normal(sum(len for *_, len in step), cols) for step in steps]
        frequencies = 5e6 ** (-2.0 * torch.arange(d // 2, dtype=torch.float64) / d)
        told = [{"attend": index > 0, "slices": [{"start": start, "len": len, "blocks": tables[i]} for i, start, len in step]}
                for index, step in enumerate(steps)]

        def judge(outputs, checks, name=name, group=group, d=d, steps=steps, qkv=qkv, frequencies=frequencies):
            keys, values = {}, {}
            at = 0
            worst = {"rope": 0.0, "q": 0.0, "out": 0.0}
            for index, step in enumerate(steps):
                first = 0
                for i, start, length in step:
                    new = s.double(qkv[index][first : first + length]).view(length, units, group + 2, d)
                    first += length
                    angle = s.double(torch.arange(start, start + length))[:, None] * s.double(frequencies)
                    cos, sin = angle.cos()[:, None, None], angle.sin()[:, None, None]
                    low, high = new[:, :, : group + 1].chunk(2, -1)
                    turned = torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
                    size = torch.cat([(low * cos).abs() + (high * sin).abs(), (high * cos).abs() + (low * sin).abs()], -1)
                    stored = turned[:, :, group].float().bfloat16().double(), new[:, :, group + 1].float().bfloat16().double()
                    for kept, fresh in zip((keys, values), stored):
                        kept[i] = torch.cat([kept[i], fresh]) if i in kept else fresh
                    if index == 0:
                        continue
                    rows = slice(at, at + length)
                    at += length
                    table = torch.cat([angle.cos(), angle.sin()], 1)
                    worst["rope"] = max(worst["rope"], relative(outputs[f"{name}.rope"][rows], table, torch.ones_like(table)))
                    q = s.double(outputs[f"{name}.q"][rows]).view(length, units, group, d)
                    worst["q"] = max(worst["q"], relative(q, turned[:, :, :group], size[:, :, :group]))
                    scores = torch.einsum("tugd,kud->tugk", q, keys[i]) * d**-0.5
                    seen = torch.arange(keys[i].shape[0], device=scores.device) <= torch.arange(start, start + length, device=scores.device)[:, None]
                    weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
                    expected = torch.einsum("tugk,kud->tugd", weights, values[i])
                    scale = torch.einsum("tugk,kud->tugd", weights, values[i].abs())
                    found = outputs[name][rows].view(length, units, group, d)
                    worst["out"] = max(worst["out"], relative(found, expected, scale))
            checks.within(f"{name}: angles", worst["rope"], 2.0**-23)
            checks.within(f"{name}: queries", worst["q"], BF16)
            checks.within(name, worst["out"], ATTENTION)

        op = {"units": units, "group": group, "head_dim": d, "blocks": blocks, "scale": d**-0.5,
              "frequencies": s.input(f"{name}.frequencies", frequencies), "qkv": s.input(f"{name}.qkv", torch.cat(qkv)), "steps": told}
        s.case(name, {"attend": op}, judge)


def sampling(s):
    vocabulary, rows = (300, 9) if s.tiny else (64000, 64)
    logits = s.normal(rows, vocabulary, scale=3)
    logits[0, 5] = logits[0, 7] = 50.0  # the lowest id among equals

    def draw(temperature, top_k, top_p, seed):
        return {"temperature": temperature, "top_k": top_k, "top_p": top_p, "seed": seed, "position": seed + 1}

    def log_probabilities(outputs, checks, name, source):
        ids = outputs[f"{name}.ids"].view(-1).long()
        expected = s.double(source).log_softmax(1).cpu()[torch.arange(len(ids)), ids]
        checks.within(f"{name}: log-probabilities", relative(outputs[f"{name}.logprobs"].view(-1), expected, 1 + expected.abs()), 1e-5)
        return ids

    def greedy(outputs, checks):
        ids = log_probabilities(outputs, checks, "greedy", logits)
        best = [(logits[row] == logits[row].max()).nonzero()[0].item() for row in range(rows)]
        checks.equal("greedy: ids", ids, torch.tensor(best))

    s.case("greedy", {"sample": {"logits": s.input("logits", logits), "draws": [draw(0.0, 0, 1.0, r) for r in range(rows)]}}, greedy)

    def truncated(outputs, checks):
        ids = log_probabilities(outputs, checks, "truncated", logits)
        outside = 0
        for row, id in enumerate(ids.tolist()):
            order = logits[row].sort(descending=True)
            rank = (order.values > logits[row, id]).sum().item()
            before = (logits[row].double() / 0.7).softmax(0)[order.indices[:rank]].sum().item()
            outside += rank >= 20 or before > 0.9 + 1e-4
        checks.within("truncated: ids outside of top-k and top-p", outside, 0)

    s.case("truncated", {"sample": {"logits": "logits", "draws": [draw(0.7, 20, 0.9, r) for r in range(rows)]}}, truncated)

    # Frequencies: of 16 ids, over many seeds, within 5 standard deviations.
    count = 256 if s.tiny else 4096
    few = s.normal(1, 16, scale=1.5).expand(count, 16).contiguous()

    def frequencies(outputs, checks):
        ids = log_probabilities(outputs, checks, "frequencies", few)
        p = (few[0].double() / 1.3).softmax(0)
        seen = torch.bincount(ids, minlength=16).double() / count
        checks.within("frequencies: deviations", ((seen - p).abs() / (p * (1 - p) / count).sqrt()).max().item(), 5)

    s.case("frequencies", {"sample": {"logits": s.input("few", few), "draws": [draw(1.3, 0, 1.0, 31 * r) for r in range(count)]}}, frequencies)


def along_tree(sums):
    """The sum of the rows in f32, by halves of which the first is the larger."""
    if len(sums) == 1:
        return sums[0]
    middle = (len(sums) + 1) // 2
    return along_tree(sums[:middle]) + along_tree(sums[middle:])


def collectives(s):
    units = 8
    for length in [1, 1000, 7168 if not s.tiny else 500] + ([] if s.tiny else [300_000]):
        sums = s.normal(units, length)

        for width in [1, 2, 3] if s.tiny else [1, 2, 3, 4, 5, 8]:
            name = f"tree_reduce of {length}, {width} ranks"

            def judge(outputs, checks, name=name, width=width, sums=sums):
                for rank in range(width):
                    checks.equal(f"{name}, rank {rank}", outputs[f"{name}.{rank}"].view(-1), along_tree(sums))

            s.case(name, {"tree_reduce": {"sums": s.input(f"sums.{length}", sums), "width": width}}, judge)

    x = s.normal(5, 700)
    s.case("gather columns", {"gather_columns": {"x": s.input("columns", x), "counts": [300, 100, 299, 1], "root": 0}},
           lambda outputs, checks: checks.equal("gather columns", outputs["gather columns"], x))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("result")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only-make", action="store_true")
    args = parser.parse_args()
    suite = Suite(args.tiny)
    for make in [elementwise, products, attention, sampling, collectives]:
        make(suite)
    if args.only_make:
        put(args.folder, suite.cases, suite.inputs)
        return 0
    outputs, checks = ask("ops", args.folder, suite.cases, suite.inputs), Checks()
    for judge in suite.judges:
        judge(outputs, checks)
    return checks.end(args.result)


if __name__ == "__main__":
    sys.exit(main())
