"""The decode engine: prompts in, new tokens out, over the trainer's layers and weights.

requests.py       Request and Answer, in token ids
engine.py         one call at a time; the door is `decode`
decode_call.py    a call: admit, choose, end, step
schedule.py       which request is in which slot, with which pages
prefill.py        the prompts, packed, through the training layer
decode_step.py    one token of each slot through the layers
decode_memory.py  all that stays between calls
decode_graphs.py  steps as CUDA graphs
kv_cache.py       keys and values in pages
step_weights.py   weights that are fast for few rows
few_row_step.py   those of a GPU
cpu_weights.py    those of a CPU
cpu_step.py       a step on a CPU
"""
