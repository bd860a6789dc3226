"""CSV, TSV, JSONL, Parquet and tar files load as folders do, and what is wrong with them is named."""

import csv
import io
import json
import os
import tarfile
import warnings

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_tgpt.data import DataWarning, class_names, load_splits
from hf_tgpt.data.readers.text_tables import read_delimited


@pytest.fixture(autouse=True)
def no_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def png(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def write_pictures(root, count=10):
    """Pictures 0.png, 1.png, ... whose number is their shade."""
    (root / "images").mkdir(parents=True)
    for number in range(count):
        (root / "images" / f"{number}.png").write_bytes(png(number))


def rows(numbers):
    return [{"image": f"images/{n}.png", "label": ["ant", "big_cat"][n % 2], "caption": f"number {n}"} for n in numbers]


def write_table(file, records):
    if file.suffix == ".jsonl":
        text = "\n".join(json.dumps(record) for record in records)
    else:
        mark = "\t" if file.suffix == ".tsv" else ","
        text = "\n".join(mark.join(record) for record in [records[0].keys(), *(record.values() for record in records)])
    file.write_text(text + "\n")


def check(splits, train, test):
    """`splits` hold the numbered pictures with their labels."""
    assert class_names(splits["train"]) == ["ant", "big cat"]
    for split, numbers in {"train": train, "test": test}.items():
        assert [image.getpixel((0, 0))[0] for image in splits[split]["image"]] == numbers
        assert splits[split]["label"][:] == [n % 2 for n in numbers]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
def test_tables_of_the_splits_with_captions(tmp_path, suffix):
    write_pictures(tmp_path)
    write_table(tmp_path / f"train{suffix}", rows([3, 0, 1]))
    write_table(tmp_path / f"test{suffix}", rows([4, 5]))
    splits = load_splits(tmp_path)
    check(splits, train=[3, 0, 1], test=[4, 5])
    assert splits["train"]["caption"][:] == ["number 3", "number 0", "number 1"]


def test_one_table_is_split_by_the_seed(tmp_path):
    write_pictures(tmp_path)
    write_table(tmp_path / "all.csv", rows(range(10)))
    splits = load_splits(tmp_path / "all.csv")
    assert {split: len(data) for split, data in splits.items()} == {"train": 4, "validation": 2, "test": 4}
    check(splits, *([i.getpixel((0, 0))[0] for i in splits[split]["image"]] for split in ("train", "test")))


def test_other_names_of_columns_and_absolute_paths(tmp_path):
    write_pictures(tmp_path)
    for split, numbers in {"train": [0, 1], "test": [2]}.items():
        records = [{"path": str(tmp_path / "images" / f"{n}.png"), "species": "xy"[n % 2]} for n in numbers]
        write_table(tmp_path / f"{split}.csv", records)
    splits = load_splits(tmp_path, label_column="species")
    assert class_names(splits["test"]) == ["x", "y"]
    named = load_splits(tmp_path, image_column="path", label_column="species")
    assert named["train"]["label"][:] == splits["train"]["label"][:] == [0, 1]


def test_tables_in_a_data_folder_may_have_paths_from_above(tmp_path):
    write_pictures(tmp_path)
    (tmp_path / "data").mkdir()
    write_table(tmp_path / "data" / "train.csv", rows([0, 1]))
    write_table(tmp_path / "data" / "test.csv", rows([2, 3]))
    check(load_splits(tmp_path), train=[0, 1], test=[2, 3])


def test_parquet_as_the_hub_exports_it(tmp_path):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["ant", "big_cat"])})
    (tmp_path / "data").mkdir()
    for part, numbers in {"train-00000-of-00002": [0, 1], "train-00001-of-00002": [2], "test-0": [3]}.items():
        pictures = [{"bytes": png(n), "path": None} for n in numbers]
        table = Dataset.from_dict({"image": pictures, "label": [n % 2 for n in numbers]}, features=features)
        table.to_parquet(tmp_path / "data" / f"{part}.parquet")
    check(load_splits(tmp_path), train=[0, 1, 2], test=[3])


def test_class_folders_come_before_tables_beside_them(tmp_path):
    for shade, split in enumerate(["train", "test"]):
        for name in ("ant", "bee"):
            (tmp_path / split / name).mkdir(parents=True)
            (tmp_path / split / name / "0.png").write_bytes(png(10 * shade + len(name)))
    (tmp_path / "train.csv").write_text("id,something\n1,2\n")
    assert class_names(load_splits(tmp_path)["train"]) == ["ant", "bee"]


def test_images_that_are_not_there_are_counted_and_named(tmp_path):
    write_pictures(tmp_path, count=3)
    write_table(tmp_path / "train.csv", rows([0, 1, 7, 8]))
    write_table(tmp_path / "test.csv", rows([2]))
    with pytest.raises(
        ValueError, match=r"'image' names 2 of 4 images that are not in .*; the first are images/7\.png"
    ):
        load_splits(tmp_path)


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("empty", [None, "", " "])
def test_rows_without_a_label_are_counted_by_the_tables_own_column(tmp_path, suffix, empty):
    write_pictures(tmp_path)
    written = [{"image": f"images/{n}.png", "Art": "ant" if n % 2 else "big_cat"} for n in range(10)]
    written[3]["Art"] = written[7]["Art"] = empty
    file = tmp_path / f"table{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(written), file)
    else:
        shown = [row | {"Art": row["Art"] if suffix == ".jsonl" else row["Art"] or ""} for row in written]
        write_table(file, shown)
    with pytest.raises(ValueError, match=r"in row 3 of the \w+ split.*: 2 rows are without a label in 'Art'; fill in"):
        load_splits(file, label_column="Art")


def test_class_numbers_without_names_ask_for_them(tmp_path):
    write_pictures(tmp_path)
    for split, numbers in {"train": [0, 1], "test": [2, 3]}.items():
        records = [{"image": f"images/{n}.png", "label": str(n % 2)} for n in numbers]
        write_table(tmp_path / f"{split}.csv", records)
    with pytest.raises(ValueError, match="list the names of the numbers as `class_names_file`"):
        load_splits(tmp_path)
    (tmp_path / "names.txt").write_text("ant\nbig cat\n")
    check(load_splits(tmp_path, class_names_file=tmp_path / "names.txt"), train=[0, 1], test=[2, 3])


def test_files_of_several_kinds_are_refused(tmp_path):
    write_pictures(tmp_path)
    write_table(tmp_path / "train.csv", rows([0, 1]))
    write_table(tmp_path / "test.jsonl", rows([2, 3]))
    with pytest.raises(ValueError, match=r"several kinds, \.csv, \.jsonl; keep one kind"):
        load_splits(tmp_path)


# Archives ------------------------------------------------------------------------------------------------------------


def write_tar(file, numbers, **texts):
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for n in numbers:
            for suffix, data in {"png": png(n), "cls": str(n % 2).encode(), "txt": f"number {n}".encode()}.items():
                member = tarfile.TarInfo(f"s{n:07d}.{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))


def write_archives(root):
    write_tar(root / "train" / "0.tar", [0, 1])
    write_tar(root / "train" / "1.tar", [2])
    write_tar(root / "test" / "0.tar", [3, 4])
    (root / "classnames.txt").write_text("ant\nbig cat\n")


def test_tar_archives_in_webdatasets_form(tmp_path):
    write_archives(tmp_path)
    splits = load_splits(tmp_path)
    check(splits, train=[0, 1, 2], test=[3, 4])
    assert splits["train"]["caption"][:] == ["number 0", "number 1", "number 2"]


@pytest.mark.parametrize("keep", [100, 1024, 3072, 5000])
def test_an_archive_that_is_cut_off_is_named(tmp_path, keep):
    write_archives(tmp_path)
    archive = tmp_path / "train" / "0.tar"
    archive.write_bytes(archive.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"0\.tar could not be read.*damaged or cut off; download or pack it again"):
        load_splits(tmp_path)


def test_an_archive_of_noise_is_named(tmp_path):
    write_archives(tmp_path)
    (tmp_path / "test" / "0.tar").write_bytes(b"noise" * 512 + bytes(512))
    with pytest.raises(ValueError, match=r"0\.tar could not be read \(.*\); a file may be damaged or cut off"):
        load_splits(tmp_path)


def test_a_damaged_parquet_file_is_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(ValueError, match=r"train\.parquet could not be read"):
        load_splits(tmp_path)


@pytest.mark.parametrize("line", ["null", "7", '["cat"]', "{", '{"image": "\\ud800"}', "[" * 100_000])
def test_a_line_that_is_no_json_object_is_named_before_arrow_sees_it(line, tmp_path):
    write_pictures(tmp_path)
    write_table(tmp_path / "train.jsonl", rows([0, 1, 2]))
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 4"):
        load_splits(tmp_path)


def test_strings_of_a_parquet_file_that_are_no_utf_8_are_refused_by_its_name(tmp_path):
    paths = pa.array([b"cat/\xe1.png"] * 4, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"image": paths, "label": ["cat", "dog"] * 2}), tmp_path / "all.parquet")
    with pytest.raises(ValueError, match=r"all\.parquet could not be read .*UTF"):
        load_splits(tmp_path / "all.parquet")


# As people write them -------------------------------------------------------------------------------------------------

MESSY = {
    "semicolons": "image;label\nimages/0.png;ant\nimages/1.png;big_cat\n",
    "tabs": "image\tlabel\nimages/0.png\tant\nimages/1.png\tbig_cat\n",
    "spaces": "image, label\nimages/0.png, ant\nimages/1.png, big_cat \n",
    "capitals": "Image,LABEL\nimages/0.png,ant\nimages/1.png,big_cat\n",
    "trailing commas": "image,label,\nimages/0.png,ant,\nimages/1.png,big_cat,\n",
    "blank lines": "\nimage,label\n\nimages/0.png,ant\nimages/1.png,big_cat\n,\n\n",
    "quotes": '"image","label"\n"images/0.png","ant"\n"images/1.png","big_cat"\n',
    "Windows paths": "image,label\nimages\\0.png,ant\nimages\\1.png,big_cat\n",
    "Windows lines": "image,label\r\nimages/0.png,ant\r\nimages/1.png,big_cat\r\n",
}


@pytest.mark.parametrize(("kind", "encoding"), [*((kind, "utf-8-sig") for kind in MESSY), ("semicolons", "utf-16")])
def test_tables_of_spreadsheets_are_read(tmp_path, kind, encoding):
    write_pictures(tmp_path)
    for split in ("train", "test"):
        (tmp_path / f"{split}.csv").write_bytes(MESSY[kind].encode(encoding))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the same pictures in both splits
        check(load_splits(tmp_path), train=[0, 1], test=[0, 1])


def test_a_table_in_a_code_page_is_read_with_a_remark(tmp_path):
    write_pictures(tmp_path)
    lines = "".join(f"images/{n}.png;{('Käfer', 'Grille')[n % 2]}\n" for n in range(8))
    (tmp_path / "all.csv").write_bytes(f"image;label\n{lines}".encode("cp1252"))
    with pytest.warns(DataWarning, match="is not UTF-8 and is read as Windows-1252"):
        assert class_names(load_splits(tmp_path / "all.csv")["train"]) == ["Grille", "Käfer"]


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl"])
@pytest.mark.parametrize("words", [("None", "null"), ("nan", "NA"), ("True", "false"), ("007", "7"), ("1.0", "1e5")])
def test_class_names_are_taken_as_they_are_written(tmp_path, words, suffix):
    write_pictures(tmp_path)
    records = [{"image": f"images/{n}.png", "label": words[n % 2]} for n in range(8)]
    write_table(tmp_path / f"all{suffix}", records)
    assert class_names(load_splits(tmp_path / f"all{suffix}")["train"]) == sorted(words)


@pytest.mark.parametrize(
    ("folder", "suffix"),
    [
        *((folder, ".csv") for folder in ("data[12]", "a*b", "what?", "{x,y}", "**")),
        ("data[12]", ".jsonl"), ("data[12]", ".parquet"), ("a*b", ".tar"), ("[!a]", ".tar"),
    ],
)  # fmt: skip
def test_a_path_is_no_pattern(tmp_path, folder, suffix):
    for name, first in {folder: 0, "data1": 4, "ab": 4, "whatx": 4, "x": 4}.items():
        write_pictures(tmp_path / name)
        table = tmp_path / name / f"all{suffix}"
        if suffix == ".tar":
            write_tar(table, range(first, first + 4))
            (tmp_path / name / "classnames.txt").write_text("ant\nbig cat\n")
        elif suffix == ".parquet":
            pictures = [{"bytes": png(n), "path": None} for n in range(first, first + 4)]
            labels = {"label": ["ant", "big_cat"] * 2}
            Dataset.from_dict({"image": pictures} | labels).cast_column("image", ImageFeature()).to_parquet(table)
        else:
            write_table(table, rows(range(first, first + 4)))
    with pytest.warns(DataWarning, match="too small"):
        splits = load_splits(tmp_path / folder / f"all{suffix}")
    assert sum(splits.num_rows.values()) == 4  # the four that were named
    for split in ("train", "test"):
        table = tmp_path / folder / f"all{suffix}"
        (tmp_path / folder / f"{split}{suffix}").write_bytes(table.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(load_splits(tmp_path / folder), train=[0, 1, 2, 3], test=[0, 1, 2, 3])


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".tar"])
def test_a_table_that_changed_under_its_time_stamp_is_read_anew(tmp_path, suffix):
    write_pictures(tmp_path)
    (tmp_path / "classnames.txt").write_text("ant\nbig cat\n")
    for numbers in ([0, 1], [2, 3]):
        for split, more in {"train": 0, "test": 4}.items():
            table = tmp_path / f"{split}{suffix}"
            if suffix == ".tar":
                write_tar(table, [n + more for n in numbers])
            else:
                write_table(table, rows([n + more for n in numbers]))
            os.utime(table, (1e9, 1e9))
        check(load_splits(tmp_path), train=numbers, test=[n + 4 for n in numbers])


@pytest.mark.parametrize("column", ["split", "Split", "partition"])
@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_column_of_splits_is_used(tmp_path, column, suffix):
    write_pictures(tmp_path)
    splits = ["train", "Training", "val", "valid", "test", "Testing"]
    records = [row | {column: split} for row, split in zip(rows(range(6)), splits, strict=True)]
    write_table(tmp_path / f"all{suffix}", records)
    loaded = load_splits(tmp_path / f"all{suffix}")
    check(loaded, train=[0, 1], test=[4, 5])
    assert len(loaded["validation"]) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("image,label,split\nimages/0.png,ant,A\n", "column 'split' holds 'A', which is not a split"),
        ("image,label,split\nimages/0.png,ant,test\n", "column 'split' has no row of the split 'train'"),
        ("image,label\n", "holds no rows below a line with the names"),
        ("", "holds no rows below a line with the names"),
        ("image,label\nimages/0.png,ant,fly\n", "line 2: it has 3 cells and the first line 2 names"),
        ("image,label\nimages/0.png\n", "line 2: it has 1 cells"),
        ("image,image\na,b\n", "two columns are called 'image'"),
        ("image,,label\nimages/0.png,x,ant\n", "column 2 has no name"),
        ("image,label\nC:\\me\\0.png,ant\n", "; write them from the table's own folder"),
        ("image,label\nimages/0.png,\nimages/1.png,ant\n", "`label`=None in row 0"),
        ("image,label\n\0\0", "is not a text file"),
    ],
)
def test_a_table_that_cannot_be_read_says_where_and_why(tmp_path, text, message):
    write_pictures(tmp_path)
    (tmp_path / "all.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_splits(tmp_path / "all.csv")


CELL = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), min_size=1, max_size=8)


@settings(max_examples=int(os.environ.get("HF_TGPT_TABLES", 30)), deadline=None)
@given(
    names=st.lists(CELL.filter(lambda name: name.strip() == name), min_size=2, max_size=4, unique=True),
    delimiter=st.sampled_from([",", ";", "\t", "|"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    header=st.sampled_from([("image", "label"), ("Filename", "Class"), ("PATH", "category")]),
    blank=st.sampled_from(["", "\n", "\r\n"]),
    folder=st.sampled_from(["plain", "a[1]", "b*", "c d"]),
)
def test_a_table_is_read_as_it_is_written(tmp_path_factory, names, delimiter, encoding, header, blank, folder):
    file = tmp_path_factory.mktemp("table") / folder / "all.csv"
    file.parent.mkdir()
    records = [(f"{number}.png", name) for number, name in enumerate(names)]
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows([header, *records])
    file.write_bytes((text.getvalue() + blank).encode(encoding))
    columns = read_delimited(file).to_dict()
    assert columns[header[0]] == [path for path, _ in records]
    written = columns[header[1]]
    assert [str(name) for name in written] == names
