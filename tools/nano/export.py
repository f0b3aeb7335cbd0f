"""Writes a checkpoint of train.py as a model directory in the form of Yi's first release: bf16 safetensors, config.json,
generation_config.json and tokenizer_config.json with the ChatML template. prepare.py has put tokenizer.json there."""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from model import Shape

CHAT_TEMPLATE = (
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}"
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("/tmp/nano"))
    parser.add_argument("--model", type=Path, default=Path("models/yi-nano"))
    args = parser.parse_args()

    checkpoint = torch.load(args.work / "checkpoint.pt", map_location="cpu", weights_only=True)
    tensors = {name: t.to(torch.bfloat16).contiguous() for name, t in checkpoint["model"].items()}
    save_file(tensors, args.model / "model.safetensors", metadata={"format": "pt"})
    (args.model / "model.safetensors").chmod(0o644)

    def write(name, content):
        (args.model / name).write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n")

    shape = Shape()
    write("config.json", {
        "architectures": ["YiForCausalLM"], "model_type": "Yi", "torch_dtype": "bfloat16",
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
        "hidden_act": "silu", "hidden_size": shape.hidden, "intermediate_size": shape.ffn,
        "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "vocab_size": shape.vocab, "max_position_embeddings": shape.max_positions, "rope_theta": shape.theta,
        "rms_norm_eps": shape.eps, "initializer_range": 0.02, "tie_word_embeddings": False, "use_cache": True,
    })
    write("generation_config.json", {
        "bos_token_id": 1, "eos_token_id": [2, 7], "pad_token_id": 0,
        "do_sample": True, "temperature": 0.6, "top_k": 40, "top_p": 0.8, "max_new_tokens": 512,
    })
    special = json.loads((args.model / "tokenizer.json").read_text())["added_tokens"]
    write("tokenizer_config.json", {
        "add_bos_token": False, "add_eos_token": False,
        "added_tokens_decoder": {str(t.pop("id")): t for t in special},
        "bos_token": "<|startoftext|>", "eos_token": "<|im_end|>", "pad_token": "<unk>", "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False,
        "model_max_length": shape.max_positions, "tokenizer_class": "PreTrainedTokenizerFast",
    })
    print({k: v for k, v in checkpoint.items() if k != "model"})


if __name__ == "__main__":
    main()
