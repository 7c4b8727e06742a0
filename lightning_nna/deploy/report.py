"""Report every emulated weight, and everything that was measured of a deployment, on one page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from torch import Tensor, nn

from lightning_nna.deploy.activations import VELA_LSTM, is_part_of
from lightning_nna.deploy.deployment import Deployment
from lightning_nna.deploy.report_page import report_page
from lightning_nna.deploy.report_tables import activations_csv
from lightning_nna.deploy.vela import VelaReport
from lightning_nna.emulation.attachment import attached
from lightning_nna.emulation.telemetry import SiteTelemetry
from lightning_nna.files import write_whole
from lightning_nna.weights.codebook import index_bits
from lightning_nna.weights.layers import LayerMetrics, as_csv, counts_around_zero, entropy_bits
from lightning_nna.weights.packed import packed_size
from lightning_nna.weights.pipeline import pipeline_of


def layer_figures(
    module: nn.Module,
    reports: Sequence[VelaReport] = (),
    *,
    folded: Mapping[str, str] = MappingProxyType({}),
) -> list[LayerMetrics]:
    """Measure every weight that an emulated module has used.

    Args:
        module: Emulated module that has run.
        reports: Vela's reports of the module's programs. An operator counts for the layer whose
            call site it has in its name; the LSTM layers of one program share the cycles of their
            parts by the bits that their weights need, because Vela names these parts alike in every
            layer.
        folded: Call sites that are part of another's operator, with that one's, see
            :class:`.Activations`; the cycles of a convolution that is folded into a batch norm are
            known with it alone.

    Raises:
        ValueError: If the module is not emulated, or has not run.

    Example:
        >>> import torch
        >>> from lightning_nna import calibrate, emulate
        >>> net, x = nn.Linear(8, 4), torch.randn(16, 8)
        >>> emulator = calibrate(net, [x])
        >>> with emulate(net):
        ...     _ = net(x)
        >>> (row,) = layer_figures(net)
        >>> row.name, row.weights
        ('weight', 32)
    """
    emulator = attached(module)
    if emulator is None or not emulator.state.used_weights:
        raise ValueError("the module has not run emulated: calibrate it and run it emulated first")
    pipeline = pipeline_of(module)
    rows = []
    for name, parameter in module.named_parameters():
        count = emulator.state.rows_of(parameter)
        if count is None:
            continue
        weight = emulator.state.weight(parameter, count)
        transforms = pipeline.transforms_of(parameter)
        latent = pipeline.latent(name) if transforms else parameter
        values = int(weight.stored.unique().numel())
        rows.append(
            LayerMetrics(
                name=name,
                method=transforms[-1].method if transforms else "chip",
                bits=index_bits(weight.stored, transforms),
                weights=parameter.numel(),
                values=values,
                zeros=float((weight.stored == 0).float().mean()),
                entropy_bits=entropy_bits(weight.stored),
                packed_bytes=packed_size(weight, count),
                sqnr_db=_sqnr_db(latent, weight.values.reshape(latent.shape)),
                histogram=counts_around_zero(weight.stored),
            )
        )
    return _with_cycles(module, rows, reports, folded)


def write_report(
    module: nn.Module,
    folder: str | Path,
    reports: Sequence[VelaReport] = (),
    *,
    deployment: Deployment | None = None,
) -> list[LayerMetrics]:
    """Write ``report.html`` and ``report.csv`` of an emulated module.

    The page needs no other file, no script and no network, and says what was not measured.

    Args:
        module: Emulated module that has run.
        folder: Folder of the files.
        reports: Vela's reports whose cycles count for the weights, see :func:`layer_figures`; none
            for those of the first system of ``deployment``.
        deployment: What :func:`.measure_deployment` has measured: the page then has metrics,
            equality, cost, operators, activations and origin, and ``activations.csv`` is written,
            too. None for the weights alone.

    Returns:
        The rows of the weights, one each.

    Raises:
        ValueError: See :func:`layer_figures`.
    """
    evidence = deployment or Deployment()
    if not reports and evidence.systems:
        reports = list(evidence.systems[0].values())
    rows = layer_figures(module, reports, folded=evidence.activations.folded)
    notes = [] if evidence.systems else [str(report) for report in reports]
    text = report_page(evidence, rows, title=type(module).__name__, notes=notes)
    write_whole(Path(folder) / "report.html", text)
    write_whole(Path(folder) / "report.csv", as_csv(rows))
    if evidence.activations.rows:
        write_whole(Path(folder) / "activations.csv", activations_csv(evidence.activations.rows))
    return rows


def _sqnr_db(weight: Tensor, deployed: Tensor) -> float:
    noise = (weight.detach().double() - deployed.double()).square().sum()
    signal = weight.detach().double().square().sum()
    return SiteTelemetry(signal=float(signal), noise=float(noise)).sqnr_db


def _with_cycles(
    module: nn.Module,
    rows: list[LayerMetrics],
    reports: Sequence[VelaReport],
    folded: Mapping[str, str],
) -> list[LayerMetrics]:
    """Return the rows with the cycles of their layers."""
    cycles: dict[str, float] = {}
    recurrent = {n for n, m in module.named_modules() if isinstance(m, (nn.LSTM, nn.LSTMCell))}
    need = {row.name: row.weights * row.entropy_bits for row in rows}
    for report in reports:
        named = [operator.name for operator in report.operators]
        together = sum(o.cycles for o in report.operators if o.operator == VELA_LSTM)
        layers = [
            row.name
            for row in rows
            if _layer(row.name) in recurrent
            and any(name.startswith(f"{_layer(row.name)}/lstm") for name in named)
        ]
        total = sum(need[name] for name in layers)
        for name in layers:
            cycles[name] = cycles.get(name, 0.0) + together * need[name] / max(total, 1.0)
        for row in rows:
            if _layer(row.name) in recurrent:
                continue
            layer = f"{_layer(row.name)}/"
            sites = [into for site, into in folded.items() if site.startswith(layer)]
            own = [
                operator.cycles
                for operator in report.operators
                if operator.on_npu
                and operator.operator != VELA_LSTM
                and (operator.name.startswith(layer) or is_part_of(operator.name, *sites))
            ]
            if own:
                cycles[row.name] = cycles.get(row.name, 0.0) + sum(own)
    return [
        LayerMetrics(**{**vars(row), "cycles": round(cycles[row.name])})
        if row.name in cycles
        else row
        for row in rows
    ]


def _layer(parameter: str) -> str:
    """Return the path of the module that has a parameter."""
    return parameter.rpartition(".")[0]
