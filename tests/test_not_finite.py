"""NaN and infinite values in weights are named when they are loaded, in every format."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from fp8_folders import make_fp8
from gguf_files import make_tiny_gguf
from safetensors.torch import load_file
from tiny import make_tiny_model
from training_runs import make_smallest_model
from weight_folders import edit_json, edit_tensors, load

from minitune import FastLanguageModel
from minitune.checkpoints.bitsandbytes_nf4 import nf4_tensors
from minitune.checkpoints.finite_check import FiniteCheck, magnitude
from minitune.checkpoints.fp8 import dequantize_fp8
from minitune.commands.plan import find_planned_model
from minitune.gguf.export import convert_folder
from minitune.gguf.reader import GgufReader
from minitune.kernels.ggml_reference import BLOCK_DEQUANTIZERS, BLOCK_SIZES
from minitune.model.ggml_weight import GgmlWeight
from minitune.model.nf4 import NF4

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), layers=1, tie=False)


def copied(folder, target):
    """Return a copy of a folder."""
    shutil.copytree(folder, target)
    return target


def write_nf4(folder, double_quant=True):
    """Replace the linears of a folder by NF4, in bitsandbytes' layout."""

    def quantize(tensors):
        for name in [name for name in tensors if "_proj" in name]:
            weight = NF4.quantize(tensors.pop(name))
            if not double_quant:
                code = weight.nested_code[weight.absmax.int()]
                scales = code * weight.nested_absmax.repeat_interleave(256)[: len(code)]
                weight = NF4(
                    weight.packed, scales + weight.nested_offset, weight.code, weight.shape
                )
            linear = name.removesuffix(".weight")
            tensors.update(
                (key, x.clone()) for key, x in nf4_tensors(linear, weight, torch.float16)
            )

    edit_tensors(folder, quantize)
    edit_json(folder / "config.json", quantization_config={"bnb_4bit_quant_type": "nf4"})
    return folder


def edit_state(folder, **changes):
    """Change the quantisation state of a linear."""
    name = f"{Q_PROJ}.quant_state.bitsandbytes__nf4"

    def change(tensors):
        state = json.loads(bytes(tensors[name].tolist())) | changes
        tensors[name] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    edit_tensors(folder, change)


# ---- the check itself


def test_the_magnitude_is_finite_only_if_all_values_are():
    generator = torch.Generator().manual_seed(0)
    for dtype in DTYPES:
        for shape in ((1,), (3, 5), (213, 7)):
            values = torch.randn(shape, generator=generator).to(dtype)
            assert magnitude(values) == values.abs().max().float()
            for wrong in (math.nan, math.inf, -math.inf):
                place = int(torch.randint(values.numel(), (), generator=generator))
                damaged = values.clone().view(-1)
                damaged[place] = wrong
                assert not magnitude(damaged.view(shape)).isfinite()


def test_every_tensor_that_is_not_finite_is_counted_and_the_first_named():
    finite = FiniteCheck()
    finite.require(lambda name, text: ValueError(name), "")
    for name, value in {"a": 1.0, "b": math.nan, "c": math.inf}.items():
        finite.add(name, torch.ones(3), torch.tensor([0.0, value]))
    assert finite.not_finite() == ["b", "c"]
    with pytest.raises(ValueError, match=r"^b holds .* NaN or infinite \(2 such tensors\)"):
        finite.require(lambda name, text: ValueError(f"{name} {text}"), "get it again")


@pytest.mark.parametrize("kind", BLOCK_DEQUANTIZERS)
def test_each_scale_of_a_block_is_checked_and_nothing_else_makes_a_value_infinite(kind):
    width, size = BLOCK_SIZES[kind]
    blocks = np.random.default_rng(0).integers(0, 256, (8, size), np.uint8)
    blocks = torch.from_numpy(blocks).view(4, 2 * size)
    weight = GgmlWeight.of(blocks, kind)
    columns = {part.data_ptr(): part for part in weight.scales()}
    for part in columns.values():
        assert part.shape == (8,)
    halves = blocks.view(torch.float16).view(8, -1)
    for column in range(size // 2):  # a NaN in any half of the block
        changed = halves.clone()
        changed.copy_(torch.where(changed.isfinite(), changed, 1.0))
        finite = GgmlWeight.of(changed.view(torch.uint8).view(4, -1), kind)
        assert finite.dequantize(torch.float32).isfinite().all()
        changed[5, column] = math.nan
        values = finite.dequantize(torch.float32)
        flagged = not all(magnitude(part).isfinite() for part in finite.scales())
        assert flagged == (not values.isfinite().all()), column
    assert finite.shape == (4, 2 * width)


# ---- each format


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_a_16_bit_weight_is_named_with_its_file(tiny, tmp_path, value, load_in_4bit):
    folder = copied(tiny, tmp_path / "m")
    for name in (Q_PROJ, "model.norm.weight", "model.embed_tokens.weight", "lm_head.weight"):
        before = load_file(folder / "model.safetensors")[name]

        def damage(tensors, name=name):
            tensors[name].view(-1)[3] = value

        edit_tensors(folder, damage)
        message = rf"model\.safetensors: {name} holds a value that is NaN or infinite \(1 such"
        with pytest.raises(ValueError, match=message):
            load(folder, load_in_4bit=load_in_4bit)
        edit_tensors(folder, lambda tensors, name=name, x=before: tensors.update({name: x}))
    load(folder, load_in_4bit=load_in_4bit)


def test_an_export_names_the_tensor_that_is_not_finite_and_leaves_no_folder(tiny, tmp_path):
    folder = copied(tiny, tmp_path / "m")
    edit_tensors(folder, lambda tensors: tensors[Q_PROJ].view(-1)[3:4].fill_(math.nan))
    message = rf"model\.safetensors: {Q_PROJ} holds a value that is NaN .*; get the file again"
    with pytest.raises(ValueError, match=message):
        convert_folder(folder, tmp_path / "out" / "x.gguf", "f16")
    assert not (tmp_path / "out").exists()


def test_the_largest_finite_values_are_taken(tiny, tmp_path):
    folder = copied(tiny, tmp_path / "m")
    largest = torch.finfo(torch.bfloat16).max
    edit_tensors(folder, lambda tensors: tensors["model.norm.weight"].fill_(largest))
    load(folder, load_in_4bit=False)


@pytest.mark.parametrize(
    ("part", "double_quant"),
    [
        (".absmax", False),
        (".nested_absmax", True),
        (".nested_quant_map", True),
        (".quant_map", True),
    ],
)
def test_each_part_of_an_nf4_weight_is_checked(tiny, tmp_path, part, double_quant):
    folder = write_nf4(copied(tiny, tmp_path / "m"), double_quant)
    load(folder)
    for value in (math.nan, math.inf, 3e38):

        def damage(tensors, value=value):
            tensors[Q_PROJ + part][0] = value
            if value == 3e38:  # finite, but the product with another part is not
                other = ".quant_map" if part.endswith("absmax") else ".nested_absmax"
                tensors[Q_PROJ + other][0] = value

        edit_tensors(folder, damage)
        with pytest.raises(ValueError, match=f"{Q_PROJ} holds a value that is NaN or infinite"):
            load(folder)


STATES = [
    {"nested_blocksize": 10**18},
    {"nested_blocksize": 2**32},
    {"nested_blocksize": 0},
    {"blocksize": 48},
    {"blocksize": 64.0},
    {"blocksize": True},
    {"blocksize": math.inf},
    {"blocksize": None},
    {"nested_offset": 10**400},
    {"nested_offset": math.nan},
    {"nested_offset": 1e308},
    {"nested_offset": "0.1"},
    {"quant_type": "fp4"},
    {"shape": [64.0, 64]},
    {"shape": [-64, -64]},
    {"shape": "64"},
]


def test_a_state_that_bitsandbytes_would_not_write_is_refused_by_its_field(tiny, tmp_path):
    folder = write_nf4(copied(tiny, tmp_path / "m"))
    good = (folder / "model.safetensors").read_bytes()
    for change in STATES:
        (folder / "model.safetensors").write_bytes(good)
        edit_state(folder, **change)
        field = next(iter(change))
        with pytest.raises(ValueError, match=rf"quant_state\.bitsandbytes__nf4 is not .*{field}"):
            load(folder)


def test_an_fp8_weight_is_named(tmp_path):
    folder = tmp_path / "m"
    make_fp8(folder)
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(folder, lambda tensors: tensors[name].view(torch.uint8)[0].fill_(0x7F))
    with pytest.raises(ValueError, match=f"{name} holds a value that is NaN or infinite"):
        load(folder)


@pytest.mark.parametrize("tensor", ["blk.0.attn_q.weight", "output_norm.weight"])
def test_a_tensor_of_a_gguf_file_is_named_as_in_the_file(tmp_path, tensor):
    path = make_tiny_gguf(tmp_path, "q4_0", layers=1)
    stored = GgufReader(path).tensors[tensor]
    content = bytearray(path.read_bytes())
    content[stored.position : stored.position + 4] = b"\x00\x7e\xc0\x7f"  # NaN in 16 and 32 bits
    path.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"\.gguf: {tensor} holds a value that is NaN or infinite"
    ):
        FastLanguageModel.from_pretrained(path, max_seq_length=64, device="cpu")


def test_a_block_of_fp8_may_be_larger_than_its_weight():
    weight = torch.ones(3, 5).to(torch.float8_e4m3fn)
    scale = torch.tensor([[2.0, 3.0]])
    values = dequantize_fp8(weight, scale, (10**18, 4))
    assert values.tolist() == [[2.0] * 4 + [3.0]] * 3


# ---- layers and vocabulary


def test_sizes_that_the_files_do_not_have_are_refused_before_anything_is_built(tmp_path):
    folder = make_smallest_model(tmp_path / "m")
    for change, message in (
        ({"num_hidden_layers": 1000}, "num_hidden_layers is 1000, but the files hold"),
        ({"num_hidden_layers": 10**18}, "num_hidden_layers is 1000000000000000000; expected"),
        ({"vocab_size": 1 << 24}, "embed_tokens.weight has shape .* asks for .16777216, "),
        ({"vocab_size": 10**12}, "vocab_size is 1000000000000; expected a whole number"),
        ({"intermediate_size": 1 << 20}, r"\.mlp\..*_proj\.weight has shape .* asks for"),
    ):
        before = (folder / "config.json").read_bytes()
        edit_json(folder / "config.json", **change)
        for read in (load, lambda path: find_planned_model(str(path), load_in_4bit=True)):
            with pytest.raises(ValueError, match=message):
                read(folder)
        (folder / "config.json").write_bytes(before)
