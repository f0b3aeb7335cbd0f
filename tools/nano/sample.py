"""Prints greedy continuations by transformers of a few prompts: what the model card shows."""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer

from reference import load_reference

PROMPTS = ["In the beginning", "Blessed are", "Then Peter", "昔人已乘黃鶴去", "《春曉》孟浩然\n", "明月",
           "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n",
           "<|im_start|>user\nTell me about David.<|im_end|>\n<|im_start|>assistant\n",
           "<|im_start|>user\n請寫一首詩，題為《秋夜》。<|im_end|>\n<|im_start|>assistant\n"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("models/yi-nano"))
    parser.add_argument("--tokens", type=int, default=80)
    args = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    model = load_reference(args.model)
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt).ids])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.tokens, do_sample=False,
                             eos_token_id=[2, 7], pad_token_id=0)
        print(f"--- {prompt!r}\n{tokenizer.decode(out[0, ids.shape[1]:].tolist(), skip_special_tokens=False)}")


if __name__ == "__main__":
    main()
