r"""A streaming Conformer encoder on torchaudio's building blocks.

Every layer is a feed-forward half step, self-attention, a depthwise convolution and another
feed-forward half step around residual connections (torchaudio's ``ConformerLayer``). Two things
make it stream. Attention of a step sees the step's chunk and the ``left_context`` steps before it,
but nothing after it. The convolution is causal: it is padded on the left alone.

Encoding chunk after chunk, each with the state of the previous one, equals encoding all at once.

Reference:
    Gulati et al., "Conformer: convolution-augmented transformer for speech recognition",
    Interspeech 2020, arXiv 2005.08100; Chen et al., "Developing real-time streaming transformer
    transducer for speech recognition on large-scale dataset", ICASSP 2021 (chunk-wise masks).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torchaudio.models.conformer import ConformerLayer

from recipes.asr.rnnt import FrameStacking, State, Transducer, assemble


class StreamingConformerLayer(ConformerLayer):
    """A Conformer layer whose attention and convolution see a limited past.

    Args:
        size: Width of the layer.
        feed_forward_size: Width inside the feed-forward modules.
        num_heads: Number of attention heads; must divide ``size``.
        kernel_size: Number of steps that the causal depthwise convolution sees, odd.
        left_context: Number of steps before the chunk that attention sees.
        dropout: Dropout probability, in [0, 1).
    """

    def __init__(
        self,
        *,
        size: int,
        feed_forward_size: int,
        num_heads: int,
        kernel_size: int,
        left_context: int,
        dropout: float,
    ) -> None:
        super().__init__(size, feed_forward_size, num_heads, kernel_size, dropout=dropout)
        self.left_context = left_context
        self.history = kernel_size - 1
        modules = self.conv_module.sequential
        assert isinstance(modules[2], nn.Conv1d), (
            "torchaudio's module has its depthwise layer third"
        )
        modules[2].padding = (0,)

    def forward(
        self,
        steps: Float[Tensor, "time batch size"],
        mask: Bool[Tensor, "..."],
        past: list[Tensor] | None = None,
    ) -> tuple[Float[Tensor, "time batch size"], list[Tensor]]:
        """Encode ``steps``, the continuation of the steps before ``past`` was returned.

        Args:
            steps: Input of the layer.
            mask: True where a step (row) does not see a key (column); keys are those of ``past``
                and then the steps.
            past: State that the previous call returned, or None at the start.

        Returns:
            Output, and the state for the following steps, the batch first in each tensor.
        """
        x = steps + 0.5 * self.ffn1(steps)
        attended, keys = self._attend(self.self_attn_layer_norm(x), mask, past)
        x = x + self.self_attn_dropout(attended)
        convolved, heard = self._convolve(x, past)
        x = x + convolved
        x = x + 0.5 * self.ffn2(x)
        return self.final_layer_norm(x), [keys, heard]

    def _attend(self, x: Tensor, mask: Tensor, past: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        keys = x if past is None else torch.cat([past[0].transpose(0, 1), x])
        attended, _ = self.self_attn(x, keys, keys, attn_mask=mask, need_weights=False)
        past_keys = keys[max(0, len(keys) - self.left_context) :]
        return attended, past_keys.transpose(0, 1)

    def _convolve(self, x: Tensor, past: list[Tensor] | None) -> tuple[Tensor, Tensor]:
        modules = self.conv_module.sequential
        gated = modules[1](modules[0](self.conv_module.layer_norm(x).permute(1, 2, 0)))
        if past is None:
            heard = nn.functional.pad(gated, (self.history, 0))
        else:
            heard = torch.cat([past[1], gated], dim=2)
        result = heard
        for module in modules[2:]:
            result = module(result)
        return result.permute(2, 0, 1), heard[:, :, heard.shape[2] - self.history :]


class ConformerEncoder(nn.Module):
    """An encoder of stacked frames, a linear layer, Conformer layers and a projection.

    Args:
        num_mels: Number of features per frame.
        frame_stack: See :class:`~recipes.asr.rnnt.FrameStacking`.
        frame_stride: See :class:`~recipes.asr.rnnt.FrameStacking`.
        size: Width of the layers.
        feed_forward_size: Width inside the feed-forward modules.
        num_layers: Number of Conformer layers.
        num_heads: Number of attention heads.
        kernel_size: Size of the depthwise convolution, in steps.
        left_context: Number of steps before its chunk that a step's attention sees.
        chunk_size: Number of steps that see each other, positive: a step sees up to
            ``chunk_size - 1`` steps ahead.
        output_size: Size of the vectors that enter the joint network.
        dropout: Dropout probability, in [0, 1).

    Raises:
        ValueError: If ``chunk_size`` is not positive or ``left_context`` negative.
    """

    def __init__(
        self,
        *,
        num_mels: int,
        frame_stack: int,
        frame_stride: int,
        size: int,
        feed_forward_size: int,
        num_layers: int,
        num_heads: int,
        kernel_size: int,
        left_context: int,
        chunk_size: int,
        output_size: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if chunk_size < 1 or left_context < 0:
            raise ValueError(
                f"chunk_size must be at least 1 and left_context at least 0, "
                f"got {chunk_size} and {left_context}"
            )
        self.left_context, self.chunk_size = left_context, chunk_size
        self.num_heads = num_heads
        self.stacking = FrameStacking(stack=frame_stack, stride=frame_stride)
        self.entry = nn.Linear(frame_stack * num_mels, size)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            StreamingConformerLayer(
                size=size,
                feed_forward_size=feed_forward_size,
                num_heads=num_heads,
                kernel_size=kernel_size,
                left_context=left_context,
                dropout=dropout,
            )
            for _ in range(num_layers)
        )
        self.projection = nn.Linear(size, output_size)

    @property
    def frames_per_step(self) -> int:
        """Number of input frames per output vector."""
        return self.stacking.stride

    def forward(
        self,
        features: Float[Tensor, "batch frames mels"],
        lengths: Int[Tensor, " batch"],
        state: State | None = None,
    ) -> tuple[Float[Tensor, "batch steps encoded"], Int[Tensor, " batch"], State]:
        """Encode ``features``; see :meth:`~recipes.asr.rnnt.Encoder.forward`.

        In streaming, every call except the last must have complete chunks, which are
        ``chunk_size * frames_per_step`` frames.
        """
        stacked, frames = self.stacking(features, None if state is None else state[0][0])
        steps = (lengths + self.frames_per_step - 1) // self.frames_per_step
        x = self.dropout(self.entry(stacked)).transpose(0, 1)
        before = 0 if state is None else state[1][0].shape[1]
        mask = self._mask(steps, x.shape[0], before)
        after: State = [[frames]]
        for index, layer in enumerate(self.layers):
            x, left = layer(x, mask, None if state is None else state[index + 1])
            after.append(left)
        return self.projection(x.transpose(0, 1)), steps, after

    def _mask(self, lengths: Int[Tensor, " batch"], steps: int, before: int) -> Bool[Tensor, "..."]:
        """Mask the keys that a step does not see; keys begin ``before`` steps earlier.

        In chunks of one step nothing lies ahead, padding included; in longer ones the padding
        after the end of an utterance is masked, except a step's view of itself.
        """
        query = torch.arange(steps, device=lengths.device)[:, None]
        key = torch.arange(-before, steps, device=lengths.device)
        chunk = query - query % self.chunk_size
        hidden = (key >= chunk + self.chunk_size) | (key < chunk - self.left_context)
        if self.chunk_size == 1:
            return hidden
        padding = (key >= lengths[:, None])[:, None] & (key != query)
        return (hidden | padding).repeat_interleave(self.num_heads, 0)


def conformer_transducer(
    *,
    num_mels: int,
    num_labels: int,
    frame_stack: int = 4,
    frame_stride: int = 4,
    encoder_size: int = 144,
    feed_forward_size: int = 576,
    encoder_layers: int = 4,
    num_heads: int = 4,
    kernel_size: int = 15,
    left_context: int = 32,
    chunk_size: int = 1,
    embedding_size: int = 64,
    predictor_size: int = 128,
    joint_size: int = 160,
    encoder_dropout: float = 0.0,
    predictor_dropout: float = 0.0,
) -> Transducer:
    """Build a transducer with a Conformer encoder from its sizes.

    Example:
        >>> model = conformer_transducer(num_mels=4, num_labels=5, encoder_size=8,
        ...     feed_forward_size=16, encoder_layers=1, num_heads=2, joint_size=8)
        >>> model.transcribe(torch.zeros(1, 8, 4), torch.tensor([8]))[0].shape
        torch.Size([1, 2, 8])
    """
    encoder = ConformerEncoder(
        num_mels=num_mels,
        frame_stack=frame_stack,
        frame_stride=frame_stride,
        size=encoder_size,
        feed_forward_size=feed_forward_size,
        num_layers=encoder_layers,
        num_heads=num_heads,
        kernel_size=kernel_size,
        left_context=left_context,
        chunk_size=chunk_size,
        output_size=joint_size,
        dropout=encoder_dropout,
    )
    return assemble(
        encoder,
        num_labels=num_labels,
        embedding_size=embedding_size,
        predictor_size=predictor_size,
        joint_size=joint_size,
        dropout=predictor_dropout,
    )
