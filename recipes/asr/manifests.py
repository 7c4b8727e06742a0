"""A corpus of one's own, from manifests in the forms that other toolkits write.

What a manifest says is kept in the cache under a digest of its files (path, size, time of change),
and the headers of the audio under the path of the manifest: of 100,000 utterances only what has
changed is read again.

A duration in a manifest is trusted until the audio is decoded: that saves opening every file twice.
There a file that differs from its manifest counts as one that cannot be used.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lhotse import CutSet

from recipes.asr.audio import AudioFormat, CorpusError
from recipes.asr.corpora import BadFiles, Splits, Utterance, hold_out_speakers, make_cuts
from recipes.asr.manifest_cache import (
    digest,
    known_headers,
    lasting_objects,
    read_checked,
    write_checked,
)
from recipes.asr.manifest_forms import find_form

Sources = str | Path | Sequence[str | Path]


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A corpus from manifests; see `recipes.asr.manifest_forms` for their forms.

    Args:
        train: Manifest or manifests of the training part: paths, or URLs of Lhotse Shar.
        validation: The same for validation; None to hold out speakers of ``train``.
        test: The same for testing; None to hold out speakers of ``train``.
        validation_fraction: Least fraction of the utterances of ``train`` to hold out for
            validation, in (0, 1); read if ``validation`` is None.
        test_fraction: The same for testing, read if ``test`` is None.
        split_seed: Seed of the random order of speakers.

    Raises:
        ValueError: If a part has neither a manifest nor a fraction, or if the fractions leave
            nothing to train on.
    """

    train: Sources
    validation: Sources | None = None
    test: Sources | None = None
    validation_fraction: float | None = None
    test_fraction: float | None = None
    split_seed: int = 0

    def __post_init__(self) -> None:
        for part in ("validation", "test"):
            if getattr(self, part) is not None:
                continue
            fraction = getattr(self, f"{part}_fraction")
            if fraction is None:
                raise ValueError(
                    f"there is nothing for {part}: set data.{part}=PATH, or hold out speakers of "
                    f"data.train with data.{part}_fraction=0.05"
                )
            if not 0 < fraction < 1:
                raise ValueError(f"data.{part}_fraction is a fraction in (0, 1), got {fraction}")
        if (total := sum(self._held_out().values())) >= 1:
            raise ValueError(
                f"data.validation_fraction and data.test_fraction hold out {total:g} of data.train "
                "together, which leaves nothing to train on"
            )

    def load(
        self,
        *,
        cache_dir: Path,
        audio_format: AudioFormat,
        max_bad_fraction: float,
    ) -> Splits:
        """Load the manifests of the three parts; see `recipes.asr.corpora.Corpus.load`."""
        parts: dict[str, CutSet] = {}
        for part in Splits._fields:
            sources = _listed(getattr(self, part))
            if sources:
                bad = BadFiles(of=f"Manifest {part}", max_fraction=max_bad_fraction)
                utterances = [
                    utterance
                    for source in sources
                    for utterance in _read(source, setting=f"data.{part}", cache_dir=cache_dir)
                ]
                with known_headers(cache_dir, "Manifest", *map(_absolute, sources)) as headers:
                    parts[part] = make_cuts(utterances, audio_format, bad=bad, headers=headers)
        size = len(parts["train"])
        for part, fraction in self._held_out().items():
            setting = f"data.{part}_fraction"
            _require_speakers(parts["train"], setting=setting, remedy=f"data.{part}=PATH")
            parts["train"], parts[part] = hold_out_speakers(
                parts["train"],
                # Of the whole training part, also if speakers of it are held out already.
                fraction=fraction * size / max(len(parts["train"]), 1),
                seed=self.split_seed,
                setting=setting,
            )
        return Splits(**parts)

    def _held_out(self) -> dict[str, float]:
        """Return the parts that are held out, with their fractions of the training part."""
        fractions = {"test": self.test_fraction, "validation": self.validation_fraction}
        return {
            part: fraction
            for part, fraction in fractions.items()
            if fraction is not None and getattr(self, part) is None
        }


@lasting_objects()
def _read(source: str, *, setting: str, cache_dir: Path) -> list[Utterance]:
    """Read the utterances of one manifest, from the cache if its files are the same."""
    form = find_form(source, setting=setting, cache_dir=cache_dir)
    stamps = [
        [str(path), status.st_size, status.st_mtime_ns]
        for path in form.files
        for status in [path.stat()]
    ]
    name = digest(_absolute(source), stamps)
    listing = Path(os.path.abspath(cache_dir)) / "manifests" / f"{name}.json"
    pack = listing.with_suffix(".audio")
    if listing.is_file():
        content = read_checked(listing)
        if not content["packed"] or pack.is_file():
            # In JSON, a pair is a list.
            return [
                Utterance._make([*fields, None if packed is None else tuple(packed)])
                for *fields, packed in content["utterances"]
            ]
    utterances = form.read(pack)
    if not utterances:
        raise CorpusError(f"{setting}={source} has no utterances")
    write_checked(listing, {"packed": pack.is_file(), "utterances": utterances})
    return utterances


def _require_speakers(cuts: CutSet, *, setting: str, remedy: str) -> None:
    unknown = [cut.id for cut in cuts if not cut.supervisions[0].speaker]
    if unknown:
        raise CorpusError(
            f"{setting} holds out entire speakers, and {len(unknown)} of {len(cuts)} utterances of "
            f"data.train have no speaker, {unknown[0]!r} first: add speakers to the manifest, or "
            f"set {remedy}"
        )


def _listed(sources: Sources | None) -> list[str]:
    if sources is None:
        return []
    return [str(sources)] if isinstance(sources, str | Path) else [str(one) for one in sources]


def _absolute(source: str) -> str:
    return source if "://" in source else os.path.abspath(source)
