"""The grid of deployment: its runs, what is missing, its report."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize

from recipes.benchmark import deployment
from recipes.benchmark.deployment import STUDY, SYSTEMS, DeploymentRun, checks, runs
from recipes.settings import check_settings

KEYS = (
    "model method bits sparsity accelerator system wer tflite_bytes encoded_bytes memory_bytes "
    "inference_ms equal_outputs equal_transcripts cpu_operators command commit seed"
).split()


def summary(size: int, milliseconds: float, wer: float = 0.15) -> dict[str, Any]:
    accelerators = [
        {
            "accelerator": accelerator,
            "system": system,
            "memory_mode": mode,
            "encoded_bytes": size,
            "memory_bytes": size,
            "sram_bytes": 1,
            "inference_ms": milliseconds,
            "part_ms": {"encoder": milliseconds / 16},
            "bound": {
                "encoder": "bandwidth" if "Flash" in system or "Emb" in system else "computation"
            },
            "cpu_operators": ["GatherV2"] if "85" not in accelerator else [],
        }
        for accelerator, system, mode in SYSTEMS
    ]
    figures = dict.fromkeys(("wer", "wer_low", "wer_high", "loss_per_token"), wer)
    return {
        **figures,
        "command": f"python -m recipes.deploy ckpt={size}",
        "commit": "abc",
        "tflite_bytes": 2_000_000,
        "real_time_factor": 0.1,
        "equal_outputs": 1.0,
        "outputs": 5_000_000,
        "equal_transcripts": 1.0,
        "utterances": 130,
        "threads": 1,
        "float": None,
        "emulated": figures,
        "systems": accelerators,
    }


def rows(few_bytes: int, few_ms: float) -> list[dict[str, Any]]:
    eight, five = runs()[:2]
    return [
        *eight.system_rows(summary(1000, 60.0)),
        *five.system_rows(summary(few_bytes, few_ms)),
    ]


def of_rate(few_bytes: int, few_ms: float, wer: float) -> list[dict[str, Any]]:
    return runs()[2].system_rows(summary(few_bytes, few_ms, wer))


def larger(few_bytes: int, few_ms: float, wer: float) -> list[dict[str, Any]]:
    return runs()[-2].system_rows({**summary(few_bytes, few_ms, wer), "wer_start": 0.14})


def rendered(rows: list[dict[str, Any]], float_wer: float | None = None) -> str:
    study = replace(STUDY, report=partial(deployment.report, float_wer=float_wer))
    return study.render(rows)


def test_rows_have_the_keys_of_the_table() -> None:
    both = rows(650, 40.0)
    assert len(both) == 2 * len(SYSTEMS)
    assert all(set(KEYS) <= set(row) for row in both)
    assert len({(r["method"], r["accelerator"], r["system"]) for r in both}) == len(both)


def test_every_command_composes() -> None:
    with initialize(version_base="1.3", config_path="../../../recipes/conf"):
        for run in runs(seeds=(1, 2)):
            module, *overrides = run.command
            config = compose("deploy", overrides=[o for o in overrides if "hydra." not in o])
            assert module == "recipes.deploy"
            assert [tuple(system) for system in config.systems] == list(SYSTEMS)
            assert Path(config.ckpt) == run.trained_checkpoint


@pytest.mark.parametrize(
    ("model", "units", "bits"), [("rnnt_large", 400, 5), ("rnnt_small", 256, None)]
)
def test_other_sizes_are_trained_into_the_folders_that_are_deployed(
    model: str, units: int, bits: int | None
) -> None:
    configs = []
    run = next(run for run in runs() if run.model == model)
    with initialize(version_base="1.3", config_path="../../../recipes/conf"):
        for command in (run.float_command, run.fine_tuning_command):
            module, *overrides = command
            assert module == "recipes.train"
            configs.append(compose("train", [o for o in overrides if "hydra." not in o]))
            check_settings(configs[-1], "train")
            assert configs[-1].model.network.encoder_size == units
    assert configs[1].init_from == f"runs/an4_{model}/seed1/checkpoints/last.ckpt"
    assert configs[1].bits == bits
    folder = run.trained_checkpoint.parents[1]
    assert run.fine_tuning_command[-1] == f"hydra.run.dir={folder}"


@pytest.mark.parametrize(
    ("size", "time", "word"),
    [
        (650, 40.0, "35.0% and 33.3%, WER 15.0 % against 15.0 %, met"),
        (800, 50.0, "20.0% and 16.7%, WER 15.0 % against 15.0 %, missed"),
    ],
)
def test_targets_are_judged(size: int, time: float, word: str) -> None:
    assert word in checks(rows(size, time))[1]


def test_the_best_row_without_loss_is_the_one_that_is_judged() -> None:
    both = [*rows(700, 42.0), *of_rate(650, 40.0, 0.14)]
    assert (
        "*fixed codebook, entropy of at most 4.25 bits*: 35.0% and 33.3%, WER 14.0 % against"
        in "".join(checks(both))
    )
    # What saves more but loses words does not count.
    worse = "".join(checks([*rows(700, 42.0), *of_rate(650, 40.0, 0.16)]))
    assert "*fixed codebook*: 30.0% and 30.0%, WER 15.0 % against 15.0 %, missed" in worse
    only = "".join(checks([*rows(700, 42.0)[: len(SYSTEMS)], *of_rate(650, 40.0, 0.16)]))
    assert "35.0% and 33.3%, WER 16.0 % against 15.0 %, missed" in only


@pytest.mark.parametrize(
    ("time", "wer", "word"), [(59.0, 0.14, "met"), (61.0, 0.14, "missed"), (59.0, 0.15, "missed")]
)
def test_a_larger_network_is_to_be_faster_and_better(time: float, wer: float, word: str) -> None:
    both = [*rows(650, 40.0), *larger(990, time, wer)]
    last = checks(both)[-1]
    assert f"{time:.2f} against 60.00 ms" in last
    assert last.endswith(f"{word}.")
    text = rendered(both, float_wer=0.168)
    assert "| 320 | 8 bits, accelerator-aware | 8 | 1 | 16.8 % | 15.0 % |" in text
    title = "fixed codebook, entropy of at most 4.25 bits"
    assert f"| 400 | {title} | 5 | 1 | 14.0 % | {100 * wer:.1f} % |" in text
    # It stands in no table of the usual size.
    assert text.count("fixed codebook, entropy of at most 4.25 bits") == len(SYSTEMS)
    smaller = runs()[-1].system_rows(summary(900, 55.0, 0.2))
    last = checks([*both, *of_rate(650, 54.0, 0.19), *smaller])[-1]
    assert "A network of 320 units at 5 bits at least as fast as one of 256 at 8" in last
    assert last.endswith(
        "54.00 against 55.00 ms for a second of speech, WER 19.0 % against 20.0 %, met."
    )


def test_the_report_keeps_systems_apart() -> None:
    text = rendered(rows(650, 40.0))
    assert text.index("reading the weights") < text.index("computing takes")
    assert text.count("Ethos_U65_High_End |") == 2
    assert "130 of 130" in text
    assert text.count("python -m recipes.deploy ckpt=") == 2


def test_what_is_missing_is_named_and_what_is_done_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    done: list[DeploymentRun] = []

    def run_once(folder: Path, command: list[str], *, threads: int) -> dict[str, Any]:
        done.append(next(run for run in runs() if run.folder == folder))
        return summary(1000, 60.0)

    monkeypatch.setattr(deployment, "summary_of", run_once)
    first = runs(trained=tmp_path)[0].trained_checkpoint
    first.parent.mkdir(parents=True)
    first.touch()
    for _ in range(2):
        STUDY.main(["--runs", str(tmp_path)])
    assert [run.method for run in done] == ["nna8"]
    lines = STUDY.results.read_text().splitlines()
    assert len(lines) == len(SYSTEMS)
    output = capsys.readouterr().out
    assert output.count("missing: ") == 16
    assert "train it with python -m recipes.benchmark.pruning --methods csp" in output
    assert json.loads(lines[0])["bits"] == 8
