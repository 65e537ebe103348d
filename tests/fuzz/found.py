"""Seeds of faults that the fuzzer found: claim -> (reader, seed).

The claims hold now. A change of a mutator changes the meaning of its seeds, so it needs new ones.
"""

FOUND = {
    "a weight file that is a link to a device is refused": ("weights", 1121),
    "a weight file that never ends is not read": ("weights", 1159),
    "a weight file that is a broken link is refused": ("weights", 1184),
    "an index does not lead out of its folder": ("index", 1087),
    "a scale that is not a number draws no token": ("quant_state", 17),
    "a quantised file that is a broken link is refused": ("quant_state", 1165),
    "a pad token that is no id is refused": ("generation_config", 1106),
    "a model_max_length that is a text is refused": ("tokenizer_files", 1022),
    "a normalizer that multiplies text does not abort": ("tokenizer_parts", 1037),
    "a post-processor that tokenizers lacks leaves no panic": ("tokenizer_parts", 1071),
    "a post-processor with an unknown token leaves no panic": ("tokenizer_parts", 1101),
    "a BPE prefix that is longer than a token leaves no panic": ("tokenizer_parts", 1184),
    "a chat template that loops for ever ends": ("chat_template", 2),
    "a chat template in a GGUF file that fills the memory ends": ("gguf_template", 5),
    "a macro in a GGUF file that doubles its text ends": ("gguf_template", 17),
    "a template in a GGUF file that is slow at each rendering ends": ("gguf_template", 26),
    "TOML that is nested too deeply is refused": ("toml", 12),
    "a run's settings that are nested too deeply are refused": ("run_folder", 18),
    "a link to itself among a run's files is refused": ("run_folder", 10025),
    "an empty text in front of each text leaves no panic": ("tokenizer_parts", 10537),
    "a sum that is a signalling NaN is refused without a warning": ("imatrix", 10054),
    "the same in a GGUF file is refused without a warning": ("imatrix", 10516),
    "a number of chunks that is a list is refused": ("imatrix", 41),
    "a header of a token file that is cut is not used": ("token_cache", 1),
    "a report of cached tokens that was changed is not used": ("token_cache", 22),
    "a wrong offset in a saved dataset does not end the process": ("arrow", 10412),
    "files of a saved dataset that are no list are refused": ("arrow", 10285),
    "columns of a saved dataset that are no list are refused": ("arrow", 38),
}
