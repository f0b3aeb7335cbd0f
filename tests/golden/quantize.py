"""Quantises the projections of a model to the nearest values, in the layouts that AutoAWQ and AutoGPTQ write.

AWQ "gemm" (WQLinear_GEMM.from_linear, github.com/casper-hansen/AutoAWQ, awq/modules/linear/gemm.py): int32 words of eight
outputs in the order AWQ_ORDER, for qweight [k, n/8] and qzeros [groups, n/8]. GPTQ (QuantLinear.pack, github.com/AutoGPTQ,
auto_gptq/nn_modules/qlinear/qlinear_cuda_old.py): words of 32/bits inputs for qweight [k*bits/32, n], of outputs for qzeros
[groups, n*bits/32], where zero points are stored less one unless the format is "gptq_v2". Scales [groups, n] are float16.
"""

import torch

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def quantize(tensors, config):
    """The tensors with projections quantised, and all in float32 with projections dequantised."""
    stored, dequantised = {}, {}
    for name, tensor in tensors.items():
        if "_proj." not in name:
            stored[name], dequantised[name] = tensor, tensor.float()
            continue
        module = name.removesuffix("weight")
        values, scales, zeros, group_of = to_groups(tensor.float(), config)
        dequantised[name] = (values - zeros[:, group_of]).float() * scales.float()[:, group_of]
        stored[module + "scales"] = scales.T.contiguous()
        if config["quant_method"] == "awq":
            stored[module + "qweight"] = pack(values.T, 4, AWQ_ORDER)
            stored[module + "qzeros"] = pack(zeros.T, 4, AWQ_ORDER)
        else:
            order = range(32 // config["bits"])
            less = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
            stored[module + "qweight"] = pack(values, config["bits"], order).T.contiguous()
            stored[module + "qzeros"] = pack(zeros.T - less, config["bits"], order)
            stored[module + "g_idx"] = group_of.int()
            if config["sym"]:
                stored[module + "bias"] = torch.zeros(tensor.shape[0], dtype=torch.float16)
    return stored, dequantised


def to_groups(weight, config):
    """Values [n, k], scales and zero points [n, groups], and the group of each column."""
    n, k = weight.shape
    size = k if config["group_size"] == -1 else config["group_size"]
    group_of = torch.arange(k) // size
    most = 2 ** config["bits"] - 1
    groups = weight.split(size, dim=1)
    low = torch.stack([g.amin(1) for g in groups], 1).clamp(max=0)
    high = torch.stack([g.amax(1) for g in groups], 1).clamp(min=0)
    if config.get("sym"):
        high = torch.maximum(high, -low)
        low = -high
    scales = ((high - low) / most).half()
    zeros = torch.full(scales.shape, (most + 1) // 2) if config.get("sym") else (-low / scales.float()).round().clamp(0, most)
    values = ((weight / scales.float()[:, group_of]).round() + zeros[:, group_of]).clamp(0, most)
    return values.int(), scales, zeros.int(), group_of


def pack(numbers, bits, order):
    """Packs the last dimension into int32 words: place i of a word holds number order[i] of its run."""
    words = numbers.long().unflatten(-1, (-1, 32 // bits))
    assert words.min() >= 0 and words.max() < 2 ** bits
    packed = sum(words[..., source] << (bits * place) for place, source in enumerate(order))
    return torch.where(packed >= 2 ** 31, packed - 2 ** 32, packed).int().contiguous()
