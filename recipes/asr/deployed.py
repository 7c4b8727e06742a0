"""A transducer as three programs of the accelerator: encoder, predictor and joint network.

A recurrent encoder is exported for a chunk of the sound, a Conformer for an utterance, the
predictor for one label, the joint network for one pair; recurrent states are inputs and outputs.
:class:`DeployedTransducer` runs the programs behind the methods of the transducer, so that the same
decoders work with both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_nna import emulate
from lightning_nna.deploy import (
    Program,
    TFLiteModel,
    export_tflite,
)
from lightning_nna.emulation.attachment import attached
from recipes.adapter import Part
from recipes.asr.conformer import ConformerEncoder
from recipes.asr.recognizer import TransducerRecognizer
from recipes.asr.rnnt import Encoder, State
from recipes.asr.vocabulary import BLANK

PARTS = ("encoder", "predictor", "joint")


def export_transducer(
    recognizer: TransducerRecognizer,
    folder: Path,
    *,
    chunk_steps: int = 1,
    utterance_frames: int | None = None,
) -> dict[str, TFLiteModel]:
    """Write ``encoder.tflite``, ``predictor.tflite`` and ``joint.tflite``.

    Args:
        recognizer: Emulated recognizer, calibrated.
        folder: Folder of the programs.
        chunk_steps: Number of steps of a recurrent encoder in one call of its program, positive.
        utterance_frames: Number of frames of the longest utterance that the program of a Conformer
            encodes, in one call; None for recurrent encoders, which need none.

    Returns:
        Each program by its name.

    Raises:
        ValueError: If ``chunk_steps`` or ``utterance_frames`` is not positive, if the encoder is a
            Conformer and ``utterance_frames`` is None or its chunks are longer than a step, or if
            the recognizer is not calibrated.
    """
    return {
        part: export_tflite(recognizer, example, folder / f"{part}.tflite", forward=forward)
        for part, (example, forward) in transducer_parts(
            recognizer, chunk_steps, utterance_frames
        ).items()
    }


def transducer_parts(
    recognizer: TransducerRecognizer, chunk_steps: int, utterance_frames: int | None = None
) -> dict[str, Part]:
    """Return arguments and forward of the encoder, the predictor and the joint network.

    Args:
        recognizer: See :func:`export_transducer`.
        chunk_steps: See :func:`export_transducer`.
        utterance_frames: See :func:`export_transducer`.

    Raises:
        ValueError: See :func:`export_transducer`.
    """
    model = recognizer.model
    encoder = model.encoder
    if chunk_steps < 1:
        raise ValueError(f"chunk_steps must be at least 1, got {chunk_steps}")
    if isinstance(encoder, Encoder):
        frames = chunk_steps * encoder.frames_per_step
    else:
        assert isinstance(encoder, ConformerEncoder)
        frames = _conformer_frames(encoder, utterance_frames)
    emulator = attached(recognizer)
    if emulator is None:
        raise ValueError("the recognizer has no ranges: calibrate it first")
    sound = torch.zeros(1, frames, _mels(encoder))
    label = torch.full((1, 1), BLANK)
    with emulate(recognizer, emulator.spec, targets=emulator.targets), torch.no_grad():
        encodings, _, encoder_state = model.transcribe_streaming(sound, _length(sound), None)
        prediction, _, predictor_state = model.predict(label, _length(label), None)
        step = encodings[:, :1]
        qparams = emulator.state.qparams_of(encodings)
        if qparams is not None:
            emulator.state.set_qparams(step, qparams)
    is_streaming = isinstance(encoder, Encoder)
    return {
        "encoder": ([sound, _zeros(encoder_state)], encode)
        if is_streaming
        else ([sound], encode_all),
        "predictor": ([label, _zeros(predictor_state)], predict),
        "joint": ([step, prediction], join),
    }


def _conformer_frames(encoder: ConformerEncoder, utterance_frames: int | None) -> int:
    """Return the number of frames of a Conformer's program, whole steps."""
    if utterance_frames is None:
        raise ValueError(
            "a streaming Conformer has a state that grows, and its program encodes an utterance at "
            "once: give utterance_frames, the number of frames of the longest"
        )
    if utterance_frames < 1:
        raise ValueError(f"utterance_frames must be at least 1, got {utterance_frames}")
    if encoder.chunk_size > 1:
        raise ValueError(
            f"with chunk_size={encoder.chunk_size} steps see the padding after the end of an "
            "utterance, which a program of one length does not mask: train with chunk_size=1"
        )
    return -(-utterance_frames // encoder.frames_per_step) * encoder.frames_per_step


@torch.no_grad()
def run_utterance(
    recognizer: TransducerRecognizer, sound: Tensor, labels: int, chunk_steps: int
) -> None:
    """Call every part as often as greedy decoding of an utterance calls its program.

    Args:
        recognizer: Recognizer, in float.
        sound: Features of shape ``(1, frames, mels)``.
        labels: Number of labels of the utterance.
        chunk_steps: See :func:`export_transducer`.
    """
    model = recognizer.model
    encoder = model.encoder
    assert isinstance(encoder, Encoder | ConformerEncoder)
    if isinstance(encoder, Encoder):
        state: State | None = None
        for chunk in _padded(sound[0], chunk_steps * encoder.frames_per_step)[None].split(
            chunk_steps * encoder.frames_per_step, 1
        ):
            encodings, _, state = model.transcribe_streaming(chunk, _length(chunk), state)
    else:
        encodings, _ = model.transcribe(sound, _length(sound))
    steps = -(-sound.shape[1] // encoder.frames_per_step)
    label, one = torch.full((1, 1), BLANK), torch.ones(1, dtype=torch.long)
    state = None
    for _ in range(labels + 1):
        prediction, _, state = model.predict(label, one, state)
    for _ in range(steps + labels):
        model.join(encodings[:, :1], one, prediction, one)


def encode(recognizer: TransducerRecognizer, chunk: Tensor, state: State) -> tuple[Tensor, State]:
    """Run the encoder's program on a chunk."""
    encodings, _, after = recognizer.model.transcribe_streaming(chunk, _length(chunk), state)
    return encodings, after


def encode_all(recognizer: TransducerRecognizer, sound: Tensor) -> Tensor:
    """Run the encoder's program on an utterance."""
    return recognizer.model.transcribe(sound, _length(sound))[0]


def predict(recognizer: TransducerRecognizer, label: Tensor, state: State) -> tuple[Tensor, State]:
    """Run the predictor's program on a label."""
    prediction, _, after = recognizer.model.predict(label, _length(label), state)
    return prediction, after


def join(recognizer: TransducerRecognizer, step: Tensor, prediction: Tensor) -> Tensor:
    """Run the joint network's program on a pair."""
    one = torch.ones(1, dtype=torch.long)
    return recognizer.model.join(step, one, prediction, one)[0]


class DeployedTransducer(nn.Module):
    """The programs of :func:`export_transducer` behind the methods of a transducer.

    Args:
        folder: Folder of the programs.
        runtime: Name of a runtime, see :func:`.runtime_of`; None for the one whose kernels the
            programs are exact for.

    Attributes:
        calls: Number of calls of each program.

    Raises:
        FileNotFoundError: If a program is missing.
        ValueError: If a program has changed since it was written.
    """

    def __init__(self, folder: Path, *, runtime: str | None = None) -> None:
        super().__init__()
        self.programs = {
            part: Program(folder / f"{part}.tflite", runtime=runtime) for part in PARTS
        }
        self.calls: Counter[str] = Counter()

    def transcribe(
        self, sources: Float[Tensor, "batch frames mels"], source_lengths: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, "batch steps dim"], Int[Tensor, " batch"]]:
        """Encode utterances chunk by chunk, each with the state of the previous one.

        Raises:
            ValueError: If an utterance is longer than the program of an encoder without a state.
        """
        lengths = source_lengths.tolist()
        frames = self.programs["encoder"].inputs[0].shape[1]
        start = self._start("encoder", 1)
        if not start and max(lengths) > frames:
            raise ValueError(
                f"the encoder's program is for utterances of at most {frames} frames, got one of "
                f"{max(lengths)}: export it with a larger utterance_frames"
            )
        sequences = [
            _padded(source[:length], frames).split(frames)
            for source, length in zip(sources, lengths, strict=True)
        ]
        rows, _ = self._run_sequences("encoder", sequences, [start] * len(sequences))
        per_step = frames // self.programs["encoder"].outputs[0].shape[1]
        steps = [-(-length // per_step) for length in lengths]
        valid = [row[:count] for row, count in zip(rows, steps, strict=True)]
        return nn.utils.rnn.pad_sequence(valid, batch_first=True), torch.tensor(steps)

    def predict(
        self,
        targets: Int[Tensor, "batch labels"],
        target_lengths: Int[Tensor, " batch"],
        state: State | None,
    ) -> tuple[Float[Tensor, "batch labels dim"], Int[Tensor, " batch"], State]:
        """Encode labels one by one."""
        leaves = [] if state is None else state[0]
        starts = [
            [leaf[row : row + 1] for leaf in leaves] or self._start("predictor", 1)
            for row in range(len(targets))
        ]
        sequences = [labels.split(1) for labels in targets]
        rows, after = self._run_sequences("predictor", sequences, starts)
        merged = [torch.cat(each) for each in zip(*after, strict=True)]
        return torch.stack(rows), target_lengths, [merged]

    def join(
        self,
        source_encodings: Float[Tensor, "batch steps dim"],
        source_lengths: Int[Tensor, " batch"],
        target_encodings: Float[Tensor, "batch labels dim"],
        target_lengths: Int[Tensor, " batch"],
    ) -> tuple[Float[Tensor, "batch steps labels vocabulary"], Tensor, Tensor]:
        """Score pair by pair."""
        pairs = [
            [step.reshape(1, 1, -1), label.reshape(1, 1, -1)]
            for steps, labels in zip(source_encodings, target_encodings, strict=True)
            for step in steps
            for label in labels
        ]
        scores = torch.cat([each[0] for each in self._run_all("joint", pairs)])
        shape = (*source_encodings.shape[:2], target_encodings.shape[1], -1)
        return scores.reshape(shape), source_lengths, target_lengths

    def _run_sequences(
        self, part: str, sequences: Sequence[Sequence[Tensor]], starts: Sequence[list[Tensor]]
    ) -> tuple[list[Tensor], list[list[Tensor]]]:
        """Run a program along sequences of inputs, all of them side by side.

        Args:
            part: Name of the program.
            sequences: Inputs of one example each, without the axis of the batch.
            starts: States before the first input of each sequence.

        Returns:
            Outputs of each sequence one after the other, and its last state.
        """
        states = list(starts)
        rows: list[list[Tensor]] = [[] for _ in sequences]
        for position in range(max(map(len, sequences))):
            running = [i for i, inputs in enumerate(sequences) if len(inputs) > position]
            calls = [[sequences[i][position].unsqueeze(0), *states[i]] for i in running]
            for i, (output, *state) in zip(running, self._run_all(part, calls), strict=True):
                rows[i].append(output[0])
                states[i] = state
        return [torch.cat(each) for each in rows], states

    def _start(self, part: str, first: int) -> list[Tensor]:
        """Return the initial states of a program, from its input ``first`` on."""
        shapes = {port.position: port.shape for port in self.programs[part].inputs}
        return [torch.zeros(shapes[position]) for position in sorted(shapes)[first:]]

    def _positional(self, part: str, inputs: Sequence[Any]) -> list[Any]:
        """Put inputs at their positions; empty arguments are no inputs of the program."""
        positions = sorted({port.position for port in self.programs[part].inputs})
        arguments: list[Any] = [np.zeros(0)] * (positions[-1] + 1)
        for position, value in zip(positions, inputs, strict=True):
            arguments[position] = np.asarray(value)
        return arguments

    def _run_all(self, part: str, calls: Sequence[Sequence[Any]]) -> list[list[Tensor]]:
        self.calls[part] += len(calls)
        results = self.programs[part].run_all([self._positional(part, inputs) for inputs in calls])
        return [[torch.from_numpy(x) for x in outputs] for outputs in results]


def _padded(frames: Tensor, multiple: int) -> Tensor:
    """Pad frames with zeros at the end to a multiple of a number of them."""
    return nn.functional.pad(frames, (0, 0, 0, -len(frames) % multiple))


def _mels(encoder: Encoder | ConformerEncoder) -> int:
    first = encoder.layers[0] if isinstance(encoder, Encoder) else encoder.entry
    size = first.input_size if isinstance(first, nn.LSTM) else first.in_features
    assert isinstance(size, int)
    return size // encoder.stacking.stack


def _length(x: Tensor) -> Tensor:
    return torch.tensor([x.shape[1]])


def _zeros(state: State) -> State:
    """Return the initial state: zeros in the shapes of ``state``."""
    return [[torch.zeros_like(tensor) for tensor in layer] for layer in state]
