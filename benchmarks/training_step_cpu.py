"""Training step, prefill and decode on CPU against transformers at the same shapes, side by side in one run.

    python benchmarks/training_step_cpu.py                        # every setting of the allocator, a few minutes
    python benchmarks/training_step_cpu.py --threads 1 --rounds 7 --allocator tuned

A training step is forward, backward and AdamW (fused), fp32. All subjects have width 256, 4 layers and a tied
vocabulary of 8192; `A` is attention with SwiGLU as in Llama, `M` is Mamba-2 without MLP as in transformers' class.
Subjects take turns, one step each a round, so that a busy machine slows all of them alike: read the ratios. They are
medians of the per-round ratios of wall time; the CPU-time ratios beside them barely feel other processes. The first
round warms up and is left out. glibc's allocator settings are read when a process starts, so each setting runs in a
process of its own. Prints tables, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from longspan.foundation.machine import ALLOCATOR
from taking_turns import Subject, measure, rows_of, show, training

WIDTH, LAYERS, VOCAB, HEADS, STATE = 256, 4, 8192, 4, 128


# Models


def own(pattern: str) -> Any:
    from longspan.models.language_model import LanguageModel, ModelConfig

    mlp: dict[str, Any] = {"mlp": "swiglu", "mlp_width": 688} if "A" in pattern else {"mlp": "none"}
    return LanguageModel(ModelConfig(pattern=pattern, width=WIDTH, heads=HEADS, state=STATE, **mlp), VOCAB, seed=0)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=688,
            vocab_size=VOCAB,
            tie_word_embeddings=True,
            max_position_embeddings=8192,
            attn_implementation="sdpa",
        )
    )


def mamba2(chunk: int) -> Any:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    return Mamba2ForCausalLM(
        Mamba2Config(
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_heads=8,
            head_dim=64,
            expand=2,
            state_size=STATE,
            n_groups=1,
            chunk_size=chunk,
            vocab_size=VOCAB,
            tie_word_embeddings=True,
        )
    )


# Training


def training_subjects(rows: int, context: int) -> list[Subject]:
    tokens = torch.randint(0, VOCAB, (rows, context + 1), generator=torch.Generator().manual_seed(0))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    four_documents = (torch.arange(context) * 4 // context).to(torch.int32).expand(rows, context).contiguous()

    def own_step(name: str, pattern: str, doc_id: torch.Tensor | None, *against: str) -> Subject:
        model = own(pattern)
        optimizer = torch.optim.AdamW(model.parameter_groups(0.1), lr=1e-4, fused=True)

        def loss() -> torch.Tensor:
            nll, num = model.loss(inputs, targets, doc_id)
            return nll / num

        return training(name, model, optimizer, loss, inputs.numel(), against)

    def theirs(name: str, model: Any) -> Subject:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
        model.train()

        def loss() -> torch.Tensor:
            # `shift_labels` are used as they are: one target per position, as on our side.
            return model(inputs, labels=inputs, shift_labels=targets, use_cache=False).loss

        return training(name, model, optimizer, loss, inputs.numel())

    mambas = ("Mamba2 chunk 256 (default)", "Mamba2 chunk 64")
    return [
        own_step("longspan AAAA", "AAAA", None, "Llama sdpa"),
        theirs("Llama sdpa", llama()),
        own_step("longspan MMMM", "MMMM", None, *mambas),
        theirs(mambas[0], mamba2(256)),
        theirs(mambas[1], mamba2(64)),
        own_step("longspan AAAA, 4 isolated documents", "AAAA", four_documents, "Llama sdpa"),
        own_step("longspan MMMM, 4 isolated documents", "MMMM", four_documents, *mambas),
    ]


# Inference


def inference_subjects(prompt: int, new_tokens: int) -> tuple[list[Subject], list[Subject]]:
    tokens = torch.randint(0, VOCAB, (1, prompt), generator=torch.Generator().manual_seed(1))
    step = torch.zeros((1, 1), dtype=torch.long)
    prefill: list[Subject] = []
    decode: list[Subject] = []

    def add(name: str, against: tuple[str, ...], first: Callable[[], Any], following: Callable[[Any], Any]) -> None:
        kept: list[Any] = []

        def run_prefill() -> int:
            kept[:] = [first()]
            return prompt

        def run_decode() -> int:
            for _ in range(new_tokens):
                kept[0] = following(kept[0])
            return new_tokens

        prefill.append(Subject(name, run_prefill, against))
        decode.append(Subject(name, run_decode, against))

    def add_own(pattern: str, *against: str) -> None:
        from longspan.models.matrix_layout import lay_out_for_decoding

        model = own(pattern).eval()
        # As the engine does that asks a model.
        lay_out_for_decoding(model)
        add(
            f"longspan {pattern}",
            against,
            lambda: model.next_logits(tokens, model.initial_state())[1],
            lambda state: model.next_logits(step, state)[1],
        )

    def add_theirs(name: str, model: Any, cache: str) -> None:
        model.eval()

        def following(past: Any) -> Any:
            return getattr(model(step, **{cache: past}, use_cache=True, logits_to_keep=1), cache)

        add(name, (), lambda: getattr(model(tokens, use_cache=True, logits_to_keep=1), cache), following)

    mambas = ("Mamba2 chunk 256 (default)", "Mamba2 chunk 64")
    add_own("AAAA", "Llama sdpa")
    add_theirs("Llama sdpa", llama(), "past_key_values")
    add_own("MMMM", *mambas)
    add_theirs(mambas[0], mamba2(256), "cache_params")
    add_theirs(mambas[1], mamba2(64), "cache_params")
    return prefill, decode


# The run


def one_setting(options: argparse.Namespace) -> dict[str, Any]:
    """Everything under the allocator settings this process was started with."""
    from transformers.utils import logging

    # It warns of missing CUDA kernels, which have no part in a comparison on CPU.
    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    tuned = os.environ.get("GLIBC_TUNABLES", "") == ALLOCATOR
    allocator = "tuned" if tuned else "default"
    print(
        f"\n=== allocator {allocator} (GLIBC_TUNABLES={os.environ.get('GLIBC_TUNABLES', '')!r}), "
        f"{options.threads} threads, torch {torch.__version__}, fp32, median of {options.rounds} rounds ==="
    )
    result: dict[str, Any] = {"allocator": allocator}
    if options.rows:
        subjects = training_subjects(options.rows, options.context)
        measure(subjects, options.rounds)
        result["training"] = rows_of(subjects, options.threads)
        show(f"training step, {options.rows} x {options.context}, forward + backward + AdamW fused", result["training"])
    result["inference"] = []
    for prompt in options.prompts:
        with torch.inference_mode():
            prefill, decode = inference_subjects(prompt, options.new_tokens)
            measure(prefill, options.rounds)
            measure(decode, options.rounds)
        tables = {"prefill": rows_of(prefill, options.threads), "decode": rows_of(decode, options.threads)}
        for kind, rows in tables.items():
            what = f"{kind}, batch 1, prompt {prompt}" + (f", {options.new_tokens} tokens" if kind == "decode" else "")
            show(what, rows)
        result["inference"].append({"prompt": prompt, **tables})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--rows", type=int, default=8, help="rows of a training batch; 0 leaves training out")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 1024, 2048, 4096])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--allocator", choices=["default", "tuned", "both"], default="both")
    parser.add_argument("--as-started", action="store_true", help="measure in this process, whatever its settings")
    options = parser.parse_args()
    if options.as_started:
        print(json.dumps(one_setting(options)))
        return
    settings = []
    for name in ("default", "tuned") if options.allocator == "both" else (options.allocator,):
        environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
        environment["OMP_NUM_THREADS"] = str(options.threads)
        if name == "tuned":
            environment["GLIBC_TUNABLES"] = ALLOCATOR
        command = [sys.executable, *sys.argv, "--as-started"]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            lines = []
            for line in process.stdout:
                if not line.startswith("{"):
                    print(line, end="", flush=True)
                lines.append(line)
        if process.returncode:
            sys.exit(process.returncode)
        settings.append(json.loads(lines[-1]))
    print(
        "\n"
        + json.dumps(
            {
                "benchmark": "training_step_cpu",
                "torch": torch.__version__,
                "threads": options.threads,
                "rounds": options.rounds,
                "shape": [options.rows, options.context],
                "dtype": "fp32",
                "settings": settings,
            }
        )
    )


if __name__ == "__main__":
    main()
