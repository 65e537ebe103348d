"""The decode engine: prompts in, new tokens out, over the trainer's layers and weights.

engine.py       continuous batching: which request runs in which slot
prefill.py      the prompts, packed, through the training layer
decode_step.py  one token of each slot through the layers
decode_graphs.py  that step as CUDA graphs
kv_cache.py     keys and values in pages
"""
