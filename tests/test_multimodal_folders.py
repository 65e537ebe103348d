"""The text model of a multimodal folder loads, merges and exports like a plain text model."""

import json

import pytest
import torch
import transformers
from gguf_files import tensors_of
from tiny import GENERATION_CONFIG, draw, write_tokenizer
from tiny_families import COMMON
from transformers_twin import batch, load, relative
from weight_folders import edit_json, edit_tensors

from minitune.checkpoints.merge import merge_to_folder
from minitune.commands import export, generate
from minitune.config.architectures import ARCHITECTURES
from minitune.config.model_config import ModelConfig
from minitune.config.text_config import TEXT_MODELS
from minitune.gguf.export import convert_folder

VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2]}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e4}
# name of the case -> (model_type of the wrapper, text_config, values of the wrapper)
WRAPPERS = {
    "llava": ("llava", {"model_type": "llama"}, {"image_token_index": 5}),
    "llava with scaled RoPE": (
        "llava",
        {"model_type": "llama", "rope_parameters": LINEAR, "tie_word_embeddings": True},
        {"image_token_index": 5, "tie_word_embeddings": True},
    ),
    "mistral3": (
        "mistral3",
        {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
        {"tie_word_embeddings": False},
    ),
    "mistral3 tied by the wrapper": (
        "mistral3",
        {"model_type": "mistral", "head_dim": 32, "sliding_window": None},
        {"tie_word_embeddings": True},
    ),
    "idefics3": ("idefics3", {"model_type": "llama", "pad_token_id": 2}, {}),
    "internvl": ("internvl", {"model_type": "qwen2"}, {}),
    "qwen2.5 with sections": (
        "qwen2_5_vl",
        {"model_type": "qwen2_5_vl_text", "rope_parameters": MROPE},
        {"vision_config": QWEN_VISION | {"out_hidden_size": 64, "fullatt_block_indexes": [0]}},
    ),
    "qwen3 with sections": (
        "qwen3_vl",
        {
            "model_type": "qwen3_vl_text",
            "head_dim": 16,
            "rope_parameters": MROPE | {"mrope_interleaved": True},
        },
        {"vision_config": QWEN_VISION | {"out_hidden_size": 64, "deepstack_visual_indexes": [0]}},
    ),
}
every_wrapper = pytest.mark.parametrize("case", WRAPPERS)


def make_wrapper(folder, case):
    """Write a random multimodal model in float32 as transformers saves it; return its model."""
    model_type, text, outer = WRAPPERS[case]
    config = transformers.AutoConfig.for_model(
        model_type, **({"vision_config": VISION} | outer), text_config=COMMON | text
    )
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            plain = name.replace("language_model.", "").replace("text_model.", "")
            parameter.copy_(draw(plain, tuple(parameter.shape), generator))
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION_CONFIG))
    write_tokenizer(folder, "llama3" if "qwen" in text["model_type"] else "spm")
    return model.eval()


@every_wrapper
def test_logits_equal_those_that_transformers_computes_with_the_whole_model(tmp_path, case):
    hf = make_wrapper(tmp_path / "m", case)
    model, _ = load(tmp_path / "m", load_in_4bit=False, with_adapter=False)
    ids = torch.randint(20, 400, (1, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = hf(input_ids=ids).logits
        assert relative(model(input_ids=ids).logits, expected) < 1e-5


@every_wrapper
def test_the_merged_folder_is_a_plain_text_model_in_transformers(tmp_path, case):
    make_wrapper(tmp_path / "m", case)
    model, tokenizer = load(tmp_path / "m", load_in_4bit=False)
    merge_to_folder(model, tmp_path / "merged", tokenizer)
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert written["model_type"] in ARCHITECTURES and "text_config" not in written
    hf, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert type(hf).__name__ == written["architectures"][0]
    again, _ = load(tmp_path / "merged", load_in_4bit=False, with_adapter=False)
    assert not again.config.notes
    ids = batch(model, rows=1, length=60)[0]
    with torch.no_grad():
        expected = hf(ids).logits
        assert relative(again(input_ids=ids).logits, expected) < 1e-5
        # A merge rounds the weights to bfloat16.
        assert relative(model(input_ids=ids).logits, expected) < 0.03


def test_a_gguf_file_of_the_text_model_needs_no_merge_first(tmp_path):
    make_wrapper(tmp_path / "m", "mistral3")
    model, tokenizer = load(tmp_path / "m", load_in_4bit=False, with_adapter=False)
    merge_to_folder(model, tmp_path / "merged", tokenizer)
    direct = tensors_of(convert_folder(tmp_path / "m", tmp_path / "x.gguf", "bf16"))
    merged = tensors_of(convert_folder(tmp_path / "merged", tmp_path / "y.gguf", "bf16"))
    assert direct.keys() == merged.keys()
    assert (direct["blk.1.attn_q.weight"].data == merged["blk.1.attn_q.weight"].data).all()


def test_names_of_transformers_4_and_5_load_alike(tmp_path):
    make_wrapper(tmp_path / "m", "llava")
    ids = torch.arange(20, 60)[None]
    expected = load(tmp_path / "m", with_adapter=False)[0](input_ids=ids).logits

    def rename(tensors):
        for name in list(tensors):
            new = name.replace("language_model.model.", "model.language_model.")
            new = new.replace("language_model.lm_head", "lm_head")
            new = new.replace("vision_tower.", "model.vision_tower.")
            tensors[new] = tensors.pop(name)

    edit_tensors(tmp_path / "m", rename)
    found = load(tmp_path / "m", with_adapter=False)[0](input_ids=ids).logits
    assert torch.equal(found, expected)


def test_qwen2_vls_first_layout_has_the_text_models_values_at_the_top(tmp_path):
    make_wrapper(tmp_path / "m", "qwen2.5 with sections")
    ids = torch.arange(20, 60)[None]
    expected = load(tmp_path / "m", with_adapter=False)[0](input_ids=ids).logits
    raw = json.loads((tmp_path / "m" / "config.json").read_text())
    text = raw.pop("text_config")
    rope = text.pop("rope_parameters")
    text |= {
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": rope["mrope_section"]},
    }
    (tmp_path / "m" / "config.json").write_text(json.dumps(text | raw))

    def rename(tensors):
        for name in list(tensors):
            new = name.replace("model.language_model.", "model.").replace("model.visual", "visual")
            tensors[new] = tensors.pop(name)

    edit_tensors(tmp_path / "m", rename)
    hf = transformers.AutoModelForImageTextToText.from_pretrained(
        tmp_path / "m", dtype=torch.float32
    )
    model = load(tmp_path / "m", load_in_4bit=False, with_adapter=False)[0]
    with torch.no_grad():
        assert relative(model(input_ids=ids).logits, hf(input_ids=ids).logits) < 1e-5
    found = load(tmp_path / "m", with_adapter=False)[0](input_ids=ids).logits
    assert torch.equal(found, expected)


def test_the_commands_say_that_the_text_model_is_used(tmp_path, capsys):
    make_wrapper(tmp_path / "m", "llava")
    note = "note: the folder holds a llava model; its text model, of type llama, is used"
    arguments = ["--model", str(tmp_path / "m"), "--device", "cpu"]
    assert generate.main([*arguments, "--prompt", "x", "--max-new-tokens", "2"]) == 0
    assert note in capsys.readouterr().err
    assert export.main([*arguments[:2], "--output", str(tmp_path / "x.gguf")]) == 0
    assert note in capsys.readouterr().err


@pytest.mark.parametrize("model_type", TEXT_MODELS)
def test_values_that_a_text_config_leaves_out_are_those_of_transformers(tmp_path, model_type):
    plain, name, defaults = vars(TEXT_MODELS[model_type]).values()
    theirs = transformers.AutoConfig.for_model(model_type).to_dict()
    theirs["rope_theta"] = theirs["rope_parameters"]["rope_theta"]
    for key, value in defaults.items():
        assert value == theirs[key], key
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    assert mapping[plain] == name
    raw = {"model_type": "wrapper", "text_config": {"model_type": model_type}}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = ModelConfig.from_folder(tmp_path)
    assert config.num_key_value_heads == theirs["num_key_value_heads"]
    assert theirs.get("head_dim") in (None, config.head_dim)
    assert config.ropes[0].theta == theirs["rope_theta"]


def test_values_of_the_wrapper_count_if_the_text_config_has_none(tmp_path):
    outer = {"eos_token_id": [7, 8], "torch_dtype": "bfloat16", "bos_token_id": 3}
    text = {"model_type": "llama", "eos_token_id": None, "bos_token_id": 4}
    raw = {"model_type": "wrapper", "text_config": text, "vocab_size": 9} | outer
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found = ModelConfig.from_folder(tmp_path).raw
    assert found["eos_token_id"] == [7, 8] and found["torch_dtype"] == "bfloat16"
    assert found["bos_token_id"] == 4 and found["vocab_size"] == 32000


# Each function below damages a llava folder and returns the error that loading must give.


def text_config_is_a_list(folder):
    edit_json(folder / "config.json", text_config=["llama"])
    return r"config\.json: text_config is \['llama'\]; expected an object"


def text_config_without_type(folder):
    edit_json(folder / "config.json", text_config={"hidden_size": 64})
    return r"text_config has no model_type"


def other_text_model(folder):
    edit_json(folder / "config.json", text_config={"model_type": "gpt2"})
    return r"model_type 'gpt2' is not supported"


def text_tensor_without_place(folder):
    name = "language_model.model.layers.0.self_attn.q_norm.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(16)}))
    return r"self_attn\.q_norm\.weight has no place in the model"


def text_tensor_missing(folder):
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors.pop(name))
    return r"holds no tensor model\.layers\.1\.mlp\.up_proj\.weight"


def text_tensor_of_wrong_shape(folder):
    name = "language_model.model.norm.weight"
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.ones(65)}))
    return r"language_model\.model\.norm\.weight has shape \(65,\), config\.json asks for \(64,\)"


def two_heads(folder):
    edit_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": torch.ones(512, 64)}))
    return r"lm_head\.weight and .*lm_head\.weight, which are the same tensor of the text model"


def no_text_model(folder):
    def drop(tensors):
        for name in list(tensors):
            if name.startswith("language_model."):
                tensors.pop(name)

    edit_tensors(folder, drop)
    return r"holds no text model; its tensors would begin with language_model\.model\., "


def a_plain_config_beside_the_tensors_of_a_wrapper(folder):
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw["text_config"]))
    return r"holds no tensor model\.embed_tokens\.weight"


DAMAGES = [
    text_config_is_a_list,
    text_config_without_type,
    other_text_model,
    text_tensor_without_place,
    text_tensor_missing,
    text_tensor_of_wrong_shape,
    two_heads,
    no_text_model,
    a_plain_config_beside_the_tensors_of_a_wrapper,
]


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    make_wrapper(folder, "llava")
    return folder


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_broken_wrapper_is_refused_by_name(tmp_path, llava, damage):
    folder = tmp_path / "m"
    folder.mkdir()
    for path in llava.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    message = damage(folder)
    with pytest.raises(ValueError, match=message):
        load(folder)
