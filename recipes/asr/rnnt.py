r"""A small streaming RNN transducer whose operators all run on the accelerator.

An encoder :math:`h_t` reads the sound up to time :math:`t`, a predictor :math:`g_u` reads the
labels up to :math:`u`, and the joint network scores the next label:

.. math:: z_{t,u} = W \tanh(A h_t + B g_u + b)

Its operators are LSTM, linear, embedding, tanh, addition, concatenation and views; normalization of
the inputs and the loss are outside. :class:`Transducer` has the
methods of ``torchaudio.models.RNNT`` (``transcribe``, ``transcribe_streaming``, ``predict`` and
``join``), so that decoders of that class work with this one.

Reference:
    Graves, "Sequence transduction with recurrent neural networks", arXiv 1211.3711, 2012.
    He et al., "Streaming end-to-end speech recognition for mobile devices", ICASSP 2019 (the time
    reduction between recurrent layers).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

State = list[list[Tensor]]
"""Recurrent state: one list of tensors per layer, the batch first in each tensor."""


class FrameStacking(nn.Module):
    """Concatenate ``stack`` consecutive frames, again every ``stride`` frames.

    The last of them is the newest; frames before the first are zero. So output ``i`` needs no
    sound after frame ``(i + 1) * stride - 1``: the layer adds no look-ahead.

    Args:
        stack: Number of frames in one output vector, a positive multiple of ``stride``.
        stride: Number of frames from one output vector to the next, positive.

    Raises:
        ValueError: If ``stride`` is not positive or ``stack`` is not a multiple of it.

    Example:
        >>> frames = torch.arange(1.0, 5.0).reshape(1, 4, 1)
        >>> FrameStacking(stack=4, stride=2)(frames)[0]
        tensor([[[0., 0., 1., 2.],
                 [1., 2., 3., 4.]]])
    """

    def __init__(self, *, stack: int, stride: int) -> None:
        super().__init__()
        if stride < 1 or stack < 1 or stack % stride:
            raise ValueError(
                f"stack must be a positive multiple of stride, got stack={stack}, stride={stride}; "
                "windows consist of complete hops"
            )
        self.stack = stack
        self.stride = stride

    def forward(
        self, frames: Float[Tensor, "batch frames mels"], past: Tensor | None = None
    ) -> tuple[Float[Tensor, "batch steps stacked"], Float[Tensor, "batch overlap mels"]]:
        """Stack ``frames``, which follow the ``past`` frames that the previous call returned."""
        batch, length, mels = frames.shape
        overlap = self.stack - self.stride
        steps = -(-length // self.stride)
        if past is None:
            past = frames.new_zeros(batch, overlap, mels)
        padding = frames.new_zeros(batch, steps * self.stride - length, mels)
        padded = torch.cat([past, frames, padding], dim=1)
        hops = padded.reshape(batch, -1, self.stride * mels)
        window = [hops[:, hop : hop + steps] for hop in range(self.stack // self.stride)]
        return torch.cat(window, dim=2), padded[:, padded.shape[1] - overlap :]


class Encoder(nn.Module):
    """Unidirectional LSTM layers over stacked frames, with one time reduction between them.

    Args:
        num_mels: Number of features per frame.
        frame_stack: See :class:`FrameStacking`.
        frame_stride: See :class:`FrameStacking`.
        hidden_size: Number of units of every LSTM layer.
        num_layers: Number of LSTM layers.
        time_reduction: Number of consecutive outputs that are concatenated into one after the first
            ``reduction_after`` layers; 1 for none.
        reduction_after: Number of layers before the time reduction.
        output_size: Size of the vectors that enter the joint network.
        dropout: Dropout probability of the inputs of LSTM layers and projection, in [0, 1).

    Raises:
        ValueError: If the time reduction is not between two layers.
    """

    def __init__(
        self,
        *,
        num_mels: int,
        frame_stack: int,
        frame_stride: int,
        hidden_size: int,
        num_layers: int,
        output_size: int,
        time_reduction: int = 1,
        reduction_after: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if time_reduction > 1 and not 1 <= reduction_after < num_layers:
            raise ValueError(
                f"reduction_after must be in [1, num_layers), got {reduction_after} of "
                f"{num_layers} layers; set time_reduction to 1 to leave it out"
            )
        self.stacking = FrameStacking(stack=frame_stack, stride=frame_stride)
        self.time_reduction = FrameStacking(stack=time_reduction, stride=time_reduction)
        self.reduction_after = reduction_after
        sizes = [frame_stack * num_mels] + [hidden_size] * (num_layers - 1)
        if time_reduction > 1:
            sizes[reduction_after] *= time_reduction
        self.layers = nn.ModuleList(nn.LSTM(size, hidden_size, batch_first=True) for size in sizes)
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(hidden_size, output_size)

    @property
    def frames_per_step(self) -> int:
        """Number of input frames per output vector."""
        return self.stacking.stride * self.time_reduction.stride

    def forward(
        self,
        features: Float[Tensor, "batch frames mels"],
        lengths: Int[Tensor, " batch"],
        state: State | None = None,
    ) -> tuple[Float[Tensor, "batch steps encoded"], Int[Tensor, " batch"], State]:
        """Encode ``features``, the continuation of the sound before ``state`` was returned.

        Args:
            features: Features, padded at the end.
            lengths: Number of valid frames of each utterance.
            state: State that the previous call returned, or None at the start.

        Returns:
            Encodings, their lengths, and the state for the following frames. A length that is not
            a multiple of :attr:`frames_per_step` is padded with zero frames: in streaming, only
            the last chunk may have one.
        """
        past = None if state is None else state[0][0]
        hidden, past = self.stacking(features, past)
        states: State = [[past]]
        for index, layer in enumerate(self.layers):
            if index == self.reduction_after and self.time_reduction.stride > 1:
                hidden, _ = self.time_reduction(hidden)
            before = None if state is None else _to_lstm(state[index + 1])
            # The features are augmented already; dropout of entire inputs does harm.
            dropped = hidden if index == 0 else self.dropout(hidden)
            hidden, after = layer(dropped, before)
            states.append(_from_lstm(after))
        steps = (lengths + self.frames_per_step - 1) // self.frames_per_step
        return self.projection(self.dropout(hidden)), steps, states


class Predictor(nn.Module):
    """An LSTM over the labels so far.

    Args:
        num_labels: Size of the vocabulary, blank included.
        embedding_size: Size of a label's embedding.
        hidden_size: Number of units of the LSTM.
        output_size: Size of the vectors that enter the joint network.
        dropout: Dropout probability of the embedding and of the LSTM's output, in [0, 1).
    """

    def __init__(
        self,
        *,
        num_labels: int,
        embedding_size: int,
        hidden_size: int,
        output_size: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_labels, embedding_size)
        self.lstm = nn.LSTM(embedding_size, hidden_size, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.projection = nn.Linear(hidden_size, output_size)

    def forward(
        self, labels: Int[Tensor, "batch labels"], state: State | None = None
    ) -> tuple[Float[Tensor, "batch labels encoded"], State]:
        """Encode ``labels``, the continuation of those before ``state`` was returned."""
        embedded = self.dropout(self.embedding(labels))
        hidden, after = self.lstm(embedded, None if state is None else _to_lstm(state[0]))
        return self.projection(self.dropout(hidden)), [_from_lstm(after)]


class Joint(nn.Module):
    """Score the next label for every pair of an encoding and a prediction.

    Args:
        input_size: Size of encodings and predictions.
        num_labels: Size of the vocabulary, blank included.
    """

    def __init__(self, *, input_size: int, num_labels: int) -> None:
        super().__init__()
        self.output = nn.Linear(input_size, num_labels)

    def forward(
        self,
        encodings: Float[Tensor, "batch steps dim"],
        predictions: Float[Tensor, "batch labels dim"],
    ) -> Float[Tensor, "batch steps labels vocabulary"]:
        """Return ``output(tanh(encoding + prediction))`` for every pair."""
        return self.output(torch.tanh(encodings.unsqueeze(2) + predictions.unsqueeze(1)))


class Transducer(nn.Module):
    """Encoder, predictor and joint network behind the methods of ``torchaudio.models.RNNT``.

    Args:
        encoder: Encoder of the sound, an :class:`Encoder` or another with the same call.
        predictor: Encoder of the labels.
        joint: Network that scores the next label.

    Example:
        >>> model = transducer(num_mels=4, num_labels=5, encoder_size=8, joint_size=8)
        >>> features, lengths = torch.zeros(2, 12, 4), torch.tensor([12, 8])
        >>> encodings, steps = model.transcribe(features, lengths)
        >>> encodings.shape, steps
        (torch.Size([2, 3, 8]), tensor([3, 2]))
    """

    def __init__(self, encoder: nn.Module, predictor: Predictor, joint: Joint) -> None:
        super().__init__()
        self.encoder = encoder
        self.predictor = predictor
        self.joint = joint

    def forward(
        self,
        sources: Float[Tensor, "batch frames mels"],
        source_lengths: Int[Tensor, " batch"],
        targets: Int[Tensor, "batch labels"],
        target_lengths: Int[Tensor, " batch"],
    ) -> tuple[Float[Tensor, "batch steps labels vocabulary"], Tensor, Tensor, State]:
        """Score ``targets``, which begin with blank, for ``sources``."""
        encodings, steps = self.transcribe(sources, source_lengths)
        predictions, target_lengths, state = self.predict(targets, target_lengths, None)
        logits, steps, target_lengths = self.join(encodings, steps, predictions, target_lengths)
        return logits, steps, target_lengths, state

    def transcribe(
        self, sources: Float[Tensor, "batch frames mels"], source_lengths: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch steps dim"], Int[Tensor, " batch"]]:
        """Encode utterances, and return encodings and their lengths."""
        encodings, steps, _ = self.encoder(sources, source_lengths)
        return encodings, steps

    def transcribe_streaming(
        self,
        sources: Float[Tensor, "batch frames mels"],
        source_lengths: Int[Tensor, " batch"],
        state: State | None,
    ) -> tuple[Float[Tensor, "batch steps dim"], Int[Tensor, " batch"], State]:
        """Encode the next chunk; all except the last have complete steps (see :class:`Encoder`)."""
        encodings, steps, after = self.encoder(sources, source_lengths, state)
        return encodings, steps, after

    def predict(
        self,
        targets: Int[Tensor, "batch labels"],
        target_lengths: Int[Tensor, " batch"],
        state: State | None,
    ) -> tuple[Float[Tensor, "batch labels dim"], Int[Tensor, " batch"], State]:
        """Encode labels; the first label of an utterance is blank."""
        predictions, after = self.predictor(targets, state)
        return predictions, target_lengths, after

    def join(
        self,
        source_encodings: Float[Tensor, "batch steps dim"],
        source_lengths: Int[Tensor, " batch"],
        target_encodings: Float[Tensor, "batch labels dim"],
        target_lengths: Int[Tensor, " batch"],
    ) -> tuple[Float[Tensor, "batch steps labels vocabulary"], Tensor, Tensor]:
        """Score the next label for every pair; lengths are returned unchanged."""
        return self.joint(source_encodings, target_encodings), source_lengths, target_lengths


def transducer(
    *,
    num_mels: int,
    num_labels: int,
    frame_stack: int = 4,
    frame_stride: int = 4,
    encoder_size: int = 320,
    encoder_layers: int = 2,
    time_reduction: int = 1,
    reduction_after: int = 1,
    embedding_size: int = 64,
    predictor_size: int = 128,
    joint_size: int = 256,
    encoder_dropout: float = 0.0,
    predictor_dropout: float = 0.0,
) -> Transducer:
    """Build a :class:`Transducer` from its sizes; see its parts for their meaning.

    Example:
        >>> model = transducer(num_mels=4, num_labels=5, encoder_size=8, joint_size=8)
        >>> model.transcribe(torch.zeros(1, 8, 4), torch.tensor([8]))[0].shape
        torch.Size([1, 2, 8])
    """
    encoder = Encoder(
        num_mels=num_mels,
        frame_stack=frame_stack,
        frame_stride=frame_stride,
        hidden_size=encoder_size,
        num_layers=encoder_layers,
        output_size=joint_size,
        time_reduction=time_reduction,
        reduction_after=reduction_after,
        dropout=encoder_dropout,
    )
    model = assemble(
        encoder,
        num_labels=num_labels,
        embedding_size=embedding_size,
        predictor_size=predictor_size,
        joint_size=joint_size,
        dropout=predictor_dropout,
    )
    _open_forget_gates(model)
    return model


def assemble(
    encoder: nn.Module,
    *,
    num_labels: int,
    embedding_size: int,
    predictor_size: int,
    joint_size: int,
    dropout: float,
) -> Transducer:
    """Put a predictor and a joint network behind an encoder.

    Their parameters are drawn after the encoder's: the predictor's first, then the joint network's.

    Args:
        encoder: Encoder whose output vectors have ``joint_size`` entries.
        num_labels: Size of the vocabulary, blank included.
        embedding_size: Size of a label's embedding.
        predictor_size: Units of the predictor's LSTM.
        joint_size: Size of the vectors that enter the joint network.
        dropout: Dropout probability of the predictor, in [0, 1).
    """
    predictor = Predictor(
        num_labels=num_labels,
        embedding_size=embedding_size,
        hidden_size=predictor_size,
        output_size=joint_size,
        dropout=dropout,
    )
    return Transducer(encoder, predictor, Joint(input_size=joint_size, num_labels=num_labels))


def _open_forget_gates(model: nn.Module) -> None:
    """Set the forget-gate bias of every LSTM to 1 (Jozefowicz et al., ICML 2015)."""
    for lstm in (module for module in model.modules() if isinstance(module, nn.LSTM)):
        bias = lstm.get_parameter("bias_ih_l0")
        nn.init.ones_(bias.data[lstm.hidden_size : 2 * lstm.hidden_size])


def _to_lstm(state: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Convert a state with the batch first to ``nn.LSTM``'s (layer, batch, hidden)."""
    return state[0].unsqueeze(0), state[1].unsqueeze(0)


def _from_lstm(state: tuple[Tensor, Tensor]) -> list[Tensor]:
    return [state[0].squeeze(0), state[1].squeeze(0)]
