"""Every source gives the records that its own library reads, and the samples of the same dicts."""

import csv
import gzip
import importlib
import importlib.util
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import write_chat_tokenizer

from minitune.data.sources import jsonl, text_files
from minitune.data.sources.sources import load_dataset, open_sources
from minitune.data.tokenization.tokenizer import Tokenizer
from minitune.data.tokenize_dataset import tokenize_dataset

datasets = pytest.importorskip("datasets")
pandas = pytest.importorskip("pandas")

RECORDS = [
    {"prompt": "How many, in words?", "completion": "Four é.\nOr five"},
    {"prompt": 'A "quoted", odd\r\nprompt', "completion": " 0012 "},
    {"prompt": "NA", "completion": "🦙 null"},
]
MESSAGES = [
    {"messages": [{"role": "user", "content": f"Say {i}"}, {"role": "assistant", "content": "Yo"}]}
    for i in range(7)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Return a tokenizer with a chat template."""
    return Tokenizer.from_folder(write_chat_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def to_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def to_json(path, records):
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8-sig")


def to_csv(path, records, delimiter=","):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, records[0].keys(), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(records)


def to_tsv(path, records):
    to_csv(path, records, "\t")


def to_parquet(path, records):
    datasets.Dataset.from_list(records).to_parquet(path)


def to_folder(path, records):
    datasets.Dataset.from_list(records).save_to_disk(path, num_shards=min(2, len(records)))


def compressed(write):
    """Return a writer that also compresses the file."""

    def to_gzip(path, records):
        write(path, records)
        path.write_bytes(gzip.compress(path.read_bytes()))

    return to_gzip


FILES = {
    "a.jsonl": to_jsonl,
    "a.json": to_json,
    "lines.json": to_jsonl,
    "a.parquet": to_parquet,
    "a.folder": to_folder,
    "a.jsonl.gz": compressed(to_jsonl),
    "a.json.gz": compressed(to_json),
}
TABLES = {"a.csv": to_csv, "a.tsv": to_tsv, "a.csv.gz": compressed(to_csv)}
OBJECTS = {
    "list": lambda records: records,
    "tuple": tuple,
    "generator": lambda records: (record for record in records),
    "Dataset": datasets.Dataset.from_list,
    "IterableDataset": lambda records: datasets.Dataset.from_list(records).to_iterable_dataset(),
    "DataFrame": pandas.DataFrame,
}


def records_of(source):
    """Return the records of a source without their places."""
    return [dict(record) for _, record in load_dataset(source)]


def without_progress(write, path, records):
    datasets.disable_progress_bars()
    write(path, records)
    return path


@pytest.mark.parametrize("name", [*FILES, *TABLES])
def test_a_file_gives_the_same_samples_as_the_list(tokenizer, tmp_path, name):
    for records in (RECORDS, MESSAGES) if name in FILES else (RECORDS,):
        path = without_progress((FILES | TABLES)[name], tmp_path / f"{len(records)}{name}", records)
        assert records_of(path) == records
        found, expected = (tokenize_dataset(x, tokenizer, 200) for x in (path, records))
        assert list(found.samples) == list(expected.samples)
        assert found.report.shapes == expected.report.shapes


@pytest.mark.parametrize("name", OBJECTS)
def test_an_object_gives_the_same_samples_as_the_list(tokenizer, name):
    for records in (RECORDS, MESSAGES):
        found = tokenize_dataset(OBJECTS[name](records), tokenizer, 200)
        assert list(found.samples) == list(tokenize_dataset(records, tokenizer, 200).samples)
        assert found.samples.origin(2) == "dataset[2]"


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20).filter(
    lambda text: text and "\x00" not in text  # an empty cell is null, and CSV has no NUL
)
values = st.none() | st.integers() | texts | st.lists(texts, max_size=3)
pairs = st.lists(st.fixed_dictionaries({"prompt": texts, "completion": texts}), min_size=1)


@pytest.mark.parametrize("name", [*FILES, *TABLES])
@given(records=pairs)
@settings(max_examples=20, deadline=None)
def test_random_texts_pass_unchanged(tmp_path_factory, name, records):
    path = tmp_path_factory.mktemp("random") / name
    assert records_of(without_progress((FILES | TABLES)[name], path, records)) == records


@given(
    values=st.lists(st.dictionaries(texts, values, max_size=3), min_size=1, max_size=5),
    block=st.integers(1, 50),
    indent=st.sampled_from([None, 1]),
)
@settings(max_examples=50, deadline=None)
def test_an_array_is_read_like_json_whatever_the_size_of_its_blocks(
    tmp_path_factory, values, block, indent
):
    path = tmp_path_factory.mktemp("array") / "a.json"
    path.write_text(json.dumps(values, indent=indent), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonl, "BLOCK", block)
        assert records_of(path) == values


def test_a_text_file_is_read_like_datasets_does_without_blank_lines(tokenizer, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("first\n\n  indented \nlast one", encoding="utf-8")
    expected = datasets.load_dataset(
        "text", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert records_of(path) == [row for row in expected if row["text"].strip()]
    assert [origin for origin, _ in load_dataset(path)] == [f"{path}:{i}" for i in (1, 3, 4)]
    named = tokenize_dataset(path, tokenizer, 99, dataset_text_field="body")
    assert list(named.samples) == list(tokenize_dataset(path, tokenizer, 99).samples)


def test_an_empty_cell_is_null_and_every_other_cell_is_a_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('a,b\n1,\n"",NA\n\n"two\nlines",true\n')
    places, records = zip(*load_dataset(path), strict=True)
    assert records == (
        {"a": "1", "b": None},
        {"a": None, "b": "NA"},
        {"a": "two\nlines", "b": "true"},
    )
    assert places == (f"{path}:2", f"{path}:3", f"{path}:5")


def test_rows_of_tables_equal_those_of_datasets(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "a", "calls": [{"x": 1}]}], "n": 1, "f": 0.5},
        {"messages": [], "n": None, "f": None},
        {"messages": [{"role": "tool", "content": None, "calls": None}], "n": 3, "f": 1.0},
    ]
    dataset = datasets.Dataset.from_list(rows)
    for name, write in (("a.parquet", to_parquet), ("a.folder", to_folder)):
        path = without_progress(write, tmp_path / name, rows)
        assert records_of(path) == list(dataset)
        assert [origin for origin, _ in load_dataset(path)] == [f"{path}[{i}]" for i in range(3)]


def test_columns_of_type_json_are_parsed_like_datasets_does(tmp_path):
    json_type = getattr(datasets, "Json", None)
    if json_type is None:
        pytest.skip("this version of datasets has no Json feature")
    features = datasets.Features(
        {"j": json_type(), "nested": [{"k": json_type(), "s": datasets.Value("string")}]}
    )
    rows = [
        {"j": {"p": 1}, "nested": [{"k": [1, {"q": None}], "s": "t"}]},
        {"j": "x", "nested": []},
    ]
    dataset = datasets.Dataset.from_list(rows, features=features)
    dataset.save_to_disk(tmp_path / "folder")
    assert records_of(tmp_path / "folder") == list(dataset) == rows


def test_a_saved_selection_of_columns_holds_those_columns(tmp_path):
    dataset = datasets.Dataset.from_list(RECORDS).with_format(columns=["completion"])
    dataset.save_to_disk(tmp_path / "folder")
    expected = list(datasets.load_from_disk(str(tmp_path / "folder")))
    assert records_of(tmp_path / "folder") == expected
    assert set(expected[0]) == {"completion"}


def test_long_rows_are_read_in_small_batches_and_in_order(tmp_path):
    rows = [{"text": f"{i} " * 30_000} for i in range(300)]
    for name, write in (("a.parquet", to_parquet), ("a.folder", to_folder)):
        assert records_of(without_progress(write, tmp_path / name, rows)) == rows


def test_several_files_follow_each_other_and_keep_their_names(tokenizer, tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.csv"
    to_jsonl(one, MESSAGES)
    to_csv(two, RECORDS)
    found = tokenize_dataset([one, str(two)], tokenizer, 200)
    assert list(found.samples) == list(tokenize_dataset(MESSAGES + RECORDS, tokenizer, 200).samples)
    assert [found.samples.origin(i) for i in (0, 6, 7)] == [f"{one}:1", f"{one}:7", f"{two}:2"]
    assert found.report.shapes == {"messages": 7, "prompt/completion": 3}


# ---- refused


def refused(source, message):
    with pytest.raises(ValueError, match=message):
        load_dataset(source)


def test_folders_that_are_no_single_dataset_are_refused_with_the_remedy(tmp_path):
    dataset = datasets.Dataset.from_list(MESSAGES)
    splits = datasets.DatasetDict({"train": dataset, "test": dataset})
    splits.save_to_disk(tmp_path / "splits")
    refused(
        tmp_path / "splits", r"holds the splits train, test; choose one, such as .*splits/train"
    )
    assert len(load_dataset(tmp_path / "splits" / "train")) == 7
    refused(splits, r"DatasetDict with the splits 'train', 'test'; .* such as dataset\['train'\]")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", r"a folder without state\.json")
    state = tmp_path / "splits" / "test" / "state.json"
    content = json.loads(state.read_text())
    state.write_text(json.dumps(content | {"_indices_data_files": [{"filename": "i.arrow"}]}))
    refused(state.parent, r"holds a selection of rows; call flatten_indices\(\)")
    state.write_text(json.dumps(content | {"_data_files": [{"filename": "../x.arrow"}]}))
    refused(state.parent, "_data_files is .*, expected a list of")
    state.write_text(json.dumps(content | {"_format_columns": True}))
    refused(state.parent, "_format_columns is True; expected null")


BROKEN = {
    "a.json": [
        (
            '[{"a": 1} {"a": 2}]',
            r"a\.json\[0\]: not a JSON array: ',' or ']' is missing before '{'",
        ),
        ('[{"a": 1}, {"a": 2]', r"a\.json\[1\]: not JSON: Expecting ',' delimiter at column 8"),
        ('[{"a": 1}', r"a\.json\[0\]: not a JSON array: ',' or ']' is missing before the end"),
        ('[{"a": 1}] x', "'x' follows the array"),
        ('[{"a": 1}, 2]', r"a\.json\[1\]: holds a number, not an object"),
        ("[]", "holds no record"),
        ("[" * 100_000, "nested too deeply"),
    ],
    "a.csv": [
        ("a,b\n1,2,3\n", r"a\.csv:2: 3 cells, but the header has 2"),
        ("a,b\n1\n", r"a\.csv:2: 1 cell, but the header has 2"),
        ('a,b\n1,2\n"1,2\n', r"a\.csv:3: not CSV: unexpected end of data"),
        ("a,a\n1,2\n", r"a\.csv:1: two columns are named 'a'"),
        ("a,\n1,2\n", r"a\.csv:1: a column has no name"),
        ("a,b\n", "holds no record"),
        (b"a,b\n1,2\n\xe9,3\n", r"a\.csv:3: not UTF-8: .* at byte 0; save the file as UTF-8"),
        ("a;b\n1;2\n", r"a\.csv:1: the header is the one cell 'a;b'; cells are separated by"),
        ("a\n1\n".encode("utf-16"), r"a\.csv: the file is UTF-16; save it as UTF-8"),
    ],
    "a.txt": [("\n \n", "holds no record"), (b"a\n\xff\n", r"a\.txt:2: not UTF-8")],
    "a.parquet": [("no table", "not a Parquet file that can be read")],
    "a.jsonl.gz": [
        ("plain", "could not be read"),
        (gzip.compress(b"{}" * 99, mtime=0)[:-9], "could not be"),
    ],
}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [(name, *case) for name, cases in BROKEN.items() for case in cases],
)
def test_a_broken_file_is_refused_by_name_and_place(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(path, message)


def test_an_arrow_file_that_is_broken_or_missing_is_named(tmp_path):
    datasets.Dataset.from_list(MESSAGES).save_to_disk(tmp_path / "folder")
    (file,) = (tmp_path / "folder").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:100])
    refused(tmp_path / "folder", "not an Arrow file that can be read|could not be read")
    file.unlink()
    refused(tmp_path / "folder", "no such file, but state.json names it")


def test_parquet_without_pyarrow_names_the_package_to_install(tmp_path, monkeypatch):
    to_parquet(tmp_path / "a.parquet", MESSAGES)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pyarrow" else find(name)
    )
    refused(tmp_path / "a.parquet", "needs the package pyarrow; run `pip install pyarrow`")


@pytest.mark.parametrize("value", [3, None, b"bytes"])
def test_an_object_that_is_no_dataset_is_refused(value):
    with pytest.raises(ValueError, match=r"the dataset is .*; expected a path, several paths"):
        open_sources(value)


def test_a_cell_that_python_cannot_hold_is_refused_by_file(tmp_path):
    arrow = pytest.importorskip("pyarrow")
    when = arrow.array([10**14], arrow.timestamp("s"))  # the year 3,170,000
    parquet = importlib.import_module("pyarrow.parquet")
    parquet.write_table(arrow.table({"text": ["a"], "when": when}), tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", r"a\.parquet: a value that Python cannot hold")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_a_record_longer_than_the_bound_is_refused_before_it_is_read_whole(
    tmp_path, monkeypatch, name
):
    for module in (jsonl, text_files):
        monkeypatch.setattr(module, "MAX_RECORD_BYTES", 1000)
    monkeypatch.setattr(jsonl, "BLOCK", 100)
    text = '[{"a": "' if name == "a.json" else '{"a": "'
    content = f"{text}{'x' * 5000}".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    refused(tmp_path / name, rf"{name}.*is longer than .* bytes, the most of a record; cut it")
