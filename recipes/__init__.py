"""Programs that are launched: ``python -m recipes.train``, or ``lightning-nna train``."""

from importlib.util import find_spec


def require_extra(extra: str, *modules: str) -> None:
    """Raise one message if a module of an extra is not installed.

    Args:
        extra: Its name in ``pyproject.toml``.
        modules: What is needed of it, by the names that are imported.

    Raises:
        ImportError: Names what is missing, and the extra that has it.

    Example:
        >>> require_extra("asr", "lhotse", "a_module_that_nobody_has")
        Traceback (most recent call last):
        ImportError: a_module_that_nobody_has is not installed: it comes with the extra asr, pip
        install 'lightning-nna[asr]' (in a checkout: pip install -e '.[asr]')
    """
    if missing := [module for module in modules if find_spec(module) is None]:
        raise ImportError(
            f"{', '.join(missing)} is not installed: it comes with the extra {extra}, pip install "
            f"'lightning-nna[{extra}]' (in a checkout: pip install -e '.[{extra}]')"
        )


require_extra(
    *("asr", "ai_edge_litert", "espeakng_loader", "flatbuffers", "hydra", "lhotse", "matplotlib"),
    *("omegaconf", "safetensors", "sentencepiece", "soundfile", "torchaudio", "tqdm"),
)
