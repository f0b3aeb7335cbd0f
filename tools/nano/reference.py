"""Loads a checkpoint, with Yi's or LLaMA's tensor names, into transformers' LlamaForCausalLM: the reference for numbers.

It goes through `from_pretrained`, as a user's does: `.to(torch.bfloat16)` on a model made otherwise would also round RoPE's
inverse frequencies, and the angles at position 4,000 would be off by whole radians.
"""

import json
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM


def load_reference(directory, dtype=torch.float32, attention="sdpa"):
    config = json.loads((directory / "config.json").read_text())
    config.update(architectures=["LlamaForCausalLM"], model_type="llama")
    tensors = {}
    for file in sorted(directory.glob("model*.safetensors")):
        for name, tensor in load_file(file).items():
            tensors[name.replace(".ln1.", ".input_layernorm.").replace(".ln2.", ".post_attention_layernorm.")] = tensor
    with tempfile.TemporaryDirectory() as at:
        (Path(at) / "config.json").write_text(json.dumps(config))
        save_file(tensors, Path(at) / "model.safetensors", metadata={"format": "pt"})
        model, report = LlamaForCausalLM.from_pretrained(at, dtype=dtype, attn_implementation=attention,
                                                         output_loading_info=True)
    assert not any(report.values()), report
    assert {p.dtype for p in model.parameters()} == {dtype} and model.model.rotary_emb.inv_freq.dtype == torch.float32
    return model.eval()
