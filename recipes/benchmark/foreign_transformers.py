"""Networks of Hugging Face's transformers and peft, small, with random weights.

All are built from configurations; nothing is downloaded. Dropout is zero, so that float and
emulated training can be compared step by step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recipes.benchmark.foreign_module import ForeignModule, ForeignProgram, classification, first

VOCABULARY = 96
_TOKENS = 12


def _tokens(batch: int = 4, count: int = _TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, count))


def _masked_tokens() -> tuple[Tensor, Tensor]:
    """Return tokens and a mask of padding, shape ``(batch, tokens)`` each."""
    lengths = torch.tensor([_TOKENS, _TOKENS - 2, _TOKENS - 3, _TOKENS])
    return _tokens(), (torch.arange(_TOKENS) < lengths[:, None]).long()


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    network: nn.Module = BertForMaskedLM(config)
    return network


def _lora() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], lora_dropout=0.0)
    network: nn.Module = get_peft_model(_bert(), config)
    return network


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
    )
    network: nn.Module = GPT2LMHeadModel(config)
    return network


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
    )
    network: nn.Module = LlamaForCausalLM(config)
    return network


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    network: nn.Module = T5ForConditionalGeneration(config)
    return network


def _wav2vec2() -> nn.Module:
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        conv_dim=(32, 32, 32),
        conv_kernel=(10, 3, 3),
        conv_stride=(5, 4, 4),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        hidden_dropout=0.0,
        activation_dropout=0.0,
        attention_dropout=0.0,
        feat_proj_dropout=0.0,
        final_dropout=0.0,
        layerdrop=0.0,
        apply_spec_augment=False,
    )
    network: nn.Module = Wav2Vec2ForCTC(config)
    return network


def _ctc(logits: Tensor) -> Tensor:
    """Compute the CTC loss of logits, shape ``(batch, frames, classes)``, to fixed labels."""
    batch, frames, classes = logits.shape
    labels = 1 + torch.arange(6 * batch).reshape(batch, 6) % (classes - 1)
    scores = logits.log_softmax(-1).transpose(0, 1)
    lengths = torch.full((batch,), frames), torch.full((batch,), 6)
    return nn.functional.ctc_loss(scores, labels, *lengths)


def _whisper() -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCABULARY,
        num_mel_bins=16,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_source_positions=24,
        max_target_positions=16,
        dropout=0.0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    network: nn.Module = WhisperForConditionalGeneration(config)
    return network


def _whisper_batch() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 16, 48), _tokens(2, 8)


def _whisper_run(network: Any, features: Tensor, tokens: Tensor) -> Any:
    return network(input_features=features, decoder_input_ids=tokens, use_cache=False).logits


def _whisper_encoder(network: Any, features: Tensor) -> Any:
    return network.model.encoder(features).last_hidden_state


def _whisper_step(
    network: Any, token: Tensor, encoded: Tensor, caches: list[tuple[Tensor, ...]]
) -> Any:
    """Decode one token: the keys and values of earlier tokens are arguments.

    Args:
        network: Whisper.
        token: Token, shape ``(1, 1)``.
        encoded: Result of the encoder, shape ``(1, frames, size)``.
        caches: Keys and values of earlier tokens, and keys and values of the encoder's result, by
            layer, shape ``(1, heads, tokens or frames, size of a head)`` each.

    Returns:
        Logits, shape ``(1, 1, tokens)``, and keys and values with those of the new token.
    """
    from transformers import DynamicCache, EncoderDecoderCache

    own, cross = DynamicCache(), DynamicCache()
    for layer, (keys, values, cross_keys, cross_values) in enumerate(caches):
        own.update(keys, values, layer)
        cross.update(cross_keys, cross_values, layer)
    past = EncoderDecoderCache(own, cross)
    result = network(
        encoder_outputs=(encoded,),
        decoder_input_ids=token,
        cache=past,
        use_cache=True,
    )
    return result.logits, [(layer.keys, layer.values) for layer in own.layers]


def _whisper_step_arguments(network: Any, features: Tensor, tokens: Tensor) -> tuple[Any, ...]:
    """Return the arguments of a decoder step after the first tokens of the first example."""
    features, tokens = first((features, tokens))
    with torch.no_grad():
        encoded = network.model.encoder(features).last_hidden_state
        result = network(encoder_outputs=(encoded,), decoder_input_ids=tokens[:, :-1])
    past = result.past_key_values
    pairs = zip(past.self_attention_cache.layers, past.cross_attention_cache.layers, strict=True)
    caches = [(own.keys, own.values, cross.keys, cross.values) for own, cross in pairs]
    return tokens[:, -1:], encoded, caches


#: Networks by the name that rows and the command line use.
TRANSFORMERS: dict[str, ForeignModule] = {
    "bert": ForeignModule(
        "BERT, masked language model",
        "transformers",
        _bert,
        _masked_tokens,
        classification(VOCABULARY),
        run=lambda net, tokens, mask: net(input_ids=tokens, attention_mask=mask).logits,
    ),
    "bert_lora": ForeignModule(
        "LoRA on BERT",
        "peft",
        _lora,
        _masked_tokens,
        classification(VOCABULARY),
        run=lambda net, tokens, mask: net(input_ids=tokens, attention_mask=mask).logits,
    ),
    "gpt2": ForeignModule(
        "GPT-2",
        "transformers",
        _gpt2,
        lambda: (_tokens(),),
        classification(VOCABULARY),
        run=lambda net, tokens: net(input_ids=tokens, use_cache=False).logits,
    ),
    "llama": ForeignModule(
        "Llama, RoPE and grouped queries",
        "transformers",
        _llama,
        lambda: (_tokens(),),
        classification(VOCABULARY),
        run=lambda net, tokens: net(input_ids=tokens, use_cache=False).logits,
    ),
    "t5": ForeignModule(
        "T5",
        "transformers",
        _t5,
        lambda: (_tokens(), _tokens()[:, :8]),
        classification(VOCABULARY),
        run=lambda net, tokens, labels: (
            net(input_ids=tokens, decoder_input_ids=labels, use_cache=False).logits
        ),
        range_margin=0.25,
    ),
    "wav2vec2": ForeignModule(
        "wav2vec 2.0, CTC",
        "transformers",
        _wav2vec2,
        lambda: (torch.randn(2, 2000),),
        _ctc,
        run=lambda net, sound: net(sound).logits,
        warmup_steps=60,
    ),
    "whisper": ForeignModule(
        "Whisper",
        "transformers",
        _whisper,
        _whisper_batch,
        classification(VOCABULARY),
        run=_whisper_run,
        programs=(
            ForeignProgram(
                _whisper_encoder, lambda net, features, tokens: first((features,)), "encoder"
            ),
            ForeignProgram(_whisper_step, _whisper_step_arguments, "decoder step"),
        ),
    ),
}
