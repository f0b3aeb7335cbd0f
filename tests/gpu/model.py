"""Whole models of random weights against Hugging Face transformers, and against themselves at other widths, cuts and by graphs.

    model.py WORK_FOLDER RESULT.json [--tiny]

Two layers of Yi-34B's shape in bf16; smaller ones quantised. The reference is LlamaForCausalLM in float32 with the weights that are
meant (dequantised ones). The bound is that of tests/tests/gpu.rs: at most 1.1 times as far from it as transformers' own bf16.
"""

import argparse
import gc
import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file

from probe import SUITE, Checks, ask

sys.path[:0] = [str(SUITE), str(SUITE.parent / "golden")]
from quantize import quantize  # noqa: E402

BF16_RATIO = 1.1
SHAPES = {
    "yi-34b": {"hidden_size": 7168, "intermediate_size": 20480, "num_attention_heads": 56, "num_key_value_heads": 8, "vocab_size": 64000},
    "small": {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 8000},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 300},
}
QUANTISED = {
    "AWQ int4": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
    "GPTQ int8": {"quant_method": "gptq", "bits": 8, "group_size": 128, "desc_act": False, "sym": True},
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def config(shape):
    return transformers.LlamaConfig(
        **SHAPES[shape], num_hidden_layers=2, head_dim=SHAPES[shape]["hidden_size"] // SHAPES[shape]["num_attention_heads"],
        max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=5e6, hidden_act="silu", tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0)


def random_weights(shape):
    """By name, in bf16 on the CPU: projections that keep the size of what they are given, norms near 1."""
    torch.manual_seed(34)
    with torch.device("meta"):
        names = {name: tensor.shape for name, tensor in transformers.LlamaForCausalLM(config(shape)).state_dict().items()}
    weights = {}
    for name, size in names.items():
        if len(size) == 1:
            tensor = 1 + 0.1 * torch.randn(size, device=DEVICE)
        else:
            scale = 1.0 if "embed" in name else size[1] ** -0.5 * (4.0 if "lm_head" in name else 1.0)
            tensor = torch.randn(size, device=DEVICE) * scale
        weights[name] = tensor.bfloat16().cpu()
    return weights


def save(folder, shape, weights, quantization=None):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    told = json.loads(config(shape).to_json_string())
    told.update(architectures=["LlamaForCausalLM"], model_type="llama", torch_dtype="bfloat16", rope_theta=5e6)
    if quantization:
        told["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(told))


def reference(shape, weights, prompts, dtype):
    """Logits of all positions of each prompt, in float32 on the CPU."""
    torch.backends.cuda.matmul.allow_tf32 = False
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config(shape))
    model.load_state_dict({name: tensor.to(DEVICE, dtype) for name, tensor in weights.items()}, assign=True)
    # What is not in the state: the angles' frequencies.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config(shape)).to(DEVICE)
    model.eval()
    with torch.inference_mode():
        logits = [model(ids[None].long().to(DEVICE)).logits[0].float().cpu() for ids in prompts]
    del model
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
    return logits


def far(found, expected):
    """||found − expected|| / ||expected||; infinite where a number is not finite."""
    if not torch.isfinite(found).all():
        return float("inf")
    return ((found - expected).norm() / expected.norm()).item()


def to_fp8(rows):
    """What E4M3 with a scale for each row stands for."""
    scale = rows.abs().amax(1, keepdim=True) / 448.0
    return (rows / scale).to(torch.float8_e4m3fn).float() * scale


class Prompts:
    def __init__(self, shape, lengths):
        generator = torch.Generator().manual_seed(5)
        self.ids = [torch.randint(3, SHAPES[shape]["vocab_size"], (n,), generator=generator).int() for n in lengths]
        self.names = [f"prompt.{i}" for i in range(len(lengths))]
        self.inputs = dict(zip(self.names, self.ids))

    def whole(self, name):
        """Each prompt in one slice, one after the other."""
        return {"name": name, "want": "logits", "sequences": self.names, "steps": [[[i, len(ids)]] for i, ids in enumerate(self.ids)]}

    def cut(self, name):
        """All at once, in chunks of changing length, so that steps mix chunks behind contexts with single tokens."""
        left, steps, turn = [len(ids) for ids in self.ids], [], 0
        while any(left):
            step = []
            for i, rest in enumerate(left):
                take = min(rest, [1, 70, 513, 200, 7, 1][(turn + i) % 6]) if rest > 1 else rest
                if take:
                    step.append([i, take])
                    left[i] -= take
            steps.append(step)
            turn += 1
        return {"name": name, "want": "logits", "sequences": self.names, "steps": steps}

    def ends(self, run):
        """Where the last slice of each prompt stands among the run's logits."""
        last, row = {}, 0
        for step in run["steps"]:
            for i, _ in step:
                last[i] = row
                row += 1
        return [last[i] for i in range(len(self.ids))]

    def decode(self, name, tokens):
        """Prompts less their last tokens, then these one by one, all sequences together."""
        prefill = [[[i, len(ids) - tokens]] for i, ids in enumerate(self.ids) if len(ids) > tokens]
        together = [[[i, 1] for i, ids in enumerate(self.ids) if len(ids) > tokens]] * tokens
        return {"name": name, "want": "tokens", "sequences": self.names, "steps": prefill + together}


def plain(shape, work, checks, figures, widths):
    lengths = [1, 17, 64, 130] if shape == "tiny" else [1, 17, 512, 3000]
    prompts, weights = Prompts(shape, lengths), random_weights(shape)
    exact = reference(shape, weights, prompts.ids, torch.float32)
    bf16 = reference(shape, weights, prompts.ids, torch.bfloat16)
    last = torch.stack([logits[-1] for logits in exact])
    theirs = far(torch.stack([logits[-1] for logits in bf16]), last)
    figures[f"{shape}: transformers' bf16 error"] = theirs
    save(work / "model", shape, weights)

    tokens = 12 if shape == "tiny" else 40
    groups = []
    for width in widths:
        runs = [prompts.whole(f"whole.{width}"), prompts.cut(f"cut.{width}"), prompts.decode(f"decode.{width}", tokens)]
        groups.append({"width": width, "deterministic": True, "graphs": True, "runs": runs})
    groups.append({"width": 1, "deterministic": True, "graphs": False, "runs": [prompts.decode("decode.eager", tokens)]})
    groups.append({"width": 1, "graphs": True, "runs": [prompts.whole("fast.whole"), prompts.cut("fast.cut"), prompts.decode("fast.decode", tokens)]})
    groups.append({"width": 1, "graphs": False, "runs": [prompts.decode("fast.eager", tokens)]})
    groups.append({"width": 1, "deterministic": True, "fp8": True, "runs": [prompts.whole("fp8.whole")]})
    groups.append({"width": 1, "fp8": True, "runs": [prompts.whole("fp8.fast")]})
    cases = {"model": str(work / "model"), "groups": groups}
    outputs = ask("model", work / "plain", cases, prompts.inputs)

    def ends(name, run):
        return outputs[name][prompts.ends(run)]

    for name in ["whole.1", "fast.whole"]:
        checks.within(f"{shape}, {name}: error", far(outputs[name], last), BF16_RATIO * theirs)
    checks.within(f"{shape}, fast.cut: error", far(ends("fast.cut", prompts.cut("")), last), BF16_RATIO * theirs)
    cut = prompts.cut("")
    checks.equal(f"{shape}: in other cuts", ends("cut.1", cut), outputs["whole.1"])
    for width in widths[1:]:
        checks.equal(f"{shape}: {width} ranks", outputs[f"whole.{width}"], outputs["whole.1"])
        checks.equal(f"{shape}: {width} ranks in other cuts", outputs[f"cut.{width}"], outputs["cut.1"])
    for part in ["ids", "logprobs"]:
        checks.equal(f"{shape}: graphs, {part}", outputs[f"decode.1.{part}"], outputs[f"decode.eager.{part}"])
        checks.equal(f"{shape}: graphs without --deterministic, {part}", outputs[f"fast.decode.{part}"], outputs[f"fast.eager.{part}"])
        for width in widths[1:]:
            checks.equal(f"{shape}: {width} ranks decode, {part}", outputs[f"decode.{width}.{part}"], outputs[f"decode.1.{part}"])

    # What is chosen is what float32 would choose wherever its lead is more than bf16 can blur.
    sequences = [i for i, n in enumerate(lengths) if n > tokens]
    chosen = outputs["decode.1.ids"].view(-1)[len(sequences):].view(tokens, len(sequences)).T
    blur = max((b - a).abs().max().item() for a, b in zip(exact, bf16))
    wrong = clear = 0
    for row, i in enumerate(sequences):
        top = exact[i][-tokens:].topk(2).values
        sure = top[:, 0] - top[:, 1] > 2 * blur
        wrong += (exact[i][-tokens:].argmax(1) != chosen[row])[sure].sum().item()
        clear += sure.sum().item()
    figures[f"{shape}: greedy choices with a clear lead"] = clear
    checks.within(f"{shape}: greedy choices other than float32's, of {clear} with a clear lead", wrong, 0)

    rounded = {}
    for name, tensor in weights.items():
        rounded[name] = tensor.float()
        if "_proj." in name or "lm_head" in name:
            # Row-parallel matrices are cut along k, and every unit's rows have scales of their own.
            units = SHAPES[shape]["num_key_value_heads"] if "o_proj" in name or "down_proj" in name else 1
            parts = tensor.to(DEVICE).float().chunk(units, 1)
            rounded[name] = torch.cat([to_fp8(part) for part in parts], 1).cpu()
    del weights
    meant = torch.stack([logits[-1] for logits in reference(shape, rounded, prompts.ids, torch.float32)])
    figures[f"{shape}: fp8 against the weights as they were"] = far(outputs["fp8.whole"], last)
    checks.within(f"{shape}, fp8 --deterministic: error", far(outputs["fp8.whole"], meant), BF16_RATIO * theirs)
    # Without --deterministic wide products round weights to bf16 after their scales: once more the error of bf16 weights.
    checks.within(f"{shape}, fp8: error", far(outputs["fp8.fast"], meant), 2 * BF16_RATIO * theirs)


def quantised(shape, work, checks, figures, widths):
    prompts, weights = Prompts(shape, [1, 17, 64, 130] if shape == "tiny" else [1, 17, 600]), random_weights(shape)
    for kind, quantization in QUANTISED.items():
        stored, meant = quantize(weights, quantization)
        folder = work / kind.replace(" ", "-")
        save(folder, shape, stored, quantization)
        exact = torch.stack([logits[-1] for logits in reference(shape, meant, prompts.ids, torch.float32)])
        theirs = far(torch.stack([logits[-1] for logits in reference(shape, meant, prompts.ids, torch.bfloat16)]), exact)
        groups = [{"width": width, "deterministic": True, "runs": [prompts.whole(f"whole.{width}"), prompts.cut(f"cut.{width}")]} for width in widths]
        groups.append({"width": 1, "runs": [prompts.whole("fast")]})
        outputs = ask("model", work / "quantised", {"model": str(folder), "groups": groups}, prompts.inputs)
        figures[f"{kind}: transformers' bf16 error on dequantised weights"] = theirs
        checks.within(f"{kind} --deterministic: error", far(outputs["whole.1"], exact), BF16_RATIO * theirs)
        checks.within(f"{kind}: error", far(outputs["fast"], exact), 2 * BF16_RATIO * theirs)
        checks.equal(f"{kind}: in other cuts", outputs["cut.1"][prompts.ends(prompts.cut(""))], outputs["whole.1"])
        for width in widths[1:]:
            checks.equal(f"{kind}: {width} ranks", outputs[f"whole.{width}"], outputs["whole.1"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("result")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    checks, figures = Checks(), {}
    plain("tiny" if args.tiny else "yi-34b", args.folder, checks, figures, [1, 2, 3] if args.tiny else [1, 2, 4, 8])
    quantised("tiny" if args.tiny else "small", args.folder, checks, figures, [1, 2] if args.tiny else [1, 2, 3, 4])
    return checks.end(args.result, figures)


if __name__ == "__main__":
    sys.exit(main())
