"""The ways to ship a trained model that the merge audit compares.

    as trained                  W + s B A, with W as the training held the base
    the base alone              W
    merged on 16 bit, on NF4    round16(W + s B A): a folder, or the source of GGUF files
    merged, as a GGUF type      the merge, quantised to the type and dequantised
    GGUF base + adapter         the base quantised without the adapter, then + s B A in float32

A model from a GGUF file has one base, the file. The file with the adapter beside it is the model as
trained, and all merges are on the file's weights.

The merges are those of checkpoints/merge.py, and the types of the tensors those of mixtures.py. So
a way computes with the values that the exported files hold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gguf import GGMLQuantizationType as GGMLType

from minitune.checkpoints.load_weights import open_weights
from minitune.checkpoints.merge import merged_specs
from minitune.checkpoints.safetensors_writer import total_bytes
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.gguf.content import content_metadata, file_content
from minitune.gguf.general_metadata import adapted_name, organization_and_name, origin_metadata
from minitune.gguf.importance.importance import ImportanceMatrix
from minitune.gguf.lora_adapter import adapter_content
from minitune.gguf.model_metadata import gguf_name
from minitune.gguf.writer import Content, MetadataValue
from minitune.model.causal_lm import CausalLM

TRAINED, BASE = "trained", "base"  # sources of weights beside the merges
MERGE_LABELS = {
    "original": "merged on 16 bit",
    "nf4": "merged on NF4",
    "auto": "merged",  # on the only base, that of a GGUF file
}


@dataclass(frozen=True)
class Way:
    """A way to ship a trained model.

    label: its name in the table.
    source: the weights that it begins with: TRAINED, BASE, or a merge base of merge.py.
    nbytes: bytes of its files, or of the weights in memory for the model as trained.
    method: type of its GGUF file, or None.
    has_adapter: True if the adapter is added to the weights at run time.
    types: Hugging Face's name of a tensor -> its storage type; other tensors stay as they are.
    """

    label: str
    source: str
    nbytes: int
    method: str | None = None
    has_adapter: bool = False
    types: Mapping[str, GGMLType] = field(default_factory=dict)


def merge_sources(model: CausalLM) -> list[str]:
    """Return the merge bases of merge.py that the model has."""
    if model.gguf is not None:
        return ["auto"]
    has_original = not open_weights(model.folder, model.config).prequantized
    return [*(["original"] if has_original else []), *(["nf4"] if model.is_nf4 else [])]


def shipped_ways(
    model: CausalLM,
    tokenizer: Tokenizer,
    methods: Sequence[str],
    importance: ImportanceMatrix | None = None,
) -> list[Way]:
    """Return the ways; the first two are the model as trained and its base.

    methods: types of the GGUF files, as `mixtures.gguf_methods` returns them.

    Raises: ValueError if GGUF cannot express the model or the tokenizer.
    """
    weights = model.gguf or model.folder
    organization, base = organization_and_name(model.name, weights)
    origin = origin_metadata(organization, base)
    merged = _contents(model, tokenizer, methods, adapted_name(base), origin, importance)
    folder_bytes, adapter_bytes = total_bytes(merged_specs(model)), adapter_content(model).nbytes
    base_bytes = _base_bytes(model)
    ways = [
        Way(_trained_label(model), TRAINED, base_bytes + adapter_bytes, has_adapter=True),
        Way("base without the adapter", TRAINED, base_bytes),
    ]
    for source in merge_sources(model):
        label = MERGE_LABELS[source]
        ways.append(Way(f"{label}, folder", source, folder_bytes))
        for method, content in merged.items():
            types = _types(model, content)
            name = f"{label}, {method.upper()}"
            ways.append(Way(name, source, content.nbytes, method, types=types))
    if model.gguf is not None:
        return ways
    alone = _contents(model, tokenizer, methods, base, {}, importance)
    for method, content in alone.items():
        types, nbytes = _types(model, content), content.nbytes + adapter_bytes
        name = f"{method.upper()} base + adapter"
        ways.append(Way(name, BASE, nbytes, method, has_adapter=True, types=types))
    return ways


def _trained_label(model: CausalLM) -> str:
    """Return the label of the model as trained, with the form in which training held the base."""
    if model.gguf is not None:
        return "GGUF base + adapter (as trained)"
    return f"as trained ({'NF4' if model.is_nf4 else '16 bit'} + adapter)"


def _contents(
    model: CausalLM,
    tokenizer: Tokenizer,
    methods: Sequence[str],
    name: str,
    origin: dict[str, MetadataValue],
    importance: ImportanceMatrix | None,
) -> dict[str, Content]:
    """Return the keys and tensors of the GGUF file of each type.

    name: general.name.
    origin: the keys that name the base model.
    """
    metadata = content_metadata(model.config, tokenizer, name)
    return {
        method: file_content(model.config, method, name, origin, metadata, importance)
        for method in methods
    }


def _types(model: CausalLM, content: Content) -> dict[str, GGMLType]:
    """Return the type of each tensor of a file by Hugging Face's name."""
    types = {info.name: info.type for info in content.infos}
    family = model.config.architecture
    return {name: types[gguf_name(name, family)] for name in model.config.tensor_shapes()}


def _base_bytes(model: CausalLM) -> int:
    """Return the bytes of the base as training held it, or of its GGUF file."""
    if model.gguf is not None:
        return model.gguf.stat().st_size
    linears = [linear for _, linear in model.linears() if linear.is_quantized]
    frozen = [p for name, p in model.named_parameters() if ".lora_" not in name]
    return sum(linear.quantized.nbytes for linear in linears) + sum(p.nbytes for p in frozen)
