"""Packing loses nothing silently, never lets loss cross a boundary, and goes on exactly where it stopped."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.corpus.packing import IGNORE, Batch, PackedBatches, PackingConfig, evaluation_batches
from longspan.corpus.shards import ShardWriter, TokenShards
from longspan.corpus.tokenizer import SpecialTokens
from longspan.foundation.errors import DataError, UserError

METHODS = ("concat", "best_fit", "one_per_row", "chunks")
SPECIAL = SpecialTokens(boundary=60_000, pad=60_001)


def corpus(folder: Path, lengths: list[int]) -> TokenShards:
    """Documents in which no token occurs twice, so that each can be followed."""
    writer = ShardWriter(folder, 60_002, "f", shard_tokens=50)
    first = 0
    for index, length in enumerate(lengths):
        writer.add(f"d{index}", "", np.arange(first, first + length), 3 * length)
        first += length
    return writer.close()


@st.composite
def packings(draw: st.DrawFn) -> tuple[PackingConfig, int, int]:
    """A packing, a context and a number of rows."""
    context = draw(st.integers(1, 12))
    method = draw(st.sampled_from(METHODS))
    crosses = draw(st.booleans())
    packing = PackingConfig(
        method=method,
        markers=draw(st.booleans()),
        overlap=0 if method == "best_fit" else draw(st.integers(0, context - 1)),
        isolation="none" if crosses else draw(st.sampled_from(["full", "attention", "state", "none"])),
        loss_crosses_boundary=crosses,
    )
    return packing, context, draw(st.integers(1, 4))


lengths_of_documents = st.lists(st.integers(1, 40), min_size=1, max_size=12)


def make(shards: TokenShards, setting: tuple[PackingConfig, int, int], seed: int = 0) -> PackedBatches | None:
    """The batches, or None where no document fills a chunk."""
    packing, context, rows = setting

    def build() -> PackedBatches:
        return PackedBatches(shards, packing, context=context, rows=rows, special=SPECIAL, seed=seed)

    if packing.method == "chunks" and shards.lengths.max() + packing.markers <= context:
        with pytest.raises(UserError, match="shorter than the context"):
            build()
        return None
    return build()


def check_shape_and_targets(batch: Batch, packing: PackingConfig, owner: np.ndarray) -> None:
    """What must hold for every batch: layout, padding, and that each target is the element that really follows."""
    assert batch.tokens.shape == batch.targets.shape == batch.doc_id.shape
    assert batch.tokens.dtype == batch.targets.dtype == batch.doc_id.dtype == np.int32
    padding = batch.doc_id < 0
    assert (batch.tokens[padding] == SPECIAL.pad).all()
    assert (batch.targets[padding] == IGNORE).all()
    assert not (batch.tokens[~padding] == SPECIAL.pad).any()
    if not packing.markers:
        assert not np.isin(batch.tokens[~padding], [SPECIAL.boundary]).any()
    for tokens, targets, ids in zip(batch.tokens, batch.targets, batch.doc_id, strict=True):
        # Padding is a tail, and a document is one run: its id does not come back in the row.
        runs = [ids[0], *(b for a, b in pairwise(ids) if a != b)]
        assert len(runs) == len(set(runs))
        assert -1 not in runs[:-1]
        for position in np.flatnonzero(targets != IGNORE):
            token, target = int(tokens[position]), int(targets[position])
            if position + 1 < len(tokens) and ids[position + 1] >= 0:
                assert target == tokens[position + 1]
            if not packing.loss_crosses_boundary:
                assert target != SPECIAL.boundary
                if token != SPECIAL.boundary:
                    assert target == token + 1
                    assert owner[token] == owner[target]


def owners(lengths: list[int]) -> np.ndarray:
    return np.repeat(np.arange(len(lengths)), lengths)


@settings(max_examples=60, deadline=None)
@given(setting=packings(), lengths=lengths_of_documents, num_batches=st.integers(1, 12))
def test_the_ledger_balances_and_no_token_is_lost_silently(
    tmp_path_factory: pytest.TempPathFactory,
    setting: tuple[PackingConfig, int, int],
    lengths: list[int],
    num_batches: int,
) -> None:
    packing, context, _ = setting
    shards = corpus(tmp_path_factory.mktemp("p") / "s", lengths)
    batches = make(shards, setting)
    if batches is None:
        return
    # One row a batch and exactly one epoch, so that everything shown can be counted from outside.
    batches = make(shards, (packing, context, 1))
    assert batches is not None
    shown: Counter[int] = Counter()
    scored: Counter[int] = Counter()
    markers = padding = 0
    for batch in islice(batches, batches.rows_per_epoch):
        check_shape_and_targets(batch, packing, owners(lengths))
        row = [*batch.tokens[0][batch.doc_id[0] >= 0].tolist()]
        text = [token for token in row if token != SPECIAL.boundary]
        targets = batch.targets[0][batch.targets[0] != IGNORE]
        # The last element of a full row is shown as a target alone.
        last = int(batch.targets[0, -1])
        shown.update(set(text) | ({last} if last not in (IGNORE, SPECIAL.boundary) else set()))
        scored.update(int(target) for target in targets)
        markers += row.count(SPECIAL.boundary)
        padding += int((batch.doc_id < 0).sum())
    ledger = batches.ledger()
    dropped = ledger["dropped"]
    assert ledger["epochs"] == 1
    assert ledger["remaining"] == 0
    assert ledger["elements_in"] == sum(lengths) + packing.markers * len(lengths)
    assert ledger["elements_in"] == ledger["elements"] + sum(d["tokens"] + d["markers"] for d in dropped.values())
    assert ledger["padding"] == padding
    assert ledger["positions"] == ledger["rows"] * context
    assert sum(scored.values()) == ledger["targets"]
    assert len(scored) == ledger["targets"] - ledger["targets_repeated"] or SPECIAL.boundary in scored
    assert ledger["elements"] == ledger["targets"] - ledger["targets_repeated"] + ledger["unscored"]
    if packing.method != "chunks":
        assert not dropped
        # Whatever is not scored is the beginning of a document: of text alone, its first token.
        firsts = set(np.cumsum([0, *lengths[:-1]]).tolist())
        assert set(range(sum(lengths))) - set(scored) <= (set() if packing.markers else firsts)
    else:
        assert padding == 0
        missing = set(range(sum(lengths))) - set(shown) - set(scored)
        # A last element without loss (a document's first token) is not visible from outside.
        assert len(missing) == sum(d["tokens"] for d in dropped.values())
        short = sum(length + packing.markers <= context for length in lengths)
        assert dropped["shorter_than_context"]["documents"] == short
    if packing.overlap == 0:
        assert ledger["targets_repeated"] == 0
        assert not [token for token, times in scored.items() if times > 1 and token != SPECIAL.boundary]


@settings(max_examples=60, deadline=None)
@given(setting=packings(), lengths=lengths_of_documents)
def test_evaluation_scores_every_target_exactly_once(
    tmp_path_factory: pytest.TempPathFactory, setting: tuple[PackingConfig, int, int], lengths: list[int]
) -> None:
    packing, context, rows = setting
    shards = corpus(tmp_path_factory.mktemp("e") / "s", lengths)
    scored: list[int] = []
    for batch in evaluation_batches(shards, packing, context=context, rows=rows, special=SPECIAL):
        assert batch.tokens.shape == (rows, context)
        check_shape_and_targets(batch, packing, owners(lengths))
        for tokens, targets, ids in zip(batch.tokens, batch.targets, batch.doc_id, strict=True):
            scored += [int(target) for target in targets[targets != IGNORE]]
            text = tokens < 60_000
            assert (ids[text] == owners(lengths)[tokens[text]]).all()  # doc_id is the index in the shards
    text = [token for token in scored if token != SPECIAL.boundary]
    assert len(text) == len(set(text))
    firsts = set(np.cumsum([0, *lengths[:-1]]).tolist())
    expected = set(range(sum(lengths))) - (set() if packing.markers else firsts)
    if packing.loss_crosses_boundary:
        assert expected <= set(text)
    else:
        assert set(text) == expected


@settings(max_examples=60, deadline=None)
@given(setting=packings(), lengths=lengths_of_documents, cut=st.integers(0, 15), seed=st.integers(0, 3))
def test_going_on_from_a_saved_state_equals_no_interruption(
    tmp_path_factory: pytest.TempPathFactory,
    setting: tuple[PackingConfig, int, int],
    lengths: list[int],
    cut: int,
    seed: int,
) -> None:
    shards = corpus(tmp_path_factory.mktemp("r") / "s", lengths)
    whole = make(shards, setting, seed)
    if whole is None:
        return
    list(islice(whole, cut))
    state = json.loads(json.dumps(whole.state_dict()))
    resumed = make(shards, setting, seed)
    assert resumed is not None
    next(resumed)
    resumed.load_state_dict(state)
    for expected, got in zip(islice(whole, 10), islice(resumed, 10), strict=True):
        for name in ("tokens", "targets", "doc_id"):
            assert (getattr(expected, name) == getattr(got, name)).all()
    assert whole.ledger() == resumed.ledger()
    assert whole.state_dict() == resumed.state_dict()


@pytest.mark.parametrize("method", METHODS)
def test_epochs_differ_and_seeds_differ_and_the_same_seed_repeats(tmp_path: Path, method: str) -> None:
    shards = corpus(tmp_path / "s", [30, 40, 35, 50, 28, 33, 47, 31])

    def rows(seed: int) -> list[list[int]]:
        packing = PackingConfig.parse({"method": method}, "packing")
        batches = PackedBatches(shards, packing, context=8, rows=1, special=SPECIAL, seed=seed)
        return [next(batches).tokens[0].tolist() for _ in range(2 * batches.rows_per_epoch)]

    first = rows(0)
    assert first == rows(0)
    assert first != rows(1)
    half = len(first) // 2
    assert first[:half] != first[half:]
    assert first[:half] != sorted(first[:half])


def test_without_markers_no_boundary_signal_is_left(tmp_path: Path) -> None:
    lengths = [5, 9, 4, 12, 3]
    shards = corpus(tmp_path / "s", lengths)
    packing = PackingConfig(markers=False)
    tokens = np.concatenate(
        [
            batch.tokens.ravel()[batch.doc_id.ravel() >= 0]
            for batch in evaluation_batches(shards, packing, context=4, rows=3, special=SPECIAL)
        ]
    )
    # The stream is the text of all documents and nothing else (its last token is a target only).
    assert tokens.tolist() == list(range(sum(lengths) - 1))


def test_a_marker_belongs_to_its_document_and_is_an_input_only(tmp_path: Path) -> None:
    shards = corpus(tmp_path / "s", [3, 2])
    (batch,) = evaluation_batches(shards, PackingConfig(), context=8, rows=1, special=SPECIAL)
    b, p = SPECIAL.boundary, SPECIAL.pad
    assert batch.tokens.tolist() == [[b, 0, 1, 2, b, 3, 4, p]]
    assert batch.targets.tolist() == [[0, 1, 2, IGNORE, 3, 4, IGNORE, IGNORE]]
    assert batch.doc_id.tolist() == [[0, 0, 0, 0, 1, 1, 1, -1]]


def test_loss_crosses_a_boundary_only_when_asked(tmp_path: Path) -> None:
    shards = corpus(tmp_path / "s", [3, 2])
    crossing = PackingConfig(isolation="none", loss_crosses_boundary=True)
    (batch,) = evaluation_batches(shards, crossing, context=8, rows=1, special=SPECIAL)
    assert batch.targets.tolist() == [[0, 1, 2, SPECIAL.boundary, 3, 4, IGNORE, IGNORE]]
    with pytest.raises(UserError, match="loss_crosses_boundary"):
        PackingConfig.parse({"loss_crosses_boundary": True}, "packing")


def test_overlap_repeats_context_and_evaluation_scores_it_once(tmp_path: Path) -> None:
    shards = corpus(tmp_path / "s", [9])
    packing = PackingConfig(method="one_per_row", markers=False, overlap=2)
    (batch,) = evaluation_batches(shards, packing, context=4, rows=3, special=SPECIAL)
    assert batch.tokens.tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [4, 5, 6, 7]]
    assert batch.targets.tolist() == [[1, 2, 3, 4], [IGNORE, IGNORE, 5, 6], [IGNORE, IGNORE, 7, 8]]
    training = PackedBatches(shards, packing, context=4, rows=3, special=SPECIAL, seed=0)
    assert (next(training).targets != IGNORE).all()
    assert training.ledger()["targets_repeated"] == 4


def test_best_fit_cuts_only_documents_longer_than_a_row_and_pads_little(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    lengths = generator.integers(5, 90, 400).tolist()
    shards = corpus(tmp_path / "s", lengths)
    packing = PackingConfig(method="best_fit", markers=False)
    batches = PackedBatches(shards, packing, context=63, rows=4, special=SPECIAL, seed=0)
    rows = batches.rows_per_epoch
    assert rows <= math.ceil(sum(lengths) / 64 * 1.03)
    starts = set(np.cumsum([0, *lengths[:-1]]).tolist())
    cut = 0
    for batch in islice(batches, rows // 4):
        for tokens, ids in zip(batch.tokens, batch.doc_id, strict=True):
            begins = np.flatnonzero(np.diff(ids, prepend=-9) != 0)
            cut += sum(int(tokens[i]) not in starts for i in begins if ids[i] >= 0)
    assert cut <= sum(length > 64 for length in lengths)


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_split_is_refused(tmp_path: Path, method: str) -> None:
    shards = corpus(tmp_path / "s", [])
    packing = PackingConfig.parse({"method": method}, "packing")
    with pytest.raises(DataError, match="is empty"):
        PackedBatches(shards, packing, context=8, rows=1, special=SPECIAL, seed=0)
    with pytest.raises(DataError, match="is empty"):
        evaluation_batches(shards, packing, context=8, rows=1, special=SPECIAL)


def test_documents_shorter_than_the_context_cannot_make_chunks(tmp_path: Path) -> None:
    shards = corpus(tmp_path / "s", [5, 8])
    packing = PackingConfig(method="chunks", markers=False)
    with pytest.raises(UserError, match="shorter than the context: the longest has 8 tokens"):
        PackedBatches(shards, packing, context=8, rows=1, special=SPECIAL, seed=0)
    assert PackedBatches(shards, packing, context=7, rows=1, special=SPECIAL, seed=0).rows_per_epoch == 1


def test_impossible_overlaps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="best_fit"):
        PackingConfig.parse({"method": "best_fit", "overlap": 3}, "packing")
    shards = corpus(tmp_path / "s", [50])
    with pytest.raises(UserError, match="overlap 8"):
        PackedBatches(shards, PackingConfig(overlap=8), context=8, rows=1, special=SPECIAL, seed=0)


def test_a_state_of_other_data_or_settings_is_refused(tmp_path: Path) -> None:
    shards = corpus(tmp_path / "s", [50, 20])
    state = PackedBatches(shards, PackingConfig(), context=8, rows=1, special=SPECIAL, seed=0).state_dict()
    other = PackedBatches(shards, PackingConfig(), context=9, rows=1, special=SPECIAL, seed=0)
    with pytest.raises(UserError, match="context = 8, not 9"):
        other.load_state_dict(state)
    elsewhere = corpus(tmp_path / "t", [50, 21])
    with pytest.raises(UserError, match="shards"):
        PackedBatches(elsewhere, PackingConfig(), context=8, rows=1, special=SPECIAL, seed=0).load_state_dict(state)
