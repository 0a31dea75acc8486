"""The one workload that every peer and this project are measured on.

`shapes(name)` gives the tensor shapes of a real model; `initial(name)` its
float32 state dict, the same on every machine; `trained(state, k)` is the
"training" of client k: it adds k+1 to every element, so that after one FedAvg
round over n equally weighted clients every element has moved by (n+1)/2, which
`check` verifies. No compute is spent on training, so a round's time is all
overhead: serialise, send, receive, aggregate, store.
"""

from __future__ import annotations

import numpy as np


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    if name == "bare":  # 16 bytes: what a process takes without a model
        return {"weight": (4,)}
    if name == "tiny":  # 262 thousand parameters, 1.05 MB: what a round takes besides moving bytes
        return {f"layer{i}.weight": (256, 256) for i in range(4)}
    if name == "resnet18":  # 11.7 M parameters, 46.8 MB
        out = {"conv1.weight": (64, 3, 7, 7), "bn1.weight": (64,), "bn1.bias": (64,)}
        cin = 64
        for i, c in enumerate([64, 128, 256, 512], 1):
            for b in range(2):
                out[f"layer{i}.{b}.conv1.weight"] = (c, cin if b == 0 else c, 3, 3)
                out[f"layer{i}.{b}.conv2.weight"] = (c, c, 3, 3)
                for j in (1, 2):
                    out[f"layer{i}.{b}.bn{j}.weight"] = (c,)
                    out[f"layer{i}.{b}.bn{j}.bias"] = (c,)
                if b == 0 and c != cin:
                    out[f"layer{i}.{b}.downsample.weight"] = (c, cin, 1, 1)
            cin = c
        return out | {"fc.weight": (1000, 512), "fc.bias": (1000,)}
    layers, d, vocab, ctx = {
        "gpt2": (12, 768, 50257, 1024),  # 124 M parameters, 498 MB
        "gpt2-medium": (24, 1024, 50257, 1024),  # 355 M parameters, 1.42 GB
        "gpt2-xl": (48, 1600, 50257, 1024),  # 1.56 B parameters, 6.2 GB
    }[name]
    out = {"wte.weight": (vocab, d), "wpe.weight": (ctx, d)}
    for i in range(layers):
        out |= {
            f"h.{i}.ln_1.weight": (d,),
            f"h.{i}.ln_1.bias": (d,),
            f"h.{i}.attn.c_attn.weight": (d, 3 * d),
            f"h.{i}.attn.c_attn.bias": (3 * d,),
            f"h.{i}.attn.c_proj.weight": (d, d),
            f"h.{i}.attn.c_proj.bias": (d,),
            f"h.{i}.ln_2.weight": (d,),
            f"h.{i}.ln_2.bias": (d,),
            f"h.{i}.mlp.c_fc.weight": (d, 4 * d),
            f"h.{i}.mlp.c_fc.bias": (4 * d,),
            f"h.{i}.mlp.c_proj.weight": (4 * d, d),
            f"h.{i}.mlp.c_proj.bias": (d,),
        }
    return out | {"ln_f.weight": (d,), "ln_f.bias": (d,)}


def initial(name: str) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {k: rng.standard_normal(s, dtype=np.float32) for k, s in shapes(name).items()}


def trained(state: dict[str, np.ndarray], client: int) -> dict[str, np.ndarray]:
    return {k: v + np.float32(client + 1) for k, v in state.items()}


def check(before, after, clients: int) -> float:
    """Largest deviation from the exact average; raises if a name or shape is lost."""
    assert before.keys() == after.keys()
    worst = 0.0
    for k, v in before.items():
        assert v.shape == tuple(after[k].shape), k
        worst = max(worst, float(np.abs(np.asarray(after[k]) - v - (clients + 1) / 2).max()))
    return worst
