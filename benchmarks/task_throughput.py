"""Tasks: items a second, asking in batches against one by one, and the training step of copying against transformers.

    python benchmarks/task_throughput.py                 # the shapes of `copying variant=cpu`, minutes
    python benchmarks/task_throughput.py --paper         # hidden 1024, 12 layers, context 220; with --device cuda

Three parts, each in turns (see `taking_turns`), fp32, batches of the same strings for everybody:

1. Strings drawn a second, for every registered task at its own defaults (short rows where those are thousands long).
2. Answers written a second: all prompts of one length at once (`generate`) against one after the other with the same
   state cache; and prompts with a common beginning against the same with nothing shared.
3. Trained positions a second: the study's RoPE Transformer and Mamba-1 against transformers' GPT-NeoX and Mamba with as
   many layers, the same width, heads, state and MLP; forward, backward and AdamW. Parameters are printed beside it.

Prints tables, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from longspan.corpus.packing import PackingConfig
from longspan.corpus.tasks import Task, TaskBatches, make_task, registered
from longspan.engines.base import Sampling
from longspan.engines.native import NativeEngine
from longspan.models.language_model import IGNORE, LanguageModel, ModelConfig
from taking_turns import Subject, count, measure, rows_of, show

SHORT = {
    "induction": {"min_length": 64, "max_length": 64},
    "selective_copy": {"min_length": 256, "max_length": 256},
    "mqar": {"vocab_size": 8192, "length": 256, "pairs": [16]},
}


def drawing(task: Task, number: int) -> Callable[[], int]:
    def run() -> int:
        generator = np.random.default_rng(0)
        for _ in range(number):
            task.example(generator, task.draw_size(generator, 0))
        return number

    return run


def one_by_one(engine: NativeEngine, prompts: list[np.ndarray], sampling: Sampling) -> Callable[[], int]:
    def run() -> int:
        return sum(len(engine.generate([prompt], sampling)[0].tokens) for prompt in prompts)

    return run


def together(engine: NativeEngine, prompts: list[np.ndarray], sampling: Sampling) -> Callable[[], int]:
    def run() -> int:
        return sum(len(answer.tokens) for answer in engine.generate(prompts, sampling))

    return run


def stepping(
    model: torch.nn.Module, batches: TaskBatches, loss: Callable[..., torch.Tensor], device: str
) -> Callable[[], int]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def run() -> int:
        batch = next(batches)
        tokens, targets = (torch.from_numpy(part).long().to(device) for part in (batch.tokens, batch.targets))
        loss(model, tokens, targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device != "cpu":
            torch.cuda.synchronize()
        return tokens.numel()

    return run


def own_loss(model: LanguageModel, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    nll, number = model.loss(tokens, targets)
    return nll / number


def their_loss(model: Any, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=tokens, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)


def peers(options: argparse.Namespace, vocab: int) -> dict[str, torch.nn.Module]:
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    neox = GPTNeoXConfig(
        vocab_size=vocab,
        hidden_size=options.width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        intermediate_size=options.mlp_width,
    )
    mamba = MambaConfig(
        vocab_size=vocab, hidden_size=options.width, num_hidden_layers=options.layers, state_size=options.state
    )
    return {"GPT-NeoX (transformers)": GPTNeoXForCausalLM(neox), "Mamba (transformers)": MambaForCausalLM(mamba)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--paper", action="store_true")
    parser.add_argument("--strings", type=int, default=64, help="prompts of part 2")
    parser.add_argument("--length", type=int, default=20, help="letters of the strings of part 2")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    small = {"width": 64, "layers": 2, "heads": 4, "state": 16, "mlp_width": 256, "context": 64, "rows": 32}
    paper = {"width": 1024, "layers": 12, "heads": 16, "state": 32, "mlp_width": 4096, "context": 220, "rows": 64}
    for name, value in (paper if options.paper else small).items():
        setattr(options, name, value)
    print(f"{options.threads} threads, torch {torch.__version__}, fp32, {options.device}, {options.rounds} rounds")
    found: dict[str, Any] = {}

    tasks = {name: make_task({"task": name, **SHORT.get(name, {})}, "task") for name in sorted(registered())}
    drawn = [Subject(name, drawing(task, 500)) for name, task in tasks.items()]
    measure(drawn, options.rounds)
    found["strings"] = rows_of(drawn, 1)
    show("strings drawn a second (the column says tok/s)", found["strings"])

    task = tasks["copy"]
    tokenizer, generator = task.tokenizer(), np.random.default_rng(0)
    shape = {"width": options.width, "heads": options.heads, "state": options.state, "mlp": "gelu"}
    shape |= {"mlp_width": options.mlp_width, "norm": "layernorm", "tied": False}
    answers: list[Subject] = []
    for letter in "AM":
        config = ModelConfig(pattern=letter * options.layers, mamba_head_dim=16, **shape)
        model = LanguageModel(config, tokenizer.vocab_size)
        engine = NativeEngine(
            model, tokenizer, markers=True, isolation="full", fingerprint=letter, device=options.device
        )
        sampling = Sampling(max_new_tokens=options.length + 1, stop_at_boundary=False)
        examples = [task.example(generator, options.length) for _ in range(options.strings)]
        prompts = [example.inputs[: example.num_given] for example in examples]
        shots = np.concatenate([task.example(generator, options.length).inputs for _ in range(8)])
        shared = [np.concatenate([shots, prompt]) for prompt in prompts]
        for kind, some in (("", prompts), (" after 8 shared examples", shared)):
            slow = Subject(f"{letter}{kind}, one by one", one_by_one(engine, some, sampling))
            answers += [slow, Subject(f"{letter}{kind}, together", together(engine, some, sampling), (slow.name,))]
    measure(answers, options.rounds)
    found["answers"] = rows_of(answers, options.threads)
    show(f"answers to {options.strings} prompts of {options.length} letters", found["answers"])

    trained: list[Subject] = []
    models = peers(options, tokenizer.vocab_size)
    own = {
        "RoPE Transformer": LanguageModel(ModelConfig(pattern="A" * options.layers, **shape), tokenizer.vocab_size),
        "Mamba-1": LanguageModel(
            ModelConfig(pattern="m" * options.layers, **{**shape, "mlp": "none", "mlp_width": None}),
            tokenizer.vocab_size,
        ),
    }
    rivals = dict(zip(own, models, strict=True))
    for name, module in {**models, **own}.items():
        batches = TaskBatches(task, PackingConfig(), context=options.context, rows=options.rows, seed=0)
        loss = own_loss if name in own else their_loss
        step = stepping(module.to(options.device), batches, loss, options.device)
        trained.append(Subject(name, step, (rivals[name],) if name in rivals else (), count(module)))
    measure(trained, options.rounds)
    found["training"] = rows_of(trained, options.threads)
    show(f"training step, {options.rows} rows of {options.context}", found["training"])
    for subject in trained:
        print(f"  {subject.name:<34}{subject.parameters:>12,} parameters")
    print("\n" + json.dumps({"benchmark": "task_throughput", "device": options.device, "threads": options.threads,
                             "rounds": options.rounds, "torch": torch.__version__, "when": time.strftime("%Y-%m-%d"),
                             **found}))  # fmt: skip


if __name__ == "__main__":
    main()
