"""A transducer as three programs of the accelerator: encoder, predictor and joint network.

The encoder is exported for a chunk of the sound, the predictor for one label, the joint network
for one pair; recurrent states are inputs and outputs. :class:`DeployedTransducer` runs the programs
behind the methods of the transducer, so that the same decoders work with both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lightning_nna import emulate
from lightning_nna.deploy import (
    MicroExport,
    Program,
    TFLiteModel,
    export_micro,
    export_tflite,
)
from lightning_nna.emulation.attachment import attached
from recipes.asr.recognizer import TransducerRecognizer
from recipes.asr.rnnt import Encoder, State, Transducer
from recipes.asr.vocabulary import BLANK

PARTS = ("encoder", "predictor", "joint")
#: Arguments of a program, and the function of the recognizer and them that it computes.
Part = tuple[list[Any], Callable[..., Any]]


def export_transducer(
    recognizer: TransducerRecognizer, folder: Path, *, chunk_steps: int = 1
) -> dict[str, TFLiteModel]:
    """Write ``encoder.tflite``, ``predictor.tflite`` and ``joint.tflite``.

    Args:
        recognizer: Emulated recognizer, calibrated.
        folder: Folder of the programs.
        chunk_steps: Number of steps of the encoder in one call of its program, positive.

    Returns:
        Each program by its name.

    Raises:
        ValueError: If ``chunk_steps`` is not positive, if the shape of the encoder's state is not
            fixed, or if the recognizer is not calibrated.
    """
    return {
        part: export_tflite(recognizer, example, folder / f"{part}.tflite", forward=forward)
        for part, (example, forward) in transducer_parts(recognizer, chunk_steps).items()
    }


def export_firmware(
    recognizer: TransducerRecognizer,
    folder: Path,
    *,
    chunk_steps: int = 1,
    accelerator: str | None = None,
) -> dict[str, MicroExport]:
    """Write the three programs for a microcontroller, each into a folder of its name.

    Args:
        recognizer: Emulated recognizer, calibrated, with a spec of TFLite-Micro.
        folder: Folder of the folders.
        chunk_steps: See :func:`export_transducer`.
        accelerator: Name of an Ethos-U for which Vela compiles them; None for the processor, which
            decodes compressed constants.

    Returns:
        Each export by its name.

    Raises:
        ValueError: See :func:`export_transducer` and :func:`.export_micro`.
        VelaError: If Vela is missing or rejects a program.
    """
    return {
        part: export_micro(
            recognizer,
            example,
            folder / part,
            name=part,
            forward=forward,
            compress=accelerator is None,
            accelerator=accelerator,
        )
        for part, (example, forward) in transducer_parts(recognizer, chunk_steps).items()
    }


def transducer_parts(recognizer: TransducerRecognizer, chunk_steps: int) -> dict[str, Part]:
    """Return arguments and forward of the encoder, the predictor and the joint network.

    Args:
        recognizer: See :func:`export_transducer`.
        chunk_steps: See :func:`export_transducer`.

    Raises:
        ValueError: See :func:`export_transducer`.
    """
    model = recognizer.model
    if chunk_steps < 1:
        raise ValueError(f"chunk_steps must be at least 1, got {chunk_steps}")
    if not isinstance(model.encoder, Encoder):
        raise ValueError(
            f"a streaming {type(model.encoder).__name__} has a state that grows; its program would "
            "have to start with all of it: export its forward at the length of an utterance"
        )
    emulator = attached(recognizer)
    if emulator is None:
        raise ValueError("the recognizer has no ranges: calibrate it first")
    chunk = torch.zeros(1, chunk_steps * model.encoder.frames_per_step, _mels(model))
    label = torch.full((1, 1), BLANK)
    with emulate(recognizer, emulator.spec, targets=emulator.targets), torch.no_grad():
        encodings, _, encoder_state = model.transcribe_streaming(chunk, _length(chunk), None)
        prediction, _, predictor_state = model.predict(label, _length(label), None)
        step = encodings[:, :1]
        qparams = emulator.state.qparams_of(encodings)
        if qparams is not None:
            emulator.state.set_qparams(step, qparams)
    starts = [_zeros(encoder_state), _zeros(predictor_state)]
    return {
        "encoder": ([chunk, starts[0]], encode),
        "predictor": ([label, starts[1]], predict),
        "joint": ([step, prediction], join),
    }


def encode(recognizer: TransducerRecognizer, chunk: Tensor, state: State) -> tuple[Tensor, State]:
    """Run the encoder's program on a chunk."""
    encodings, _, after = recognizer.model.transcribe_streaming(chunk, _length(chunk), state)
    return encodings, after


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
        """Encode utterances chunk by chunk, each with the state of the previous one."""
        rows, steps = [], []
        frames = self.programs["encoder"].inputs[0].shape[1]
        per_step = frames // self._chunk_steps
        for source, length in zip(sources, source_lengths.tolist(), strict=True):
            count = -(-length // frames)
            padded = nn.functional.pad(source[:length], (0, 0, 0, count * frames - length))
            rows.append(torch.cat(list(self._encode(padded.split(frames)))))
            steps.append(-(-length // per_step))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), torch.tensor(steps)

    def predict(
        self,
        targets: Int[Tensor, "batch labels"],
        target_lengths: Int[Tensor, " batch"],
        state: State | None,
    ) -> tuple[Float[Tensor, "batch labels dim"], Int[Tensor, " batch"], State]:
        """Encode labels one by one."""
        rows: list[Tensor] = []
        after: list[list[Tensor]] = []
        leaves = [] if state is None else state[0]
        for row, labels in enumerate(targets):
            running = [leaf[row : row + 1] for leaf in leaves] or self._start("predictor", 1)
            steps = []
            for label in labels:
                step, *running = self._run("predictor", [label.reshape(1, 1), *running])
                steps.append(step[0])
            rows.append(torch.cat(steps))
            after.append(running)
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
        scores = [
            [
                torch.cat([self._score(step, label) for label in labels], dim=2)
                for step in steps.split(1)
            ]
            for steps, labels in zip(source_encodings, target_encodings, strict=True)
        ]
        logits = torch.cat([torch.cat(rows, dim=1) for rows in scores])
        return logits, source_lengths, target_lengths

    @property
    def _chunk_steps(self) -> int:
        return self.programs["encoder"].outputs[0].shape[1]

    def _encode(self, chunks: Iterable[Tensor]) -> Iterable[Tensor]:
        state = self._start("encoder", 1)
        for chunk in chunks:
            encoded, *state = self._run("encoder", [chunk.unsqueeze(0), *state])
            yield encoded[0]

    def _score(self, step: Tensor, label: Tensor) -> Tensor:
        (scores,) = self._run("joint", [step.reshape(1, 1, -1), label.reshape(1, 1, -1)])
        return scores

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

    def _run(self, part: str, inputs: Sequence[Any]) -> list[Tensor]:
        self.calls[part] += 1
        results = self.programs[part](self._positional(part, inputs))
        return [torch.from_numpy(x) for x in results]


def _mels(model: Transducer) -> int:
    encoder = model.encoder
    assert isinstance(encoder, Encoder)
    first = encoder.layers[0]
    assert isinstance(first, nn.LSTM)
    return first.input_size // encoder.stacking.stack


def _length(x: Tensor) -> Tensor:
    return torch.tensor([x.shape[1]])


def _zeros(state: State) -> State:
    """Return the initial state: zeros in the shapes of ``state``."""
    return [[torch.zeros_like(tensor) for tensor in layer] for layer in state]
