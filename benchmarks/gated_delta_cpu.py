"""Training step of Gated DeltaNet on CPU against transformers' layer of Qwen3-Next and against Mamba-2, side by side.

    python benchmarks/gated_delta_cpu.py                    # about two minutes on a free core
    python benchmarks/gated_delta_cpu.py --threads 2 --rounds 7 --rows 2 --context 2048

A training step is forward, backward and AdamW (fused), fp32. Every subject has width 256, 4 layers without MLP and a
tied vocabulary of 8192. "Qwen3-Next's layer" is our model with transformers' `Qwen3NextGatedDeltaNet` (its torch path)
in the place of each mixer, with the same weights; before anything is timed both losses are checked to be equal.

Subjects take turns, one step each a round, so that a busy machine slows all of them alike: read the ratios. They are
medians of the per-round ratios of wall time; the CPU-time ratios beside them barely feel other processes. The first
round warms up and is left out. Prints a table, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

import torch
from torch import Tensor, nn

from taking_turns import Subject, measure, rows_of, show, training

WIDTH, LAYERS, VOCAB, HEADS, KEY_DIM = 256, 4, 8192, 3, 64
PEER, MAMBA = "Qwen3-Next's layer, transformers", "longspan MMMM, state 128"


class Layer(nn.Module):
    """transformers' layer where a block expects a mixer, with the weights of ours."""

    def __init__(self, mixer: Any) -> None:
        super().__init__()
        from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
        from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

        config = Qwen3NextConfig(
            hidden_size=WIDTH,
            linear_num_key_heads=HEADS,
            linear_num_value_heads=HEADS,
            linear_key_head_dim=KEY_DIM,
            linear_value_head_dim=2 * KEY_DIM,
            rms_norm_eps=mixer.settings.norm_eps,
            num_hidden_layers=1,
            layer_types=["linear_attention"],
        )
        self.layer = Qwen3NextGatedDeltaNet(config, 0)
        sizes = [HEADS * KEY_DIM] * 2 + [2 * HEADS * KEY_DIM] * 2 + [HEADS] * 2
        *qkvz, b, a = (rows.view(HEADS, -1, WIDTH) for rows in mixer.in_proj.weight.detach().split(sizes))
        weights = {
            "in_proj_qkvz.weight": torch.cat(qkvz, 1).flatten(0, 1),
            "in_proj_ba.weight": torch.cat((b, a), 1).flatten(0, 1),
            "conv1d.weight": mixer.conv_weight[:, None],
        }
        weights |= {name: mixer.get_parameter(name) for name in ("A_log", "dt_bias", "norm.weight", "out_proj.weight")}
        self.layer.load_state_dict(weights)

    def forward(self, x_BTD: Tensor, segments: Any, state: Any) -> tuple[Tensor, None]:
        return self.layer(x_BTD), None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from longspan.models.language_model import LanguageModel, ModelConfig

    tokens = torch.randint(0, VOCAB, (options.rows, options.context + 1), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    documents = (torch.arange(options.context) * 4 // options.context).int().expand(options.rows, -1).contiguous()

    def subject(name: str, model: Any, doc_id: Tensor | None, *against: str) -> Subject:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def loss() -> Tensor:
            nll, num = model.loss(inputs, targets, doc_id)
            return nll / num

        return training(name, model, optimizer, loss, inputs.numel(), against)

    def own(letter: str) -> Any:
        config = ModelConfig(pattern=letter * LAYERS, width=WIDTH, heads=4, state=128, mlp="none")
        return LanguageModel(config, VOCAB, seed=0)

    ours, peer = own("D"), own("D")
    for block in peer.blocks:
        block.mixer = Layer(block.mixer)
    with torch.no_grad():
        losses = [float(model.loss(inputs, targets)[0]) / inputs.numel() for model in (ours, peer)]
    assert abs(losses[0] - losses[1]) <= 1e-5, losses
    subjects = [
        subject("longspan DDDD", ours, None, PEER, MAMBA),
        subject("longspan DDDD, 4 isolated documents", own("D"), documents, PEER, MAMBA),
        subject(PEER, peer, None),
        subject(MAMBA, own("M"), None),
        subject("longspan CCCC", own("C"), None, MAMBA),
    ]
    measure(subjects, options.rounds)
    rows = rows_of(subjects, options.threads)
    allocator = os.environ.get("GLIBC_TUNABLES", "")
    title = f"training step, {options.rows} x {options.context}, {options.threads} threads, fp32, torch"
    show(f"{title} {torch.__version__}, GLIBC_TUNABLES={allocator!r}", rows)
    result = {
        "benchmark": "gated_delta_cpu",
        "torch": torch.__version__,
        "threads": options.threads,
        "rounds": options.rounds,
        "shape": [options.rows, options.context],
        "dtype": "fp32",
        "allocator": allocator,
        "training": rows,
    }
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
