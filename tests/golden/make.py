"""Makes the golden files of the Rust tests with Hugging Face transformers on the CPU. Run by hand, from the repository root:

    nice -n 19 python tests/golden/make.py [MODEL ...]          (needs tools/nano/requirements.txt, a few minutes)

For the bundled yi-nano and for tiny models of random weights, which are written here first, `<model>/golden.safetensors`
holds `prompt` (int32 ids) and `logits` (float32, one row for each of POSITIONS) of LlamaForCausalLM in float32, and
`<model>/golden.json` holds what goes with it: how far transformers' own bf16 runs are from those logits (||a-b|| / ||b||),
and for yi-nano greedy continuations and rendered chats. `yi-nano/prompt.txt` is the text of yi-nano's prompt. The values of a
quantised model are those of its dequantised weights in float32.
"""

import json
import sys
import tempfile
from pathlib import Path

import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

GOLDEN = Path(__file__).resolve().parent
ROOT = GOLDEN.parents[1]
sys.path.insert(0, str(ROOT / "tools/nano"))
from model import Shape, Yi  # noqa: E402
from quantize import quantize  # noqa: E402
from reference import load_reference  # noqa: E402

YI_NANO = ROOT / "models/yi-nano"
POSITIONS = [0, 1, 64, 1000, 4200]
PROMPT_LENGTH = 4224
GREEDY_TOKENS = 64
# Chosen for a clear lead of every greedy token, so that other implementations in float32 can't but agree.
GREEDY_PROMPTS = ["In the beginning", "Blessed are", "Then Peter", "昔人已乘黃鶴去", "千山", "《春曉》孟浩然\n",
                  "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
                  "<|im_start|>user\n你好<|im_end|>\n<|im_start|>assistant\n"]
CHATS = [
    [{"role": "user", "content": "Hello!"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "續寫：白日依山盡，"},
     {"role": "assistant", "content": "黃河入海流。"}, {"role": "user", "content": " Go on.\n"}],
]

CLASSIC = {"hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "max_position_embeddings": 8192,
           "attention_bias": False, "use_cache": True}
RANDOM_MODELS = {
    # Seven query heads to a KV head as in Yi-34B, Yi's names, two files, a vocabulary and an FFN that nothing divides well.
    "gqa7": (torch.bfloat16, {
        **CLASSIC, "architectures": ["YiForCausalLM"], "model_type": "Yi", "torch_dtype": "bfloat16",
        "hidden_size": 112, "intermediate_size": 200, "num_hidden_layers": 2, "num_attention_heads": 14,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 211, "rope_theta": 5000000.0, "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False}),
    # A KV head for every query head, float32, LLaMA's names, heads * head_dim != hidden, another theta and epsilon.
    "mha": (torch.float32, {
        **CLASSIC, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
        "hidden_size": 64, "intermediate_size": 120, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 4, "head_dim": 24, "vocab_size": 200, "rope_theta": 10000.0, "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False}),
    # Tied embeddings, float16, no head_dim, and the config.json that transformers 5 writes.
    "tied": (torch.float16, {
        **CLASSIC, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "float16",
        "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 256, "rope_parameters": {"rope_theta": 1000000.0, "rope_type": "default"},
        "rms_norm_eps": 1e-05, "tie_word_embeddings": True}),
}
QUANTISED = {
    **CLASSIC, "torch_dtype": "float16", "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 20, "vocab_size": 101, "rope_theta": 5000000.0,
    "rms_norm_eps": 1e-05, "tie_word_embeddings": False}
QUANTISED_MODELS = {
    # As Yi-34B-Chat-4bits. A unit has 80 columns of o_proj, so that its border cuts a group, and 20 keys, which eight does not
    # divide, so that it cuts words.
    "awq4": {**QUANTISED, "architectures": ["YiForCausalLM"], "model_type": "Yi", "quantization_config": {
        "quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}},
    # As Yi-34B-Chat-8bits, with biases of zeros as AutoGPTQ writes them; the last group of o_proj is shorter than the others.
    "gptq8": {**QUANTISED, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "quantization_config": {
        "quant_method": "gptq", "bits": 8, "group_size": 64, "desc_act": False, "sym": True, "damp_percent": 0.01,
        "static_groups": False, "true_sequential": True, "model_name_or_path": None, "model_file_base_name": None}},
    # A group for every row, and zero points as they are; heads that GPUs take.
    "gptq4": {**QUANTISED, "head_dim": 16, "architectures": ["LlamaForCausalLM"], "model_type": "llama", "quantization_config": {
        "quant_method": "gptq", "bits": 4, "group_size": -1, "desc_act": False, "sym": False,
        "checkpoint_format": "gptq_v2"}},
}
TWO_FILES = ["gqa7", "awq4", "gptq8"]


def write_json(path, content):
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n")


def shape_of(config):
    heads = config["num_attention_heads"]
    return Shape(hidden=config["hidden_size"], layers=config["num_hidden_layers"], heads=heads,
                 kv_heads=config["num_key_value_heads"], head_dim=config.get("head_dim", config["hidden_size"] // heads),
                 ffn=config["intermediate_size"], vocab=config["vocab_size"], eps=config["rms_norm_eps"],
                 theta=config.get("rope_theta") or config["rope_parameters"]["rope_theta"])


def random_tensors(config):
    """Scaled so that attention scores and logits have a standard deviation of about 2, with norms far from 1."""
    gains = {"embed_tokens": 1, "q_proj": 1.5, "k_proj": 1.5, "lm_head": 2}
    tensors = {}
    for name, like in Yi(shape_of(config)).state_dict().items():
        if like.dim() == 1:
            tensors[name] = 0.5 + torch.rand(like.shape)
        else:
            part = name.split(".")[-2]
            fan_in = 1 if part == "embed_tokens" else like.shape[1]
            tensors[name] = torch.randn(like.shape) * gains.get(part, 1) / fan_in ** 0.5
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
        tensors["model.embed_tokens.weight"] *= 2 / config["hidden_size"] ** 0.5
    return tensors


def random_model(name, dtype, config):
    torch.manual_seed(len(name))
    tensors = {name: t.to(dtype).contiguous() for name, t in random_tensors(config).items()}
    if config["model_type"] == "llama":
        tensors = {n.replace(".ln1.", ".input_layernorm.").replace(".ln2.", ".post_attention_layernorm."): t
                   for n, t in tensors.items()}
    return tensors


def write_model(directory, config, tensors):
    directory.mkdir(exist_ok=True)
    write_json(directory / "config.json", config)
    names = list(tensors)
    parts = {"model.safetensors": names}
    if directory.name in TWO_FILES:  # the cut goes through a layer
        half = len(names) // 2
        parts = {f"model-0000{i + 1}-of-00002.safetensors": part for i, part in enumerate([names[:half], names[half:]])}
        write_json(directory / "model.safetensors.index.json", {
            "metadata": {"total_size": sum(t.nbytes for t in tensors.values())},
            "weight_map": {name: file for file, part in parts.items() for name in part}})
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)


def plain_torch_logits(directory, ids):
    """The same model by tools/nano/model.py: shows that transformers took theta and everything else from config.json."""
    plain = Yi(shape_of(json.loads((directory / "config.json").read_text())))
    tensors = {}
    for file in directory.glob("model*.safetensors"):
        tensors.update(load_file(file))
    tensors = {n.replace("input_layernorm", "ln1").replace("post_attention_layernorm", "ln2"): t.float()
               for n, t in tensors.items()}
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    plain.load_state_dict(tensors)
    return plain(ids[None])[0, POSITIONS]


def logits_of(model, ids):
    """The logits at POSITIONS, without computing those of the others."""
    hidden = model.model(ids[None], use_cache=False).last_hidden_state[0, POSITIONS]
    return model.lm_head(hidden).float()


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def greedy(model, tokenizer, prompt):
    """GREEDY_TOKENS tokens, an end-of-text among them or not, and the smallest lead that a chosen token had."""
    ids = tokenizer.encode(prompt).ids
    generated, smallest_gap = [], float("inf")
    for _ in range(GREEDY_TOKENS):
        top = model(torch.tensor([ids + generated]), use_cache=False).logits[0, -1].topk(2)
        smallest_gap = min(smallest_gap, (top.values[0] - top.values[1]).item())
        generated.append(top.indices[0].item())
    return {"prompt": prompt, "prompt_ids": ids, "ids": generated, "smallest_gap": round(smallest_gap, 5),
            "text": tokenizer.decode(generated, skip_special_tokens=False)}


def make_golden(checkpoint, name, ids, extra):
    ids = torch.tensor(ids)
    reference = load_reference(checkpoint, attention="eager")
    logits = logits_of(reference, ids)
    difference = relative_error(plain_torch_logits(checkpoint, ids), logits)
    assert difference < 1e-4, difference
    bf16 = {}
    for attention in ["sdpa", "eager"]:
        rounded = logits_of(load_reference(checkpoint, torch.bfloat16, attention), ids)
        bf16[attention] = {"error": relative_error(rounded, logits),
                           "error_at": [relative_error(a, b) for a, b in zip(rounded, logits)]}
    save_file({"prompt": ids.int(), "logits": logits.contiguous()}, GOLDEN / name / "golden.safetensors")
    (GOLDEN / name / "golden.safetensors").chmod(0o644)
    write_json(GOLDEN / name / "golden.json", {
        "positions": POSITIONS, "bf16": bf16, "plain_torch_error": difference, "logits_std": logits.std(-1).tolist(),
        **extra(reference),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, tokenizers)}})
    print(f"{name}: logits std {logits.std().item():.2f}, plain torch differs by {difference:.1e}, "
          f"bf16 by {bf16['sdpa']['error']:.4f} (sdpa), {bf16['eager']['error']:.4f} (eager)")


def random_ids(config):
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, config["vocab_size"], (PROMPT_LENGTH,), generator=generator).tolist()


def make_random(name):
    dtype, config = RANDOM_MODELS[name]
    write_model(GOLDEN / name, config, random_model(name, dtype, config))
    make_golden(GOLDEN / name, name, random_ids(config), lambda _: {})


def make_quantised(name):
    config = QUANTISED_MODELS[name]
    stored, dequantised = quantize(random_model(name, torch.float16, config), config["quantization_config"])
    write_model(GOLDEN / name, config, stored)
    with tempfile.TemporaryDirectory() as plain:
        plain_config = {key: value for key, value in config.items() if key != "quantization_config"}
        write_model(Path(plain), plain_config, dequantised)
        make_golden(Path(plain), name, random_ids(config), lambda _: {})


def make_yi_nano():
    tokenizer = tokenizers.Tokenizer.from_file(str(YI_NANO / "tokenizer.json"))
    chat_tokenizer = PreTrainedTokenizerFast.from_pretrained(YI_NANO)
    ids = tokenizer.encode((GOLDEN / "yi-nano/prompt.txt").read_text()).ids
    assert len(ids) > POSITIONS[-1], len(ids)
    make_golden(YI_NANO, "yi-nano", ids, lambda model: {
        "greedy": [greedy(model, tokenizer, p) for p in GREEDY_PROMPTS],
        "chats": [{"messages": m, "text": chat_tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True)}
                  for m in CHATS]})


@torch.no_grad()
def main():
    for name in sys.argv[1:] or [*RANDOM_MODELS, *QUANTISED_MODELS, "yi-nano"]:
        if name in RANDOM_MODELS:
            make_random(name)
        elif name in QUANTISED_MODELS:
            make_quantised(name)
        else:
            make_yi_nano()


if __name__ == "__main__":
    main()
