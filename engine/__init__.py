"""Generation without Ray: continuous batching over a paged latent KV cache, with speculative decoding.

The way of a token: `service` runs `engine` in a thread; a step of it goes through `scheduler`, `runner` and
`acceptance`; `text` decodes the new tokens and finds where the text ends.
"""
