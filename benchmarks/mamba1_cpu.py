"""Training step of Mamba-1 on CPU against transformers' Mamba and mambapy, side by side in one run.

    python benchmarks/mamba1_cpu.py                          # three shapes, below four minutes on two free cores
    python benchmarks/mamba1_cpu.py --threads 1 --rounds 5 --shapes 1x256

A training step is forward, backward and AdamW (fused), fp32. Every subject has 4 layers of Mamba-1 without MLP, width
256, state 16 and a tied vocabulary of 8192, the same weights and the same tokens; before anything is timed their losses
are checked to be equal.

transformers computes token by token without kernels, `sequential` here; each of its slices keeps a gradient of the
whole row, so that a step at 8x512 does not finish in minutes. It therefore takes part in the shapes of at most
`--sequential-tokens` tokens only. With `use_mambapy` it calls mambapy's parallel scan; `mambapy` is that library's own
model. All states of a layer lie in memory there, so they stop at `--pscan-tokens`. Both limits are printed.

Subjects take turns, one step each a round, so that a busy machine slows all of them alike: read the ratios. They are
medians of the per-round ratios of wall time; the CPU-time ratios beside them barely feel other processes. The first
round warms up and is left out. Prints a table per shape, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taking_turns import Subject, measure, rows_of, show, training

WIDTH, LAYERS, VOCAB, STATE = 256, 4, 8192, 16
SEQUENTIAL, PSCAN, MAMBAPY = "transformers, sequential", "transformers, use_mambapy", "mambapy"
Loss = Callable[[Tensor, Tensor], Tensor]


def longspan_model() -> Any:
    from longspan.models.language_model import LanguageModel, ModelConfig

    config = {"pattern": "m" * LAYERS, "width": WIDTH, "mlp": "none", "mixers": {"m": {"mamba1_state": STATE}}}
    return LanguageModel(ModelConfig.parse(config, "model"), VOCAB, seed=0)


def theirs(model: Any, mixer_norm: str, layers: str, embedding: str, norm: str) -> dict[str, Tensor]:
    """Our weights under the names of another library."""
    weights = {embedding: model.embedding.weight, norm: model.norm.weight}
    for i, block in enumerate(model.blocks):
        mixer, prefix = block.mixer, f"{layers}.{i}"
        weights[f"{prefix}.{mixer_norm}"] = block.mixer_norm.weight
        weights |= {f"{prefix}.mixer.{name}": getattr(mixer, name) for name in ("A_log", "D")}
        for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
            weights[f"{prefix}.mixer.{name}.weight"] = getattr(mixer, name).weight
        weights[f"{prefix}.mixer.dt_proj.bias"] = mixer.dt_bias
        weights[f"{prefix}.mixer.conv1d.weight"] = mixer.conv_weight[:, None]
        weights[f"{prefix}.mixer.conv1d.bias"] = mixer.conv_bias
    return weights


def transformers_model(ours: Any, use_mambapy: bool) -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        state_size=STATE,
        vocab_size=VOCAB,
        tie_word_embeddings=True,
        use_mambapy=use_mambapy,
    )
    model = MambaForCausalLM(config).train()
    names = ("norm.weight", "backbone.layers", "backbone.embeddings.weight", "backbone.norm_f.weight")
    missing = model.load_state_dict(theirs(ours, *names), strict=False)
    assert missing.missing_keys == ["lm_head.weight"]
    assert not missing.unexpected_keys
    return model


class MambapyModel(nn.Module):
    """mambapy's layers between an embedding and the tied head."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        from mambapy.mamba import Mamba, MambaConfig, RMSNorm

        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.mamba = Mamba(MambaConfig(d_model=WIDTH, n_layers=LAYERS, d_state=STATE))
        self.norm = RMSNorm(WIDTH, 1e-5)
        self.load_state_dict(theirs(ours, "norm.weight", "mamba.layers", "embedding.weight", "norm.weight"))

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(self.norm(self.mamba(self.embedding(inputs))), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def subjects_of(inputs: Tensor, targets: Tensor, sequential: bool, pscan: bool) -> list[Subject]:
    """Every subject that takes part, checked to start from the same loss."""
    ours = longspan_model()

    def loss_of_ours(inputs: Tensor, targets: Tensor) -> Tensor:
        nll, num = ours.loss(inputs, targets)
        return nll / num

    losses: dict[str, tuple[nn.Module, Loss]] = {}

    def add_transformers(name: str, use_mambapy: bool) -> None:
        model = transformers_model(ours, use_mambapy)
        # `shift_labels` are used as they are: one target per position, as on our side.
        losses[name] = (
            model,
            lambda inputs, targets: model(inputs, labels=inputs, shift_labels=targets, use_cache=False).loss,
        )

    if sequential:
        add_transformers(SEQUENTIAL, use_mambapy=False)
    if pscan:
        add_transformers(PSCAN, use_mambapy=True)
        mambapy = MambapyModel(ours)
        losses[MAMBAPY] = (mambapy, mambapy.loss)
    others = tuple(losses)
    losses = {"longspan": (ours, loss_of_ours), **losses}

    with torch.no_grad():
        first = {name: float(loss(inputs[:1, :64], targets[:1, :64])) for name, (_, loss) in losses.items()}
    if max(first.values()) - min(first.values()) > 1e-4:
        sys.exit(f"the subjects do not compute the same: losses {first}")

    def subject(name: str, model: nn.Module, loss: Loss) -> Subject:
        groups = ours.parameter_groups(0.1) if model is ours else model.parameters()
        optimizer = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.1, fused=True)
        against = others if name == "longspan" else ()
        return training(name, model, optimizer, lambda: loss(inputs, targets), inputs.numel(), against)

    return [subject(name, *pair) for name, pair in losses.items()]


def shape(text: str) -> tuple[int, int]:
    rows, context = text.split("x")
    return int(rows), int(context)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--shapes", type=shape, nargs="*", default=[(1, 256), (2, 512), (8, 512)], metavar="ROWSxCONTEXT"
    )
    parser.add_argument("--sequential-tokens", type=int, default=256, help="largest batch for the sequential path")
    parser.add_argument("--pscan-tokens", type=int, default=1024, help="largest batch for the two with mambapy's scan")
    options = parser.parse_args()
    from transformers.utils import logging

    # It warns of missing CUDA kernels, which have no part in a comparison on CPU.
    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    print(
        f"{options.threads} threads, torch {torch.__version__}, fp32, median of {options.rounds} rounds, "
        f"GLIBC_TUNABLES={os.environ.get('GLIBC_TUNABLES', '')!r}; `{SEQUENTIAL}` up to "
        f"{options.sequential_tokens} tokens a step, `{PSCAN}` and `{MAMBAPY}` up to {options.pscan_tokens}"
    )
    shapes = []
    for rows, context in options.shapes:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, VOCAB, (rows, context + 1), generator=generator)
        inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        num = inputs.numel()
        subjects = subjects_of(inputs, targets, num <= options.sequential_tokens, num <= options.pscan_tokens)
        measure(subjects, options.rounds)
        table = rows_of(subjects, options.threads)
        show(f"training step, {rows} x {context}, forward + backward + AdamW fused", table)
        shapes.append({"shape": [rows, context], "training": table})
    print(
        "\n"
        + json.dumps(
            {
                "benchmark": "mamba1_cpu",
                "torch": torch.__version__,
                "threads": options.threads,
                "rounds": options.rounds,
                "dtype": "fp32",
                "tunables": os.environ.get("GLIBC_TUNABLES", ""),
                "largest_resident_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
                "shapes": shapes,
            }
        )
    )


if __name__ == "__main__":
    main()
