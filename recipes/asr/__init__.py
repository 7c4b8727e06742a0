"""Streaming speech recognition with the RNN transducer: data, model, decoding, scoring."""
