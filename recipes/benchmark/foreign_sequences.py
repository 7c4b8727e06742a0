"""Networks for speech and time series: torchaudio, a voice detector, a forecaster, and a GAN."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchaudio.models import Conformer, emformer_rnnt_model
from typing_extensions import override

from recipes.benchmark.foreign_module import (
    ForeignModule,
    ForeignProgram,
    ForeignTask,
    classification,
    first,
    regression,
)


def _conformer() -> nn.Module:
    return Conformer(
        input_dim=32,
        num_heads=2,
        ffn_dim=64,
        num_layers=2,
        depthwise_conv_kernel_size=7,
    )


def _lengths(batch: int, length: int) -> Tensor:
    return torch.full((batch,), length)


def _emformer() -> nn.Module:
    return emformer_rnnt_model(
        input_dim=16,
        encoding_dim=32,
        num_symbols=24,
        segment_length=8,
        right_context_length=2,
        time_reduction_input_dim=16,
        time_reduction_stride=2,
        transformer_num_heads=2,
        transformer_ffn_dim=64,
        transformer_num_layers=2,
        transformer_dropout=0.0,
        transformer_activation="relu",
        transformer_left_context_length=4,
        transformer_max_memory_size=0,
        transformer_weight_init_scale_strategy="depthwise",
        transformer_tanh_on_mem=True,
        symbol_embedding_dim=16,
        num_lstm_layers=1,
        lstm_layer_norm=True,
        lstm_layer_norm_epsilon=1e-3,
        lstm_dropout=0.0,
    )


def _emformer_batch() -> tuple[Tensor, ...]:
    # Four frames of right context are no part of the 32 frames that are encoded.
    features = torch.randn(2, 34, 16)
    return features, _lengths(2, 34), torch.randint(0, 23, (2, 5)), _lengths(2, 5)


def _emformer_run(network: Any, *batch: Tensor) -> Tensor:
    result: Tensor = network(*batch)[0]
    return result


def _transcribe(network: Any, features: Tensor, lengths: Tensor) -> Any:
    return network.transcribe(features, lengths)[0]


def _predict(network: Any, tokens: Tensor, lengths: Tensor) -> Any:
    return network.predict(tokens, lengths, None)[0]


def _join(network: Any, encoded: Tensor, predicted: Tensor) -> Any:
    lengths = _lengths(1, encoded.shape[1]), _lengths(1, predicted.shape[1])
    return network.join(encoded, lengths[0], predicted, lengths[1])[0]


def _join_arguments(network: Any, *batch: Tensor) -> tuple[Tensor, Tensor]:
    features, lengths, tokens, counts = first(batch)
    with torch.no_grad():
        encoded = _transcribe(network, features, lengths)
        return encoded, _predict(network, tokens, counts)


class VoiceDetector(nn.Module):
    """Detect voice in chunks of sound, like Silero's detector: no code of it is used.

    A short-time Fourier transform is a convolution with fixed sines and cosines; its magnitude goes
    through convolutions and an LSTM cell whose state is passed from chunk to chunk.
    """

    def __init__(self, window: int = 64, hop: int = 32, size: int = 32) -> None:
        super().__init__()
        time, frequency = torch.arange(window), torch.arange(window // 2 + 1)
        angles = 2 * math.pi * frequency[:, None] * time / window
        basis = torch.cat([angles.cos(), -angles.sin()]) * torch.hann_window(window)
        self.register_buffer("basis", basis[:, None])
        self.hop, self.window = hop, window
        self.encoder = nn.Sequential(
            nn.Conv1d(window // 2 + 1, size, 3, padding=1),
            nn.ReLU(),
            nn.Conv1d(size, size, 3, stride=2, padding=1),
            nn.ReLU(),
        )
        self.cell = nn.LSTMCell(size, size)
        self.decoder = nn.Sequential(nn.ReLU(), nn.Conv1d(size, 1, 1), nn.Sigmoid())

    @override
    def forward(self, sound: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the probability of voice, shape ``(batch, 1)``, and the new state.

        Args:
            sound: Chunk of sound, shape ``(batch, samples)``.
            h: Hidden state, shape ``(batch, size)``.
            c: Cell state, shape ``(batch, size)``.
        """
        x = nn.functional.pad(sound.unsqueeze(1), (0, self.window), mode="reflect")
        x = nn.functional.conv1d(x, self.get_buffer("basis"), stride=self.hop)
        real, imaginary = x.chunk(2, dim=1)
        x = self.encoder(torch.sqrt(real**2 + imaginary**2))
        h, c = self.cell(x.mean(-1), (h, c))
        return self.decoder(h.unsqueeze(-1)).squeeze(-1), h, c


def _detector_batch() -> tuple[Tensor, ...]:
    return torch.randn(8, 256), torch.zeros(8, 32), torch.zeros(8, 32)


class GRUForecaster(nn.Module):
    """Forecast a time series with a GRU."""

    def __init__(self, series: int = 4, size: int = 32, horizon: int = 24) -> None:
        super().__init__()
        self.series, self.horizon = series, horizon
        self.gru = nn.GRU(series, size, num_layers=2, batch_first=True)
        self.head = nn.Linear(size, series * horizon)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Return the next values, shape ``(batch, horizon, series)``."""
        _, state = self.gru(x)
        result: Tensor = self.head(state[-1]).view(-1, self.horizon, self.series)
        return result


class GAN(nn.Module):
    """Generator and discriminator of images of 8 x 8."""

    def __init__(self, size: int = 16, latent: int = 16) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            nn.ConvTranspose2d(latent, 2 * size, 4, bias=False),
            nn.BatchNorm2d(2 * size),
            nn.ReLU(True),
            nn.ConvTranspose2d(2 * size, 1, 4, stride=2, padding=1),
            nn.Tanh(),
        )
        self.discriminator = nn.Sequential(
            nn.Conv2d(1, size, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(size, 1, 4),
            nn.Flatten(),
        )

    @override
    def forward(self, latent: Tensor) -> Tensor:
        """Generate images, shape ``(batch, 1, 8, 8)``."""
        result: Tensor = self.generator(latent)
        return result


class GANTask(ForeignTask):
    """Train a GAN with manual optimization and two optimizers."""

    def __init__(self, foreign: ForeignModule, seed: int = 0) -> None:
        super().__init__(foreign, seed)
        self.automatic_optimization = False

    @override
    def training_step(self, batch: tuple[Any, ...], batch_index: int) -> None:
        """Train the discriminator, then the generator."""
        (latent,) = batch
        score = nn.functional.binary_cross_entropy_with_logits
        optimizers: Any = self.optimizers()
        generator, discriminator = optimizers
        images = torch.sin(torch.arange(64.0)).view(1, 1, 8, 8).expand(len(latent), -1, -1, -1)
        judge = self.network.discriminator
        generated = self(latent)
        real, fake = judge(images), judge(generated.detach())
        loss = score(real, torch.ones_like(real)) + score(fake, torch.zeros_like(fake))
        discriminator.zero_grad()
        self.manual_backward(loss)
        discriminator.step()
        fooled = judge(generated)
        generator.zero_grad()
        generator_loss = score(fooled, torch.ones_like(fooled))
        self.manual_backward(generator_loss)
        generator.step()
        self.losses.append(float(loss.detach() + generator_loss.detach()))

    @override
    def configure_optimizers(self) -> Any:
        """Return one optimizer each for generator and discriminator."""
        parts = (self.network.generator, self.network.discriminator)
        return [torch.optim.Adam(part.parameters(), lr=1e-3) for part in parts], []


#: Networks by the name that rows and the command line use.
SEQUENCES: dict[str, ForeignModule] = {
    "conformer": ForeignModule(
        "Conformer",
        "torchaudio",
        _conformer,
        lambda: (torch.randn(4, 16, 32), _lengths(4, 16)),
        regression,
        run=lambda net, features, lengths: net(features, lengths)[0],
        warmup_steps=60,
    ),
    "emformer": ForeignModule(
        "Emformer RNN-T",
        "torchaudio",
        _emformer,
        _emformer_batch,
        classification(24),
        run=_emformer_run,
        programs=(
            ForeignProgram(_transcribe, lambda net, *batch: first(batch[:2]), "encoder"),
            ForeignProgram(_predict, lambda net, *batch: first(batch[2:]), "predictor"),
            ForeignProgram(_join, _join_arguments, "joint"),
        ),
    ),
    "voice_detector": ForeignModule(
        "Voice detector like Silero's",
        "written out",
        VoiceDetector,
        _detector_batch,
        regression,
        run=lambda net, *batch: net(*batch)[0],
        programs=(
            ForeignProgram(lambda net, *batch: net(*batch), lambda net, *batch: first(batch)),
        ),
        range_margin=0.25,
    ),
    "gru": ForeignModule(
        "GRU forecaster",
        "written out",
        GRUForecaster,
        lambda: (torch.randn(8, 24, 4),),
        regression,
    ),
    "gan": ForeignModule(
        "GAN, manual optimization",
        "written out",
        GAN,
        lambda: (torch.randn(8, 16, 1, 1),),
        regression,
        task_class=GANTask,
    ),
}
