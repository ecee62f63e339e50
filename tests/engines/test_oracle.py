"""Claims about the check of an engine: rounding of a deep model is no fault, and a fault is seen through rounding."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from longspan.corpus.tokenizer import Tokenizer
from longspan.engines import graphs, oracle, precision
from longspan.engines.base import Sampling
from longspan.engines.causal_model import CausalModel
from longspan.engines.native import NativeEngine
from longspan.engines.oracle import Check, check_equivalence
from longspan.engines.precision import in_fp32, no_room_for_fp32
from longspan.engines.transformers import TransformersEngine
from longspan.models.graphed_decoding import GraphedDecoding
from longspan.models.language_model import LanguageModel
from longspan.models.state import ModelState

MakeModel = Callable[..., LanguageModel]
MakeEngine = Callable[..., NativeEngine]
IN_PARTS = {"cached = cold", "chunked = whole", "streaming = parallel"}


def tokens(length: int = 120) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 250, size=length)


def checks(engine: Any, length: int = 120) -> dict[str, Check]:
    return {check.name: check for check in check_equivalence(engine, tokens(length)) if check.verdict != "not used"}


def differing(engine: Any, length: int = 120) -> set[str]:
    return {name for name, check in checks(engine, length).items() if check.verdict == "differs"}


@pytest.fixture
def deep(tiny_model: MakeModel, tiny_engine: MakeEngine) -> Callable[[str], NativeEngine]:
    def build(pattern: str = "(MMMA)6") -> NativeEngine:
        return tiny_engine(tiny_model(pattern, width=32), dtype="bf16")

    return build


@pytest.mark.parametrize("pattern", ["(M)24", "(A)24", "(MMMA)6"])
def test_rounding_of_a_deep_model_is_no_difference(pattern: str, deep: Callable[[str], NativeEngine]) -> None:
    found = checks(deep(pattern))
    assert {check.verdict for check in found.values()} == {"equal"}
    for check in found.values():
        assert check.mean is not None
        assert check.rounding is not None
        assert check.in_fp32 is not None
        assert check.rounding > 100 * check.in_fp32
        assert "equal within rounding" in check.note


def test_weights_are_the_same_bytes_after_they_were_in_fp32(deep: Callable[..., NativeEngine]) -> None:
    model = deep().module
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with in_fp32(model):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    after = model.state_dict()
    assert [after[name].dtype for name in before] == [tensor.dtype for tensor in before.values()]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_steps_that_were_captured_before_are_not_replayed_on_weights_that_moved(
    deep: Callable[..., NativeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(graphs.VARIABLE, "on")
    made: list[int] = []

    class Counted(GraphedDecoding):
        def __init__(self, model: LanguageModel, rows: int, slots: int) -> None:
            made.append(rows)
            super().__init__(model, rows, slots)

    monkeypatch.setattr(graphs, "GraphedDecoding", Counted)
    engine, sampling = deep("AM"), Sampling(max_new_tokens=8, stop_at_boundary=False)
    written = [engine.generate([tokens(20)], sampling)[0].tokens.tolist() for _ in range(2)]
    assert len(made) == 1
    checks(engine)
    assert written == 2 * [engine.generate([tokens(20)], sampling)[0].tokens.tolist()]
    assert len(made) == 2


def forgets(state: ModelState, layers: slice) -> ModelState:
    """The states of some layers are as if nothing had come before."""
    kept = list(state.layers)
    kept[layers] = [layer.map(torch.zeros_like) for layer in kept[layers]]
    return dataclasses.replace(state, layers=tuple(kept))


def one_layer_forgets(state: ModelState) -> ModelState:
    return forgets(state, slice(4, 5))


def forgets_in_bf16(state: ModelState) -> ModelState:
    """As a kernel of one dtype may: with the same weights in fp32 all is right."""
    seen: list[torch.dtype] = []
    for layer in state.layers:
        layer.map(lambda tensor: seen.append(tensor.dtype) or tensor)  # type: ignore[func-returns-value]
    return forgets(state, slice(None)) if torch.bfloat16 in seen else state


@pytest.mark.parametrize("fault", [one_layer_forgets, forgets_in_bf16])
def test_a_fault_in_what_is_carried_is_seen_through_rounding(
    fault: Callable[[ModelState], ModelState], deep: Callable[..., NativeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = deep("(A)24")
    forward = LanguageModel.forward

    def wrong(self, tokens_BT, doc_id_BT=None, state=None, **more):  # type: ignore[no-untyped-def]
        return forward(
            self, tokens_BT, doc_id_BT, fault(state) if state is not None and state.length else state, **more
        )

    monkeypatch.setattr(LanguageModel, "forward", wrong)
    assert differing(engine) == IN_PARTS


def test_a_wrong_position_is_seen_through_rounding(
    deep: Callable[..., NativeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = deep("(A)24")
    segments = LanguageModel.segments

    def wrong(self, tokens_BT, doc_id_BT=None, state=None, *given, **more):  # type: ignore[no-untyped-def]
        if state is not None and state.length:
            past = dataclasses.replace(state.past, length=state.past.length + 1)
            state = dataclasses.replace(state, past=past)
        return segments(self, tokens_BT, doc_id_BT, state, *given, **more)

    monkeypatch.setattr(LanguageModel, "segments", wrong)
    assert differing(engine) >= {"chunked = whole", "streaming = parallel"}


def mamba2(tokenizer: Tokenizer, layers: int, **ways: bool) -> TransformersEngine:
    transformers = pytest.importorskip("transformers")
    settings = {"hidden_size": 32, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 16}
    torch.manual_seed(0)
    config = transformers.Mamba2Config(vocab_size=270, num_hidden_layers=layers, **settings)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return TransformersEngine(model, tokenizer, markers=False, fingerprint="f", **ways)


def test_a_deep_model_of_transformers_keeps_its_ways_in_lower_precision(tokenizer: Tokenizer) -> None:
    engine = mamba2(tokenizer, 16)
    assert engine.model.dtype == torch.bfloat16
    assert (engine.model.keeps_state, engine.notes) == (True, ())
    assert differing(engine, 60) == set()


def test_padding_that_is_seen_is_seen_through_rounding(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = mamba2(tokenizer, 16)
    padded = engine.model.padded
    monkeypatch.setattr(
        engine.model, "padded", lambda tokens_BT, mask_BS, *given, **more: padded(
            tokens_BT, torch.ones_like(mask_BS), *given, **more)
    )  # fmt: skip
    engine.model.takes_padding = True
    assert differing(engine, 60) == {"left-padded = unpadded"}


def test_without_memory_for_fp32_the_bound_is_fixed_and_said(
    deep: Callable[..., NativeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = deep()
    assert no_room_for_fp32(engine.module) is None
    monkeypatch.setattr(oracle, "no_room_for_fp32", lambda module: "9 GiB more are needed, 1 are free")
    found = checks(engine)
    assert {check.allowed for check in found.values()} == {oracle.ROUNDED}
    assert all("not asked in fp32 (9 GiB more are needed, 1 are free)" in check.note for check in found.values())


@pytest.mark.parametrize(("free", "said"), [(None, "how much is free is not known"), (0, "0 are free")])
def test_fp32_is_not_tried_where_no_room_is_known(
    free: int | None, said: str, deep: Callable[..., NativeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "free_memory", lambda: free)
    reason = no_room_for_fp32(deep().module)
    assert reason is not None
    assert reason.endswith(f" GiB more are needed, {said}")
    assert no_room_for_fp32(deep().module.float()) is None


def test_a_subject_whose_ways_are_not_tried_in_fp32_says_so_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).bfloat16()
    assert not CausalModel(model).notes
    monkeypatch.setattr(precision, "free_memory", lambda: 0)
    (note,) = CausalModel(model).notes
    assert "tried with the rounding of bfloat16" in note
    assert "not in fp32" in note
    assert note.endswith("GiB more are needed, 0 are free")
    assert not CausalModel(model.float()).notes


def test_kernels_that_fail_in_fp32_leave_the_fixed_bound(
    deep: Callable[..., NativeEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = deep("(A)4")
    forward = LanguageModel.forward

    def failing(self, *given, **more):  # type: ignore[no-untyped-def]
        if self.embedding.weight.dtype == torch.float32:
            raise RuntimeError("out of resource: shared memory")
        return forward(self, *given, **more)

    monkeypatch.setattr(LanguageModel, "forward", failing)
    found = checks(engine)
    assert {(check.verdict, check.allowed) for check in found.values()} == {("equal", oracle.ROUNDED)}
    assert all("out of resource" in check.note for check in found.values())
