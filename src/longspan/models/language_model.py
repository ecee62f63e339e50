"""The language model: embedding, the layers of a pattern, norm, head, and the loss that never holds all logits.

Legend: B rows, T tokens, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longspan.foundation.errors import UserError
from longspan.foundation.randomness import torch_generator
from longspan.models.block import Block, build_norm
from longspan.models.config import ModelConfig
from longspan.models.handover import Handover
from longspan.models.initialisation import draw_parameters
from longspan.models.mixers.base import MixerState
from longspan.models.norms import RMSNorm
from longspan.models.segments import Isolation, Segments
from longspan.models.state import ModelState
from longspan.ops.embedding import embedding
from longspan.ops.linear_cross_entropy import default_chunk, linear_cross_entropy

__all__ = ["IGNORE", "LanguageModel", "ModelConfig"]

IGNORE = -100


class TokenEmbedding(nn.Embedding):
    """`nn.Embedding` whose gradient is a kernel's where kernels serve; hooks on it work as on any module."""

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) of integers (...)."""
        return embedding(tokens, self.weight)


class LanguageModel(nn.Module):
    """A decoder with any pattern of mixers.

    Training passes no state. Prefill, chunked prefill and decode pass `initial_state()` and then what came back, with
    any T >= 1 each time.
    """

    def __init__(
        self, config: ModelConfig, vocab_size: int, seed: int = 0, *, device: torch.device | str = "cpu"
    ) -> None:
        """Build and initialise.

        Args:
            config: what the model is made of.
            vocab_size: V, rows of the embedding, special tokens included.
            seed: the same seed gives the same bytes; each part has a stream of its own, so that equal parts of two
                patterns start equal.
            device: where the parameters live; they are drawn on the CPU. `meta` allocates and draws nothing.
        """
        super().__init__()
        if vocab_size < 1:
            raise UserError(f"vocab_size = {vocab_size}", "at least 1", "take it from the tokenizer")
        self.config = config
        self.vocab_size = vocab_size
        # Built without memory first: the modules' own constructors would draw from torch's global generator.
        with torch.device("meta"):
            self.embedding = TokenEmbedding(vocab_size, config.width)
            learned = config.max_positions if config.positions == "learned" else None
            self.position_embedding = nn.Embedding(learned, config.width) if learned else None
            self.layers = nn.ModuleList(Block(config, letter) for letter in config.layers())
            self.norm = build_norm(config)
            self.head = None if config.tied else nn.Linear(config.width, vocab_size, bias=False)
            self.handover: Handover | None = None
            if config.state_bits is not None and config.handover is not None:
                self.handover = Handover(config.carried(), config.handover, config.state_bits)
        if torch.device(device).type != "meta":
            self.to_empty(device="cpu")
            draw_parameters(self, seed)
            self.to(device)

    @classmethod
    def drawn_on(
        cls, device: torch.device | str, dtype: torch.dtype, config: ModelConfig, vocab_size: int, seed: int = 0
    ) -> Self:
        """An untrained model whose parameters never were elsewhere, in the dtype it computes in: for what models cost.

        The device's own generator draws them: another device, or dtype, gives other weights.
        """
        model = cls(config, vocab_size, seed, device="meta")
        model.cast(dtype)
        model.to_empty(device=device)
        draw_parameters(model, seed)
        return model

    @property
    def blocks(self) -> list[Block]:
        """The layers, first layer first."""
        return [layer for layer in self.layers if isinstance(layer, Block)]

    @property
    def head_weight(self) -> nn.Parameter:
        """(V, D), the token embedding itself where tied."""
        weight = self.embedding.weight if self.head is None else self.head.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def state_to_hand_over(self, generator: torch.Generator, rows: int) -> ModelState:
        """The state after drawn tokens, as many as a row has before it is handed over, not rounded."""
        assert self.handover is not None
        shape, device = (rows, self.handover.at), self.embedding.weight.device
        tokens_BT = torch.randint(self.vocab_size, shape, generator=generator, device=device)
        _, state = self._through_layers(tokens_BT, self.segments(tokens_BT), self.initial_state())
        assert state is not None
        return state

    @torch.no_grad()
    def handed_over_bits(self) -> int | None:
        """Bits of the state of a row where it is handed over rounded; None where it is not."""
        if self.handover is None:
            return None
        generator = torch_generator(0, "handover", device=self.embedding.weight.device)
        return self.handover.num_bits(self.state_to_hand_over(generator, 1))

    def compile_layers(self, backend: str = "inductor") -> None:
        """Have every layer compiled where it is trained; evaluation, prefill and decoding stay as they are.

        Layers of one kind share one compilation, made at the first step.
        """
        for block in self.blocks:
            block.compiled = backend

    def initial_state(self) -> ModelState:
        """The state before the first token, for any number of rows."""
        return ModelState(tuple(block.mixer.initial_state() for block in self.blocks))

    def segments(
        self,
        tokens_BT: Tensor,
        doc_id_BT: Tensor | Segments | None = None,
        state: ModelState | None = None,
        isolation: Isolation = "full",
        *,
        keep_ids: bool = False,
    ) -> Segments:
        """Build what `forward` needs of the documents; see `Segments.build`."""
        if isinstance(doc_id_BT, Segments):
            segments = doc_id_BT
        else:
            if doc_id_BT is not None and doc_id_BT.shape != tokens_BT.shape:
                given = f"doc_id of shape {tuple(doc_id_BT.shape)} for tokens of shape {tuple(tokens_BT.shape)}"
                raise UserError(given, "one id per token", "cut both the same way")
            past = None if state is None else state.past
            shape = (tokens_BT.shape[0], tokens_BT.shape[1])
            segments = Segments.build(
                doc_id_BT, isolation, shape=shape, device=tokens_BT.device, past=past, keep_ids=keep_ids
            )
        limit = self.config.max_positions
        if self.position_embedding is not None and limit is not None and segments.max_position >= limit:
            given = f"position {segments.max_position} with learned positions"
            raise UserError(given, f"max_positions = {limit}, so positions 0 to {limit - 1}", "use shorter rows")
        return segments

    def prepare(self, segments: Segments, tokens_BT: Tensor) -> None:
        """Make ahead of `forward` what layers share and keep in `segments`: angles and masks of a training batch."""
        weight = self.embedding.weight
        # Made anew, since a weight that several processes hold in parts gives birth to others like it.
        x_BTD = torch.empty((), dtype=weight.dtype, device=weight.device).expand(*tokens_BT.shape, weight.shape[1])
        for mixer in {block.letter: block.mixer for block in self.blocks}.values():
            mixer.prepare(segments, x_BTD)

    def forward(
        self,
        tokens_BT: Tensor,
        doc_id_BT: Tensor | Segments | None = None,
        state: ModelState | None = None,
        *,
        isolation: Isolation = "full",
    ) -> tuple[Tensor, ModelState | None]:
        """Hidden states after the last norm.

        Args:
            tokens_BT: integer (B, T), T >= 1.
            doc_id_BT: integer (B, T), best on the CPU, or ready `Segments`; None: each row goes on with one document.
            state: of the tokens before; None in training.
            isolation: what is kept apart at document boundaries (ignored where `Segments` are given).

        Returns:
            hidden (B, T, D), and the state after these tokens, None without one.

        Raises:
            UserError: shapes that do not fit, or learned positions that run past their table.
        """
        segments = self.segments(tokens_BT, doc_id_BT, state, isolation)
        if self.handover is not None and segments.step is None:
            return self._through_handover(self.handover, tokens_BT, segments, state)
        return self._through_layers(tokens_BT, segments, state)

    def _through_handover(
        self, handover: Handover, tokens_BT: Tensor, segments: Segments, state: ModelState | None
    ) -> tuple[Tensor, ModelState | None]:
        """`forward` where the state is rounded after token number `handover.at` of the row."""
        num_tokens = tokens_BT.shape[1]
        until = handover.at - (segments.past.length - num_tokens)
        if not 1 <= until <= num_tokens:
            return self._through_layers(tokens_BT, segments, state)
        first, rest = (segments, None) if until == num_tokens else segments.split(until)
        hidden_BTD, before = self._through_layers(tokens_BT[:, :until], first, state or self.initial_state())
        assert before is not None
        after: ModelState | None = handover(before)
        if rest is not None:
            rest_BTD, after = self._through_layers(tokens_BT[:, until:], rest, after)
            hidden_BTD = torch.cat([hidden_BTD, rest_BTD], dim=1)
        return hidden_BTD, None if state is None else after

    def _through_layers(
        self, tokens_BT: Tensor, segments: Segments, state: ModelState | None
    ) -> tuple[Tensor, ModelState | None]:
        """`forward` without a handover."""
        x_BTD = self.embedding(tokens_BT)
        if self.config.embedding_multiplier != 1.0:
            x_BTD = x_BTD * self.config.embedding_multiplier
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding(segments.positions)
        if self.training and self.config.dropout:
            x_BTD = F.dropout(x_BTD, self.config.dropout)
        chained = all(block.chains(x_BTD.device) for block in self.blocks)
        if chained and state is None and torch.is_grad_enabled():
            return self._through_chain(x_BTD, segments), None
        after: list[Any] = []
        before = [None] * len(self.layers) if state is None else state.layers
        if chained and not torch.is_grad_enabled():
            hidden_BTD, after = self._read_chain(x_BTD, segments, before)
        else:
            for block, layer_before in zip(self.layers, before, strict=True):
                x_BTD, layer_state = block(x_BTD, segments, layer_before)
                after.append(layer_state)
            hidden_BTD = self.norm(x_BTD)
        return hidden_BTD, None if state is None else ModelState(tuple(after), segments.past)

    def _read_chain(
        self, x_BTD: Tensor, segments: Segments, before: Sequence[MixerState | None]
    ) -> tuple[Tensor, list[Any]]:
        """As `_through_chain` without gradients, and the layers' states."""
        after: list[Any] = []
        normed_BTD: Tensor = self.blocks[0].mixer_norm(x_BTD)
        followings = [*(block.mixer_norm for block in self.blocks[1:]), self.norm]
        for block, following, layer_before in zip(self.blocks, followings, before, strict=True):
            assert isinstance(following, RMSNorm)
            x_BTD, normed_BTD, layer_state = block.read_chained(x_BTD, normed_BTD, segments, layer_before, following)
            after.append(layer_state)
        return normed_BTD, after

    def _through_chain(self, x_BTD: Tensor, segments: Segments) -> Tensor:
        """Hidden states after the last norm, where every layer hands the next one its normed input."""
        norms = [*(block.mixer_norm for block in self.blocks), self.norm]
        assert isinstance(norms[0], RMSNorm)
        stream, normed_BTD = norms[0].begin(x_BTD)
        for block, following in zip(self.blocks, norms[1:], strict=True):
            assert isinstance(following, RMSNorm)
            stream, normed_BTD = block.train_chained(stream, normed_BTD, segments, following)
        return normed_BTD

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., D) to (..., V); for training and scoring use `loss` and `token_nll`, which hold no such tensor."""
        return F.linear(hidden, self.head_weight)

    def next_logits(
        self, tokens_BT: Tensor, state: ModelState, segments: Segments | None = None
    ) -> tuple[Tensor, ModelState]:
        """One step of generation: take in any T >= 1 tokens, return the logits (B, V) of the next and the new state."""
        hidden_BTD, after = self(tokens_BT, segments, state)
        return self.logits(hidden_BTD[:, -1]), after

    def loss(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        doc_id_BT: Tensor | Segments | None = None,
        isolation: Isolation = "full",
    ) -> tuple[Tensor, Tensor]:
        """The training loss.

        Args:
            tokens_BT: integer (B, T).
            targets_BT: integer (B, T), `IGNORE` (-100) marks targets without loss.
            doc_id_BT: see `forward`.
            isolation: see `forward`.

        Returns:
            Sum of negative log-likelihoods (nats, fp32 scalar) and the number of targets (int64 scalar tensor, so that
            nothing waits for the device).
        """
        hidden_BTD, _ = self(tokens_BT, doc_id_BT, isolation=isolation)
        nll = self._nll(hidden_BTD, targets_BT, "sum")
        return nll, (targets_BT != IGNORE).sum()

    def judge(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        doc_id_BT: Tensor | Segments | None = None,
        isolation: Isolation = "full",
    ) -> tuple[Tensor, Tensor]:
        """`loss` without the number of targets, and for each of them (in order) whether it is the likeliest token.

        Returns:
            fp32 scalar, and bool (N,) over the targets that are not ignored.
        """
        hidden_BTD, _ = self(tokens_BT, doc_id_BT, isolation=isolation)
        counted_BT = targets_BT != IGNORE
        likeliest_N = self.likeliest(hidden_BTD[counted_BT])
        return self._nll(hidden_BTD, targets_BT, "sum"), likeliest_N == targets_BT[counted_BT]

    def likeliest(self, hidden_ND: Tensor, rows: int | None = None) -> Tensor:
        """int64 (N,): the likeliest of the first `rows` tokens (None: of all), without holding all logits at once."""
        parts = torch.split(hidden_ND, default_chunk(self.head_weight.shape[0], hidden_ND.device))
        return torch.cat([self.logits(part_ND)[:, :rows].argmax(-1) for part_ND in parts])

    def token_nll(
        self,
        tokens_BT: Tensor,
        targets_BT: Tensor,
        doc_id_BT: Tensor | Segments | None = None,
        isolation: Isolation = "full",
        state: ModelState | None = None,
    ) -> tuple[Tensor, ModelState | None]:
        """Negative log-likelihood of every target.

        Returns:
            (B, T) fp32 nats, 0 where ignored, and the state after these tokens, None without one.
        """
        hidden_BTD, after = self(tokens_BT, doc_id_BT, state, isolation=isolation)
        return self._nll(hidden_BTD, targets_BT, "none").view(targets_BT.shape), after

    def _nll(self, hidden_BTD: Tensor, targets_BT: Tensor, reduction: Literal["sum", "none"]) -> Tensor:
        device = hidden_BTD.device.type
        if torch.is_autocast_enabled(device):
            # Autocast does not reach into a function with its own backward.
            hidden_BTD = hidden_BTD.to(torch.get_autocast_dtype(device))
        return linear_cross_entropy(
            hidden_BTD.flatten(0, 1), self.head_weight, targets_BT.flatten(), ignore=IGNORE, reduction=reduction
        )

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups with and without weight decay.

        Matrices decay, embeddings, head and convolution filters included; biases, norms and what a mixer lists in
        `no_decay` (A_log, D, dt_bias) do not.
        """
        spared = {id(block.mixer.get_parameter(name)) for block in self.blocks for name in block.mixer.no_decay}
        decayed = [p for p in self.parameters() if p.ndim >= 2 and id(p) not in spared]
        kept = {id(p) for p in decayed}
        others = [p for p in self.parameters() if id(p) not in kept]
        return [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]

    def cast(self, dtype: torch.dtype) -> LanguageModel:
        """Convert the parameters in place, except those that a mixer keeps in fp32; returns the model."""
        kept = [block.mixer.get_parameter(name) for block in self.blocks for name in block.mixer.fp32]
        values = [parameter.detach().float().clone() for parameter in kept]
        self.to(dtype)
        for parameter, value in zip(kept, values, strict=True):
            parameter.data = value
        return self
