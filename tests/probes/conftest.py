"""A small test split, tiny real subjects, and fake subjects that say the same of everything."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.corpus.packing import PackingConfig
from longspan.corpus.shards import ShardWriter, TokenShards
from longspan.corpus.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from longspan.engines.base import Engine, Generation, Sampling, Tokens
from longspan.engines.native import NativeEngine
from longspan.models.language_model import LanguageModel, ModelConfig
from longspan.probes import made_up
from longspan.probes.base import Probe, ProbeData
from longspan.records.observation import Observation, Summary, summarise
from longspan.records.store import Record

LENGTHS = (130, 40, 300, 7, 161, 1, 90, 220, 2, 140, 175, 133)
SPEAKERS = ("senate", "house", "union", "people")


class FakeEngine(Engine):
    """Answers every likelihood by a function of the token: no context counts."""

    capabilities = frozenset({"nll", "score", "generate"})
    isolation = "full"

    def __init__(self, tokenizer: Tokenizer, say: Callable[[Tokens], Tokens], limit: int | None = None) -> None:
        self.name, self.fingerprint = "fake", "fake"
        self.tokenizer = tokenizer
        self.document_prefix = np.array([tokenizer.special.boundary])
        self.context_limit = limit
        self._say = say
        self.asked: list[int] = []

    def nll(self, sequences: Sequence[Tokens], doc_ids: Sequence[Tokens] | None = None) -> list[np.ndarray]:
        del doc_ids
        self.asked += [len(sequence) for sequence in sequences]
        return [self._say(sequence[1:].astype(np.int64)).astype(np.float64) for sequence in sequences]

    def score_many(
        self, prefixes: Sequence[Tokens], continuations: Sequence[Sequence[Tokens]]
    ) -> list[list[np.ndarray]]:
        self.asked += [len(prefix) for prefix in prefixes]
        return [[self._say(c.astype(np.int64)).astype(np.float64) for c in choices] for choices in continuations]

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling) -> list[Generation]:
        new = np.zeros(sampling.max_new_tokens, dtype=np.int64)
        return [Generation(new, "", "length", len(p), 0.001 * len(p), 0.5, None) for p in prompts]

    def state_bytes(self, context: int) -> int:
        return 10 * context


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    texts = [f"The {noun} {verb} the other {noun}." for noun in SPEAKERS for verb in ("asks", "answers", "thanks")]
    return train_tokenizer(TokenizerConfig(vocab_size=275, min_frequency=1), texts)


@pytest.fixture(scope="session")
def data(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> ProbeData:
    return ProbeData(write_shards(tokenizer, LENGTHS, tmp_path_factory.mktemp("shards") / "test"), tokenizer, 64)


def write_shards(tokenizer: Tokenizer, lengths: Sequence[int], folder: Path) -> TokenShards:
    rng = np.random.default_rng(0)
    writer = ShardWriter(folder, tokenizer.vocab_size, tokenizer.fingerprint)
    for number, length in enumerate(lengths):
        words = rng.choice([*SPEAKERS, "asks", "answers", "the", f"law{number}"], size=length)
        tokens = tokenizer.encode(" ".join(words))[:length]
        writer.add(f"doc-{number}", f"Title {number}", tokens, int(tokenizer.token_bytes[tokens].sum()))
    writer.close()
    return TokenShards.open(folder)


@pytest.fixture
def make_data(tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., ProbeData]:
    def make(*lengths: int, context: int = 64, packing: PackingConfig | None = None) -> ProbeData:
        return ProbeData(
            write_shards(tokenizer, lengths, tmp_path / "s"), tokenizer, context, packing or PackingConfig()
        )

    return make


@pytest.fixture(scope="session")
def subject(tokenizer: Tokenizer) -> Callable[..., NativeEngine]:
    def build(
        pattern: str = "AM", seed: int = 0, markers: bool = True, isolation: str = "full", **model: object
    ) -> NativeEngine:
        options = {"width": 16, "heads": 2, "state": 8, "mamba_head_dim": 8, "chunk": 16, "mlp": "none", **model}
        config = ModelConfig.parse({"pattern": pattern, **options}, "model")
        built = LanguageModel(config, tokenizer.vocab_size, seed=seed)
        return NativeEngine(
            built,
            tokenizer,
            markers=markers,
            isolation=isolation,
            fingerprint=f"{pattern}-{seed}-{markers}-{isolation}",
        )

    return build


@pytest.fixture(scope="session")
def fake(tokenizer: Tokenizer) -> Callable[..., FakeEngine]:
    def build(
        say: Callable[[Tokens], Tokens] | None = None, limit: int | None = None, of: Tokenizer = tokenizer
    ) -> FakeEngine:
        constant = np.log(of.vocab_size)
        return FakeEngine(of, say or (lambda tokens: np.full(len(tokens), constant)), limit)

    return build


class WritingEngine(FakeEngine):
    """Writes what a function makes of the prompt's text, and remembers the prompts."""

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], str | tuple[str, str]], **options: Any) -> None:
        constant = np.log(tokenizer.vocab_size)
        super().__init__(tokenizer, options.get("say") or (lambda tokens: np.full(len(tokens), constant)))
        self.context_limit = options.get("limit")
        self.prompts: list[Tokens] = []
        self.samplings: list[Sampling] = []
        self._write = write

    def generate(self, prompts: Sequence[Tokens], sampling: Sampling) -> list[Generation]:
        written = []
        for prompt in prompts:
            self.prompts.append(prompt)
            self.samplings.append(sampling)
            answer = self._write(self.tokenizer.decode(prompt))
            text, finish = answer if isinstance(answer, tuple) else (answer, "stop")
            tokens = self.tokenizer.encode(text).astype(np.int64)
            written.append(Generation(tokens, text, finish, len(prompt), 0.1, 0.1, None))
        return written


@pytest.fixture(scope="session")
def writing(tokenizer: Tokenizer) -> Callable[..., WritingEngine]:
    def build(write: Callable[[str], str | tuple[str, str]], **options: Any) -> WritingEngine:
        return WritingEngine(options.pop("tokenizer", tokenizer), write, **options)

    return build


def run(probe: Probe, engine: Engine, data: ProbeData, label: str = "S", seed: int = 0) -> list[Record]:
    return [
        Record.make(
            probe=probe.kind,
            protocol=probe.protocol(),
            item=answer.item,
            subject=label,
            seed=seed,
            fingerprint=engine.fingerprint,
            answer=answer.content,
            seconds=answer.seconds,
        )
        for batch in probe.ask(engine, probe.items(data), data)
        for answer in batch
    ]


@pytest.fixture(scope="session")
def ask() -> Callable[..., list[Record]]:
    return run


@pytest.fixture(scope="session")
def read() -> Callable[[Probe, Sequence[Record]], tuple[list[Observation], Summary]]:
    def read_records(probe: Probe, records: Sequence[Record]) -> tuple[list[Observation], Summary]:
        observations = [seen for record in records for seen in probe.observe(record)]
        return observations, summarise(observations, probe.metrics, resamples=2_000)

    return read_records


# --- text with sentences ---------------------------------------------------------------------------------------------

KINDS = ("treaty", "bridge", "harbour", "railway", "mine", "school", "bank", "canal", "court", "mill")


def document(number: int, sentences: int, rare: Sequence[str] = ()) -> str:
    """Plain sentences, some with a number, some with a name of the document's own that comes back."""
    rng = np.random.default_rng(number)
    names = [*rare, made_up.name(rng), made_up.name(rng)]
    lines = []
    for _ in range(sentences):
        kind, other = (str(rng.choice(KINDS)) for _ in range(2))
        lines.append(
            [
                f"The {kind} beside the {other} was built for {rng.integers(100, 99999)} dollars in all.",
                f"It was said that the {kind} of the old {other} belonged to {rng.choice(names)} and others.",
                made_up.sentence(rng),
                made_up.sentence(rng),
            ][int(rng.integers(4))]
        )
    return " ".join(lines)


def small_tokenizer() -> Tokenizer:
    return train_tokenizer(TokenizerConfig(vocab_size=500), [document(i, 60) for i in range(100, 108)])


def shards_of(texts: Sequence[str], tokenizer: Tokenizer, folder: Path) -> TokenShards:
    writer = ShardWriter(folder, tokenizer.vocab_size, tokenizer.fingerprint)
    for number, text in enumerate(texts):
        tokens = tokenizer.encode(text)
        writer.add(f"doc-{number}", f"Title {number}", tokens, int(tokenizer.token_bytes[tokens].sum()))
    writer.close()
    return TokenShards.open(folder)


@pytest.fixture(scope="session")
def words() -> Tokenizer:
    """A tokenizer that knows the words of `document`."""
    return small_tokenizer()


@pytest.fixture(scope="session")
def text(words: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> ProbeData:
    """Eight documents of sixty sentences."""
    texts = [document(number, 60) for number in range(8)]
    return ProbeData(shards_of(texts, words, tmp_path_factory.mktemp("sentences") / "s"), words, 256)


@pytest.fixture
def data_of(words: Tokenizer, tmp_path: Path) -> Callable[..., ProbeData]:
    """Documents given as text."""

    def make(*texts: str, context: int = 256) -> ProbeData:
        return ProbeData(shards_of(texts, words, tmp_path / "texts"), words, context)

    return make


@pytest.fixture(scope="session")
def reader_of_words(words: Tokenizer) -> Callable[..., NativeEngine]:
    """An untrained model for the tokenizer of `text`."""

    def build(pattern: str = "AM", limit: int | None = None) -> NativeEngine:
        options = {"width": 16, "heads": 2, "state": 8, "mamba_head_dim": 8, "chunk": 16, "mlp": "none"}
        model = LanguageModel(ModelConfig.parse({"pattern": pattern, **options}, "model"), words.vocab_size, seed=0)
        engine = NativeEngine(model, words, markers=True, isolation="full", fingerprint=pattern)
        engine.context_limit = limit
        return engine

    return build
