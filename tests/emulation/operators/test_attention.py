"""Attention: every instruction is LiteRT's, masks hide what they mask, and gradients flow."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_nna import calibrate, emulate
from lightning_nna.deploy import export_tflite, verify
from lightning_nna.emulation.coverage import coverage
from lightning_nna.emulation.program import Instruction
from lightning_nna.testing.replay import replays
from tests.emulation.modules import Function

SPECS = {8: "litert-int8", 16: "litert-int16x8"}
HEADS, TIME, WIDTH = 4, 24, 16
BEFORE = torch.ones(TIME, TIME, dtype=torch.bool).tril()
DISTANCE = (torch.arange(TIME)[:, None] - torch.arange(TIME)).float()

# Keyword arguments of the scaled dot product, and the instructions that it becomes.
PRODUCT = {"QUANTIZE", "MUL", "BATCH_MATMUL", "SOFTMAX"}
MASKS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "none": ({}, set()),
    "scale": ({"scale": 0.3}, set()),
    "negative scale": ({"scale": -0.25}, set()),
    "causal": ({"is_causal": True}, {"SELECT_V2"}),
    "boolean": ({"attn_mask": BEFORE.flip(1)}, {"SELECT_V2"}),
    "infinite": (
        {"attn_mask": torch.zeros(TIME, TIME).masked_fill(~BEFORE, -torch.inf)},
        {"SELECT_V2"},
    ),
    "bias": ({"attn_mask": -0.1 * DISTANCE.abs()}, {"ADD"}),
    "both": (
        {"attn_mask": (-0.1 * DISTANCE).masked_fill(~BEFORE, -1e9)},
        {"ADD", "SELECT_V2"},
    ),
    "heads": ({"attn_mask": torch.rand(HEADS, TIME, TIME) > 0.1}, {"SELECT_V2"}),
}


def _causal(network: nn.Module, inputs: list[Tensor], *, is_decoder: bool) -> Tensor:
    return _causal_arguments(network, *inputs, is_decoder=is_decoder)


def _causal_arguments(
    network: nn.Module, source: Tensor, target: Tensor, *, is_decoder: bool
) -> Tensor:
    """Run a decoder, or an encoder and a decoder, with a causal mask of the target."""
    mask = nn.Transformer.generate_square_subsequent_mask(target.size(1))
    if is_decoder:
        return network(target, source, tgt_mask=mask)
    return network(source, target, tgt_mask=mask)


class Attending(nn.Module):
    """The scaled dot product, with fixed arguments."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        self.arguments = arguments

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, **self.arguments)


def operands(batch: int = 3, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, HEADS, TIME, WIDTH, generator=generator) for _ in range(3)]


def emulated(module: nn.Module, *inputs: Any, spec: Any = "litert-int8", **arguments: Any) -> Any:
    with torch.no_grad(), emulate(module, spec) as chip:
        with chip.observing():
            module(*inputs, **arguments)
        return module(*inputs, **arguments)


class TestScaledDotProduct:
    @pytest.mark.exactness
    @pytest.mark.parametrize("bits", SPECS)
    @pytest.mark.parametrize("name", MASKS)
    def test_every_output_is_the_references(self, name: str, bits: int) -> None:
        arguments, extra = MASKS[name]
        loud = [3 * x for x in operands(6, seed=1)]
        compared = replays(Attending(**arguments), *operands(), inputs=loud, spec=SPECS[bits])
        assert set(compared) == PRODUCT | extra
        assert min(compared.values()) >= 9_000

    @pytest.mark.parametrize("bits", SPECS)
    @pytest.mark.parametrize("name", MASKS)
    def test_it_is_near_the_float_result(self, name: str, bits: int) -> None:
        module, inputs = Attending(**MASKS[name][0]), operands()
        errors = (emulated(module, *inputs, spec=SPECS[bits]) - module(*inputs)).abs()
        assert float(errors.mean()) < {8: 0.01, 16: 0.0003}[bits]

    @pytest.mark.parametrize("loudness", [0.01, 1.0, 10.0])
    def test_no_query_sees_what_comes_after_it(self, loudness: float) -> None:
        module, inputs = Attending(is_causal=True), operands()
        inputs[0] *= loudness
        with torch.no_grad(), emulate(module) as chip:
            with chip.observing():
                module(*inputs)
            before = module(*inputs)
            for x in inputs:
                x[..., TIME // 2 :, :] = 0.5
            after = module(*inputs)
        assert torch.equal(before[..., : TIME // 2, :], after[..., : TIME // 2, :])
        assert not torch.equal(before, after)

    def test_in_16_bits_it_sees_next_to_nothing(self) -> None:
        module, inputs = Attending(is_causal=True), operands()
        with torch.no_grad(), emulate(module, SPECS[16]) as chip:
            with chip.observing():
                module(*inputs)
            before = module(*inputs)
            for x in inputs:
                x[..., TIME // 2 :, :] = 0.5
            after = module(*inputs)
        early = slice(0, TIME // 2)
        bound = 2.0**-15 * TIME * 4  # One unit of every masked weight, of values up to 4.
        assert float((before - after)[..., early, :].abs().max()) < bound

    def test_ranges_ignore_what_is_masked(self) -> None:
        query, key, value = operands()
        key[..., -1, :] *= 100
        keep = torch.ones(TIME, dtype=torch.bool)
        keep[-1] = False
        module = Attending(attn_mask=keep)
        with emulate(module) as chip, chip.observing():
            module(query, key, value)
        scores = query @ key[..., :-1, :].mT / WIDTH**0.5
        seen = chip.ranges["./attention#0/masked_scores/output"]
        assert (seen.minimum, seen.maximum) == pytest.approx(
            (float(scores.min()), float(scores.max()))
        )

    def test_a_call_without_a_mask_where_calibration_saw_one(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        module, inputs = Attending(attn_mask=MASKS["infinite"][0]["attn_mask"]), operands()
        with torch.no_grad(), emulate(module) as chip:
            with chip.observing():
                module(*inputs)
            module.arguments = {"attn_mask": torch.zeros(TIME, TIME)}
            module(*inputs)
        assert not caplog.records

    def test_a_row_without_scores_is_level(self) -> None:
        keep = torch.ones(TIME, TIME, dtype=torch.bool)
        keep[3] = False
        query, key, value = operands()
        result = emulated(Attending(attn_mask=keep), query, key, value)
        assert torch.allclose(result[..., 3, :], value.mean(-2), rtol=0, atol=0.1)

    @pytest.mark.exactness
    @pytest.mark.parametrize("bits", SPECS)
    @pytest.mark.parametrize("name", [*MASKS, "keys"])
    def test_grouped_queries(self, name: str, bits: int, tmp_path: Path) -> None:
        arguments = {"attn_mask": torch.rand(3, 1, 1, TIME) > 0.2}
        arguments = arguments if name == "keys" else MASKS[name][0]
        module = Attending(**arguments, enable_gqa=True)
        query, key, value = operands()
        inputs = [query, key[:, :2], value[:, :2]]
        assert not coverage(module, *inputs).fallbacks
        compared = replays(module, *inputs, spec=SPECS[bits])
        assert compared["SOFTMAX"] == 3 * HEADS * TIME**2
        error = emulated(module, *inputs, spec=SPECS[bits]) - module(*inputs)
        assert float(error.abs().mean()) < {8: 0.02, 16: 0.0003}[bits]
        calibrate(module, [inputs], lambda module, batch: module(*batch), spec=SPECS[bits])
        model = export_tflite(module, inputs, tmp_path / "net.tflite")
        assert verify(module, model.path, inputs) == 1.0

    @pytest.mark.parametrize("name", ["none", "causal", "both"])
    @pytest.mark.parametrize("fidelity", ["exact", "fast"])
    def test_the_gradient_is_near_the_float_one(self, name: str, fidelity: Any) -> None:
        module = Attending(**MASKS[name][0])
        inputs = operands()
        slopes = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(5))
        mine, reference = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
        with emulate(module, fidelity=fidelity) as chip:
            with chip.observing():
                module(*(1.1 * x for x in inputs))
            module(*mine).backward(slopes)
        module(*reference).backward(slopes)
        for x, y in zip(mine, reference, strict=True):
            assert float(F.cosine_similarity(x.grad.flatten(), y.grad.flatten(), 0)) > 0.99
            assert float(x.grad.norm() / y.grad.norm()) == pytest.approx(1, abs=0.02)


# Arguments of the module, shapes of query, key and value, and arguments of the call.
Layer = tuple[dict[str, Any], tuple[tuple[int, ...], ...], dict[str, Any]]
PADDED = torch.arange(TIME) >= torch.tensor([TIME, TIME - 5, 7])[:, None]
LAYERS: dict[str, Layer] = {
    "itself": ({"batch_first": True}, ((3, TIME, 32),), {"need_weights": False}),
    "time first": ({}, ((TIME, 3, 32),), {}),
    "no batch": ({"bias": False}, ((TIME, 32),), {"average_attn_weights": False}),
    "another": ({"batch_first": True}, ((3, 10, 32), (3, TIME, 32), (3, TIME, 32)), {}),
    "other widths": (
        {"batch_first": True, "kdim": 20, "vdim": 12},
        ((3, 10, 32), (3, TIME, 20), (3, TIME, 12)),
        {"average_attn_weights": False},
    ),
    "bias and zeros": (
        {"batch_first": True, "add_bias_kv": True, "add_zero_attn": True},
        ((3, TIME, 32),),
        {"key_padding_mask": PADDED, "attn_mask": ~BEFORE},
    ),
    "zeros": ({"add_zero_attn": True}, ((TIME, 32),), {"need_weights": False}),
    "bias": ({"add_bias_kv": True}, ((TIME, 3, 32),), {"need_weights": False}),
    "padded": ({"batch_first": True}, ((3, TIME, 32),), {"key_padding_mask": PADDED}),
    "masked": (
        {"batch_first": True},
        ((3, TIME, 32),),
        {"attn_mask": ~BEFORE, "key_padding_mask": PADDED, "need_weights": False},
    ),
    "of heads": (
        {"batch_first": True},
        ((3, TIME, 32),),
        {"attn_mask": -torch.rand(3 * HEADS, TIME, TIME), "need_weights": False},
    ),
}


def layer_of(name: str) -> tuple[nn.Module, list[Tensor], dict[str, Any]]:
    settings, shapes, arguments = LAYERS[name]
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(32, HEADS, **settings)
    given = [torch.randn(shape) for shape in shapes]
    return layer, given * 3 if len(given) == 1 else given, arguments


class TestMultiHead:
    @pytest.mark.exactness
    @pytest.mark.parametrize("bits", SPECS)
    @pytest.mark.parametrize("name", LAYERS)
    def test_every_output_is_the_references(self, name: str, bits: int) -> None:
        layer, given, arguments = layer_of(name)

        def forward(*inputs: Tensor) -> Any:
            return layer(*inputs, **arguments)

        compared = replays(layer, *given, forward=forward, spec=SPECS[bits])
        rows = sum(x.numel() // x.shape[-1] for x in (*given, given[0]))
        assert compared["FULLY_CONNECTED"] == 32 * rows
        assert ("MEAN" in compared) == (
            arguments.get("need_weights", True) and arguments.get("average_attn_weights", True)
        )

        # The factor of the query is in the scales of its projection.
        assert "MUL" not in compared

    @pytest.mark.parametrize(("heads", "products"), [(2, 0), (4, 1)])
    def test_scales_of_powers_of_two_take_such_factors_alone(
        self, heads: int, products: int
    ) -> None:
        torch.manual_seed(0)
        layer, x = nn.MultiheadAttention(32, heads), torch.randn(10, 3, 32)
        instructions: list[Instruction] = []
        with torch.no_grad(), emulate(layer, "shift") as chip:
            with chip.observing():
                layer(x, x, x)
            with chip.running(recorder=instructions.append):
                result, _ = layer(x, x, x)
        assert [each.operator for each in instructions].count("MUL") == products
        error = result - layer(x, x, x)[0].detach()
        assert float(error.abs().mean()) < 0.01

    @pytest.mark.parametrize("bits", SPECS)
    @pytest.mark.parametrize("name", LAYERS)
    def test_it_is_near_the_float_result(self, name: str, bits: int) -> None:
        layer, given, arguments = layer_of(name)
        found = emulated(layer, *given, spec=SPECS[bits], **arguments)
        with torch.no_grad():
            expected = layer(*given, **arguments)
        pairs = [(x, y) for x, y in zip(found, expected, strict=True) if y is not None]
        assert (found[1] is None) == (expected[1] is None)
        for x, y in pairs:
            assert x.shape == y.shape
            assert float((x - y).abs().mean()) < {8: 0.005, 16: 0.001}[bits]

    def test_padding_has_no_weight_and_no_say(self) -> None:
        layer, (x, *_), arguments = layer_of("padded")
        with torch.no_grad(), emulate(layer) as chip:
            with chip.observing():
                layer(x, x, x, **arguments)
            before, weights = layer(x, x, x, **arguments)
            x[PADDED] = 1.5
            after, _ = layer(x, x, x, **arguments)
        assert float(weights[PADDED[:, None].expand(weights.shape)].abs().max()) == 0
        assert torch.equal(before[~PADDED], after[~PADDED])

    def test_evaluation_does_not_take_torchs_fused_path(self) -> None:
        layer, (x, *_), _ = layer_of("itself")
        with emulate(layer) as chip:
            with chip.observing():
                layer(x, x, x)
            trained, _ = layer(x, x, x)
            layer.eval()
            with torch.no_grad():
                assert torch.equal(layer(x, x, x)[0], trained)

    @pytest.mark.parametrize("padding", [None, PADDED])
    def test_nor_does_a_whole_encoder(self, padding: Tensor | None) -> None:
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(32, HEADS, 48, dropout=0.0, batch_first=True)
        encoder, x = nn.TransformerEncoder(layer, 2), torch.randn(3, TIME, 32)
        assert not coverage(encoder, x, src_key_padding_mask=padding).fallbacks
        with emulate(encoder) as chip:
            with chip.observing():
                encoder(x, src_key_padding_mask=padding)
            trained = encoder(x, src_key_padding_mask=padding)
            encoder.eval()
            with torch.no_grad():
                assert torch.equal(encoder(x, src_key_padding_mask=padding), trained)

    @pytest.mark.exactness
    @pytest.mark.filterwarnings("ignore:enable_nested_tensor")
    @pytest.mark.parametrize("spec", SPECS.values())
    @pytest.mark.parametrize("first", [True, False])
    @pytest.mark.parametrize("kind", ["decoder", "transformer"])
    def test_a_decoder_and_a_whole_transformer_train_and_are_exported(
        self, kind: str, first: bool, spec: str, tmp_path: Path
    ) -> None:
        torch.manual_seed(0)
        options: Any = {"dropout": 0.0, "batch_first": True, "norm_first": first}
        if kind == "decoder":
            layer = nn.TransformerDecoderLayer(32, HEADS, 48, **options)
            network: nn.Module = nn.TransformerDecoder(layer, 2, nn.LayerNorm(32))
        else:
            network = nn.Transformer(32, HEADS, 1, 1, 48, **options)
        inputs = [torch.randn(2, 5, 32), torch.randn(2, 7, 32)]
        forward = partial(_causal, is_decoder=kind == "decoder")
        optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
        calibrate(network, [inputs], forward, spec=spec)
        assert not coverage(network, inputs, forward=forward, spec=spec).fallbacks
        for _ in range(3):
            optimizer.zero_grad()
            with emulate(network, spec):
                forward(network, inputs).square().mean().backward()
            assert all(bool(p.grad.any()) for p in network.parameters() if p.grad is not None)
            optimizer.step()
        network.eval()
        given = partial(_causal_arguments, is_decoder=kind == "decoder")
        path = tmp_path / "net.tflite"
        export_tflite(network, inputs, path, forward=given)
        assert verify(network, path, inputs, forward=given, random_inputs=4) == 1.0

    @pytest.mark.exactness
    def test_dropout_leaves_integers(self) -> None:
        torch.manual_seed(0)
        layer, x = nn.MultiheadAttention(32, HEADS, dropout=0.1), torch.randn(TIME, 8, 32)
        compared = replays(layer, x, x, x, spec="litert-int8")
        assert compared["BATCH_MATMUL"] == 8 * (HEADS * TIME**2 + TIME * 32)

    def test_the_gradient_is_near_the_float_one(self) -> None:
        layer, (x, *_), arguments = layer_of("masked")
        slopes = torch.randn(x.shape)

        def gradients(run: Callable[[Tensor], Tensor]) -> list[Tensor]:
            inputs = [x.clone().requires_grad_(), *layer.parameters()]
            return list(torch.autograd.grad(run(inputs[0]), inputs, slopes))

        def run(x: Tensor) -> Tensor:
            return layer(x, x, x, **arguments)[0]

        expected = gradients(run)
        with emulate(layer) as chip:
            with chip.observing():
                run(1.1 * x)
            found = gradients(run)
        for mine, reference in zip(found, expected, strict=True):
            assert float(F.cosine_similarity(mine.flatten(), reference.flatten(), 0)) > 0.99


def test_a_positional_bias_is_learned() -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(0.1 * torch.randn(HEADS, TIME, TIME))

        def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(query, key, value, attn_mask=self.bias)

    torch.manual_seed(0)
    module, inputs = Biased(), operands()
    with emulate(module) as chip:
        with chip.observing():
            module(*inputs)
        module(*inputs).square().sum().backward()
    found = module.bias.grad.clone()
    module.bias.grad = None
    module(*inputs).square().sum().backward()
    assert float(F.cosine_similarity(found.flatten(), module.bias.grad.flatten(), 0)) > 0.98


@pytest.mark.parametrize("spec", ["litert-int8", "litert-int16x8"])
def test_a_row_of_which_all_is_masked_is_the_mean_of_the_values(spec: str) -> None:
    def attend(x: Tensor, keep: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, attn_mask=keep)

    torch.manual_seed(0)
    x, keep = torch.randn(2, 5, 4), torch.ones(2, 5, 5, dtype=torch.bool)
    keep[0, 3] = False
    net = Function(attend)
    calibrate(net, [x], lambda net, x: net(x, keep), spec)
    with emulate(net, spec):
        result = net(x, keep)
    in_float = attend(x, keep)
    assert not in_float[0, 3].any()
    torch.testing.assert_close(result[0, 3], x[0].mean(0), rtol=0, atol=0.03)
    others = keep.any(-1)
    torch.testing.assert_close(result[others], in_float[others], rtol=0, atol=0.05)
